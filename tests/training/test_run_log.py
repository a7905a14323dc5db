"""metrics.jsonl of a resumed run is that of one that never stopped; signals ask before they insist."""

import io
import json
import resource
import signal
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from flax_encoder.training.panel import run_panel, sparkline
from flax_encoder.training.run_log import Clock, RunLog, read_metrics, write_atomically
from flax_encoder.training.runtime import StopSignals


def write_run(run_dir, resume_step, steps, total=7):
    with RunLog(run_dir, steps=total, resume_step=resume_step) as log:
        for step in steps:
            log.write(step, {"loss": 10.0 / step})
        if steps[-1] == total:
            log.write(total, {"eval/loss": 3.0})


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path):
    """Lines after the resume step are dropped, and so is one that a kill cut short."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for run_dir in (whole, resumed):
        run_dir.mkdir()
    write_run(whole, 0, range(1, 8))
    write_run(resumed, 0, range(1, 6))
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write_run(resumed, 3, range(4, 8))
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in read_metrics(resumed)] == [1, 2, 3, 4, 5, 6, 7, 7]


def test_a_finished_run_opened_again_writes_its_last_evaluation_once(tmp_path):
    write_run(tmp_path, 0, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with RunLog(tmp_path, steps=7, resume_step=7, is_finished=True) as log:
        log.write(7, {"eval/loss": 3.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_that_is_refused_before_its_first_line_leaves_the_log_as_it_was(tmp_path):
    write_run(tmp_path, 0, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for is_finished in (True, False):
        with pytest.raises(ValueError), RunLog(tmp_path, steps=7, resume_step=3, is_finished=is_finished):
            raise ValueError
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 26, 60])
def test_lines_for_which_a_disk_has_no_room_are_written_when_it_has(tmp_path, size, caplog):
    """Though it takes a line by half; it is said once."""
    (tmp_path / "whole").mkdir()
    write_run(tmp_path / "whole", 0, range(1, 8))
    with RunLog(tmp_path, steps=7, resume_step=0) as log:
        with files_of_at_most(size):
            for step in range(1, 6):
                log.write(step, {"loss": 10.0 / step})
            assert (tmp_path / "metrics.jsonl").stat().st_size == size
        log.write(6, {"loss": 10.0 / 6})
        log.write(7, {"loss": 10.0 / 7})
        log.write(7, {"eval/loss": 3.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert [record.message for record in caplog.records if "its lines are kept" in record.message] == [
        f"{tmp_path / 'metrics.jsonl'} cannot be written (File too large): its lines are kept and written later."
    ]


def test_lines_for_which_there_is_no_room_at_the_end_are_an_error(tmp_path):
    with files_of_at_most(30), pytest.raises(OSError, match="the log's last lines are lost"):
        write_run(tmp_path, 0, range(1, 8))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_a_run_without_a_log_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_other_processes_write_nothing(tmp_path):
    with RunLog(tmp_path, steps=7, resume_step=0, is_main=False) as log:
        log.write(1, {"loss": 1.0})
        log.progress(1, {"loss": 1.0}, "loss", 0.0)
    assert list(tmp_path.iterdir()) == []


def test_writing_atomically_leaves_the_text_and_nothing_else(tmp_path):
    for text in ("old", json.dumps({"new": "ü"})):
        write_atomically(tmp_path / "file.json", text)
        assert (tmp_path / "file.json").read_text("utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_the_clock_counts_tokens_over_the_time_that_counts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock()
    with clock.waiting():
        now[0] += 1
    now[0] += 3
    with clock.paused():
        now[0] += 100
    clock.tokens, clock.steps = 800, 2
    assert clock.read() == {"tokens_per_second": 200.0, "data_wait_fraction": 0.25, "spent_seconds": 4.0}
    assert clock.seconds_per_step == 2.0
    assert clock.tokens == clock.steps == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.requested is None
        signal.raise_signal(number)
        assert stop.requested == number.name
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(0, 60))
def test_a_sparkline_is_a_character_a_share_of_the_values_from_the_least_to_the_most(values, width):
    line = sparkline(values, width, "01234567")
    assert len(line) == min(width, len(values))
    if len(line) == len(values) and len({*values}) > 1:
        heights = [int(c) for c in line]
        assert (heights[values.index(min(values))], heights[values.index(max(values))]) == (0, 7)
        ordered = sorted(range(len(values)), key=values.__getitem__)
        assert [heights[i] for i in ordered] == sorted(heights)


def test_a_falling_loss_is_drawn_as_a_falling_curve():
    assert sparkline([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([4.0, 2.0, 2.0, 0.0], 2) == "█▁" and sparkline([3.0] * 5, 3) == "▁▁▁"


@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize("is_plain", [False, True])
def test_a_panel_fits_its_terminal_and_says_what_is_asked_most(width, is_plain):
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    facts = ["accuracy 0.512", "12,300 tokens/s", "data wait 0.2%"]
    console.print(run_panel("runs/a", 120, 6000, [5.0, 4.0, 3.25], facts, "2:10", width, is_plain))
    lines = console.file.getvalue().splitlines()
    assert all(cell_len(line) <= width for line in lines) and "3.250" in "".join(lines)
    if width >= 80:
        assert "step 120 of 6,000" in lines[1] and "2:10 left" in lines[1] and "12,300 tokens/s" in lines[3]
        assert ("█▄▁" in lines[2]) == (not is_plain)
