"""Answers for a whole file."""

import argparse
import functools
import itertools
import json
import pathlib
import sys
import time

from flax_encoder.commands.screen import (
    add_generation_options,
    add_processes_option,
    generation_options,
    positive_count,
    saying,
)
from flax_encoder.config import ConfigError, DataConfig, GenerationConfig
from flax_encoder.config.rules import counted
from flax_encoder.training.console import make_news_console

HELP = "answer each text of a file: a label, score, tags, answer, choice or text, by the task of the model"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run, one of its checkpoints, or a published folder with a head")
    parser.add_argument(
        "--input", required=True, help="file of texts: .txt (one per line), .jsonl, .csv, .parquet ..., its URL, or - "
        "for standard input"
    )
    parser.add_argument("--output", required=True, help="file for the answers, in the same order: .jsonl, "
                        ".csv, its URL (gs://, s3://), or - for standard output")  # fmt: skip
    # Also by the names that training uses, so that the options in an error message work here.
    parser.add_argument("--text-column", "--data.text-column", dest="text_column", help="the column of the text "
                        "(default: guessed by its name)")  # fmt: skip
    parser.add_argument("--text-pair-column", "--data.text-pair-column", dest="text_pair_column",
                        help="the column of the second text of a pair")  # fmt: skip
    parser.add_argument("--history-column", "--data.history-column", dest="history_column", help="text to text: the "
                        "column with a list of turns")  # fmt: skip
    parser.add_argument("--skip-bad-rows", "--data.skip-bad-rows", dest="skip_bad_rows", action="store_true",
                        help="leave out rows that cannot be read, and count them")  # fmt: skip
    parser.add_argument("--top", type=positive_count, help="also give this many of the likeliest labels")
    parser.add_argument("--probabilities", action="store_true", help="give the probability of every label")
    parser.add_argument("--texts", action="store_true", help="give each text beside its answer, so that a model can "
                        "learn from the file")  # fmt: skip
    parser.add_argument("--squad", metavar="FILE", help="question answering: also write the answers to FILE by the ids "
                        "of their questions, as SQuAD's evaluation reads them")  # fmt: skip
    parser.add_argument("--prefix", help="text to text: text that is put before every source (default: the run's "
                        "data.prefix)")  # fmt: skip
    add_generation_options(parser)
    parser.add_argument("--objective", help="the task to open a published folder for (default: the task of its head)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of matrix products (default: the "
                        "model's)")  # fmt: skip
    parser.add_argument("--allow-unused", action="store_true", help="leave out tensors of a published folder that no "
                        "part of the model reads")  # fmt: skip
    add_processes_option(parser)


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.runs.processes import together

    if arguments.input == "-" and arguments.num_processes > 1:
        raise ConfigError(
            "several processes must read the same input, but each has its own standard input: give --input FILE."
        )
    with together(arguments.num_processes) as is_first:
        _run(arguments, is_first)


def _run(arguments: argparse.Namespace, is_first: bool) -> None:
    from flax_encoder.data.sources.opening import files_identity
    from flax_encoder.runs.ask_file import AnswerFile, identity_of, open_input, output_file, shown
    from flax_encoder.runs.ask_together import predict_together
    from flax_encoder.runs.elsewhere import local_folder
    from flax_encoder.runs.load import load
    from flax_encoder.runs.processes import as_first_has_it
    from flax_encoder.training.runtime import set_up_runtime

    set_up_runtime()
    folder = pathlib.Path(local_folder(arguments.folder))
    loaded = load(
        folder, objective=arguments.objective, allow_unused=arguments.allow_unused,
        dtype=arguments.dtype,
    )  # fmt: skip
    generation = generation_options(arguments)
    if generation != GenerationConfig() or arguments.prefix is not None:
        loaded = loaded.with_settings(generation, arguments.prefix)
    columns = loaded.task.reading.columns
    if arguments.text_pair_column is not None and columns.max_texts < 2:
        raise ConfigError(f"--text-pair-column is for tasks that read pairs: {loaded.config.objective} reads one text.")
    if arguments.squad is not None and (columns.value != "answers" or not arguments.output.endswith(".jsonl")):
        raise ConfigError(
            f"--squad needs a model of question_answering, and --output FILE.jsonl: this model is of "
            f"{loaded.config.objective}, --output {arguments.output}."
        )
    config = DataConfig(
        source=arguments.input, text_unit="line", text_column=arguments.text_column,
        text_pair_column=arguments.text_pair_column, history_column=arguments.history_column,
        skip_bad_rows=arguments.skip_bad_rows,
    )  # fmt: skip
    tell = make_news_console(stderr=True, is_shown=is_first).print
    records = open_input(arguments.input, config, columns, tell)
    options = (arguments.top, arguments.probabilities)
    ask = functools.partial(predict_together, loaded, with_texts=arguments.texts)
    if arguments.output == "-":
        for answer in ask(records):
            if is_first:
                print(json.dumps(shown(answer, *options), ensure_ascii=False))
        return
    if not is_first:
        done = as_first_has_it(0)
        for _ in ask(itertools.islice(records, done, None)):
            pass  # the first process writes it
        return
    told = (loaded.config.generation, loaded.config.data.prefix, loaded.config.model.dtype, arguments.texts)
    what = (str(folder.resolve()), loaded.step, files_identity(arguments.input), columns, config, options, told)
    with output_file(arguments.output) as path:
        out = AnswerFile(path, identity_of(what))
        done = as_first_has_it(0 if arguments.input == "-" else out.num_done())
        if done:
            print(f"continuing after {done:,} answers", file=sys.stderr)
        began, empty = time.monotonic(), 0

        def progress_line(n: int) -> str:
            rate = (n - done) / (time.monotonic() - began)
            return f"{counted(n, 'answer')}, {rate:{',.0f' if rate >= 10 else '.2g'}} a second"

        def answers():
            nonlocal empty
            for answer in ask(itertools.islice(records, done, None)):
                empty += "error" in answer
                yield shown(answer, *options)

        with saying() as say:
            total = out.write(answers(), done, lambda n: say(progress_line(n)))
        if arguments.squad is not None:
            _write_by_id(path, arguments.squad)
    print(f"wrote {arguments.output}: {counted(total, 'answer')}{_about_empty(empty)}")


def _about_empty(count: int) -> str:
    return f"; {count:,} text{'s were' if count > 1 else ' was'} empty" if count else ""


def _write_by_id(answers: pathlib.Path, squad: str) -> None:
    from flax_encoder.runs.ask_file import answers_by_id, output_file

    by_id = answers_by_id(answers)
    with output_file(squad) as path:
        path.write_text(json.dumps(by_id, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {squad}: {len(by_id):,} answers by id")
