"""Batches: what a row holds, and that it does not matter who asks for it or when."""

import numpy as np
import pytest

from flax_encoder.config import MaskingConfig
from flax_encoder.data.batches import SPECIAL_PER_PIECE, Batches, label_targets, masked_lm_targets, one_pass
from flax_encoder.data.packing import PackingPlan
from flax_encoder.data.store import Split
from flax_encoder.data.tokenizer import train_wordpiece

T, SEED = 31, 5
WORDS = ["rows", "of", "pieces", "are", "packed", "and", "masked", "by", "number", "so", "that", "any", "process"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([" ".join(WORDS)] * 2, 97)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 41, 67)]


@pytest.fixture(scope="module")
def split(tokenizer, texts):
    ids = tokenizer.encode_batch(texts)
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
    labels = np.random.default_rng(1).integers(0, 7, len(ids)).astype(np.int32)
    return Split(np.concatenate(ids).astype(np.uint16), offsets, labels)


@pytest.fixture(scope="module")
def make(tokenizer, split):
    def make(kind="masked_lm", plan=None, **options):
        plan = plan or plan_of(split, kind)
        if kind == "masked_lm":
            targets = masked_lm_targets(tokenizer, MaskingConfig(), 0.15, SEED)
        elif kind == "labels":
            targets = label_targets(split.labels, plan.max_pieces_per_row)
        else:
            targets = lambda rows, pieces, numbers: {"target_weights": np.ones((len(numbers), 1), np.float32)}  # noqa: E731
        options = {"batch_size": 8, "num_batches": 11, "seed": SEED} | options
        return Batches(split, plan, targets, tokenizer, row_length=T, **options)

    return make


def plan_of(split, kind="masked_lm"):
    return PackingPlan(split.lengths, T, SPECIAL_PER_PIECE, split_long=kind != "labels")


def segments(batch):
    """Each piece as (row, first column, its tokens, its positions), read off segment_ids."""
    for b, ids in enumerate(batch["segment_ids"]):
        for s in range(1, ids.max() + 1):
            (at,) = np.nonzero(ids == s)
            assert at.tolist() == list(range(at[0], at[-1] + 1))
            yield b, at[0], batch["tokens"][b, at], batch["positions"][b, at]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_special_tokens_frame_each_piece_and_positions_restart(make, tokenizer):
    batch = make("plain")[0]
    first, last, pad = (tokenizer.special(role) for role in ("first", "last", "pad"))
    covered = 0
    for _, _, tokens, positions in segments(batch):
        assert (tokens[0], tokens[-1]) == (first, last) and len(tokens) >= 3
        assert not np.isin(tokens[1:-1], tokenizer.special_ids).any()
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
        covered += len(tokens)
    padding = batch["segment_ids"] == 0
    assert padding.any() and padding.sum() + covered == padding.size
    assert np.all(batch["tokens"][padding] == pad) and not batch["positions"][padding].any()
    assert np.all(np.diff(padding.astype(int), axis=1) >= 0)  # padding stands at the end
    assert {batch[name].dtype for name in ("tokens", "segment_ids", "positions")} == {np.dtype(np.int32)}


def test_an_epoch_holds_the_store_whole(make, split, tokenizer, texts):
    plan = plan_of(split)
    R = plan.rows_per_epoch
    batch = make("plain", plan, batch_size=R)[1]
    pieces = plan.rows(np.arange(R, 2 * R), SEED)
    documents = {}
    for (row, _, tokens, _), to, document, start in zip(
        segments(batch), pieces.row, pieces.document, pieces.start, strict=True
    ):
        assert row == to
        documents.setdefault(int(document), []).append((int(start), tokens[1:-1].tolist()))
    assert len(documents) == len(texts)
    for document, parts in documents.items():
        ids = [token for _, part in sorted(parts) for token in part]
        assert ids == split.tokens[split.offsets[document] : split.offsets[document + 1]].tolist()
        assert tokenizer.decode(ids) == texts[document]


@pytest.mark.parametrize("kind", ["masked_lm", "labels"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_process_slices_concatenated_equal_the_whole_batch(make, kind, count):
    whole = make(kind)
    share = 8 // count
    parts = [make(kind, rows=slice(i * share, (i + 1) * share)) for i in range(count)]
    for number in (0, 10, 1000):
        together = [part[number] for part in parts]
        assert_equal({name: np.concatenate([p[name] for p in together]) for name in whole[number]}, whole[number])


def test_a_row_does_not_depend_on_the_batch_size(make):
    small, large = make(batch_size=3), make(batch_size=21)
    parts = [small[i] for i in range(14, 21)]
    assert_equal({name: np.concatenate([p[name] for p in parts]) for name in parts[0]}, large[2])


@pytest.mark.parametrize("start", [0, 1, 7, 11])
def test_iterate_from_a_start_continues_bitwise(make, start):
    batches = make()
    expected = [batches[i] for i in range(len(batches))]
    resumed = list(batches.iterate(start))
    assert len(resumed) == len(expected) - start
    for a, b in zip(resumed, expected[start:], strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("kind", ["masked_lm", "labels"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_one_pass_weighs_every_row_once(make, split, kind, count):
    plan = plan_of(split, kind)
    R, B, share = plan.rows_per_epoch, 16, 16 // count
    assert R % B in range(1, 13)  # with four processes the last one has nothing but filling
    slices = [slice(i * share, (i + 1) * share) for i in range(count)]
    parts = [make(kind, plan, batch_size=B, rows=rows, **one_pass(plan, B)) for rows in slices]
    batches = [[part[i] for part in parts] for i in range(len(parts[0]))]
    read = {name: np.concatenate([p[name] for batch in batches for p in batch]) for name in batches[0][0]}
    reference = make(kind, plan, batch_size=R)[0]
    assert len(read["tokens"]) == -(-R // B) * B
    assert_equal({name: values[:R] for name, values in read.items()}, reference)
    assert reference["target_weights"].any(1).all() and not read["target_weights"][R:].any()


def test_one_pass_stops_at_its_limit(split):
    plan = plan_of(split)
    assert one_pass(plan, 8, limit=2)["num_batches"] == 2
    assert one_pass(plan, 8, limit=10**6) == one_pass(plan, 8)


def test_label_targets_sit_on_first_tokens_with_their_documents_label(make, split, tokenizer):
    plan = plan_of(split, "labels")
    batch = make("labels", plan, batch_size=plan.rows_per_epoch)[0]
    found = {}
    for (row, column, tokens, _), document in zip(
        segments(batch), plan.rows(np.arange(plan.rows_per_epoch), SEED).document, strict=True
    ):
        slot = batch["segment_ids"][row, column] - 1
        assert batch["target_positions"][row, slot] == column and tokens[0] == tokenizer.special("first")
        assert batch["target_weights"][row, slot] == 1.0
        found[int(document)] = int(batch["targets"][row, slot])
    assert found == dict(enumerate(split.labels.tolist()))
    assert batch["target_weights"].sum() == len(split.lengths)


def test_masked_targets_are_the_tokens_before_masking(make):
    plain, masked = make("plain")[3], make("masked_lm")[3]
    used = masked["target_weights"] > 0
    before = np.take_along_axis(plain["tokens"], masked["target_positions"], 1)
    np.testing.assert_array_equal(masked["targets"][used], before[used])
    changed = plain["tokens"] != masked["tokens"]
    assert 0 < changed.sum() <= used.sum()
