"""A run on conversations answers by what was said before, in training, evaluation and predictions."""

import dataclasses
import itertools
import json

import jax
import pytest

from flax_encoder.commands import main
from flax_encoder.config import ConfigError, RunConfig
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.sources.records import DataError, Record
from flax_encoder.runs.load import load
from flax_encoder.tasks import check_task
from tests.runs import TINY, with_fields
from train import train

WORDS = ["red", "blue", "green", "river", "stone", "cloud", "candle", "moon", "fish", "bread", "wind", "rope"]
ROLES = ("user", "user", "user", "assistant", "user", "assistant")


def conversations() -> list[dict]:
    """Two words, the second of which is to be said again, twice. Who has not read them is right in one of twelve."""
    return [{"turns": [a, b, "again", b, "more", b]} for a, b in itertools.permutations(WORDS, 2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk")
    rows = [
        {"messages": [{"role": role, "content": turn} for role, turn in zip(ROLES, row["turns"], strict=True)]}
        for row in conversations()
    ]  # fmt: skip
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_fields(
        TINY, objective="text_to_text", run_dir=str(folder / "run"), steps=160, log_every=40, checkpoint_every=160,
        batch_size=16, data__source=str(folder / "talk.jsonl"), data__vocab_size=380, data__row_length=32,
        data__packing="best-fit", data__turn_separator="|", model__position="none", model__relative_position="t5",
        model__norm="rms_norm", model__use_bias=False, model__init_std=0.1, model__embed_dim=48,
        optimizer__learning_rate=5e-3, decoder__num_layers=1,
    )  # fmt: skip
    devices = jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *args: devices[:1])
        jax.config.update("jax_disable_most_optimizations", True)
        yield folder, config, train(config)


def test_answers_follow_from_the_turns_before(run):
    _, config, metrics = run
    assert metrics["eval/rougeL"] > 0.8
    loaded = load(config.run_dir)
    pairs = list(itertools.permutations(WORDS, 2))
    asked = [Record(("again",), history=pair) for pair in pairs]
    answers = [answer["text"] for answer in loaded.predict(asked)]
    assert sum(answer == new for answer, (_, new) in zip(answers, pairs, strict=True)) > 0.8 * len(pairs)
    # What was said too long ago for a row is as if it had not been said.
    long = [Record(("again",), history=(*["moon"] * 90, *["rope"] * 40, *pair)) for pair in pairs[:20]]
    longer = [record._replace(history=("fish",) * 30 + record.history) for record in long]
    assert list(loaded.predict(long)) == list(loaded.predict(longer))
    data = open_data(config, loaded.task.reading, tokenizer=loaded.tokenizer)
    baselines = loaded.task.baselines(loaded, data)
    assert set(baselines) == {"the newest turn itself", "the most frequent answer"}
    assert baselines["the newest turn itself"]["rougeL"] == 0.0
    assert " --input conversations.jsonl " in loaded.task.commands(loaded, data)[0]
    named = dataclasses.replace(loaded, config=with_fields(config, data__history_column="said"))
    asked, scored = loaded.task.commands(named, data)[:2]
    assert " conversations.jsonl --history-column said " in asked and scored.endswith(" --data.history-column said")
    shown = loaded.task.examples(loaded, data)
    assert all(line.count("\n") >= 4 and "the model writes" in line for line in shown)


def test_commands_take_the_same_files(run, capsys):
    folder, config, _ = run
    rows = [{"id": i, **row} for i, row in enumerate(conversations())]
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    (folder / "some.jsonl").write_text("".join((folder / "talk.jsonl").read_text().splitlines(True)[:40]))
    main(["evaluate", config.run_dir, "--data.source", str(folder / "some.jsonl"), "--json"])
    assert json.loads(capsys.readouterr().out)["rougeL"] > 0.8
    asked = [{"id": row["id"], "turns": row["turns"][:3]} for row in rows]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    main(["predict", config.run_dir, "--input", str(folder / "asked.jsonl"), "--output", str(folder / "out.jsonl")])
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    right = sum(answer["text"] == row["turns"][3] for answer, row in zip(answers, rows, strict=True))
    assert [answer["id"] for answer in answers] == [str(row["id"]) for row in rows] and right > 0.8 * len(rows)
    # Chat data is asked without the answers at its end.
    main(["predict", config.run_dir, "--input", str(folder / "some.jsonl"), "--output", str(folder / "chat.jsonl")])
    texts = [json.loads(line)["text"] for line in (folder / "chat.jsonl").read_text().splitlines()]
    right = sum(text == row["turns"][5] for text, row in zip(texts, conversations()[:40], strict=True))
    assert right > 0.8 * len(texts)


def test_a_separator_that_the_tokenizer_lacks_stops_the_run_before_it_trains(run, tmp_path):
    from flax_encoder.data.tokens.tokenizer import train_wordpiece

    _, config, _ = run
    (tmp_path / "tokenizer.json").write_text(train_wordpiece(WORDS * 3, 80).json)
    lacking = with_fields(config, data__tokenizer=str(tmp_path / "tokenizer.json"), run_dir=str(tmp_path / "run"))
    with pytest.raises(DataError, match=r"no token for '\|'. Give a text that it has as --data\.turn-separator"):
        train(lacking)


def test_settings_of_conversations_are_of_tasks_that_write():
    for fields in ({"data__history_column": "a"}, {"data__target_turns": "last"}, {"data__turn_separator": "|"}):
        with pytest.raises(ConfigError, match="is not read by the objective masked_lm"):
            check_task(with_fields(RunConfig(), **fields))
