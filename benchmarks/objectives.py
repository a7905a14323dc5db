"""The table of docs/objectives.md: each objective with its law, its recipe and what was measured of it.

    python benchmarks/objectives.py                            # print the page
    python benchmarks/objectives.py --write docs/objectives.md

A row is written here and nowhere else. Every figure of it stands in the header of its recipe or in LOG.md, whichever
`source` names, its law is a test, and every objective has a row: or else the page is not written.
"""

import argparse
import ast
import pathlib
import re
import sys
from typing import NamedTuple

from flax_encoder.tasks import TASKS

ROOT = pathlib.Path(__file__).parents[1]
NOT_RUN, NOT_KEPT = "not run", "not kept"


class Row(NamedTuple):
    objective: str
    """A name in TASKS, with what is set besides if that makes it another row."""
    law: str
    """A test, FILE::NAME."""
    recipe: str
    """A file of configs/, without its end."""
    data: str
    minutes: str
    result: str
    baseline: str
    """What can be had without it."""
    peer: str = NOT_RUN
    """The same by another program."""
    source: str = ""
    """What the figures stand in: empty is the recipe, or a file."""


ROWS = (
    Row(
        "masked_lm", "tests/data/test_masking.py::test_choice_equals_a_plain_reference", "quickstart",
        "CPython's help and docstrings", "5 min 32 s", "masked accuracy 0.421", "two neighbours' counts 0.290",
    ),
    Row(
        "classification", "tests/tasks/test_objectives.py::test_packed_documents_are_classified_as_if_alone",
        "classify",
        "1,584 rated movie snippets", NOT_KEPT, "accuracy 0.744", NOT_KEPT, "transformers 0.740",
    ),
    Row(
        "classification with distillation, by a teacher's answers",
        "tests/tasks/test_labels_and_numbers.py::"
        "test_the_loss_of_shares_is_the_cross_entropy_with_them_and_of_whole_ones_that_of_labels", "classify",
        "1,600 labelled movie snippets, 8,166 without labels", "2 min 47 s, 1 min 39 s and 49 s of processor time",
        "accuracy 0.766, 0.769, 0.761 of three seeds; MiniLM, the teacher, 0.811",
        "as many steps with the labels alone 0.729, 0.715, 0.719; three epochs of them 0.719, 0.725, 0.734",
    ),
    Row(
        "classification of pairs, to rerank",
        "tests/tasks/test_objectives.py::test_packed_documents_are_classified_as_if_alone", "rerank",
        "9,049 descriptions and Wikipedia leads", "2 min 15 s of processor time",
        "accuracy at 1 0.719 (0.717 to 0.750), nDCG@10 0.823 (0.821 to 0.838) of a search's ten first, three seeds",
        "the search's order, by TF-IDF: 0.655 and 0.784",
    ),
    Row(
        "multi_label",
        "tests/tasks/test_labels_and_numbers.py::test_the_loss_of_labels_is_the_mean_binary_cross_entropy_of_each",
        "multi_label", "2,566 addresses and names", "27", "micro F1 0.682", "most frequent label 0.175",
    ),
    Row(
        "regression", "tests/tasks/test_labels_and_numbers.py::test_the_loss_of_numbers_is_the_squared_error",
        "regression", "5,749 pairs of the STS benchmark", "16", "Pearson 0.765, squared error 0.95",
        "mean of training 0 and 2.36",
    ),
    Row(
        "token_classification",
        "tests/tasks/test_token_classification.py::test_packed_rows_equal_one_text_a_row_forward_and_gradient", "ner",
        "2,566 US addresses", "5 of processor time", "F1 of entities 0.908", "most frequent tag of each word 0.509",
        "transformers 0.886 to 0.895, here 0.883 to 0.896, five seeds on the 675 of the test",
    ),
    Row(
        "question_answering",
        "tests/tasks/test_question_answering.py::test_packed_windows_learn_and_answer_as_if_alone",
        "question_answering", "729 questions of SQuAD 1.1", "16", "F1 0.468, exact match 0.354",
        "sentence most like the question 0.199 and 0.004",
    ),
    Row(
        "multiple_choice", "tests/tasks/test_multiple_choice.py::test_packed_choices_are_weighed_as_if_alone",
        "multiple_choice", "3,400 Wikipedia leads and descriptions", "5", "accuracy 0.988", "most common words 0.935",
    ),
    Row(
        "masked_lm with distillation", "tests/tasks/test_distillation.py::test_the_loss_is_the_formula_of_its_paper",
        "distillation", "9,833 Wikipedia leads; a published BERT of 2 layers", "2 min 25 s and 2 min 0 s",
        "masked-LM loss 6.199, 6.233, 6.230 of three seeds: worse than the start alone; the teacher itself has 8.08",
        "the same start without a teacher's loss 5.842, 5.874, 5.907; begun anew 7.160 and 7.178",
    ),
    Row(
        "causal_lm", "tests/tasks/test_causal_lm.py::test_no_token_sees_a_later_one_or_another_document", "causal_lm",
        "CPython's help and docstrings", "2 min 19 s, then 3 min 20 s",
        "next token 0.229; then masked-LM loss 4.468, accuracy 0.279",
        "the token before 0.198; masked words alone, as many steps, 4.610 and 0.282",
    ),
    Row(
        "next_sentence",
        "tests/tasks/test_two_sentences.py::test_pairs_are_segments_of_the_texts_in_the_order_that_they_say",
        "next_sentence", "CPython's help and docstrings", "2 min 46 s", "pairs 0.699, masked accuracy 0.178",
        "more frequent answer 0.506, two neighbours' counts 0.274",
    ),
    Row(
        "sentence_order",
        "tests/tasks/test_two_sentences.py::test_the_loss_is_that_of_masked_words_plus_that_of_the_pairs",
        "sentence_order", "CPython's help and docstrings", "4 min 18 s",
        "pairs 0.494: not learned; masked accuracy 0.156", "more frequent answer 0.506, most frequent token 0.046",
    ),
    Row(
        "replaced_token_detection",
        "tests/tasks/test_replaced_token_detection.py::test_the_loss_equals_the_formula_of_the_papers",
        "replaced_tokens", "9,033 Wikipedia leads; 1,000 with topics", "20",
        "topics 0.362, 0.327, 0.382 of three seeds: worse", "as many minutes of masked words 0.550, 0.541, 0.550",
    ),
    Row(
        "autoencoder",
        "tests/tasks/test_autoencoder.py::test_the_decoder_sees_only_its_documents_vector_and_the_text_before",
        "autoencoder", "13,197 sentences of the STS benchmark", "2 min 44 s",
        "Spearman 0.401: worse; written tokens 0.202; at 3e-5 by cls vectors 0.515: worse, and 0.056",
        "the encoder before 0.620, by cls vectors 0.577; the token before 0.249",
    ),
    Row(
        "contrastive", "tests/tasks/test_contrastive_loss.py::test_the_loss_is_the_slow_ones_whatever_texts_are_equal",
        "contrastive", "7,606 descriptions and Wikipedia leads", "8", "nDCG@10 0.797, 0.803, 0.805 of three seeds",
        "TF-IDF 0.732, before training 0.415",
    ),
    Row(
        "text_to_text", "tests/tasks/test_text_to_text_task.py::test_packed_pairs_learn_as_if_alone",
        "translate_en_fr", "33,448 pairs of LibreOffice's help, English to French", "6", "BLEU 19.8, chrF 44.8",
        "the source itself 5.7 and 26.8", "transformers' Marian, a core and 6 minutes of its own: 1.9 and 15.9",
    ),
    Row(
        "text_to_text with recurrent layers",
        "tests/nn/test_recurrent_decoder.py::test_packed_targets_equal_each_by_hand_forward_and_gradient",
        "translate_recurrent", "33,448 pairs of LibreOffice's help, English to French", "8 min 35 s",
        "BLEU 19.8, chrF 43.3", "the source itself 5.7 and 26.8",
    ),
    Row(
        "text_to_text of conversations",
        "tests/data/test_dialogue.py::test_a_long_conversation_loses_its_oldest_tokens_and_the_newest_turn_last",
        "dialogue", "801 conversations of ChatterBot", "2 min 9 s", "BLEU 2.3, chrF 9.5: no better than an echo",
        "the newest turn itself 1.9 and 13.2",
    ),
    Row(
        "text_to_text of summaries", "tests/tasks/test_text_to_text_task.py::test_packed_pairs_learn_as_if_alone",
        "summarize", "9,360 Wikipedia leads and descriptions", "4 min 40 s and 6 min 58 s of processor time",
        "ROUGE-1, -2 and -L 0.325, 0.145 and 0.313, with 4 beams; one seed",
        "first sentence 0.310, 0.166 and 0.285; a rule for these texts, six words after the first \"is\" or \"was\", "
        "0.423, 0.239 and 0.407",
    ),
    Row(
        "span_corruption", "tests/data/test_span_corruption.py::test_input_and_targets_together_are_the_text",
        "span_corruption", "CPython's help and docstrings", "3 min 50 s of processor time", "tokens right 0.356",
        "the token before 0.216, most frequent token 0.077",
    ),
    Row(
        "span_corruption by UL2's denoisers",
        "tests/data/test_span_corruption.py::test_for_every_denoiser_the_mode_input_and_targets_together_are_the_text",
        "ul2", "CPython's help and docstrings", "4 min 21 s", "tokens right 0.194",
        "the token before 0.110, most frequent token 0.042",
    ),
)

HEADER = """# Objectives

What a measured run of each objective reached on 2 CPU cores, beside a baseline. The law is what a test holds the code
to; the recipe is a file of `configs/`, whose header has the settings and the spread. [Tasks](tasks.md) describes each
task's file and answers. `python benchmarks/objectives.py --write docs/objectives.md` writes this page.

| objective | law | recipe | data | minutes | result | baseline | peer |
|---|---|---|---|---|---|---|---|
"""


def page(rows: tuple[Row, ...] = ROWS) -> str:
    """The page, Markdown."""
    lines = []
    for row in rows:
        file, _, test = row.law.partition("::")
        law = f"{test.removeprefix('test_').replace('_', ' ')} (`{file.rpartition('/')[2]}`)"
        cells = (f"`{row.objective}`", law, f"`{row.recipe}`", *row[3:8])
        lines.append(f"| {' | '.join(cells)} |\n")
    return HEADER + "".join(lines)


def problems(rows: tuple[Row, ...] = ROWS) -> list[str]:
    """What of the rows is not so: laws that are no test, recipes that are no file, figures that their source lacks."""
    found = []
    for row in rows:
        name = row.objective.split()[0]
        if name not in TASKS:
            found.append(f"{row.objective}: {name} is no objective")
        file, _, test = row.law.partition("::")
        if not (ROOT / file).is_file() or test not in _functions(ROOT / file):
            found.append(f"{row.objective}: {row.law} is no test")
        recipe = ROOT / "configs" / f"{row.recipe}.py"
        if not recipe.is_file():
            found.append(f"{row.objective}: there is no {recipe.relative_to(ROOT)}")
            continue
        source = (ROOT / row.source).read_text("utf-8") if row.source else ast.get_docstring(
            ast.parse(recipe.read_text("utf-8")))  # fmt: skip
        known = set(_figures(source or ""))
        cells = (row.minutes, row.result, row.baseline, row.peer)
        where, figures = row.source or recipe.name, _figures(" ".join(cells))
        found += [f"{row.objective}: {figure} is not in {where}" for figure in figures if figure not in known]
    return found


def missing(rows: tuple[Row, ...] = ROWS) -> list[str]:
    """Objectives without a row."""
    return [name for name in TASKS if not any(row.objective.split()[0] == name for row in rows)]


def _functions(path: pathlib.Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


def _figures(text: str) -> list[str]:
    """Numbers with a decimal point, and whole ones that stand apart from words."""
    return re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?![\w])", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="FILE", help="write the page there instead of printing it")
    arguments = parser.parse_args()
    if found := [*problems(), *(f"{name} has no row" for name in missing())]:
        sys.exit("\n".join(found))
    if arguments.write is None:
        print(page(), end="")
    else:
        pathlib.Path(arguments.write).write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
