"""Modules by the names that they had in version 0.1: `import flax_encoder.embed` is `flax_encoder.runs.embed`."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

MOVED = {
    "cli": "commands.recipe",
    "data.batches": "data.rows.batches",
    "data.files": "data.sources.files",
    "data.masking": "data.rows.masking",
    "data.merging": "data.store.merging",
    "data.packing": "data.rows.packing",
    "data.prepare": "data.store.prepare",
    "data.python_docs": "data.sources.python_docs",
    "data.randomness": "data.rows.randomness",
    "data.records": "data.sources.records",
    "data.span_corruption": "data.rows.span_corruption",
    "data.tokenizer": "data.tokens.tokenizer",
    "data.tokenizer_files": "data.tokens.tokenizer_files",
    "data.tokenizing": "data.store.tokenizing",
    "data.word_vectors": "data.tokens.word_vectors",
    "embed": "runs.embed",
    "exchange": "runs.exchange",
    "generation": "nn.generation",
    "hub": "published.load",
    "objectives": "tasks",
    "objectives.classification": "tasks.classification",
    "objectives.loss": "tasks.loss",
    "objectives.masked_lm": "tasks.masked_lm",
    "report": "runs.report",
    "run": "runs.loaded",
    "start": "runs.start",
    "weights": "published.weights",
}
_PACKAGE = __name__.partition(".")[0]


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its old name. Both names are one module."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != _PACKAGE or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=name == "objectives")

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = importlib.import_module(f"{_PACKAGE}.{MOVED[spec.name.partition('.')[2]]}")
        self._spec = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the old name's in its place


def find_moved() -> None:
    """Have Python find modules under their old names."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
