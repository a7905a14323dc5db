"""completion: what a shell runs to complete this program's commands, options, choices and recipes."""

import argparse
import dataclasses
import importlib
import shlex

HELP = "print a script that makes bash or zsh complete commands, options and recipes"

_SCRIPT = """\
_flax_encoder() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
  if [ "$COMP_CWORD" = 1 ]; then words={commands}
  else
    case "$before" in
{choices}
      *) case "$word" in -*) case "${{COMP_WORDS[1]}}" in
{options}
      esac ;; esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _flax_encoder flax-encoder
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell; append its script to ~/.bashrc or "
                        "~/.zshrc")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    if arguments.shell == "zsh":
        print("autoload -U +X compinit && compinit && autoload -U +X bashcompinit && bashcompinit")
    print(completion_script(), end="")


def completion_script() -> str:
    """The script for bash, and for zsh with `bashcompinit`. Where it knows no word, the shell completes file names."""
    from flax_encoder.commands import COMMANDS, make_parser
    from flax_encoder.commands.recipe import recipe_names
    from flax_encoder.tasks import TASKS

    [commands] = (a.choices for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    options: list[tuple[str, list[str]]] = []
    choices = {"--config": recipe_names(), "--objective": list(TASKS)}
    for name, parser in commands.items():
        module = importlib.import_module(f"flax_encoder.commands.{COMMANDS[name]}")
        parser = module.own_parser() if hasattr(module, "own_parser") else parser
        # What stands right after the command, such as a suite's name, has its choices too.
        actions = [(o, action.choices) for action in parser._actions for o in action.option_strings or [name]]
        known = [*(option for option, _ in actions if option.startswith("--")), "--help", "--quiet"]
        known += _setting_options(module.SETTINGS) if hasattr(module, "SETTINGS") else []
        options.append((name, sorted({*known})))
        for option, own in actions:
            if own:  # of options that commands share, the choices of all
                choices[option] = sorted({*choices.get(option, []), *map(str, own)})
    return _SCRIPT.format(
        commands=shlex.quote(" ".join(commands)), choices=_cases(list(choices.items()), 6), options=_cases(options, 8)
    )


def _setting_options(settings: type, section: str = "") -> list[str]:
    """The options, such as --data.row-length, of a dataclass's fields and of the dataclasses within it."""
    found = []
    for field in dataclasses.fields(settings):
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.default_factory):
            found += _setting_options(field.default_factory, f"{section}{name}.")
        else:
            found += [f"--{section}{name}", *[f"--{section}no-{name}"] * isinstance(field.default, bool)]
    return found


def _cases(words: list[tuple[str, list[str]]], indent: int) -> str:
    return "\n".join(f"{' ' * indent}{name}) words={shlex.quote(' '.join(own))} ;;" for name, own in words)
