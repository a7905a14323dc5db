"""A published folder as a run."""

import argparse

from flax_encoder.commands.screen import add_folder_options, folder_options

HELP = "turn a published folder into a run folder"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a published folder: config.json, weights and a tokenizer")
    parser.add_argument("out", help="an empty or new folder")
    add_folder_options(parser)


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.published.sentence_transformers import encoder_folder, is_sentence_folder
    from flax_encoder.runs.exchange import import_folder
    from flax_encoder.runs.vector_settings import write_sentence_files

    import_folder(encoder_folder(arguments.folder), arguments.out, **folder_options(arguments))
    if is_sentence_folder(arguments.folder):
        write_sentence_files(arguments.folder, arguments.out)
    print(f"wrote {arguments.out}; --init-from {arguments.out} starts from it")
