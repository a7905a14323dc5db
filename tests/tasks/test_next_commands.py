"""What a run says to type next can be typed: a file of pairs has columns, and they are named."""

import argparse
import dataclasses
import json
import shlex
from types import SimpleNamespace

import pytest
import tyro

from flax_encoder.commands import evaluate, predict
from flax_encoder.config import DataConfig
from flax_encoder.data.pipeline import open_data
from flax_encoder.data.sources.opening import open_source
from flax_encoder.runs.ask_file import open_input
from flax_encoder.runs.load import load
from flax_encoder.tasks import TASKS
from flax_encoder.tasks.document_model import export_commands
from tests.runs import ROOT, TINY, with_fields

NAMED = {"data__text_column": "my text", "data__text_pair_column": "other", "data__label_column": "kind"}


@pytest.mark.parametrize(
    ("objective", "settings", "of_row", "num_texts"),
    [
        ("classification", {}, lambda a, b, i: {"text": a, "label": "xy"[i % 2]}, 1),
        ("classification", NAMED, lambda a, b, i: {"id": a, "my text": a, "other": b, "kind": "xy"[i % 2]}, 2),
        ("regression", {}, lambda a, b, i: {"sentence1": a, "sentence2": b, "score": i / 40}, 2),
        ("multiple_choice", {}, lambda a, b, i: {"question": a, "choices": [a, b], "label": i % 2}, 3),
        ("multiple_choice", {}, lambda a, b, i: {"sent1": a, "sent2": b, "ending0": a, "ending1": b, "label": 0}, 3),
        ("question_answering", {}, lambda a, b, i: {"query": a, "passage": b, "answers": []}, 2),
    ],
)
def test_commands_read_a_file_such_as_the_run_learned_from(tmp_path, objective, settings, of_row, num_texts):
    path, task = tmp_path / "rows.jsonl", TASKS[objective]
    rows = [of_row(f"the list of each item {i}", f"a value is given in order {i}", i) for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_fields(TINY, objective=objective, data__source=str(path), data__row_length=64, **settings)
    data = open_data(config, task.reading)
    lines = task.commands(SimpleNamespace(config=config, task=task), data)
    *one, asked, scored = [shlex.split(line)[3:] for line in lines]
    assert [command[0] for command in one] == (["classify"] if num_texts == 1 else [])
    parser = argparse.ArgumentParser()
    predict.add_options(parser)
    options = parser.parse_args(asked[1:])
    assert asked[0] == "predict" and options.input == ("texts.txt" if num_texts == 1 else "pairs.jsonl")
    columns = {name: getattr(options, name) for name in ("text_column", "text_pair_column")}
    record = next(open_input(str(path), DataConfig(**columns), task.reading.columns))
    assert len(record.texts) == num_texts
    read = tyro.cli(evaluate.EvaluateArguments, args=scored[1:]).data
    read = dataclasses.replace(read, source=str(path))
    assert next(open_source(str(path), read, task.reading.columns, tmp_path).records()).value is not None


def test_export_is_offered_where_a_published_family_has_the_model():
    run = load(ROOT / "tests/golden/runs/classification")
    assert export_commands(run, "OUT") == []  # rotary positions, and norms after the residual sums
    bert = with_fields(run.config, model__position="learned", model__embedding_norm=True, pooling="cls")
    [line] = export_commands(dataclasses.replace(run, config=bert), "OUT")
    assert line.startswith("python -m flax_encoder export ") and line.endswith(" OUT")
