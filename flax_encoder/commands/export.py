"""A run as a folder that other libraries open."""

import argparse
from typing import get_args

from flax_encoder.commands.screen import add_folder_options, folder_options
from flax_encoder.config import ConfigError
from flax_encoder.config.model import PoolingMode

HELP = "write a run as a folder for transformers, sentence-transformers or PEFT, or as a StableHLO file"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="a run folder, one checkpoint in it, or a published folder")
    parser.add_argument("out", help="an empty or new folder; with --stablehlo a file")
    add_folder_options(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                        help="dtype of the weights")  # fmt: skip
    parser.add_argument("--model-type", help="the family to write (default: the first that can express the model)")
    parser.add_argument("--pooling", nargs="+", choices=get_args(PoolingMode), help="write a sentence-transformers "
                        "folder that makes one vector of a text's tokens in this way, or concatenates several "
                        "(runs that make vectors, and folders imported from sentence-transformers, have their "
                        "own)")  # fmt: skip
    parser.add_argument("--part", help="the model to write, of a run that trains several: generator, of "
                        "replaced_token_detection (default: the encoder)")  # fmt: skip
    parser.add_argument("--adapter", action="store_true", help="write only the run's LoRA adapters, as a folder that "
                        "PEFT opens beside the model that they were trained on")  # fmt: skip
    parser.add_argument("--base", help="with --adapter: that model's published folder (default: the run's init_from)")
    parser.add_argument("--stablehlo", action="store_true", help="write OUT as one file of StableHLO, which needs only "
                        "`jax.export.deserialize` to run on CPUs, GPUs and TPUs")  # fmt: skip
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=None, help="with --pooling: "
                        "scale vectors to length 1")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    from flax_encoder.published.sentence_transformers import encoder_folder
    from flax_encoder.runs.exchange import export_run
    from flax_encoder.runs.vector_settings import own_settings, write_sentence_files

    if arguments.base is not None and not arguments.adapter:
        raise ConfigError("--base needs --adapter: give it too, or leave --base out.")
    if arguments.adapter:
        from flax_encoder.runs.adapter import export_adapter

        count = export_adapter(arguments.run_dir, arguments.out, arguments.base)
        print(f"wrote {arguments.out}, adapters of {count} linear maps, for PEFT")
        return
    if arguments.stablehlo:
        from flax_encoder.runs.load import load
        from flax_encoder.runs.stablehlo import export_stablehlo

        loaded = load(arguments.run_dir, **folder_options(arguments)).part(arguments.part)
        names = export_stablehlo(loaded, arguments.out)
        print(f"wrote {arguments.out}, a program of {', '.join(names)}")
        return
    is_sentence = arguments.pooling is not None or own_settings(arguments.run_dir) is not None
    if arguments.normalize is not None and not is_sentence:
        raise ConfigError("--normalize is for sentence-transformers folders: give --pooling too, or leave it out.")
    architecture = export_run(
        encoder_folder(arguments.run_dir),
        arguments.out,
        arguments.dtype,
        arguments.model_type,
        encoder_only=is_sentence,
        part=arguments.part,
        **folder_options(arguments),
    )
    if is_sentence:
        write_sentence_files(arguments.run_dir, arguments.out, arguments.pooling, arguments.normalize)
    print(f"wrote {arguments.out}, a {architecture}{' for sentence-transformers' if is_sentence else ''}")
