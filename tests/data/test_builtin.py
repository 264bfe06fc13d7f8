"""Corpora that need no network."""

import platform
import sysconfig
from pathlib import Path

import pytest

from ltm_hf.data import CORPORA, load_corpus


def test_the_standard_library():
    """Its sources, by file: no tests, no tables, nothing of others; the same each time."""
    corpus = CORPORA["stdlib"]
    texts, root = corpus.documents(), Path(sysconfig.get_paths()["stdlib"])
    assert platform.python_version() in corpus.title
    assert len(texts) > 300 and sum(map(len, texts)) > 5e6 and texts == corpus.documents()
    for path, is_in in (
        ("json/decoder.py", True), ("argparse.py", True), ("asyncio/tasks.py", True),
        ("encodings/cp037.py", False), ("html/entities.py", False), ("pydoc_data/topics.py", False),
        ("test/test_json/__init__.py", False),
    ):  # fmt: skip
        if (root / path).is_file():
            assert ((root / path).read_text(encoding="utf-8") in texts) == is_in, path


def test_it_is_the_default_split_by_file():
    corpus, texts = load_corpus(), CORPORA["stdlib"].documents()
    train, validation = (corpus[name]["text"] for name in ("train", "validation"))
    assert sorted([*train, *validation]) == sorted(texts) and 0 < len(validation) < 0.1 * len(texts)
    streamed = load_corpus(streaming=True)
    assert next(iter(streamed["train"]))["text"] in texts


def test_an_unknown_one_is_named():
    with pytest.raises(ValueError, match="corpus must be one of stdlib, sotu; got 'nope'"):
        load_corpus(corpus="nope")
