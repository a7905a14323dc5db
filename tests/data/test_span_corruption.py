"""T5's spans: nothing is lost, the counts are the paper's, and every way to cut is equally likely."""

import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.config import UL2, ConfigError, DenoiserConfig, RunConfig, SpansConfig, from_dict, to_dict
from flax_encoder.data.rows.span_corruption import Denoiser, Sentinels, corrupt_spans, draw_denoisers
from flax_encoder.data.rows.targets import most_spans, span_corruption_targets
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.tokens.byte_pairs import train_byte_pairs
from flax_encoder.data.tokens.tokenizer import load_tokenizer, train_wordpiece

PAD, LAST, START = 0, 1, 2
SENTINELS = Sentinels(np.arange(299, 199, -1), LAST, START, PAD)


def rows_of(lengths_by_row, row_length, seed=0):
    """Rows of documents of so many ordinary tokens, each ended by LAST."""
    rng = np.random.default_rng(seed)
    tokens = np.full((len(lengths_by_row), row_length), PAD)
    segments = np.zeros_like(tokens)
    for b, lengths in enumerate(lengths_by_row):
        at = 0
        for s, n in enumerate(lengths, 1):
            tokens[b, at : at + n + 1] = [*rng.integers(10, 199, n), LAST]
            segments[b, at : at + n + 1] = s
            at += n + 1
    return tokens, segments


def corrupt(tokens, segments, rate=0.15, mean=3.0, slots=None, seed=7, address=None, denoisers=None):
    address = np.arange(len(tokens), dtype=np.uint64) if address is None else address
    slots = slots or 2 * tokens.shape[1]
    denoisers = denoisers or [Denoiser(1.0, rate, mean)]
    return corrupt_spans(
        tokens, segments, tokens >= 10, address, SENTINELS, denoisers=denoisers, slots=slots, seed=seed
    )


def documents(batch, tokens="tokens", segments="segment_ids"):
    """{(row, document): its tokens in order}, positions checked on the way."""
    found = {}
    for b, ids in enumerate(batch[segments]):
        for s in np.unique(ids[ids > 0]):
            (at,) = np.nonzero(ids == s)
            assert at.tolist() == list(range(at[0], at[-1] + 1))
            found[b, int(s)] = batch[tokens][b, at].tolist()
    return found


def restored(shown, target):
    """A document from its text with holes and what was in them, one token at a time."""
    spans, sentinel = {}, None
    for token in target[:-1]:
        if token >= 200:
            sentinel = token
            spans[sentinel] = []
        else:
            spans[sentinel].append(token)
    return [t for token in shown for t in spans.get(token, [token])], spans


LENGTHS = st.lists(st.lists(st.integers(1, 40), max_size=5), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(LENGTHS, st.sampled_from([0.15, 0.5, 0.9]), st.sampled_from([1.0, 3.0]), st.integers(0, 2**31))
def test_input_and_targets_together_are_the_text(lengths, rate, mean, seed):
    T = max([sum(n) + len(n) for n in lengths] + [1])
    tokens, segments = rows_of(lengths, T, seed)
    batch = corrupt(tokens, segments, rate, mean, seed=seed)
    before = documents({"tokens": tokens, "segment_ids": segments})
    shown = documents(batch)
    targets = documents(batch, "targets", "decoder_segment_ids")
    inputs = documents(batch, "decoder_tokens", "decoder_segment_ids")
    assert shown.keys() == before.keys() and not batch["overflow"].any()
    for key, text in before.items():
        n = len(text) - 1
        if n == 1:
            assert shown[key] == text and key not in targets
            continue
        again, spans = restored(shown[key], targets[key])
        assert again == text and targets[key][-1] == LAST
        assert inputs[key] == [START, *targets[key][:-1]]
        cut = min(max(1, round(n * rate)), n - 1)
        assert sum(map(len, spans.values())) == cut
        assert len(spans) == min(max(1, round(cut / mean)), n - cut)
        assert list(spans) == SENTINELS.ids[: len(spans)].tolist() and min(map(len, spans.values())) >= 1
        assert shown[key][0] < 200  # text comes first
    for ids, positions in (("segment_ids", "positions"), ("decoder_segment_ids", "decoder_positions")):
        for at in documents(batch, positions, ids).values():
            assert at == list(range(len(at)))
    np.testing.assert_array_equal(batch["target_weights"] > 0, batch["decoder_segment_ids"] > 0)


def test_every_way_to_cut_is_equally_likely():
    """Nine tokens, four of them cut in two spans: 3 ways to part those, times 4 for the five that stay."""
    tokens, segments = rows_of([[9]] * 6007, 10)
    batch = corrupt(tokens, segments, rate=0.44, mean=2.0)
    seen = {}
    for shown in batch["tokens"]:
        where = tuple(np.flatnonzero(shown >= 200))
        target = batch["targets"][sum(seen.values())]
        first = int(np.flatnonzero(target == SENTINELS.ids[1])[0]) - 1
        seen[where, first] = seen.get((where, first), 0) + 1
    assert len(seen) == 12
    n, share = 6007, 1 / 12
    assert all(abs(count - n * share) < 4.5 * np.sqrt(n * share) for count in seen.values())


def test_spans_are_a_function_of_seed_address_and_the_documents_place():
    tokens, segments = rows_of([[30, 11], [25], [8, 8, 9]], 44)
    whole = corrupt(tokens, segments, rate=0.4)
    order = np.array([2, 0, 1])
    moved = corrupt(tokens[order], segments[order], rate=0.4, address=order.astype(np.uint64))
    for name, values in moved.items():
        np.testing.assert_array_equal(values, whole[name][order], err_msg=name)
    assert (corrupt(tokens, segments, rate=0.4, seed=8)["tokens"] != whole["tokens"]).any()


def test_targets_that_do_not_fit_are_left_out_whole_and_counted():
    tokens, segments = rows_of([[20, 20, 20], [20]], 63)
    batch = corrupt(tokens, segments, slots=10)  # a document needs 3 tokens, a sentinel and the end
    assert batch["overflow"].tolist() == [1, 0]
    np.testing.assert_array_equal(documents(batch)[0, 3], documents({"tokens": tokens, "segment_ids": segments})[0, 3])
    assert documents(batch, "targets", "decoder_segment_ids").keys() == {(0, 1), (0, 2), (1, 1)}


def test_too_few_sentinels_and_a_tokenizer_without_them_are_errors():
    tokens, segments = rows_of([[60]], 61)
    few = Sentinels(np.arange(3), LAST, START, PAD)
    with pytest.raises(ValueError, match="a document needs 30 sentinels, the tokenizer has 3"):
        corrupt_spans(
            tokens, segments, tokens >= 10, np.zeros(1, np.uint64), few,
            denoisers=[Denoiser(1.0, 0.5, 1.0)], slots=99, seed=0,
        )  # fmt: skip
    with pytest.raises(DataError, match=r"up to 3 spans, the tokenizer 0 sentinels <extra_id_0>.* Without --data\.tok"):
        span_corruption_targets(train_wordpiece(["a b"] * 2, 41), SpansConfig().mixture, 64, 20, 0)


def test_sentinels_that_are_added_as_the_error_says_are_enough(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(train_wordpiece(["a b"] * 2, 41).plain_json)
    with pytest.raises(DataError) as error:
        span_corruption_targets(load_tokenizer(file), SpansConfig().mixture, 64, 20, 0)
    [code] = re.findall(r"by (t = .*; t\.save\(FILE\))\.", str(error.value))
    exec(code, {"tokenizers": tokenizers, "FILE": str(file)})
    span_corruption_targets(load_tokenizer(file), SpansConfig().mixture, 64, 20, 0)
    assert len(load_tokenizer(file).sentinel_ids) == 3


# --- several denoisers

# Modes of none, one and two tokens (3 and 4 are no text); UL2's kinds of denoisers, shorter.
MIXTURE = [
    Denoiser(2.0, 0.15, 3.0, (3,)), Denoiser(1.0, 0.15, 8.0), Denoiser(2.0, 0.25, None, (4, 3)),
    Denoiser(1.0, 0.5, 3.0, (4,)), Denoiser(1.0, 0.5, 64.0, (4,)),
]  # fmt: skip


def spans_of(denoiser, n):
    """(tokens cut, spans) of a document of n tokens."""
    cut = min(max(1, round(n * denoiser.rate)), n - 1)
    mean = denoiser.mean_span_tokens
    return cut, 1 if mean is None else min(max(1, round(cut / mean)), n - cut)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(LENGTHS, st.integers(0, 2**31), st.integers(0, 9))
def test_for_every_denoiser_the_mode_input_and_targets_together_are_the_text(lengths, seed, free):
    T = max([sum(n) + len(n) for n in lengths] + [1]) + free
    tokens, segments = rows_of(lengths, T, seed)
    batch = corrupt(tokens, segments, denoisers=MIXTURE, seed=seed)
    before = documents({"tokens": tokens, "segment_ids": segments})
    shown, targets = documents(batch), documents(batch, "targets", "decoder_segment_ids")
    left_whole = np.zeros(len(tokens), int)
    assert shown.keys() == before.keys()
    for (row, document), text in before.items():
        n = len(text) - 1
        if (row, document) not in targets:
            assert shown[row, document] == text
            left_whole[row] += n > 1
            continue
        again, spans = restored(shown[row, document], targets[row, document])
        cut = sum(map(len, spans.values()))
        counts = (cut, len(spans))
        fits = [own for own in MIXTURE if again == [*own.mode, *text] and counts == spans_of(own, n)]
        assert fits
        if fits == [MIXTURE[2]]:  # a prefix, and what follows it
            assert [*shown[row, document][2:-2], *targets[row, document][1:-1], LAST] == text
    assert batch["overflow"].tolist() == left_whole.tolist()
    positions = documents(batch, "positions", "segment_ids")
    assert all(at == list(range(len(at))) for at in positions.values())


def test_a_document_draws_its_denoiser_by_its_place_and_in_proportion():
    keys = np.random.default_rng(0).integers(0, 2**63, 20_000).astype(np.uint64)
    drawn = draw_denoisers(MIXTURE, keys)
    np.testing.assert_array_equal(draw_denoisers(MIXTURE, keys[::-1]), drawn[::-1])
    shares = np.bincount(drawn, minlength=5) / len(keys)
    np.testing.assert_allclose(shares, np.array([2, 1, 2, 1, 1]) / 7, atol=4.5 * np.sqrt(0.25 / len(keys)))
    assert (draw_denoisers(MIXTURE[:1], keys) == 0).all()


def test_equal_denoisers_are_one_and_one_is_t5s():
    tokens, segments = rows_of([[30, 11], [25], [8, 8, 9]], 44)
    one = corrupt(tokens, segments, rate=0.4)
    for denoisers in ([Denoiser(1.0, 0.4, 3.0)], [Denoiser(3.0, 0.4, 3.0), Denoiser(1.0, 0.4, 3.0)]):
        for name, values in corrupt(tokens, segments, denoisers=denoisers).items():
            np.testing.assert_array_equal(values, one[name], err_msg=name)


def test_rows_that_are_full_have_no_room_for_modes_where_little_is_cut():
    """Documents of two tokens lose one and get a sentinel; with a mode each is longer by one than it was."""
    tokens, segments = rows_of([[2, 2, 2], [2]], 9)
    batch = corrupt(tokens, segments, denoisers=[Denoiser(1.0, 0.5, 3.0, (3,))])
    assert batch["overflow"].tolist() == [3, 0]
    assert documents(batch)[1, 1][0] == 3 and documents(batch)[0, 1] == tokens[0, :3].tolist()


def test_ul2s_denoisers_are_those_of_its_table_and_survive_json():
    """Table 1: R with spans of 3 and 8 at 15%; X with spans of 3, 8 and 64 at 50%, and of 64 at 15%; S of 25%."""
    modes = {own.mode for own in UL2}
    assert {mode: {(own.mean_tokens, own.rate) for own in UL2 if own.mode == mode} for mode in modes} == {
        "[NLU]": {(3.0, 0.15), (8.0, 0.15)}, "[S2S]": {(None, 0.25)},
        "[NLG]": {(3.0, 0.5), (8.0, 0.5), (64.0, 0.15), (64.0, 0.5)},
    }  # fmt: skip
    assert len(UL2) == 7 and {own.share for own in UL2} == {1.0}
    config = RunConfig(spans=SpansConfig(denoisers=UL2))
    assert from_dict(RunConfig, to_dict(config)) == config


def test_settings_of_denoisers_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match=r"each of spans\.denoisers.*spans\.rate at 0\.15.*got 0\.2 and 3\.0"):
        SpansConfig(rate=0.2, denoisers=UL2)
    for fields, message in (
        ({"share": 0.0}, "share must be above 0"), ({"rate": 1.0}, "rate is a probability"),
        ({"mean_tokens": 0.5}, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"a denoiser's {message}|{message}"):
            DenoiserConfig(**fields)


def test_a_mode_needs_tokens_and_the_sentinels_are_those_of_the_denoiser_that_needs_most(caplog):
    tokenizer = train_byte_pairs(["the red stone"] * 3, 400)
    wordpiece = train_wordpiece(["a b"] * 2, 60)
    assert [len(tokenizer.encode_batch([mode])[0]) for mode in ("[NLU]", "[S2S]")] == [5, 5]
    moded = train_byte_pairs(["the red stone"] * 3, 400, ["[NLU]", "[S2S]"])
    assert [len(moded.encode_batch([mode])[0]) for mode in ("[NLU]", "[S2S]")] == [1, 1]
    assert moded.sentinel_ids.tolist() == list(range(moded.vocab_size - 1, moded.vocab_size - 101, -1))
    assert most_spans(UL2, 512) == 85 and most_spans(UL2[:3], 512) == 26
    with pytest.raises(DataError, match=r"a row of 1024 tokens has up to 171 spans, the tokenizer 100 sentinels"):
        span_corruption_targets(tokenizer, UL2, 1024, 512, 0)
    assert span_corruption_targets(moded, UL2[:3], 512, 512, 0) and not caplog.records
    assert span_corruption_targets(tokenizer, UL2, 512, 512, 0)
    assert "the mode '[NLU]' is 5 tokens of this tokenizer" in caplog.text
    with pytest.raises(DataError, match=r"the tokenizer 0 sentinels"):
        span_corruption_targets(wordpiece, UL2[2:3], 64, 64, 0)
