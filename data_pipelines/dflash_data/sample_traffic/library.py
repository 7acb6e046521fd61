"""Short functions and paragraphs of the Python standard library on this machine.

The sample fleet asks about them. Files are read, never imported, so nothing runs; another
Python version gives other text, hence "the same seed gives the same log on one machine".
"""

import ast
import functools
import importlib.util
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dflash_train.config import UnavailableError

MODULES = (
    "argparse ast asyncio.locks asyncio.queues asyncio.tasks base64 bdb bisect calendar cmd code "
    "codeop colorsys configparser contextlib copy csv dataclasses datetime decimal difflib dis "
    "doctest email.header email.message email.utils enum filecmp fileinput fnmatch fractions "
    "ftplib functools getopt gettext glob graphlib gzip hashlib heapq hmac html html.parser "
    "http.client http.cookies http.server imaplib inspect ipaddress json json.decoder "
    "json.encoder keyword linecache locale logging logging.handlers lzma mailbox mimetypes "
    "multiprocessing.pool multiprocessing.queues netrc numbers operator optparse pathlib pdb "
    "pickletools pkgutil platform plistlib poplib pprint profile pstats queue quopri random "
    "reprlib runpy sched secrets selectors shelve shlex shutil smtplib socket socketserver "
    "sqlite3.dump ssl statistics string subprocess symtable tarfile tempfile textwrap threading "
    "timeit tokenize trace traceback tracemalloc typing unittest.case unittest.mock unittest.suite "
    "urllib.error urllib.parse urllib.request urllib.response urllib.robotparser uuid wave "
    "weakref webbrowser wsgiref.headers wsgiref.util xml.dom.minidom xmlrpc.client zipapp zipfile"
).split()
"""Modules that are read where this machine has them as source files."""

SOURCE_LENGTH = range(110, 391)
"""Characters of a function that fits a short prompt."""
PARAGRAPH_LENGTH = range(150, 401)
"""Characters of a paragraph worth a summary that fits a short prompt."""


@dataclass(frozen=True)
class Function:
    """A function or method with its source."""

    module: str
    name: str
    source: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of a docstring."""

    module: str
    about: str
    text: str


@dataclass(frozen=True)
class Library:
    """What the fleet may ask about, in a fixed order."""

    functions: list[Function]
    paragraphs: list[Paragraph]


@functools.cache
def read_library() -> Library:
    """Read all modules.

    Raises:
        UnavailableError: This Python carries no source of its standard library.
    """
    functions: dict[str, Function] = {}
    paragraphs: dict[str, Paragraph] = {}
    for module in MODULES:
        source = _module_source(module)
        if source is None:
            continue
        tree = ast.parse(source)
        for function in _short_functions(module, source, tree):
            functions.setdefault(function.source, function)
        for paragraph in _paragraphs(module, tree):
            paragraphs.setdefault(paragraph.text, paragraph)
    if not functions or not paragraphs:
        raise UnavailableError(
            "this Python has no source files of its standard library, which sample-traffic reads. "
            "Use a Python that has them, or set data.logs to a real log."
        )
    return Library(list(functions.values()), list(paragraphs.values()))


def _module_source(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin).read_text(encoding="utf-8")


def _short_functions(module: str, source: str, tree: ast.Module) -> Iterator[Function]:
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("test"):
            continue
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if len(text) in SOURCE_LENGTH and text.isascii() and len(node.body) > 1:
            arguments = [argument.arg for argument in node.args.args if argument.arg != "self"]
            yield Function(module, node.name, text, tuple(arguments))


def _paragraphs(module: str, tree: ast.Module) -> Iterator[Paragraph]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if not isinstance(node, documented) or not (docstring := ast.get_docstring(node)):
            continue
        about = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
        for paragraph in docstring.split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) in PARAGRAPH_LENGTH and text.isascii() and _is_prose(text):
                yield Paragraph(module, about, text)


def _is_prose(text: str) -> bool:
    """Leave out doctests, tables and option lists."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return (
        text[0].isupper() and text[-1] in ".!" and ">>>" not in text and letters > 0.9 * len(text)
    )
