"""Nothing is lost, and nothing goes wrong in silence: damage, streams, signals, settings at their edges."""

import errno
import io
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_encoder.commands.recipe import HOME, find_recipe
from flax_encoder.commands.screen import failing_clearly, show
from flax_encoder.config import ConfigError, DataConfig, EncoderConfig, OptimizerConfig, RunConfig
from flax_encoder.data.pipeline import cache_folder, default_cache_dir
from flax_encoder.data.sources.records import DataError
from flax_encoder.data.store.store import is_store
from flax_encoder.runs.start import schedule_start
from flax_encoder.training.checkpoint import CheckpointError, Checkpoints, checkpoint_steps
from flax_encoder.training.console import lasting_streams, make_console
from flax_encoder.training.host import run_folder
from flax_encoder.training.run_log import NotFinite, RunLog, read_metrics
from flax_encoder.training.runtime import StopSignals
from tests.runs import ROOT, environment, losses, tiny, with_fields
from train import train

# Damage


@pytest.mark.parametrize("is_large", [False, True])
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_with_the_same_losses(
    corpus, tmp_path, one_device, monkeypatch, capsys, is_large
):
    if is_large:  # found while it is read
        monkeypatch.setattr("flax_encoder.training.checksums._SMALL_BYTES", 0)
    config = tiny(
        corpus, tmp_path / "run", steps=9, log_every=1, checkpoint_every=3, keep_checkpoints=5, model__num_layers=1
    )
    metrics, whole = train(config), losses(tmp_path / "run")
    folder = tmp_path / "run/checkpoints/9"
    path = max((p for p in folder.glob("optimizer/**/*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert train(config) == metrics and losses(tmp_path / "run") == whole
    said = capsys.readouterr().out
    assert said.count("checkpoints/9 is damaged: optimizer/") == 1 and "from step 6" in said
    assert (folder.parent / "9.damaged").is_dir() and folder.is_dir()


def test_a_new_run_that_is_refused_leaves_no_folder(corpus, tmp_path, one_device):
    config = tiny(corpus, tmp_path / "new/er/run", steps=3)
    with pytest.raises(DataError):
        train(with_fields(config, data__source=str(tmp_path / "nothing.txt")))
    assert not (tmp_path / "new").exists()
    (tmp_path / "kept").mkdir()
    with pytest.raises(DataError):
        train(with_fields(config, run_dir=str(tmp_path / "kept/run"), data__source=str(tmp_path / "nothing.txt")))
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_folder_that_cannot_be_made_or_written_to_is_refused_with_a_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run cannot be made: Not a directory\. Give another --run-dir"):
        run_folder(tmp_path / "file/run").__enter__()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere but to a read-only disk
    with pytest.raises(ConfigError, match=r"run is read-only\. Give another --run-dir"):
        run_folder(tmp_path / "run").__enter__()


BAD_LINES = [b"[1]", b"7", b"null", b'{"loss": 1.0}', b'{"step": "3"}', b'{"step": 1.5}', b'{"step": 3, "loss": NaN}',
             b'{"step": 3, "loss": Infinity}', b"\xff\xfe", b'{"step": 3', b"", b"[" * 5000, b'"\\ud800"']  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*BAD_LINES, b'{"step": 2, "loss": 1.5}']), max_size=6))
def test_damaged_lines_of_a_log_are_left_out_with_a_word_each(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("log")
    (folder / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    heard, handler = [], logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("flax_encoder.training.run_log")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        found = read_metrics(folder)
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    assert found == [{"step": 2, "loss": 1.5}] * (len(lines) - sum(line in BAD_LINES for line in lines))
    assert len(heard) == sum(line in BAD_LINES for line in lines)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_metric_is_written_that_is_not_finite(tmp_path, value):
    with RunLog(tmp_path, steps=3, resume_step=0) as log:
        log.write(1, {"loss": 1.0})
        with pytest.raises(NotFinite, match=r"at step 2, eval/loss is (nan|-?inf)"):
            log.write(2, {"eval/loss": value})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


# Streams and screens

TALKS = """
import sys, time
from flax_encoder.runs.start import schedule_start
from flax_encoder.training.console import lasting_streams, make_console
with lasting_streams():
    for i in range(2000):
        print("a line of text, and letters: \\u6f22 \\u2713", i, flush=True)
        make_console().print("[red]", i)
    open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize(("full_at", "num_said"), [((3,), 1), ((3, 6, 9), 2)])
def test_a_run_whose_disk_is_full_goes_on_and_fails_at_the_end_if_it_still_is(
    corpus, tmp_path, monkeypatch, one_device, capsys, full_at, num_said
):
    config = tiny(corpus, tmp_path / "run", steps=9, log_every=1, checkpoint_every=3, model__num_layers=1)
    commit = Checkpoints._commit

    def full(self, saved, step):
        if step in full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(self, saved, step)

    monkeypatch.setattr(Checkpoints, "_commit", full)
    if full_at == (3,):
        train(config)
    else:
        with pytest.raises(CheckpointError, match="9 could not be written, there is none before it; free some space"):
            train(config)
    said = capsys.readouterr().out
    assert "checkpoints/3 could not be written" in said and said.count("training goes on") == num_said
    assert sorted(losses(tmp_path / "run")) == list(range(1, 10))
    assert checkpoint_steps(tmp_path / "run") == {6, 9} - {*full_at}


@pytest.mark.parametrize("how", ["{} | head -1", "{} >&-", "{} >&- 2>&- <&-", "{} >/dev/full", "{} 2>&1 | true"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_state_of_standard_output_ends_the_work(tmp_path, how, encoding):
    command = f"'{sys.executable}' -c \"$TALKS\" '{tmp_path / 'end'}'"
    shell = ["bash", "-o", "pipefail", "-c", how.format(command)]
    variables = os.environ | {"TALKS": TALKS, "PYTHONIOENCODING": encoding}
    done = subprocess.run(shell, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "end").read_text() == "done"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if "head" in how or "full" in how:
        assert done.stderr.count("standard output can no longer be written") == 1


def test_a_letter_that_a_stream_lacks_is_escaped_and_a_paths_bytes_are_kept(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with lasting_streams():
        print("\u6f22", os.fsdecode(b"r\xc3\xbcn") if sys.getfilesystemencoding() == "ascii" else "r\udcc3\udcbcn")
    assert raw.getvalue() == b"\\u6f22 r\xc3\xbcn\n"


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)
MARKUP = st.sampled_from(["[red]", "[/usr/bin]", ":fire:", "[b]x[/b]", "\\[", "list[int]", "[link=a]"])


@settings(max_examples=60, deadline=None)
@given(st.lists(MARKUP | TEXTS, min_size=1, max_size=4), st.sampled_from(["0", "7", "20", "80"]))
def test_texts_labels_and_numbers_are_shown_as_they_are_on_any_screen(pieces, columns):
    text, out = "".join(pieces), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", columns)
        patch.setattr(sys, "stdout", out)
        show([{"label": text, "probability": 0.12345}], f"of {text}")
        make_console().print(text)
    first, *rest = out.getvalue().splitlines()
    assert first == f"of {text}" and rest[-1] == text and "0.1235" in out.getvalue()
    cells = "".join(line.split("│")[1].strip() for line in rest if line.startswith("│"))
    assert "│" in text or cells.replace(" ", "") == text


# Signals and processes


def test_a_terminal_that_closes_saves_like_a_signal_and_nohup_is_heeded():
    for previous in (signal.SIG_DFL, signal.SIG_IGN):
        before = signal.signal(signal.SIGHUP, previous)
        try:
            with StopSignals() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.requested == (None if previous == signal.SIG_IGN else "SIGHUP")
            assert signal.getsignal(signal.SIGHUP) == previous
        finally:
            signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("arguments", [["train.py", "--help"], ["-m", "flax_encoder", "plot", "x"]])
def test_ctrl_c_during_imports_ends_at_once_without_a_traceback(arguments):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if "tyro" in line or "argparse" in line or "jax" in line:  # the imports are under way
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in said


PARENT = """
import multiprocessing, os, sys, time
from flax_encoder.data.workers import serve_parent

def work(path):
    serve_parent()
    open(path, "w").write(str(os.getpid()))
    time.sleep(100)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1],)).start()
    time.sleep(100)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    note = tmp_path / "worker"
    command = [sys.executable, str(tmp_path / "parent.py"), str(note)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (note.exists() and note.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while is_alive(int(note.read_text())):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


UNGUARDED = """
from flax_encoder.config import DataConfig, EncoderConfig, RunConfig
from flax_encoder.data.pipeline import prepare_stores
from flax_encoder.data.sources.columns import Columns
import pathlib
data = DataConfig(source={source!r}, vocab_size=300, held_out_rate=0.1, cache_dir={cache!r})
stores = prepare_stores(data, pathlib.Path({out!r}), Columns(), workers=2, shard=(0, 1), progress=lambda message: None)
print(len(stores[0].train) > 200)
"""


@pytest.mark.parametrize("how", ["script", "stdin"])
def test_a_script_without_a_main_guard_prepares_text(tmp_path, how):
    for k in range(3):
        rows = [json.dumps({"text": f"words of number {i} and {i * i} here"}) for i in range(k * 100, k * 100 + 100)]
        (tmp_path / f"{k}.jsonl").write_text("\n".join(rows))
    text = UNGUARDED.format(source=f"{tmp_path}/*.jsonl", cache=str(tmp_path / "cache"), out=str(tmp_path / "store"))
    (tmp_path / "user.py").write_text(text)
    command, options = [sys.executable, "-"], {"input": text}
    if how == "script":
        command, options = [sys.executable, str(tmp_path / "user.py")], {}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=90, **options)  # fmt: skip
    assert done.stdout == "True\n", done.stderr


# Places and settings


@pytest.mark.parametrize("name", ["configs/quickstart.py", "quickstart"])
def test_a_recipe_is_found_by_name_or_path_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name).samefile(HOME / "configs/quickstart.py")
    (tmp_path / "quickstart").write_text("a file of the user's own comes first")
    assert find_recipe("quickstart") == pathlib.Path("quickstart")
    with pytest.raises(ConfigError, match=r"configs/ are: .*configs/quickstart\.py.*, in /"):
        find_recipe("nothing")


def test_a_file_beside_one_with_partial_in_its_name_is_no_store(tmp_path):
    (tmp_path / "t.jsonl").write_text("{}")
    (tmp_path / "t.jsonl.partial").touch()
    (tmp_path / "half.partial").mkdir()
    (tmp_path / "u.jsonl.partial").touch()
    assert [is_store(tmp_path / name) for name in ("t.jsonl", "u.jsonl", "half")] == [False, False, True]


def test_no_home_and_no_place_name_the_variable_to_set(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLAX_ENCODER_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(DataError, match="Set FLAX_ENCODER_CACHE"):
        cache_folder(DataConfig())
    monkeypatch.delenv("FLAX_ENCODER_CACHE")
    monkeypatch.setattr(pathlib.Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home.")))
    with pytest.raises(DataError, match="Set FLAX_ENCODER_CACHE"):
        default_cache_dir()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**64])
def test_a_seed_that_would_lose_bits_is_refused_with_the_rule(seed):
    with pytest.raises(ConfigError, match=rf"seed is a whole number from 0 to 4294967295 .*got {seed}"):
        RunConfig(seed=seed)
    assert RunConfig(seed=2**32 - 1).seed == 2**32 - 1


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize(
    ("section", "name"),
    [(OptimizerConfig, "learning_rate"), (OptimizerConfig, "muon_learning_rate"), (OptimizerConfig, "clip_norm"),
     (OptimizerConfig, "epsilon"), (EncoderConfig, "norm_epsilon"), (RunConfig, "budget_minutes")],
)  # fmt: skip
def test_no_setting_is_infinite_or_no_number(section, name, value):
    with pytest.raises(ConfigError, match=name.replace("muon_", "").replace("_rate", ".rate")):
        section(**{name: value})


def test_a_run_of_one_step_learns(corpus, tmp_path, one_device):
    train(tiny(corpus, tmp_path / "run", steps=1, log_every=1, model__num_layers=1))
    [line] = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert line["learning_rate"] == pytest.approx(3e-3)


def test_an_error_that_a_user_can_mend_is_one_message(capsys):
    with pytest.raises(SystemExit) as ended, failing_clearly():
        raise DataError("the rule, the values, the way out")
    assert ended.value.code == 1 and capsys.readouterr().err == "DataError: the rule, the values, the way out\n"


# A finished run that is made longer

CONSTANT = OptimizerConfig(learning_rate=3e-3, schedule="constant")
FALLS_LATE = OptimizerConfig(learning_rate=3e-3, schedule="wsd", decay_rate=0.25)


def short(corpus, run_dir, **fields):
    return tiny(corpus, run_dir, log_every=1, checkpoint_every=4, keep_checkpoints=9, model__num_layers=1, **fields)


def test_a_run_whose_rate_does_not_fall_is_made_longer_by_more_steps_alone(corpus, tmp_path, one_device):
    train(short(corpus, tmp_path / "whole", steps=12, optimizer=CONSTANT))
    train(short(corpus, tmp_path / "run", steps=8, optimizer=CONSTANT))
    train(short(corpus, tmp_path / "run", steps=12, optimizer=CONSTANT))
    got, want = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert got.keys() == want.keys() and [got[s] for s in range(9, 13)] != [got[s] for s in range(1, 5)]
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert rates[1:] == pytest.approx([3e-3] * 11)
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"4", "8", "12"}
    assert train(short(corpus, tmp_path / "run", steps=12, optimizer=CONSTANT)) is not None, "and is finished again"


def test_a_run_whose_rate_has_fallen_gets_a_new_schedule_if_that_is_asked_for(corpus, tmp_path, one_device):
    before = short(corpus, tmp_path / "run", steps=8)
    train(before)
    longer = with_fields(before, steps=16)
    with pytest.raises(ConfigError, match=r"would jump with 16 steps. --extend begins a new schedule at step 8"):
        train(longer)
    longer = with_fields(longer, extend=True)
    train(longer)
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    rates = [line["learning_rate"] for line in lines]
    assert [line["step"] for line in lines] == [*range(1, 17)]
    assert rates[8:] == rates[:8] and rates[7] < rates[9]  # the same schedule over as many steps
    whole = losses(tmp_path / "run")
    for step in ("12", "16"):
        (tmp_path / "run/checkpoints" / step).rename(tmp_path / step)
    (tmp_path / "12").rename(tmp_path / "run/checkpoints/12")
    train(longer)  # resumed within its second schedule, to the bit
    assert losses(tmp_path / "run") == whole
    train(with_fields(longer, extend=False))  # finished: the same, whether it is said again or not


def test_wsd_goes_on_until_it_has_begun_to_fall(corpus, tmp_path, one_device):
    config = short(corpus, tmp_path / "run", steps=8, optimizer=FALLS_LATE)
    assert schedule_start(config, with_fields(config, steps=16), 4) == 0
    with pytest.raises(ConfigError, match="--extend begins a new schedule at step 8"):
        schedule_start(config, with_fields(config, steps=16), 8)
    with pytest.raises(ConfigError, match=r"with masking.last_rate.*--init-from"):
        fixed = with_fields(config, masking__last_rate=0.1)
        schedule_start(fixed, with_fields(fixed, steps=16), 4)
    with pytest.raises(ConfigError, match="extend needs a run to make longer"):
        train(with_fields(config, extend=True))
