"""How rows count places and which end of a document they keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.data.rows.documents import Documents, Frame, Layout, assemble
from flax_encoder.data.rows.packing import PackingPlan
from tests.data.toy_split import split_of

PAD = 1
few = settings(max_examples=60, deadline=None, derandomize=True)
documents = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=14), min_size=1, max_size=9)


def roberta_places(ids):
    """transformers' create_position_ids_from_input_ids, from 0: the padding's id is not counted, wherever it stands."""
    places, count = [], 0
    for i in ids:
        count += i != PAD
        places.append(count - 1 if i != PAD else -1)
    return places


@given(documents, st.sampled_from([(0, 2), (None, 2), (None, None)]))
@few
def test_a_padding_token_in_a_text_is_skipped_by_positions_in_every_packed_document(texts, around):
    frame = Frame(PAD, *around, skips_pad=True)
    documents = Documents(split_of([np.array(ids, np.int32) for ids in texts]), Layout(long="split"), frame, 9)
    plan = documents.plan(9)
    numbers = np.arange(plan.rows_per_epoch)
    batch = frame.empty(len(numbers), 9)
    assemble(documents, plan.rows(numbers, 0), batch, numbers)
    for tokens, segments, positions in zip(batch["tokens"], batch["segment_ids"], batch["positions"], strict=True):
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            assert positions[own].tolist() == roberta_places(tokens[own].tolist())


def test_models_that_count_columns_count_a_padding_token_too():
    tokens, columns = np.array([[5, PAD, 6, PAD]], np.int32), np.arange(4, dtype=np.int32)[None]
    segments = np.array([[1, 1, 1, 0]], np.int32)
    np.testing.assert_array_equal(Frame(PAD, 0, 2).positions(tokens, segments, columns), columns)
    skipping = Frame(PAD, 0, 2, skips_pad=True)
    np.testing.assert_array_equal(skipping.positions(tokens, segments, columns), [[0, -1, 1, 3]])


@pytest.mark.parametrize("packing", ["best-fit", "one-per-row"])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20))
@few
def test_documents_that_are_cut_keep_the_end_that_their_tokenizer_keeps(packing, lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    for side in ("right", "left"):
        plan = PackingPlan(offsets, 10, (1, 1), packing=packing, split_long=False, truncation_side=side)
        pieces = plan.rows(np.arange(plan.rows_per_epoch), 0)
        kept = np.minimum(lengths, 8)[pieces.document]
        np.testing.assert_array_equal(pieces.length, kept)
        first = np.array(lengths)[pieces.document] - kept
        np.testing.assert_array_equal(pieces.start, first if side == "left" else 0 * first)
