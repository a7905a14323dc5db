"""generation_config.json: how a published encoder-decoder writes, in transformers' names, as a `Generation`.

Each field is honoured, or changes nothing, or is refused by name when text is asked for; encoding needs none of them.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax_encoder.config import ConfigError, DecoderConfig, GenerationConfig
from flax_encoder.data.sources.records import DataError
from flax_encoder.nn.generation import Generation
from flax_encoder.nn.logit_rules import LogitRules
from flax_encoder.published.folder import read_json

FILE = "generation_config.json"


class _Wrong(Exception):
    """A value is not of the kind that its argument names."""


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _count(value: Any) -> int:
    if not _is_id(value):
        raise _Wrong("a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise _Wrong("a number")
    return float(value)


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise _Wrong("true or false")
    return value


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(map(_is_id, value)):
        raise _Wrong("a list of token ids")
    return tuple(value)


def _id_or_ids(value: Any) -> tuple[int, ...]:
    return (value,) if _is_id(value) else _ids(value)


def _one_or_more(value: Any) -> int | tuple[int, ...]:
    return value if _is_id(value) else _ids(value)


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (list, tuple)):
        raise _Wrong("a list of lists of token ids")
    return tuple(map(_ids, value))


def _early(value: Any) -> bool | str:
    if type(value) is not bool and value != "never":
        raise _Wrong('true, false or "never"')
    return value


class _Meaning(NamedTuple):
    ours: str
    """A field of `Generation` or of `LogitRules`."""
    read: Callable[[Any], Any]


_FIELDS = {
    "max_new_tokens": _Meaning("max_new_tokens", _count),
    # Lengths count the token that starts the text.
    "max_length": _Meaning("max_new_tokens", lambda n: _count(n) - 1),
    "min_new_tokens": _Meaning("min_new_tokens", _count),
    "min_length": _Meaning("min_new_tokens", lambda n: max(_count(n) - 1, 0)),
    "decoder_start_token_id": _Meaning("start_id", _count),
    "eos_token_id": _Meaning("end_id", _one_or_more),
    "pad_token_id": _Meaning("pad_id", _count),
    "num_beams": _Meaning("num_beams", _count),
    "length_penalty": _Meaning("length_penalty", _number),
    "early_stopping": _Meaning("early_stopping", _early),
    "temperature": _Meaning("temperature", _number),
    "top_k": _Meaning("top_k", lambda n: _count(n) or None),
    "top_p": _Meaning("top_p", _number),
    "repetition_penalty": _Meaning("repetition_penalty", _number),
    "no_repeat_ngram_size": _Meaning("no_repeat_ngram_size", _count),
    "encoder_no_repeat_ngram_size": _Meaning("encoder_no_repeat_ngram_size", _count),
    "bad_words_ids": _Meaning("bad_words_ids", _words),
    "forced_bos_token_id": _Meaning("forced_bos_id", _count),
    "forced_eos_token_id": _Meaning("forced_eos_ids", _id_or_ids),
    "suppress_tokens": _Meaning("suppress_ids", _ids),
    "begin_suppress_tokens": _Meaning("begin_suppress_ids", _ids),
}
_OF_DRAWN = ("temperature", "top_k", "top_p")
_OF_BEAMS = ("length_penalty", "early_stopping")
DRAWN_TOP_K = 50  # what the file means where it says do_sample and no top_k
# Fields that are served at these values alone.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (), "constraints": (), "diversity_penalty": (0, 0.0), "dola_layers": (),
    "encoder_repetition_penalty": (1, 1.0), "epsilon_cutoff": (0, 0.0), "eta_cutoff": (0, 0.0),
    "exponential_decay_length_penalty": (), "force_words_ids": (), "guidance_scale": (1, 1.0), "max_time": (),
    "min_p": (0, 0.0), "num_beam_groups": (1,), "num_return_sequences": (1,), "penalty_alpha": (0, 0.0),
    "prompt_lookup_num_tokens": (), "renormalize_logits": (False,), "sequence_bias": (), "stop_strings": (),
    "token_healing": (False,), "top_h": (), "typical_p": (1, 1.0), "use_mtp": (False,), "watermarking_config": (),
}  # fmt: skip
_OWN = {*LogitRules._fields, *(field.name for field in dataclasses.fields(Generation))} - {"rules", "is_drawn"}
# Fields that change no text.
_NOTHING = frozenset(
    """
    _commit_hash _from_model_config _original_object_hash assistant_confidence_threshold assistant_ensemble_weight
    assistant_lookbehind bos_token_id cache_config cache_implementation compile_config continuous_batching_config
    disable_compile is_assistant low_memory max_cache_len max_matching_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule output_attentions output_hidden_states output_logits output_scores prefill_chunk_size
    remove_invalid_values return_dict_in_generate speculation_type target_lookbehind transformers_version use_cache
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Settings:
    """What a folder says of writing."""

    path: pathlib.Path
    """Where it says so, for messages."""
    given: Mapping[str, Any]
    """In transformers' names."""
    do_sample: bool
    meant: Mapping[str, Any]
    """The same by fields of `Generation` and `LogitRules`."""
    not_done: Mapping[str, Any]
    """Fields with values that are not served."""

    def generation(self, do_sample: bool | None = None, **told: Any) -> Generation:
        """A `Generation` of what the folder says, and of what is told, which wins: by its own names or transformers'.

        What the folder says of drawing is left where nothing is drawn, and so what it says of beams without them.

        Raises:
          DataError: the folder asks for what is not done here, and nothing else is told.
          ValueError: settings that contradict each other, or that are not known.
        """
        own = {name: value for name, value in self.not_done.items() if name not in told}
        if own:
            listed = ", ".join(f"{name} {value!r}" for name, value in own.items())
            raise DataError(
                f"{self.path} asks for what is not done: {listed}. Tell generate otherwise, such as "
                f"{next(iter(own))}=None, or remove it from the file."
            )
        wanted: dict[str, Any] = {}
        for name, value in told.items():
            if name in _FIELDS:
                wanted |= {} if value is None else {_FIELDS[name].ours: _read("generate", name, value, ValueError)}
            elif name in _OWN:
                wanted[name] = _hashable(value)
            elif name not in (*_NOT_DONE, *_NOTHING, *self.not_done):
                raise ValueError(f"generate has no setting {name!r}; it has {', '.join(sorted({*_OWN, *_FIELDS}))}.")
            elif name not in _NOTHING and value is not None and value not in _NOT_DONE.get(name, ()):
                raise ValueError(f"{name} is not done here: got {value!r}.")
        is_drawn = self.do_sample if do_sample is None else do_sample
        mine = dict(self.meant)
        if is_drawn and do_sample is None:
            mine.setdefault("top_k", DRAWN_TOP_K)
        if (wanted.get("num_beams") or mine.get("num_beams", 1)) == 1:
            mine = {name: value for name, value in mine.items() if name not in _OF_BEAMS}
        if not is_drawn:
            mine = {name: value for name, value in mine.items() if name not in _OF_DRAWN}
        both = mine | wanted | {"is_drawn": is_drawn}
        rules = {name: both.pop(name) for name in LogitRules._fields if name in both}
        return Generation(**both, rules=LogitRules(**rules))


def read_settings(folder: pathlib.Path, published: Mapping[str, Any]) -> Settings:
    """What a folder's generation_config.json says, or where it has none, as older ones, its config.json.

    Ids that generation_config.json does not give are config.json's.

    Raises:
      ConfigError: no JSON, or a value of another kind than its field has.
    """
    path = folder / FILE
    known = {*_FIELDS, *_NOT_DONE, "do_sample"}
    ids = {n: published[n] for n in ("decoder_start_token_id", "eos_token_id", "pad_token_id") if n in published}
    if path.exists():
        given = ids | read_json(path)
    else:
        path, given = folder / "config.json", {name: value for name, value in published.items() if name in known}
    given = {name: value for name, value in given.items() if value is not None}
    meant = {"start_id": given.get("pad_token_id", 0), "end_id": 1, "pad_id": 0}
    # The second of two names of one thing wins, as in transformers.
    order = sorted(given, key=lambda name: name in ("max_new_tokens", "min_new_tokens"))
    meant |= {_FIELDS[name].ours: _read(path, name, given[name], ConfigError) for name in order if name in _FIELDS}
    do_sample = _read(path, "do_sample", given.get("do_sample", False), ConfigError, _truth)
    not_done = {
        name: value
        for name, value in given.items()
        if name not in (*_FIELDS, *_NOTHING, "do_sample") and value not in _NOT_DONE.get(name, ())
    }
    return Settings(path, given, do_sample, meant, not_done)


def written_settings(generation: GenerationConfig, decoder: DecoderConfig, pad_id: int) -> dict[str, Any]:
    """generation_config.json of a run: what it says of writing, in transformers' names. `read_settings` reads it."""
    ids = {"decoder_start_token_id": decoder.start_id, "eos_token_id": decoder.end_id, "pad_token_id": pad_id}
    said = {name: value for name, value in vars(generation).items() if name not in ("sample", "seed")}
    said |= {"do_sample": generation.sample}
    return {name: value for name, value in (ids | said).items() if value is not None}


def _read(path: Any, name: str, value: Any, error: type[Exception], read: Callable[[Any], Any] | None = None) -> Any:
    try:
        return (read or _FIELDS[name].read)(value)
    except _Wrong as wrong:
        raise error(f"{path}: {name} must be {wrong}: got {value!r}.") from None


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
