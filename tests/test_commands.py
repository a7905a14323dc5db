"""What all commands share: their page, their exit statuses, completion in a shell; and how objects show themselves."""

import pathlib
import re
import shutil
import subprocess

import pytest

from flax_encoder.commands import COMMANDS, main
from flax_encoder.commands.completion import completion_script
from flax_encoder.published.load import load_pretrained
from flax_encoder.runs.load import load

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"


def test_the_page_of_commands_names_each_of_them():
    page = (ROOT / "docs/commands.md").read_text("utf-8")
    table = page.split("```bash")[0]
    named = [name for row in re.findall(r"^\| (`.*?`) \|", table, re.M) for name in re.findall(r"`([a-z-]+)`", row)]
    assert sorted(named) == sorted(COMMANDS)


@pytest.mark.parametrize(
    "status, arguments",
    [
        (1, ["predict", "no/such/folder", "--input", "x.txt", "--output", "y.jsonl"]),
        (1, ["train", "--objective", "nonsense"]),
        (1, ["report", "no/such/run"]),
        (2, ["predict"]),
        (2, ["nonsense"]),
        (2, ["train", "--nonsense", "1"]),
        (2, ["train", "--steps", "many"]),
        (2, ["train", "--steps", "0"]),
        (0, ["export", "--help"]),
        (0, ["train", "--help"]),
    ],
)
def test_exit_statuses_are_those_of_the_page(status, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == status, capsys.readouterr().err
    assert "Traceback" not in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_a_shell_completes_commands_options_recipes_and_choices(tmp_path):
    if (bash := shutil.which("bash")) is None:
        pytest.skip("completes by bash, which is not here")
    asked = {
        "tr": {"train"},
        "train --config quickst": {"quickstart", "quickstart_classify"},
        "train --objective span": {"span_corruption"},
        "plan --mesh.fs": {"--mesh.fsdp"},
        "plan --hardw": {"--hardware"},
        "evaluate --data.text-c": {"--data.text-column"},
        "train --model.no-scan": {"--model.no-scan-layers"},
        "export --dtype b": {"bfloat16"},
        "suite glu": {"glue"},
        "predict runs/": set(),  # names of files, which bash completes
    }
    script = completion_script() + "".join(
        f'COMP_WORDS=(flax-encoder {line}); COMP_CWORD={len(line.split())}; _flax_encoder; echo "${{COMPREPLY[*]}}"\n'
        for line in asked
    )
    done = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert [set(line.split()) for line in done.stdout.split("\n")[:-1]] == list(asked.values())


@pytest.mark.parametrize("folder", ["classification", "masked_lm"])
def test_runs_models_configs_and_tokenizers_show_themselves_in_a_line(folder):
    run = load(GOLDEN / "runs" / folder)
    shown = [repr(x) for x in (run, run.model, run.tokenizer, run.config.model, run.model.encoder)]
    assert all("\n" not in text and len(text) < 400 for text in shown)
    for text in (shown[0], shown[1], shown[4]):
        assert "1 layer of width 16" in text and "parameters" in text
    assert f"step {run.step}" in shown[0]


@pytest.mark.parametrize("folder", ["text_to_text/t5", "bert-classification"])
def test_published_models_show_themselves_in_a_line(folder):
    pretrained = load_pretrained(GOLDEN / folder)
    for text in (repr(pretrained), repr(pretrained.model)):
        assert "\n" not in text and len(text) < 700
