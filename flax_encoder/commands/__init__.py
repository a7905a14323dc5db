"""The command line, `python -m flax_encoder COMMAND`: a module a command, with its help, options and work."""

import argparse
import importlib
import pathlib
import sys

from flax_encoder.commands.screen import failing_clearly, obey_quiet

# The module of each command. Those that are not asked for are imported for their options alone.
COMMANDS = {
    "train": "train",
    "plan": "plan",
    "fill-mask": "fill_mask",
    "classify": "classify",
    "predict": "predict",
    "evaluate": "evaluate",
    "suite": "suite",
    "embed": "embed",
    "export": "export",
    "import": "import_folder",
    "plot": "plot",
    "report": "report",
    "attention": "attention",
    "map": "map",
    "prepare": "prepare",
    "inspect": "inspect",
    "verify": "verify",
    "completion": "completion",
}


def program() -> str:
    """How the command line was called: flax-encoder, or as a module of Python."""
    is_script = pathlib.Path(sys.argv[0]).stem == "flax-encoder"
    return "flax-encoder" if is_script else "python -m flax_encoder"


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; a command with a parser of its own leaves its options unparsed."""
    parser = argparse.ArgumentParser(prog=program(), description="Train text encoders and use them.")
    parser.add_argument("--quiet", action="store_true", help="show only results, warnings and errors, no progress; may "
                        "stand anywhere in a command")  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(f"flax_encoder.commands.{module_name}")
        has_own_parser = hasattr(module, "SETTINGS")
        command = commands.add_parser(name, help=module.HELP, add_help=not has_own_parser)
        command.set_defaults(run=module.run, has_own_parser=has_own_parser)
        if not has_own_parser:
            module.add_options(command)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    arguments, rest = parser.parse_known_args(obey_quiet(sys.argv[1:] if argv is None else argv))
    if arguments.has_own_parser:
        arguments.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    with failing_clearly():
        arguments.run(arguments)
