"""The English that every CPython carries, as a TensorFlow Datasets builder: no download, no TensorFlow.

`python_docs` is the language reference's help topics and the standard library's docstrings. `python_docs/topics` is
the docstrings alone, each labelled with the area of the library that it documents. Both are split by module, the same
way, so that a model pretrained on the first has never read the second's test texts.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import pathlib
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator

import tensorflow_datasets as tfds

# Chapters of the Python library reference, and the top-level modules that stand in them.
AREAS: dict[str, str] = {
    "text": (
        "string re difflib textwrap unicodedata stringprep readline rlcompleter codecs encodings struct "
        "_codecs locale gettext sre_compile sre_parse sre_constants _sre _struct pprint reprlib shlex cmd"
    ),
    "data types": (
        "datetime zoneinfo calendar collections _collections _collections_abc heapq _heapq bisect _bisect "
        "array weakref _weakref _weakrefset types copy enum graphlib _datetime _zoneinfo _strptime builtins "
        "functools _functools itertools operator _operator"
    ),
    "numbers": (
        "numbers math cmath decimal _decimal _pydecimal fractions random _random statistics _statistics "
        "colorsys secrets hashlib hmac uuid _md5 _sha1 _sha256 _sha512 _sha2 _sha3 _blake2 _hashlib"
    ),
    "files": (
        "pathlib fileinput stat _stat filecmp tempfile glob fnmatch linecache shutil pickle pickletools "
        "_pickle copyreg shelve marshal dbm sqlite3 _sqlite3 zlib gzip bz2 _bz2 lzma _lzma zipfile tarfile "
        "csv _csv configparser tomllib netrc plistlib io _io _pyio _compression posixpath ntpath genericpath "
        "chunk wave aifc sunau sndhdr imghdr"
    ),
    "system": (
        "os posix time argparse getopt logging getpass curses _curses platform errno ctypes _ctypes optparse "
        "fcntl resource pwd grp termios tty pty syslog mmap signal select selectors sched _posixsubprocess nt "
        "subprocess _winapi winreg msvcrt sysconfig site"
    ),
    "concurrency": (
        "asyncio _asyncio threading _thread multiprocessing _multiprocessing concurrent queue _queue "
        "contextvars _contextvars _threading_local _posixshmem"
    ),
    "network": (
        "socket _socket ssl _ssl urllib http ftplib poplib imaplib smtplib smtpd socketserver xmlrpc "
        "ipaddress wsgiref cgi cgitb nntplib telnetlib webbrowser asyncore asynchat"
    ),
    "mail and markup": (
        "email json _json mailbox mailcap mimetypes base64 binascii quopri uu html xml pyexpat _elementtree _markupbase"
    ),
    "graphics": ("tkinter _tkinter turtle"),
    "development": (
        "typing _typing pydoc doctest unittest bdb faulthandler pdb timeit trace tracemalloc _tracemalloc "
        "profile cProfile _lsprof pstats distutils venv zipapp ensurepip"
    ),
    "language": (
        "sys importlib zipimport pkgutil modulefinder runpy ast _ast inspect dis opcode _opcode "
        "tokenize token symtable _symtable tabnanny pyclbr py_compile compileall codeop code abc _abc "
        "contextlib dataclasses atexit traceback gc warnings _warnings __future__ keyword imp _imp"
    ),
}
_AREA_OF = {module: area for area, modules in AREAS.items() for module in modules.split()}
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "pydoc_data", "antigravity", "this"}
_MIN_CHARACTERS = 40
_TEST_SHARE = 0.1


def _area(module: str) -> str | None:
    return _AREA_OF.get(module.split(".")[0])


def _order(module: str) -> bytes:
    return hashlib.sha256(module.encode()).digest()


def test_modules(counts: dict[str, int]) -> set[str]:
    """The modules held out, given the number of texts of each: about a tenth of every area's texts.

    Whole modules, so that nothing leaks, in the order of a hash of their names; one that would overshoot is passed by.
    """
    chosen: set[str] = set()
    for area in {_area(module) for module in counts}:
        members = sorted((m for m in counts if _area(m) == area), key=_order)
        room = _TEST_SHARE * sum(counts[m] for m in members)
        for module in members:
            if counts[module] <= 1.2 * room:
                chosen.add(module)
                room -= counts[module]
    return chosen


def _clean(text: str) -> str:
    """Drop the rules under headings and trailing blanks: runs of one sign would be free points for a language model."""
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    return "\n".join(line for line in lines if not re.fullmatch(r"\s*([^\w\s])\1{2,}", line)).strip()


def _source_docstrings() -> Iterator[tuple[str, str]]:
    """(module, docstring) from the library's sources, read without importing them."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED.intersection(parts) or parts[0] not in sys.stdlib_module_names:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a library file's own invalid escapes are not the reader's concern
                tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue  # a few files of old versions exist to be broken
        module = ".".join(parts).removesuffix(".__init__")
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield module, ast.get_docstring(node) or ""


def _compiled_docstrings() -> Iterator[tuple[str, str]]:
    """(module, docstring) from the modules written in C, which have no source to read."""
    folder = pathlib.Path(sysconfig.get_path("platstdlib")) / "lib-dynload"
    names = set(sys.builtin_module_names) | {path.name.split(".")[0] for path in folder.glob("*.so")}
    for name in sorted(n for n in names if n in _AREA_OF):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # some systems ship some of these apart
        yield name, inspect.getdoc(module) or ""
        for _, value in sorted(vars(module).items()):
            members = [v for _, v in sorted(vars(value).items())] if inspect.isclass(value) else []
            for item in (value, *members):
                if inspect.isclass(item) or inspect.isroutine(item) or inspect.isdatadescriptor(item):
                    text = item.__doc__
                    yield name, inspect.cleandoc(text) if isinstance(text, str) else ""


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from ((f"topic:{name}", text) for name, text in sorted(topics.items()))


@functools.cache
def documents() -> tuple[list[tuple[str, str]], set[str]]:
    """All (module, text), each text once, where it stands first; and the modules that are held out."""
    texts: dict[str, str] = {}
    for source in (_source_docstrings(), _compiled_docstrings(), _topics()):
        for module, raw in source:
            text = _clean(raw)
            if len(text) >= _MIN_CHARACTERS:
                texts.setdefault(text, module)
    return [(module, text) for text, module in texts.items()], test_modules(Counter(texts.values()))


class PythonDocs(tfds.core.GeneratorBasedBuilder):
    """Help topics and docstrings of the running interpreter; `topics` labels docstrings with their area."""

    name = "python_docs"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 - the framework's own idiom
        tfds.core.BuilderConfig(name="text", description="help topics and docstrings"),
        tfds.core.BuilderConfig(name="topics", description="docstrings with the area of the library they document"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "module": tfds.features.Text()}
        if self.builder_config.name == "topics":
            features["label"] = tfds.features.ClassLabel(names=list(AREAS))
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {"train": self._generate_examples(False), "test": self._generate_examples(True)}

    def _generate_examples(self, held_out: bool):
        texts, test = documents()
        labelled = self.builder_config.name == "topics"
        for key, (module, text) in enumerate(texts):
            area = _area(module)
            if (module in test) == held_out and (area or not labelled):
                yield key, {"text": text, "module": module} | ({"label": area} if labelled else {})
