"""The settings of a run: those of its data, objective, model, optimizer and mesh, and its own."""

from dataclasses import dataclass, field, replace
from typing import Literal

from flax_encoder.config.contrastive import ContrastiveConfig
from flax_encoder.config.data import DataConfig
from flax_encoder.config.distillation import DistillationConfig
from flax_encoder.config.mesh import MeshConfig, check_context
from flax_encoder.config.model import DecoderConfig, EncoderConfig, GenerationConfig, HeadConfig
from flax_encoder.config.objectives import (
    AutoencoderConfig,
    GeneratorConfig,
    LabelsConfig,
    MaskingConfig,
    SentencesConfig,
    SpansConfig,
)
from flax_encoder.config.optimizer import LoraConfig, OptimizerConfig
from flax_encoder.config.phases import (
    Phase,
    Ramp,
    Stage,
    Timeline,
    check_objective,
    check_phases,
    check_steps,
    make_timeline,
    phases_of_ramps,
)
from flax_encoder.config.rules import (
    ShortRepr,
    nearest_divisors,
    require,
    require_finite,
    require_positive,
    require_rates,
)


@dataclass(frozen=True, repr=False)
class RunConfig(ShortRepr):
    """The settings of a run."""

    run_dir: str = "runs/run"
    """The folder of config.json, tokenizer.json, metrics.jsonl, checkpoints/ and TensorBoard events; if it holds a run,
    that run is resumed. A recipe without a run_dir has runs/NAME, by its own name."""
    init_from: str | None = None
    """A run, a checkpoint or a published folder whose encoder and tokenizer to start from. Parts that differ, such as
    the head, are newly initialized."""
    objective: str = "masked_lm"
    """The name of the task to learn."""
    steps: int = 1000
    """Updates of the run; epochs, if set, decides them."""
    extend: bool = False
    """Make a run longer, with more steps than it was begun with, by a new schedule from the current step on, warm-up
    first. Not needed while the learning rate is still at its peak (wsd before its decay)."""
    schedule_began: int = 0
    """The step at which the schedule began; extend sets it."""
    epochs: float | None = None
    """How often to read the training text. Steps follow from it once the text is packed into rows."""
    budget_minutes: float | None = None
    """End after so many minutes of training, compiling and evaluations not counted, if the steps take longer. The
    learning rate then follows the share of steps or of time, whichever is larger; all other settings follow steps."""
    batch_size: int = 32
    """Rows in a batch, over all devices; batch_texts, if set, decides it."""
    batch_texts: int | None = None
    """Documents in a batch, on average. batch_size follows from it once the text is packed into rows."""
    first_batch_size: int | None = None
    """Rows in the first batch; batches then double until they have batch_size rows. Each size is compiled once."""
    batch_warmup_rate: float = 0.1
    """With first_batch_size: the share of steps that have smaller batches."""
    phases: tuple[Phase, ...] = ()
    """Parts of the run with other settings, one after the other, such as longer rows or fewer masks (see `Phase`). A
    recipe lists them; their settings are then options, such as --phases.0.share 0.9."""
    num_microbatches: int = 1
    """Equal parts of a batch over which gradients are accumulated; the update is the same. CPUs are fastest with 2,000
    to 4,000 tokens in each part (LOG.md)."""
    max_skipped: int = 0
    """How many updates in all the run may skip because their loss or gradient is not finite or has exploded. A skipped
    update leaves the state as it was. One more stops the run; with 0 the first one does."""
    max_norm_factor: float | None = None
    """With max_skipped: a gradient has exploded if its norm is above this factor times the median norm of the last 64
    steps."""
    skip_rows: tuple[int, ...] = ()
    """Steps whose rows make no update."""
    seed: int = 0
    seeds: int = 1
    """Train this many runs, with the seeds from seed on, in RUN_DIR/seed-0, RUN_DIR/seed-1, ..., and report the median
    and the spread. The same command again continues where it stopped."""
    pooling: Literal["cls", "mean", "late"] = "cls"
    """What classification reads: the document's first token (cls), the mean of its tokens (mean), or each token, whose
    logits are averaged (late)."""
    compare_with_scratch: bool = False
    """After a run with init_from, train the same model without it, and report both."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int | Literal["epoch"] | None = None
    """Steps between evaluations on held-out text; epoch evaluates after each epoch; None evaluates only at the end."""
    keep_best: str | None = None
    """A metric of the evaluations, such as eval/f1. The checkpoint where it was best is kept beside the newest; the run
    reports, tests, loads and exports this one. A loss or an error is best when lowest, other metrics when highest."""
    patience: int | None = None
    """With keep_best: end the run after so many evaluations in a row without a better one."""
    eval_batches: int | None = None
    """Batches of each evaluation; None reads all held-out text."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a run also saves one at its end and when a signal stops it."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep, beside the best by keep_best."""
    keep_every: int | None = None
    """Also keep for good the checkpoints whose step is a multiple of this."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Services that also get the lines of metrics.jsonl; wandb needs pip install 'flax-encoder[wandb]'."""
    stall_seconds: float | None = None
    """If the run makes no step for this long, evaluations and compiling included, print the stack of every thread and
    end with status 86; None waits for ever."""
    profile: str | None = None
    """Write a trace of the steps FIRST:LAST, such as 100:105, to RUN_DIR/profile."""
    model: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    spans: SpansConfig = field(default_factory=SpansConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    sentences: SentencesConfig = field(default_factory=SentencesConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        require_positive(
            self, "steps", "batch_size", "num_microbatches", "log_every", "checkpoint_every", "keep_checkpoints",
            "seeds",
        )  # fmt: skip
        require(
            0 <= self.schedule_began < self.steps,
            f"schedule_began is a step of the run, set by extend: got {self.schedule_began} of {self.steps} steps.",
        )
        every, saved = self.keep_every, self.checkpoint_every
        require(
            every is None or (every > 0 and every % saved == 0),
            f"keep_every is a multiple of checkpoint_every, or its steps would have no checkpoints: got {every} for "
            f"{saved}; {max(1, (every or 0) // saved) * saved} does.",
        )
        require(
            0 <= self.seed < 2**32,
            f"seed is a whole number from 0 to 4294967295 (2**32 - 1), of which JAX keeps every bit: got {self.seed}.",
        )
        first, _, last = (self.profile or "1:1").partition(":")
        require(
            first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last),
            f"profile is the first and the last step of a trace, such as 100:105: got {self.profile!r}.",
        )
        require(
            self.stall_seconds is None or self.stall_seconds > 0,
            f"stall_seconds must be above 0 or None: got {self.stall_seconds}.",
        )
        require(self.max_skipped >= 0, f"max_skipped counts updates: got {self.max_skipped}.")
        require(
            self.max_norm_factor is None or (self.max_norm_factor > 1 and self.max_skipped > 0),
            f"max_norm_factor is above 1, and of runs that may skip updates: got {self.max_norm_factor} with "
            f"max_skipped {self.max_skipped}.",
        )
        require(
            min(self.skip_rows, default=1) >= 1, f"skip_rows are steps, counted from 1: got {self.skip_rows}."
        )
        for name in (
            "eval_every", "eval_batches", "budget_minutes", "first_batch_size", "epochs", "batch_texts", "patience"
        ):  # fmt: skip
            value = getattr(self, name)
            require(value in (None, "epoch") or value > 0, f"{name} must be above 0 or None: got {value}.")
        require(
            self.mesh.num_processes == 1 or not (self.compare_with_scratch or self.seeds > 1),
            f"compare_with_scratch and seeds train more runs, in one process: got mesh.num_processes "
            f"{self.mesh.num_processes}. Train each run by a command of its own.",
        )
        require(
            self.seeds == 1 or not self.compare_with_scratch,
            f"compare_with_scratch needs seeds 1: got seeds {self.seeds}. Leave it out by --no-compare-with-scratch.",
        )
        shapes = {name for phase in self.phases for name in phase.changes} & {"row_length", "batch_size"}
        require(
            (self.epochs is None and self.batch_texts is None)
            or (self.first_batch_size is None and self.data.last_row_length is None and not shapes),
            "epochs and batch_texts count rows of one length in batches of one size: give steps and batch_size with "
            "first_batch_size, data.last_row_length or phases of another shape.",
        )
        require(
            self.keep_best is None or self.keep_best.startswith("eval/"),
            f"keep_best names a metric of the evaluations, such as eval/loss: got {self.keep_best!r}.",
        )
        require(
            self.keep_best is None or self.eval_every is not None,
            "keep_best chooses among evaluations: give eval_every, such as --eval-every epoch.",
        )
        require(
            self.patience is None or self.keep_best is not None,
            f"patience counts evaluations without a better keep_best: got {self.patience} without one. Give it too, "
            f"such as --keep-best eval/loss.",
        )
        require(
            self.batch_size % self.num_microbatches == 0,
            f"num_microbatches must divide batch_size: got {self.num_microbatches} for {self.batch_size}; "
            f"{nearest_divisors(self.batch_size, self.num_microbatches)} do.",
        )
        first = self.first_batch_size or self.batch_size
        require(
            first <= self.batch_size and first % self.num_microbatches == 0,
            f"first_batch_size is at most batch_size, and num_microbatches divides it: got {first} for a batch_size of "
            f"{self.batch_size} and {self.num_microbatches} microbatches.",
        )
        require_rates(self, "batch_warmup_rate")
        last_rate = self.data.last_rate if self.data.last_row_length else 0.0
        require(
            first == self.batch_size or self.batch_warmup_rate + last_rate <= 1.0,
            "batches have grown before rows change length: batch_warmup_rate + data.last_rate is at most 1, got "
            f"{self.batch_warmup_rate} + {last_rate}.",
        )
        require(
            self.data.word_vectors is None or self.init_from is None,
            "the token embedding starts from data.word_vectors or from init_from: got both.",
        )
        require(
            self.distillation.initial_layers is None or (self.init_from, self.data.word_vectors) == (None, None),
            f"a model starts from one place: got distillation.initial_layers {self.distillation.initial_layers} with "
            f"init_from {self.init_from} and data.word_vectors {self.data.word_vectors}. Leave one out.",
        )
        tokens = self.batch_size * self.data.row_length
        require(
            tokens % (self.data.final_row_length * self.num_microbatches) == 0,
            f"a batch keeps its tokens when rows change length, in num_microbatches equal parts: {self.batch_size} "
            f"rows of {self.data.row_length} are {tokens} tokens, not a multiple of {self.num_microbatches} times "
            f"data.last_row_length {self.data.final_row_length}.",
        )
        if self.phases:
            self._check_phases()
        if self.init_from is None:  # or else the model is another's, and checked once that is known
            self.check_model_serves()
        require_finite(self)

    def _check_phases(self) -> None:
        names = {name for phase in self.phases for name in phase.changes}
        old = {"first_batch_size": self.first_batch_size, "data.last_row_length": self.data.last_row_length}
        if "masking_rate" in names:
            old["masking.last_rate"] = self.masking.last_rate
        check_phases(self.phases, len(self.data.sources), old, self.budget_minutes)
        in_shares = self.phases[0].share is not None
        require(
            self.epochs is None or in_shares,
            f"the steps follow from epochs, so phases are shares of them: got epochs {self.epochs} and phases in "
            f"steps, tokens or minutes. Give every phase a share, or leave epochs out.",
        )
        check_objective(self.timeline, self.objective)
        if not in_shares and self.phases[0].minutes is None:
            check_steps(self.timeline, self.steps)
        for stage in self.timeline.stages:
            at = f"phases.{stage.phase}"
            require(
                stage.batch_size % stage.num_microbatches == 0,
                f"num_microbatches must divide every batch: got {stage.num_microbatches} for {stage.batch_size} rows "
                f"in {at}. Give it {at}.num-microbatches, such as {nearest_divisors(stage.batch_size, 1)}.",
            )
            longest = max(self.data.buckets, default=0)
            require(
                longest < stage.row_length or not self.data.buckets,
                f"buckets are shorter than every row: got {longest} and rows of {stage.row_length} in {at}.",
            )
        require(
            "learning_rate" not in names or self.budget_minutes is None,
            f"phases' learning rates go by steps, and a run with budget_minutes ends by its clock: got budget_minutes "
            f"{self.budget_minutes}. Leave it out, or let optimizer.schedule say the learning rate.",
        )
        require(
            "learning_rate" not in names or self.optimizer.learning_rate > 0,
            f"phases' learning rates are shares of optimizer.learning_rate, which must be above 0: got "
            f"{self.optimizer.learning_rate}.",
        )

    def check_model_serves(self) -> None:
        """Raise ConfigError for rows that the model cannot read, or phases that change what it has not."""
        longest = max(self.row_lengths)
        require(
            self.model.position != "learned" or longest <= self.model.max_length,
            f"learned positions reach max_length: got data.row_length {longest} for model.max_length "
            f"{self.model.max_length}. Give rows of at most {self.model.max_length}"
            + (", or start from a model without a table of positions, such as ModernBERT." if self.init_from else "."),
        )
        require(
            self.model.product_dtype is None or self.mesh.tensor == 1,
            f"a scale of float8 is of a whole tensor, which mesh.tensor splits: got {self.mesh.tensor} with "
            f"model.product_dtype {self.model.product_dtype}. Give --mesh.tensor 1, and split by --mesh.fsdp.",
        )
        if self.mesh.context > 1:
            lengths = *self.row_lengths, *self.data.buckets
            check_context(self.mesh.context, self.model, lengths, self.data.target_length)
        turned = [phase.rope_theta for phase in self.phases if phase.rope_theta is not None]
        require(
            not turned or self.model.position == "rope",
            f"rope_theta needs rotary positions: got phases with {', '.join(map(str, turned))}, and model.position "
            f"{self.model.position}.",
        )

    @property
    def trained_by(self) -> OptimizerConfig:
        """The optimizer's settings; beside adapters the encoder is frozen."""
        if not self.lora.rank:
            return self.optimizer
        return replace(self.optimizer, freeze=("encoder", *self.optimizer.freeze))

    @property
    def timeline(self) -> Timeline:
        """What `phases`, or else the settings that change by themselves, come to."""
        data = self.data
        phases = self.phases or phases_of_ramps(
            self.steps, self.batch_size, self.first_batch_size, self.batch_warmup_rate, data.last_row_length,
            data.last_rate,
        )
        own = Stage(
            self.steps, self.batch_size, data.row_length, num_microbatches=self.num_microbatches,
            masking_rate=Ramp(0, self.steps, *self.masking.rates), rope_theta=self.model.rope_theta,
            weights=data.weights, objective=self.objective,
        )  # fmt: skip
        return make_timeline(phases, self.steps, own)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The run's parts, within which all batches have one shape."""
        return tuple(stage for stage in self.timeline.stages if stage.start_step < stage.end_step)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """T of each stage in turn; the last one's is that of evaluations too."""
        return tuple(stage.row_length for stage in self.timeline.stages)

    def after(self, step: int) -> "RunConfig":
        """These settings, with those of the model as they are after so many updates, where phases change them."""
        theta = self.timeline.stage_of(step - 1).rope_theta
        return self if theta == self.model.rope_theta else replace(self, model=replace(self.model, rope_theta=theta))
