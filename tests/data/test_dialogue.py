"""Conversations: which turns are read of data sets, how they are joined, and what is cut of them."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from flax_encoder.config import DataConfig
from flax_encoder.data.inspect import draw_row, sample_rows
from flax_encoder.data.pipeline import open_stores
from flax_encoder.data.rows.documents import Documents, Frame, Layout, Written, assemble, assemble_targets
from flax_encoder.data.sources.columns import Columns
from flax_encoder.data.sources.records import DataError, Record
from flax_encoder.data.store.encoding import encode_records, split_turns, turn_separator_ids
from flax_encoder.data.store.store import Split
from flax_encoder.data.tokens.byte_pairs import train_byte_pairs
from flax_encoder.data.tokens.tokenizer import train_wordpiece
from tests.data.reading import CLASS, jsonl, open_named, parquet

WRITTEN = Columns("text", writes=True, has_turns=True)
ASKED = WRITTEN._replace(value="none")
TOKENIZER = train_byte_pairs(["the red stone", "a blue river"] * 3, 400)


def read(path, columns=WRITTEN, **options):
    source = open_named(DataConfig(source=str(path), **options), path.parent / "cache", columns)
    return [(*(r.history or ()), *r.texts, r.value) for r in source.records("train")], source.notes


def said(role, text, names=("role", "content")):
    return dict(zip(names, (role, text), strict=True))


CHAT = [said("system", "s"), said("user", "u"), said("assistant", "a"), said("user", "v"), said("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "answered", "asked"),
    [
        ({"topic": "x", "turns": ["a", "b", "c"]}, [("a", "b"), ("a", "b", "c")], ("a", "b", "c")),
        ({"dialog": ["a", "b"]}, [("a", "b")], ("a", "b")),
        ({"messages": CHAT}, [("s", "u", "a"), ("s", "u", "a", "v", "b")], ("s", "u", "a", "v")),
        ({"messages": CHAT[:4]}, [("s", "u", "a")], ("s", "u", "a", "v")),
        (
            {"conversations": [said("human", "u", ("from", "value")), said("gpt", "a", ("from", "value"))]},
            [("u", "a")], ("u",),
        ),
        ({"utterances": [said("Ann", "u", ("speaker", "text")), said("Bo", "v", ("speaker", "text"))]}, [("u", "v")],
         ("u", "v")),
        ({"history": ["x", "y"], "question": "q", "answer": "z"}, [("x", "y", "q", "z")], ("x", "y", "q")),
        ({"history": [["x", "y"], ["v", "w"]], "input": "q", "output": "z"}, [("x", "y", "v", "w", "q", "z")],
         ("x", "y", "v", "w", "q")),
        ({"history": ["x", "y"], "response": "z"}, [("x", "y", "z")], ("x", "y")),
    ],
)  # fmt: skip
def test_the_turns_of_data_sets_are_found_by_their_columns_names_in_every_format(tmp_path, row, answered, asked):
    for path in (jsonl(tmp_path / "a.jsonl", row), parquet(tmp_path / "a.parquet", row)):
        found, notes = read(path)
        assert found == answered
        assert "--data.history-column" in notes[0]
        assert read(path, target_turns="last")[0] == answered[-1:] if "history" not in row else True
        assert read(path, ASKED)[0] == [(*asked, None)]


def test_named_columns_win_and_objects_of_lists_are_lists_of_objects(tmp_path):
    row = {"chat": ["a", "b"], "turns": ["c", "d"], "reply": "e"}
    path = jsonl(tmp_path / "a.jsonl", row)
    assert read(path, history_column="turns") == ([("c", "d")], ())
    assert read(path, history_column="chat", text_pair_column="reply") == ([("a", "b", "e")], ())
    path = jsonl(tmp_path / "b.jsonl", {"foo": ["a", "b"]})
    assert read(path, history_column="foo") == ([("a", "b")], ())
    path = jsonl(tmp_path / "c.jsonl", {"conversations": {"from": ["human", "gpt"], "value": ["u", "a"]}})
    assert read(path)[0] == [("u", "a")]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"turns": ["x"]}, {}, r"and an answer to it: column 'turns' of .*line 1 holds 1 turn\. --data\.skip-bad"),
        ({"messages": [said("user", "u")]}, {}, "holds 1 turn of user"),
        ({"turns": ["x", " "]}, {}, "every turn of a conversation must have text: .*line 1 holds ' ' as turn 2"),
        ({"turns": ["x", 3]}, {}, "a turn of a conversation is a text, or an object.*line 1 holds 3 as turn 2"),
        ({"messages": [said("user", "u"), said("assistant", None)]}, {}, "holds None as turn 2"),
        ({"history": [], "response": "z"}, {}, "a turn to be answered: column 'history' of .*line 1 holds none"),
        ({"dialog": ["a", "b"], "turns": ["a", "b"]}, {}, r"turns, or dialog could be\. Name one with --data\.history"),
        ({"source": "a", "target": "b", "turns": ["c"]}, {}, "turns, or source with target could be"),
        ({"history": ["a"], "input": "b", "prompt": "c", "output": "d"}, {}, "prompt, input could be"),
        ({"source": "a", "target": "b"}, {"turn_separator": "|"}, "without conversations: .* has source, target"),
        ({"history": ["a"], "source": "b", "target": "c"}, {"target_turns": "last"}, "holds a whole conversation"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_with_its_row_and_a_way_out(tmp_path, row, options, message):
    with pytest.raises(DataError, match=message):
        read(jsonl(tmp_path / "a.jsonl", row), **options)


def test_other_tasks_read_no_history(tmp_path):
    with pytest.raises(DataError, match=r"leave out --data\.history-column 'turns' and --data\.turn-separator '\|'"):
        path = jsonl(tmp_path / "a.jsonl", {"text": "a", "label": "b"})
        read(path, CLASS, history_column="turns", turn_separator="|")


def test_bad_rows_are_left_out_where_asked(tmp_path):
    rows = [{"turns": turns} for turns in (["a"], ["b", "c"], ["d", 3], [])]
    assert read(jsonl(tmp_path / "a.jsonl", *rows), skip_bad_rows=True)[0] == [("b", "c")]


TURNS = st.lists(st.text("ab |", min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(TURNS, st.text("xy", min_size=1)), min_size=1, max_size=6), st.sampled_from([None, "||", "\n"])
)
def test_turns_come_back_from_the_tokens_of_a_history(dialogues, separator):
    columns = WRITTEN._replace(turn_separator=separator, prompts=("p: ", ""))
    records = [Record((turns[-1],), value, history=tuple(turns[:-1])) for turns, value in dialogues]
    encoded = encode_records(records, TOKENIZER, columns, {}, np.dtype(np.uint16))
    ids = turn_separator_ids(TOKENIZER, separator)
    ends = np.cumsum(encoded.text_lengths.ravel(), dtype=np.int64)[:-1]
    parts = np.split(encoded.tokens, ends)
    assert len(encoded.words) == len(encoded.tokens)
    for i, (turns, value) in enumerate(dialogues):
        history, newest, target = parts[3 * i : 3 * i + 3]
        stripped = [turn.strip() for turn in turns]
        assert TOKENIZER.decode(newest) == "p: " + stripped[-1] and TOKENIZER.decode(target) == value
        between = [*TOKENIZER.encode_batch(stripped[:-1])]
        assert history.tolist() == [token for own in between for token in (*own.tolist(), *ids)]
        if separator is None:  # which no turn can spell
            assert [TOKENIZER.decode(turn) for turn in split_turns(history, ids)] == stripped[:-1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 13), st.integers(1, 9)), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_a_long_conversation_loses_its_oldest_tokens_and_the_newest_turn_last(lengths, side):
    """Of a history of h tokens and a newest turn of n, a row with room for 8 holds the last 8 of both; only a newest
    turn of more than 8 loses tokens itself, on the tokenizer's side."""
    lengths = np.array(lengths)
    total = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))])
    words = np.packbits(np.ones(total, bool), bitorder="little")
    split = Split([np.arange(5, 5 + total).astype(np.uint16)], [words], offsets, {"text_lengths": lengths})
    frame = Frame(0, 3, 1, truncation_side=side)
    documents = Documents(split, Layout(written=Written(6)), frame, 10)
    plan = documents.plan(10, "one-per-row")
    numbers = np.arange(plan.rows_per_epoch)
    pieces = plan.rows(numbers, 0)
    batch, targets = frame.empty(len(numbers), 10), frame.empty(len(numbers), 6)
    assemble(documents, pieces, batch, numbers)
    assemble_targets(documents.target, pieces, targets, numbers)
    for row, document in zip(pieces.row, documents.documents(pieces).tolist(), strict=True):
        h, n, _ = lengths[document]
        tokens = split.document(document)
        source, target = tokens[: h + n], tokens[h + n :][:5]
        cut = source[h:][:8] if n > 8 and side == "right" else source[-8:]
        assert batch["tokens"][row][batch["segment_ids"][row] > 0].tolist() == [3, *cut, 1]
        assert targets["tokens"][row][targets["segment_ids"][row] > 0].tolist() == [*target, 1]
    long = (lengths[:, :2].sum(1) > 8) | (lengths[:, 2] > 5)
    assert documents.num_cut == long.sum()


def test_a_separator_must_be_in_the_tokenizer():
    wordpiece = train_wordpiece(["a b c d"] * 3, 60)
    assert turn_separator_ids(wordpiece, None) == list(wordpiece.between)
    for separator in ("\n", "|"):
        with pytest.raises(DataError, match=r"has no token for .*as --data\.turn-separator, or another --data\.tok"):
            turn_separator_ids(wordpiece, separator)


def test_a_conversation_is_held_out_whole_and_a_store_remembers_its_separator(tmp_path):
    rows = [{"turns": [f"{i} {k}" for k in range(5)]} for i in range(300)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    config = DataConfig(source=str(path), held_out_rate=0.2, cache_dir=str(tmp_path / "c"))
    _, [store], _ = open_stores(config, WRITTEN._replace(turn_separator="|"), tokenizer=TOKENIZER)
    of = {}
    for name, split in (("train", store.train), ("validation", store.validation)):
        own = [TOKENIZER.decode(split.document(i)).split()[0] for i in range(len(split))]
        of[name] = set(own)
        assert all(own.count(one) == 4 for one in of[name])
    assert not of["train"] & of["validation"] and len(of["train"]) + len(of["validation"]) == 300
    assert len(of["validation"]) > 20
    # As inspect shows them.
    batch = sample_rows(store.train, TOKENIZER, kind="written", rate=0.15, rows=2, row_length=32, seed=0)
    source, target = str(draw_row(batch, 0, TOKENIZER)).split("→")
    sources = [part.split("|") for part in TOKENIZER.decode(batch["tokens"][0]).split("</s>") if "<pad>" not in part]
    written = TOKENIZER.decode(batch["targets"][0][batch["target_weights"][0] > 0]).split("</s>")[:-1]
    assert source.count("|") == sum(map(len, sources)) - len(sources) and target.count("</s>") == len(written)
    for turns, answer in zip(sources, written, strict=True):
        assert answer == f"{turns[-1].split()[0]} {int(turns[-1].split()[1]) + 1}"
    mixed = sample_rows(store.train, TOKENIZER, kind="ul2", rate=0.15, rows=2, row_length=96, seed=0)
    assert "<extra_id_0>" in str(draw_row(mixed, 0, TOKENIZER))
    again = DataConfig(source=str(store.folder))
    open_stores(again, WRITTEN._replace(turn_separator="|"), tokenizer=TOKENIZER)
    with pytest.raises(DataError, match=r"the turn separator '\|', the run has None\. Give the run --data\.turn-sep"):
        open_stores(again, WRITTEN, tokenizer=TOKENIZER)
