"""Batches: what a row holds, and that it does not matter who asks for it or when."""

import functools
import os
import signal

import numpy as np
import pytest

from flax_encoder.config import MaskingConfig, RunConfig
from flax_encoder.data.rows.batches import Batches, Mixture, OneByOne, Stages
from flax_encoder.data.rows.documents import Documents, Frame, Layout
from flax_encoder.data.rows.packing import PackingPlan
from flax_encoder.data.rows.targets import TargetInputs, document_targets, masked_lm_targets
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from tests.data.toy_split import split_of

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
    labels = np.random.default_rng(1).integers(0, 7, len(texts)).astype(np.int32)
    return split_of(tokenizer.encode_batch(texts), labels)


def plain_targets(rows):
    return {"target_weights": np.ones((len(rows.address), 1), np.float32)}


@pytest.fixture(scope="module")
def make(tokenizer, split):
    def make(kind="masked_lm", plan=None, order=None, splits=None, targets=None, masking=None, **options):
        plan = plan or plan_of(split, kind)
        masking = masking or MaskingConfig()
        if kind == "masked_lm":
            rates = masking.rates
            targets = masked_lm_targets(tokenizer, masking, rates, masking.budget or 7, 11, SEED)
        elif kind == "labels":
            documents = laid_out(split, tokenizer, "cut")
            inputs = TargetInputs(RunConfig(), tokenizer, documents, T, plan.max_pieces_per_row, is_training=True)
            targets = document_targets(inputs, "labels")
        else:
            targets = plain_targets
        options = {"batch_size": 8, "num_batches": 11, "seed": SEED, "row_length": T} | options
        long = "cut" if kind == "labels" else "split"
        documents = [laid_out(s, tokenizer, long) for s in splits or [split]]
        return Batches(documents, order or Mixture([plan], [1.0]), targets, **options)

    return make


def laid_out(split, tokenizer, long):
    return Documents(split, Layout(long=long), Frame.of(tokenizer), T)


def plan_of(split, kind="masked_lm", row_length=T, **options):
    return PackingPlan(split.offsets, row_length, split_long=kind != "labels", **options)


def one_pass(plan, batch_size):
    """Options for `make` to read every row once."""
    order = OneByOne([plan])
    return {"order": order, "num_batches": -(-len(order) // batch_size), "stop_row": len(order)}


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
        assert ids == split.document(document).tolist()
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
    assert found == dict(enumerate(split.values["labels"].tolist()))
    assert batch["target_weights"].sum() == len(split.lengths)


def test_masked_targets_are_the_tokens_before_masking(make):
    plain, masked = make("plain")[3], make("masked_lm")[3]
    used = masked["target_weights"] > 0
    before = np.take_along_axis(plain["tokens"], masked["target_positions"], 1)
    np.testing.assert_array_equal(masked["targets"][used], before[used])
    changed = plain["tokens"] != masked["tokens"]
    assert 0 < changed.sum() <= used.sum()


@pytest.mark.parametrize("kind", ["whole_word", "span"])
def test_word_starts_come_from_the_store_bit_by_bit(make, split, tokenizer, kind):
    """Words of two and three tokens: a masked one is masked whole, whatever row and shard it is read from."""
    rng = np.random.default_rng(2)
    documents = [split.document(i) for i in range(len(split))]
    starts = [rng.random(len(ids)) < 0.4 for ids in documents]
    for begins in starts:
        begins[0] = True
    ours = split_of(documents, word_starts=starts, shards=3)
    masking = MaskingConfig(kind=kind, rate=0.4, mask_rate=1.0, random_rate=0.0, budget=T)
    batches = make(splits=[ours], masking=masking, streams=("word_starts",))
    plan = plan_of(ours)
    for number in range(3):
        batch, pieces = batches[number], plan.rows(np.arange(number * 8, number * 8 + 8), SEED)
        masked = batch["tokens"] == tokenizer.special("mask")
        assert masked.any()
        rows = segments(batch)
        for (row, column, tokens, _), document, start in zip(rows, pieces.document, pieces.start, strict=True):
            word = np.cumsum(starts[document][start : start + len(tokens) - 2])
            is_masked = masked[row, column + 1 : column + len(tokens) - 1]
            for w in np.unique(word):
                assert len(set(is_masked[word == w].tolist())) == 1


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("packing", ["best-fit", "one-per-row", "concatenate"])
def test_shards_and_packings_hold_the_same_text(make, split, packing, shards):
    sharded = split_of([split.document(i) for i in range(len(split))], shards=shards)
    plan = plan_of(sharded, packing=packing)
    R = plan.rows_per_epoch
    batch = make("plain", plan, splits=[sharded], batch_size=R)[0]
    pieces = plan.rows(np.arange(R), SEED)
    for (row, _, tokens, _), to, document, start, length, first, last in zip(
        segments(batch), *(getattr(pieces, n).tolist() for n in (
            "row", "document", "start", "length", "has_first", "has_last")), strict=True,
    ):  # fmt: skip
        assert row == to and len(tokens) == first + length + last
        assert tokens[first : first + length].tolist() == split.document(document)[start : start + length].tolist()


def test_a_mixture_keeps_its_weights_and_each_plan_its_own_epochs(split):
    plans = [plan_of(split), plan_of(split, packing="one-per-row"), plan_of(split, window=11)]
    weights = [0.5, 0.3, 0.2]
    order = Mixture(plans, weights)
    plan, inner = order.locate(np.arange(3 * 4096), seed=3)
    for k, weight in enumerate(weights):
        mine = inner[plan == k]
        assert sorted(mine.tolist()) == list(range(len(mine)))  # none lost, none twice: so its epochs follow each other
        assert abs(len(mine) / (3 * 4096) - weight) <= 1 / 4096
        share = np.cumsum(plan == k) / np.arange(1, len(plan) + 1)
        assert np.all(np.abs(share[500:] - weight) < 0.1)
    some = np.array([5000, 17, 12000])
    again, numbers = order.locate(some, seed=3)
    np.testing.assert_array_equal(again, plan[some])
    np.testing.assert_array_equal(numbers, inner[some])
    assert (order.locate(np.arange(4096), seed=4)[0] != plan[:4096]).mean() > 0.3


def test_a_small_share_is_kept_as_exactly_as_a_large_one(split):
    """By its rows in a block of rows, of which there are as many as that takes."""
    plans = [plan_of(split)] * 3
    for weights in ([3_000_000.0, 30.0, 30.0], [1e6, 370.0, 1.0], [0.5, 0.3, 0.2], [5.0, 5.0, 5.0]):
        ends = Mixture(plans, weights)._ends
        shares = np.diff(ends, prepend=0) / ends[-1]
        np.testing.assert_allclose(shares, np.array(weights) / sum(weights), rtol=1 / 64)
    ends = Mixture(plans, [1.0, 1e-12, 1e-12])._ends
    assert np.diff(ends, prepend=0).tolist() == [2**30 - 2, 1, 1]


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_a_mixture_that_changes_reads_no_row_twice_and_leaves_none_out(split, sources):
    """Each source goes on where it was, in the middle of a block of rows too, and one of weight 0 is not read."""
    plans, rng = [plan_of(split)] * sources, np.random.default_rng(sources)
    for _ in range(10):
        found, left, start = [[] for _ in plans], (), ()
        for count in rng.choice([0, 1, 50, 4095, 4096, 4097, 9000], 4):
            weights = [*rng.choice([0.0, 1.0, 0.01, 5.0], sources - 1), 1.0]
            mixture = Mixture(plans, [float(w) for w in weights], left, start)
            plan, inner = mixture.locate(np.arange(count), SEED)
            assert not set(plan.tolist()) & {k for k, weight in enumerate(weights) if weight == 0}
            for k in range(sources):
                found[k] += inner[plan == k].tolist()
            left, start = mixture.unread(int(count), SEED)
        for k in range(sources):
            assert sorted([*found[k], *left[k].tolist()]) == list(range(start[k]))


@pytest.fixture(scope="module")
def elaborate(make, split, tokenizer):
    """Everything at once: a mixture of two stores in windows, whole words, a falling rate, ends of epochs inside."""
    other = split_of([split.document(i) for i in range(0, len(split), 3)], shards=2)
    plans = [plan_of(split, window=23), plan_of(other)]
    masking = MaskingConfig(kind="whole_word", rate=0.3, last_rate=0.1, budget=12)

    def elaborate(**options):
        return make(
            order=Mixture(plans, [2.0, 1.0]), splits=[split, other], masking=masking,
            streams=("word_starts",), num_batches=40, **options,
        )  # fmt: skip

    return elaborate


@pytest.mark.parametrize("count", [2, 4, 8])
def test_global_batches_are_the_same_on_any_number_of_processes_at_any_step(elaborate, count):
    whole = elaborate()
    parts = [elaborate(rows=slice(i * 8 // count, (i + 1) * 8 // count)) for i in range(count)]
    for number in (*range(0, 40, 3), 12_345):  # the smaller store's epoch ends every few batches
        together = [part[number] for part in parts]
        assert_equal({name: np.concatenate([p[name] for p in together]) for name in together[0]}, whole[number])


def test_the_masking_rate_goes_straight_from_the_first_to_the_last(make, tokenizer):
    batches = make(masking=MaskingConfig(rate=0.5, last_rate=0.1, budget=16), batch_size=64)
    rates = []
    for number in (0, 5, 10):
        batch = batches[number]
        ordinary = ~np.isin(batch["tokens"], tokenizer.special_ids) | (batch["tokens"] == tokenizer.special("mask"))
        rates.append(batch["target_weights"].sum() / ordinary.sum())
    np.testing.assert_allclose(rates, [0.5, 0.3, 0.1], atol=0.02)


@pytest.mark.parametrize("is_evaluation", [False, True])
def test_buckets_give_every_row_once_in_batches_just_long_enough(make, split, is_evaluation):
    plan = plan_of(split, "labels", packing="one-per-row")
    R = plan.rows_per_epoch
    options = one_pass(plan, 4) if is_evaluation else {"num_batches": 64}
    batches = make("plain", plan, batch_size=4, buckets=(8, 16), **options)
    found, lengths = [], set()
    for number in range(len(batches)):
        batch = batches[number]
        real = batch["target_weights"][:, 0] > 0
        T_here = batch["tokens"].shape[1]
        longest = (batch["segment_ids"] > 0).sum(1).max()
        assert T_here == min(b for b in (8, 16, T) if b >= longest)
        lengths.add(T_here)
        found += [tuple(t[s > 0]) for t, s in zip(batch["tokens"][real], batch["segment_ids"][real], strict=True)]
        half = make("plain", plan, batch_size=4, buckets=(8, 16), rows=slice(2, 4), **options)[number]
        np.testing.assert_array_equal(half["tokens"], batch["tokens"][2:])
    assert lengths == {8, 16, T}
    plain = make("plain", plan, batch_size=R if is_evaluation else 256)[0]
    expected = [tuple(t[s > 0]) for t, s in zip(plain["tokens"], plain["segment_ids"], strict=True)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("start", [0, 3, 4, 6])
def test_rows_change_length_where_a_stage_ends(make, split, start):
    short = make(num_batches=4)
    long = make(plan=plan_of(split, row_length=2 * T), row_length=2 * T, batch_size=4, num_batches=9)
    stages = Stages([short, long])
    read = list(stages.iterate(start))
    assert len(read) == len(stages) - start == 9 - start
    for number, batch in enumerate(read, start):
        assert_equal(batch, (short if number < 4 else long)[number])
        assert_equal(batch, stages[number])


@pytest.mark.parametrize("buckets", [(), (8, 16)])
def test_batches_that_grow_read_the_rows_that_equal_ones_would(make, split, buckets):
    """None twice and none left out, though pools of rows of like length end where a stage does."""
    plan = plan_of(split, "labels", packing="one-per-row")
    make = functools.partial(make, "plain", plan, buckets=buckets)
    stages = Stages([
        make(batch_size=2, num_batches=3),
        make(batch_size=4, num_batches=70, first=(3, 6)),
        make(batch_size=8, num_batches=80, first=(70, 6 + 67 * 4)),
    ])  # fmt: skip
    grown = list(stages.iterate())
    assert [len(batch["tokens"]) for batch in grown] == [2] * 3 + [4] * 67 + [8] * 10
    for number in (0, 2, 3, 69, 70, 79):
        assert_equal(stages[number], grown[number])
    texts = lambda batch: [tuple(t[s > 0]) for t, s in zip(batch["tokens"], batch["segment_ids"], strict=True)]  # noqa: E731
    rows = [text for batch in grown for text in texts(batch)]
    expected = texts(make(batch_size=6 + 67 * 4 + 80, num_batches=1)[0])
    assert sorted(rows) == sorted(expected)
    assert buckets or rows == expected


def test_an_evaluation_of_several_stores_samples_all_and_reads_each_row_once(split):
    plans = [plan_of(split), plan_of(split, packing="one-per-row")]
    order = OneByOne(plans)
    plan, inner = order.locate(np.arange(len(order)), seed=3)
    assert sorted(zip(plan.tolist(), inner.tolist(), strict=True)) == [
        (k, i) for k, p in enumerate(plans) for i in range(p.rows_per_epoch)
    ]
    assert 0 < np.count_nonzero(plan[:10]) < 10


def test_rows_shorter_than_the_slots_have_as_many_slots_as_tokens(make, split):
    plan = plan_of(split, "labels", packing="one-per-row")
    batches = make(plan=plan, masking=MaskingConfig(budget=20), buckets=(8,), num_batches=64)
    shapes = {(batch["tokens"].shape[1], batch["targets"].shape[1]) for batch in map(batches.__getitem__, range(64))}
    assert shapes == {(8, 8), (T, 20)}


def test_a_full_masking_budget_is_counted_not_exceeded(make, split):
    starts = [np.zeros(split.lengths[i], bool) for i in range(len(split))]  # every document is one word
    ours = split_of([split.document(i) for i in range(len(split))], word_starts=starts)
    masking = MaskingConfig(kind="whole_word", rate=0.4, budget=13)
    batches = make(splits=[ours], masking=masking, streams=("word_starts",))
    overflow = sum(int(batches[i]["overflow"].sum()) for i in range(11))
    assert overflow > 10 and batches[0]["target_weights"].shape == (8, 13)


class Lethal:
    """Targets whose worker dies at some batches, the first time that it is asked for them."""

    def __init__(self, folder, at):
        self.folder, self.at = folder, at

    def __call__(self, rows):
        flag = self.folder / str(rows.number)
        if rows.number in self.at and not flag.exists():
            if self.folder.exists():
                flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"target_weights": np.ones((len(rows.address), 1), np.float32)}


@pytest.mark.slow
def test_a_thousand_batches_survive_their_workers_deaths(make, tmp_path, split, tokenizer, caplog):
    at = np.random.default_rng(0).choice(1000, 3, replace=False).tolist()
    batches = Batches(
        [laid_out(split, tokenizer, "split")], Mixture([plan_of(split)], [1.0]), Lethal(tmp_path, at), row_length=T,
        batch_size=8, seed=SEED, num_batches=1000,
    )  # fmt: skip
    expected = make("plain", num_batches=1000)
    read = 0
    for batch in batches.iterate(workers=2):
        assert_equal(batch, expected[read])
        read += 1
    assert read == 1000 and len(list(tmp_path.iterdir())) == 3
    assert sum("data worker died" in r.message for r in caplog.records) in (2, 3)  # two may die at once


def test_workers_that_die_again_and_again_are_an_error(split, tokenizer, tmp_path):
    batches = Batches(
        [laid_out(split, tokenizer, "split")], Mixture([plan_of(split)], [1.0]), Lethal(tmp_path / "never", [2]),
        row_length=T,
        batch_size=8, seed=SEED, num_batches=9,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"one died twice before batch [0-2],"):
        list(batches.iterate(workers=1))
