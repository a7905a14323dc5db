"""T5's and UL2's pretraining: an encoder reads texts with holes, and a decoder writes what was in them.

(Raffel et al., arXiv 1910.10683, section 3.1.4; Tay et al., arXiv 2205.05131.) The model is
text_to_text's, so one run starts from the other.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Array

from flax_encoder.config import RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.documents import Layout
from flax_encoder.data.rows.targets import TargetInputs, Targets, span_corruption_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.tasks.masked_lm import MaskedLM
from flax_encoder.tasks.samples import written_sentences
from flax_encoder.tasks.task import Task
from flax_encoder.tasks.text_to_text import TextToText, check_model, make_model, settle_ids, with_ids

_COUNTED_BATCHES = 200  # of training, by which the baselines guess
_ROOM = 1.3  # times what spans need on average: hardly a row has so many short texts that it needs more


class SpanCorruption(TextToText):
    """An encoder-decoder that writes what was in the holes of a text."""

    def outputs(self, batch: dict[str, Array]) -> dict[str, Array]:
        """What is written for each row, which holds one text: ids `text` [B, 1, S], as many as its target has room
        for."""
        most = batch["decoder_tokens"].shape[1]
        return {"text": self.write(batch, dataclasses.replace(self.generation, max_new_tokens=most))}


def _slots(inputs: TargetInputs) -> int:
    """Tokens of the decoder's rows, a multiple of 8: what documents need on average, with some room, and what the
    denoiser needs that cuts most, since a row may hold one document."""
    data = inputs.config.data
    if data.target_length is not None:
        return data.target_length
    specials = sum(inputs.documents.frame.specials)
    n = np.minimum(inputs.documents.split.lengths, inputs.row_length - specials).astype(np.int64)
    mixture = inputs.config.spans.mixture
    needs, of_all = [], (n + specials).sum()
    for own in mixture:
        cut = np.clip(np.rint(n * own.rate), 1, np.maximum(n - 1, 1))
        spans = 1 if own.mean_tokens is None else np.maximum(1, np.rint(cut / own.mean_tokens))
        needs.append((cut + spans + 1).sum() / of_all)
    mean = np.average(needs, weights=[own.share for own in mixture])
    return int(-(-(max(_ROOM * mean, max(needs)) * inputs.row_length + 8) // 8)) * 8


def _targets(inputs: TargetInputs) -> Targets:
    mixture, decoder = inputs.config.spans.mixture, with_ids(inputs.config.decoder, inputs.tokenizer)
    return span_corruption_targets(
        inputs.tokenizer, mixture, inputs.row_length, _slots(inputs), inputs.config.seed, start=decoder.start_id,
        end=decoder.end_id,
    )  # fmt: skip


def _layout(config: RunConfig) -> Layout:
    return Layout(long="split")


def _modes(config: RunConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(own.mode for own in config.spans.mixture if own.mode))


def _check(config: RunConfig) -> None:
    check_model(config)
    require(
        config.data.packing != "concatenate",
        "spans are cut of documents that begin and end in their rows: data.packing must be best-fit or one-per-row, "
        "got concatenate.",
    )


def _baselines(run: Any, data: Any) -> dict[str, dict[str, float]]:
    """What the token before tells of the next one, without the text that the encoder reads."""
    from flax_encoder.data.baselines import PreviousCounts

    some = [data.train[number] for number in range(min(len(data.train), _COUNTED_BATCHES))]
    counts = PreviousCounts.of_batches(some, data.tokenizer.vocab_size, given="decoder_tokens")
    scores = counts.score(data.evaluation, given="decoder_tokens")
    return {"most frequent token": scores["most_frequent"], "guess from the token before": scores["previous"]}


_READING = Reading(Columns(writes=True), _targets, _layout, special_tokens=_modes)

TASK = Task(
    reading=_READING,
    make_model=functools.partial(make_model, kind=SpanCorruption),
    report=MaskedLM.report,
    reads=("decoder.", "spans.", "labels.smoothing", "data.target_length"),
    check=_check,
    settle=settle_ids,
    baselines=_baselines,
    samples=functools.partial(written_sentences, _READING),
    head="text_to_text",
)
