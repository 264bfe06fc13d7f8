"""A corpus of five kinds of English in equal parts, where latents have something to say: which kind a text is.

    python examples/benchmarks/mixed_corpus.py ../shared/data mixed.jsonl
    python examples/benchmarks/mixed_corpus.py ../shared/data prose.jsonl --prose      # the last kind alone, all of it

Plays, arithmetic problems with their solutions, news, abstracts of papers, and technical prose: a million characters of
each, in documents of about 1,000 characters of one kind, shuffled. The folder's README names the sources.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from datasets import load_dataset

CHARACTERS = 1_000_000  # of each kind
DOCUMENT = 1_000  # characters, at least


def texts(folder: Path) -> dict[str, Iterator[str]]:
    """The pieces of each kind, a speech or a problem or an article, in the order of their files."""

    def rows(kind, file, **options):
        return iter(load_dataset(kind, data_files=str(folder / file), split="train", **options))

    plays = rows("text", "tinyshakespeare/input.txt.gz", sample_by="paragraph")
    problems = rows("json", "gsm8k/train.jsonl.gz")
    abstracts = chain(
        *(rows("json", file) for file in ("arxiv_scitldr/train.jsonl.gz", "pubmed_pubmedqa/test.jsonl.gz"))
    )
    return {
        "plays": (row["text"] for row in plays),
        "problems": (row["question"] + "\n" + row["answer"] for row in problems),
        "news": (row["text"] for row in rows("json", "ag_news/test.jsonl.gz")),
        "abstracts": (row["text"] for row in abstracts),
        "prose": prose(folder, "train-00000-of-00008.parquet"),
    }


def prose(folder: Path, files: str) -> Iterator[str]:
    """Textbooks, specifications and handbooks: passages of at most 6,000 characters."""
    rows = load_dataset("parquet", data_files=str(folder / "train_books_web" / files), split="train")
    return (row["text"] for row in rows if "classic-books" not in row["source"])


def documents(pieces: Iterator[str]) -> Iterator[str]:
    """Neighbouring pieces together, until a document is long enough; none longer than twice that."""
    document, written = "", 0
    for piece in pieces:
        document += piece.strip() + "\n\n"
        if len(document) >= DOCUMENT:
            yield document[: 2 * DOCUMENT]
            written += len(document[: 2 * DOCUMENT])
            document = ""
        if written >= CHARACTERS:
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the texts")
    parser.add_argument("output", type=Path, help="JSON lines to write")
    parser.add_argument("--prose", action="store_true", help="technical prose alone, all of it, in whole passages")
    options = parser.parse_args()
    if options.prose:
        kinds = {"prose": prose(options.folder, "train-*.parquet")}
    else:
        kinds = {kind: documents(pieces) for kind, pieces in texts(options.folder).items()}
    rows = [{"text": document, "kind": kind} for kind, found in kinds.items() for document in found]
    random.Random(0).shuffle(rows)
    options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        chosen = [row["text"] for row in rows if row["kind"] == kind]
        print(f"{kind}: {len(chosen):,} documents, {sum(map(len, chosen)):,} characters")


if __name__ == "__main__":
    main()
