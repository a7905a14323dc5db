"""T5's pretraining: an encoder reads texts with holes, and a decoder writes what was in them.

(Raffel et al., arXiv 1910.10683, section 3.1.4.) The model is text_to_text's, so one run starts from the other.
"""

import numpy as np

from flax_encoder.config import RunConfig
from flax_encoder.config.rules import require
from flax_encoder.data.reading import Reading
from flax_encoder.data.rows.documents import Layout
from flax_encoder.data.rows.targets import TargetInputs, Targets, span_corruption_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.tasks.masked_lm import MaskedLM
from flax_encoder.tasks.task import Task
from flax_encoder.tasks.text_to_text import check_model, make_model, settle_ids, with_ids

_ROOM = 1.3  # times what spans need on average: hardly a row has so many short texts that it needs more


def _slots(inputs: TargetInputs) -> int:
    """Tokens of the decoder's rows, a multiple of 8."""
    data, spans = inputs.config.data, inputs.config.spans
    if data.target_length is not None:
        return data.target_length
    specials = sum(inputs.documents.frame.specials)
    n = np.minimum(inputs.documents.split.lengths, inputs.row_length - specials).astype(np.int64)
    cut = np.clip(np.rint(n * spans.rate), 1, np.maximum(n - 1, 1))
    needs = cut + np.maximum(1, np.rint(cut / spans.mean_tokens)) + 1
    share = needs.sum() / (n + specials).sum()
    return int(-(-(_ROOM * share * inputs.row_length + 8) // 8)) * 8


def _targets(inputs: TargetInputs) -> Targets:
    spans, decoder = inputs.config.spans, with_ids(inputs.config.decoder, inputs.tokenizer)
    return span_corruption_targets(
        inputs.tokenizer, spans.rate, spans.mean_tokens, inputs.row_length, _slots(inputs), inputs.config.seed,
        start=decoder.start_id, end=decoder.end_id,
    )  # fmt: skip


def _layout(config: RunConfig) -> Layout:
    return Layout(long="split")


def _check(config: RunConfig) -> None:
    check_model(config)
    require(
        config.data.packing != "concatenate",
        "spans are cut of documents that begin and end in their rows: data.packing must be best-fit or one-per-row, "
        "got concatenate.",
    )


TASK = Task(
    reading=Reading(Columns(writes=True), _targets, _layout),
    make_model=make_model,
    report=MaskedLM.report,
    reads=("decoder.", "spans.", "labels.smoothing", "data.target_length"),
    check=_check,
    settle=settle_ids,
    head="text_to_text",
)
