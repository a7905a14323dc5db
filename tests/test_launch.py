"""The files that start a run elsewhere: they parse, and what they give to train.py are settings that it has."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from flax_encoder.commands.recipe import parse_run_config
from tests.runs import ROOT

SCRIPTS = sorted(ROOT.glob("launch/*.s*[hb]*"))
DOCUMENTS = sorted(ROOT.glob("launch/*.yaml"))


def check_command(words: list[str]) -> None:
    config = parse_run_config(words, default=str(ROOT / "configs/quickstart.py"))
    assert config.stall_seconds == 1800


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_give_settings_that_there_are(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text().replace("\\\n", " ")
    [command] = re.findall(r"^[^#\n]*python train\.py (.*?)(?:\$arguments| \"\$@\")", text, re.M)
    check_command(shlex.split(re.sub(r'"?\$\w+"?', "4", command)))
    [example] = re.findall(r"^#.*?(--config .*)$", text, re.M)
    parse_run_config(shlex.split(example), default=str(ROOT / "configs/quickstart.py"))


def commands_of(node):
    """Every command line of train.py in a document: `command` with `args`, or a line of a script."""
    if isinstance(node, dict):
        if "args" in node:
            yield [*node["command"], *node["args"]]
        for value in node.values():
            yield from commands_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from commands_of(value)
    elif isinstance(node, str) and "train.py" in node and "\n" in node:
        yield shlex.split(node)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_parse_and_give_settings_that_there_are(path: pathlib.Path):
    document = yaml.safe_load(path.read_text())
    [command] = commands_of(document)
    assert command[:2] == ["python", "train.py"]
    check_command(command[2:])


def test_as_many_pods_as_processes_and_as_many_chips_as_the_slice_has():
    document = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    [command] = commands_of(document)
    processes = int(command[command.index("--mesh.num-processes") + 1])
    assert job["parallelism"] == job["completions"] == processes
    chips = processes * int(pod["containers"][0]["resources"]["limits"]["google.com/tpu"])
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert chips == rows * columns
