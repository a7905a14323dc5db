"""The teacher of a run: opened beside it at every start, held against it, and laid on its mesh."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flax_encoder.config import FREE_OF_PARAMETERS, ConfigError, EncoderConfig, RunConfig, differences
from flax_encoder.config.rules import require
from flax_encoder.data.pipeline import RunData, settle_tokenizer
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import Say
from flax_encoder.data.tokens.tokenizer import TextTokenizer
from flax_encoder.nn.partition import abstract_model, flatten, unflatten
from flax_encoder.runs.load import load
from flax_encoder.runs.loaded import LoadedRun
from flax_encoder.tasks import find_task, is_setting_read
from flax_encoder.tasks.distillation import check_pair, check_settings, spread_layers
from flax_encoder.training.parameters import layer_numbers
from flax_encoder.training.sharding import logical_axes, sharding_tree
from flax_encoder.training.step import Teacher


@dataclass(frozen=True)
class OpenTeacher:
    """A run's teacher."""

    run: LoadedRun
    folder: str
    hash: str
    """SHA-256 of its parameters: their names, shapes and numbers."""

    def settle(
        self, config: RunConfig, tokenizer: TextTokenizer | None, labels: list[str] | None, say: Say,
        before: str | None = None,
    ) -> tuple[RunConfig, TextTokenizer, list[str] | None]:
        """(config, tokenizer, labels) of a run that learns from this teacher: the rows of its vocabulary, the hash of
        its parameters and, of a student that starts from its layers, its settings of the model.

        Args:
          tokenizer, labels: of what the run goes on from, as far as that has any.
          before: of a run that is resumed, the hash that it has kept of its teacher.

        Raises:
          ConfigError: a teacher of another vocabulary, of other classes, of other parameters than the run began with,
            or one that cannot be compared with the student.
        """
        if other := {before, config.distillation.teacher_hash} - {None, self.hash}:
            raise ConfigError(
                f"a run goes on with the teacher that it began with: the parameters of {self.folder} have the hash "
                f"{self.hash[:12]}, those that it began with {other.pop()[:12]}. Bring that teacher back "
                f"(--distillation.teacher FOLDER), or give another --run-dir."
            )
        config = dataclasses.replace(
            config, distillation=dataclasses.replace(config.distillation, teacher_hash=self.hash)
        )
        tokenizer = self._tokenizer(config, tokenizer, say)
        if config.distillation.initial_layers is not None:
            settled = self._as_start(config)
            for name, (was, now) in differences(config, settled).items():
                say(f"{name} is {now}, from {self.folder} (the config has {was})")
            config = settled
        rows = self.run.config.model.vocab_size
        if config.model.vocab_size not in (0, rows):
            raise ConfigError(
                f"predictions are compared token by token, so the student's table has as many rows as its teacher's: "
                f"got model.vocab_size {config.model.vocab_size} for {rows}. Give --model.vocab-size 0, which takes "
                f"the teacher's."
            )
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=rows))
        check_settings(config)
        check_pair(config, self.run.config.model)
        if config.distillation.soft_weight and self.run.label_names is not None:
            labels = self.run.label_names if labels is None else labels
            if labels != self.run.label_names:
                raise ConfigError(
                    f"predictions are compared class by class: the teacher {self.folder} has the classes "
                    f"{', '.join(self.run.label_names)}, the run {', '.join(labels)}. Give a teacher of these classes, "
                    f"or --distillation.soft-weight 0 with another term."
                )
        return config, tokenizer, labels

    def check_data(self, config: RunConfig, data: RunData) -> None:
        """Raise ConfigError where the rows of two texts lack the types by which the teacher tells them."""
        has_types = any(documents.has_types for documents in data.train.stages[-1].documents)
        types = (config.model.num_token_types, self.run.config.model.num_token_types)
        if has_types and types[0] < 2 <= types[1]:
            raise ConfigError(
                f"the teacher tells two texts by their types, which rows have if the student has any: got "
                f"model.num_token_types {types[0]} for {types[1]}. Give --model.num-token-types {types[1]}."
            )

    def _tokenizer(self, config: RunConfig, tokenizer: TextTokenizer | None, say: Say) -> TextTokenizer:
        """The run's: that which it goes on with or is given, if its ids mean the same to the teacher, or the
        teacher's."""
        theirs = self.run.tokenizer
        if tokenizer is None and config.data.tokenizer is not None:
            tokenizer = settle_tokenizer(config.data, Columns(), [], [], say)
        if tokenizer is None or tokenizer.hash == theirs.hash:
            return theirs if tokenizer is None else tokenizer
        sizes = (tokenizer.vocab_size, theirs.vocab_size)
        other = next((i for i in range(min(sizes)) if tokenizer.token(i) != theirs.token(i)), min(sizes))
        if other < max(sizes):
            of_run, of_teacher = (
                repr(t.token(other)) if other < t.vocab_size else "none" for t in (tokenizer, theirs)
            )
            way_out = "leave --data.tokenizer out, and the run takes the teacher's"
            if config.init_from is not None:
                way_out = "--init-from must be of the teacher's vocabulary too"
            raise ConfigError(
                f"a teacher reads the tokens of the run, so both have one vocabulary: the run has {sizes[0]} tokens, "
                f"{self.folder} has {sizes[1]}, and token {other} is {of_run} to the run and {of_teacher} to the "
                f"teacher. Give another --distillation.teacher; or {way_out}."
            )
        return tokenizer

    def _as_start(self, config: RunConfig) -> RunConfig:
        """The config with the teacher's settings of the model, but for its number of layers and what initial_width
        leaves, and of its head.

        Raises:
          ConfigError: a width at which heads could not be kept whole.
        """
        theirs, own = self.run.config, config.model
        kept = (*FREE_OF_PARAMETERS, "num_layers")
        shape = {name: value for name, value in vars(theirs.model).items() if name not in kept}
        shape |= cut_width(theirs.model, config.distillation.initial_width)
        head, pooling = (theirs.head, theirs.pooling) if self._has_head(config) else (config.head, config.pooling)
        if not is_setting_read(config.objective, "pooling"):
            pooling = config.pooling
        return dataclasses.replace(config, model=dataclasses.replace(own, **shape), head=head, pooling=pooling)

    def _has_head(self, config: RunConfig) -> bool:
        return not self.run.fresh and self.run.config.objective == config.objective

    def initial_params(self, config: RunConfig, params: Any, say: Say) -> Any:
        """`params` of a student with the teacher's in their place: layers by `distillation.initial_layers`, and what
        stands before and after them as it is; what is new is named.

        Raises:
          ConfigError: a first layer that differs from the rest would start from another.
        """
        wanted = config.distillation.initial_layers
        count = config.model.num_layers
        layers = spread_layers(count, self.run.config.model.num_layers) if wanted == "spread" else wanted
        say(f"started from layers {', '.join(map(str, layers))} of {self.folder}")
        if config.model.first_differs and layers[0] != 0:
            raise ConfigError(
                f"the first layer of this model differs from the rest, so it starts from the teacher's first: "
                f"distillation.initial_layers must begin with 0, got {layers}."
            )
        theirs = flatten(self.run.params)
        numbers, theirs_numbers = layer_numbers(params), layer_numbers(self.run.params)
        kept = _kept(theirs, self.run.config.model, config.model)
        runs = [_runs(n, p) for n, p in ((numbers, count), (theirs_numbers, self.run.config.model.num_layers))]
        fresh = []

        def pick(path: tuple[Any, ...], own: jax.Array) -> jax.Array:
            name = ".".join(key.key for key in path)
            found = theirs.get(name) if path[0].key == "encoder" or self._has_head(config) else None
            if found is not None and path in numbers:
                first = numbers[path][0].start  # of a stack, whose entries may each run for several layers
                which = [layers[(first + i) * runs[0]] // runs[1] for i in range(own.shape[0])]
                start = theirs_numbers[path][0].start
                found = np.asarray(found)[[i - start for i in which]]
            if found is not None and found.ndim == own.ndim:
                found = np.asarray(found)[np.ix_(*map(kept, found.shape, own.shape))]
            if found is None or found.shape != own.shape:
                fresh.append(name)
                return own
            return jax.make_array_from_callback(own.shape, own.sharding, np.asarray(found).__getitem__)

        picked = jax.tree_util.tree_map_with_path(pick, params)
        if fresh:
            say(f"new parameters: {', '.join(fresh)}")
        return picked

    def on_mesh(self, config: RunConfig, mesh: Mesh, *, is_abstract: bool = False) -> Teacher:
        """The model as the step runs it: in the student's dtype, its parameters split as the mesh splits a run's.

        Args:
          is_abstract: as shapes alone.
        """
        run = self.run
        free = {name: getattr(config.model, name) for name in FREE_OF_PARAMETERS}
        model = dataclasses.replace(run.config.model, **free)
        own = dataclasses.replace(run.config, model=model)
        task = find_task(own.objective)

        def make_model() -> nnx.Module:
            return task.make_model(own, run.label_names)(nnx.Rngs(0))

        graphdef, abstract = abstract_model(make_model)
        abstract = nnx.to_pure_dict(abstract)
        places = sharding_tree(mesh, logical_axes(make_model), abstract)
        if is_abstract:
            return Teacher(graphdef, jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places
            ))  # fmt: skip

        def put(x: Any, place: Any) -> jax.Array:
            return jax.make_array_from_callback(x.shape, place, np.asarray(x).__getitem__)

        return Teacher(graphdef, jax.tree.map(put, unflatten(flatten(run.params)), places))


def cut_width(teacher: EncoderConfig, width: int | None) -> dict[str, int | None]:
    """The settings of a student that has `width` features of its teacher's, heads as wide as its teacher's and as wide
    a feed-forward block in proportion; nothing where the width is None.

    Raises:
      ConfigError: heads do not come out whole, or the width is not below the teacher's.
    """
    if width is None:
        return {}
    D, heads = teacher.embed_dim, (teacher.num_heads, teacher.num_kv_heads or teacher.num_heads)
    unit = D // math.gcd(D, *heads)
    require(
        teacher.layer == "attention" and width < D and width % unit == 0,
        f"distillation.initial_width keeps whole heads of layers with attention: got {width} of a teacher with "
        f"layers of {teacher.layer}, {D} features and {heads[0]} heads ({heads[1]} of keys and values). "
        + (f"Multiples of {unit} below {D} do." if unit < D else "Leave it out."),
    )
    kv_heads = teacher.num_kv_heads and teacher.num_kv_heads * width // D
    return {
        "embed_dim": width, "num_heads": heads[0] * width // D, "num_kv_heads": kv_heads,
        "mlp_dim": max(1, round(teacher.mlp_dim * width / D)),
    }  # fmt: skip


def _kept(params: dict[str, Any], teacher: EncoderConfig, student: EncoderConfig) -> Callable[[int, int], np.ndarray]:
    """Which of a teacher's numbers along an axis a student has, by (their size, its size): of features those with the
    longest columns of what makes them of tokens, in their order; of heads and units the first; of all else all."""
    cut = {(getattr(teacher, name), getattr(student, name)) for name in ("num_heads", "num_kv_heads", "mlp_dim")}
    chosen = {(theirs, own): np.arange(own) for theirs, own in cut if own}
    if student.embed_dim < teacher.embed_dim:
        made_by = params.get("encoder.embedding.projection.kernel", params["encoder.embedding.token"])
        longest = np.argsort(-np.square(np.asarray(made_by, np.float64)).sum(0), kind="stable")[: student.embed_dim]
        chosen[teacher.embed_dim, student.embed_dim] = np.sort(longest)
    return lambda theirs, own: chosen.get((theirs, own), np.arange(theirs))


def _runs(numbers: Any, num_layers: int) -> int:
    """How many layers run with each set of parameters of the encoder's stacks."""
    return num_layers // next((total for path, (_, total) in numbers.items() if path[0].key == "encoder"), num_layers)


def open_teacher(config: RunConfig) -> OpenTeacher | None:
    """The teacher that a run's settings name; None if they name none.

    Raises:
      ConfigError: it has not the head whose predictions are to be learned.
      CheckpointError, WeightsError, DataError: whatever `load` raises of a folder that it cannot open.
    """
    settings, objective = config.distillation, config.objective
    if settings.teacher is None or not is_setting_read(objective, "distillation.teacher"):
        return None
    needs_head = settings.soft_weight > 0
    run = load(settings.teacher)
    if not needs_head and run.task.parts:
        run = run.part()
    has = "no head of its own" if run.fresh else f"the head of {run.config.objective}"
    if needs_head and (run.fresh or run.config.objective != objective):
        raise ConfigError(
            f"a teacher predicts what the run predicts, {objective}: {settings.teacher} has {has}. Give another "
            f"--distillation.teacher; or --distillation.soft-weight 0 --distillation.relation-weight 1, which learn "
            f"from its layers alone."
        )
    return OpenTeacher(run, str(settings.teacher), params_hash(run.params))


def params_hash(params: Any) -> str:
    """SHA-256 of parameters, by their names, shapes and float32 numbers; the same however they are stored."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten(params).items()):
        array = np.ascontiguousarray(np.asarray(value, np.float32))
        digest.update(f"{name} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


