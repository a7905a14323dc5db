"""docs/objectives.md is what its command makes, of laws that are tests and figures that stand in the recipes."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("objectives_page", ROOT / "benchmarks/objectives.py")
objectives = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(objectives)


def test_the_page_is_what_the_command_makes_and_every_row_is_so():
    assert objectives.problems() == [] and objectives.missing() == []
    assert (ROOT / "docs/objectives.md").read_text("utf-8") == objectives.page()


def test_a_row_that_is_not_so_is_named():
    row = objectives.ROWS[0]
    wrong = (
        row._replace(objective="guessing"), row._replace(law=f"{row.law}_not"), row._replace(recipe="none"),
        row._replace(result=f"{row.result} and 0.98765"),
    )  # fmt: skip
    for one, message in zip(wrong, ("is no objective", "is no test", "there is no", "0.98765 is not in"), strict=True):
        assert any(message in problem for problem in objectives.problems((one,)))
