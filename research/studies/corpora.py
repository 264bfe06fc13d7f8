"""Corpora of the studies, as JSON lines of documents.

    python -m research.studies.corpora mixed mixed.jsonl --folder DATA
    python -m research.studies.corpora prose prose.jsonl --folder DATA

mixed: five kinds of English in equal parts, where
latents have something to say, which kind a text is: plays, arithmetic problems with their solutions, news, abstracts of
papers, and technical prose, a million characters of each, in documents of about 1,000 characters of one kind. prose:
the last kind alone, all of it, in whole passages. Documents are shuffled.

DATA holds tinyshakespeare/, gsm8k/, ag_news/, arxiv_scitldr/, pubmed_pubmedqa/ and train_books_web/ (textbooks,
specifications and handbooks beside novels, which are left out): see `texts` for the files.
"""

import json
import random
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from datasets import load_dataset

from ltm_hf import cli
from ltm_hf.data.files import local_files

CHARACTERS = 1_000_000  # of each kind
DOCUMENT = 1_000  # characters, at least


def texts(folder: Path) -> dict[str, Iterator[str]]:
    """The pieces of each kind, a speech or a problem or an article, in the order of their files."""

    def rows(kind, file, **options):
        return iter(load_dataset(kind, data_files=local_files(str(folder / file)), split="train", **options))

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
    found = local_files(str(folder / "train_books_web" / files))
    rows = load_dataset("parquet", data_files=found, split="train")
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


CORPORA = {
    "mixed": lambda folder: {kind: documents(pieces) for kind, pieces in texts(folder).items()},
    "prose": lambda folder: {"prose": prose(folder, "train-*.parquet")},
}


@cli.one_sentence()
def main() -> None:
    parser = cli.Parser(description="A corpus of the studies, as JSON lines.")
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("output", type=cli.file, help="JSON lines to write")
    parser.add_argument("--folder", type=Path, required=True, help="of the texts")
    options = parser.parse_args()
    kinds = CORPORA[options.corpus](options.folder)
    rows = [{"text": document, "kind": kind} for kind, found in kinds.items() for document in found]
    random.Random(0).shuffle(rows)
    options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        chosen = [row["text"] for row in rows if row["kind"] == kind]
        print(f"{kind}: {len(chosen):,} documents, {sum(map(len, chosen)):,} characters")


if __name__ == "__main__":
    main()
