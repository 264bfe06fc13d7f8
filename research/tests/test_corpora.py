import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from research.studies import corpora

ENOUGH = 40  # pieces of each kind


@pytest.fixture
def folder(tmp_path):
    """Small files in the places of the real ones."""

    def write(file, lines):
        path = tmp_path / "texts" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(lines).encode()))

    def rows(**row):
        return [json.dumps(row) + "\n"] * ENOUGH

    write("tinyshakespeare/input.txt.gz", ["To be, or not.\nThat is it.\n\n"] * 10 * ENOUGH)
    write("gsm8k/train.jsonl.gz", rows(question="How many? " * 10, answer="#### 4"))
    write("ag_news/test.jsonl.gz", rows(text="News. " * 30))
    write("arxiv_scitldr/train.jsonl.gz", rows(text="We show. " * 20))
    write("pubmed_pubmedqa/test.jsonl.gz", rows(text="We find. " * 20))
    (tmp_path / "texts" / "train_books_web").mkdir()
    sources = ["classic-books-markdown", "python-peps"] * ENOUGH
    table = pa.table({"source": sources, "text": [f"{source} " * 20 for source in sources]})
    for number in (0, 1):
        pq.write_table(table, tmp_path / "texts" / "train_books_web" / f"train-0000{number}-of-00008.parquet")
    return tmp_path / "texts"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_mixed(run, folder, tmp_path):
    said = run("studies.corpora", "mixed", tmp_path / "mixed.jsonl", "--folder", folder)
    found = read(tmp_path / "mixed.jsonl")
    assert {row["kind"] for row in found} == {"plays", "problems", "news", "abstracts", "prose"}
    assert all(f"{row['kind']}: " in said and 1000 <= len(row["text"]) <= 2000 for row in found)
    assert len({row["kind"] for row in found[:10]}) > 1  # shuffled
    assert not any("classic-books" in row["text"] for row in found)


def test_prose_in_whole_passages(run, folder, tmp_path):
    run("studies.corpora", "prose", tmp_path / "prose.jsonl", "--folder", folder)
    found = read(tmp_path / "prose.jsonl")
    assert len(found) == 2 * ENOUGH and {row["text"] for row in found} == {"python-peps " * 20}


def test_a_kind_ends_at_its_million():
    pieces = ["x" * 1500] * 2000
    assert sum(map(len, corpora.documents(iter(pieces)))) in range(corpora.CHARACTERS, corpora.CHARACTERS + 2000)


def test_bad_commands(refused, tmp_path):
    output = tmp_path / "out.jsonl"
    assert "the following arguments are required: --folder" in refused("studies.corpora", "mixed", output)
    assert "No files to read in" in refused("studies.corpora", "prose", output, "--folder", tmp_path)
    assert not output.exists()
