"""Files as they come: what is in them is read as it is, and what is wrong with one is said by file and line."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltm_hf.data import load_conversations, load_corpus

GOOD = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(6)).encode()
LATIN = '{"text": "café"}\n'.encode("latin-1")


@pytest.fixture
def write(tmp_path):
    """Writes files of a folder, and says where it is."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / "texts" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / "texts"

    return write


def texts_of(files, **options):
    corpus = load_corpus(files, validation_fraction=0.5, **options)
    return sorted(row["text"] for split in corpus.values() for row in split)


def not_utf8():
    table = pa.table({"text": pa.array([b"fine", b"caf\xe9"])})
    buffers = table["text"].chunk(0).buffers()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, buffers)}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.txt", b"one\ntwo\nthr\xe9e\n", r"b.txt', line 3 is not UTF-8 \(byte 0xe9\)"),
        ("b.txt", "text".encode("utf-16"), "b.txt', line 1 is not UTF-8"),
        ("b.md.xz", lzma.compress(b"one\ncaf\xe9"), "b.md.xz', line 2 is not UTF-8"),
        ("b.txt.gz", gzip.compress(b"text" * 99)[:-12], "b.txt.gz' cannot be read: Compressed file"),
        ("b.jsonl.bz2", GOOD, "b.jsonl.bz2' cannot be read: Invalid data"),
        ("b.jsonl", GOOD + LATIN, "b.jsonl', line 7 is not UTF-8"),
        ("b.jsonl.gz", gzip.compress(GOOD + LATIN), "b.jsonl.gz', line 7 is not UTF-8"),
        ("b.json", b'[{"text": "a"},\n{"text": "caf\xe9"}]', "b.json', line 2 is not UTF-8"),
        ("b.json", b'[{"text": "a"},\n{"text": "b"', "b.json', line 2 is not JSON, or cut"),
        ("b.jsonl", GOOD + b"\n\n" + GOOD[:-9], "b.jsonl', line 14 is not JSON, or cut"),
        ("b.jsonl", b'{"text": "a \\ud800 b"}', r"b.jsonl', line 1: \\ud800 is half of a pair"),
        ("b.jsonl", GOOD + b'{"text": 3}', "b.jsonl', line 7: 'text' must be a string, not 3"),
        ("b.jsonl", b'{"text": 3}\n' + GOOD, "b.jsonl', line 1: 'text' must be a string, not 3"),
        ("b.jsonl", GOOD + b'["a"]', r"b.jsonl', line 7: a row must be an object with named fields, not \['a'\]"),
        ("b.json", b'[{"text": "a"}, "b"]', "b.json', row 2: a row must be an object"),
        ("b.jsonl", b"[" * 10_000, "b.jsonl', line 1 cannot be read: maximum recursion depth"),
        ("b.jsonl", b'{"body": "b"}\n', "b.jsonl' has no column 'text'"),
        ("b.parquet", b"PAR1 and no more", "b.parquet' cannot be read: Parquet"),
        ("b.parquet", not_utf8(), "b.parquet', row 2 is not UTF-8"),
    ],
)
def test_what_is_wrong_is_named(write, name, content, message, streaming):
    """Beside a file in which nothing is, which is read first."""
    fine = {"txt": b"fine", "md": b"fine", "jsonl": GOOD, "json": GOOD, "parquet": None}[name.split(".")[1]]
    folder = write({name: content} | ({} if fine is None else {f"a.{name.split('.')[1]}": fine}))
    with pytest.raises(ValueError, match=message):
        texts_of(folder, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", b"\xef\xbb\xbfone", ["one"]),  # with the mark of some editors
        ("a.txt", b"one\r\ntwo\rthree\n", ["one\ntwo\nthree\n"]),
        ("a.txt", b"one\x00two", ["one\x00two"]),
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD[:23], ["document 0"]),
        ("a.jsonl", b'{"text": "a\\r\\nb"}\r\n\r\n{"text": "\\ud83d\\ude42"}', ["a\r\nb", "🙂"]),
        ("a.jsonl", b'{"text": "a", "v": {"x": 1}}\n{"text": null}\n{}\n{"v": [2]}\n', ["a"]),
        ("a.json", b'{\n "text": "a",\n "v": 1\n}', ["a"]),
        ("a.jsonl.bz2", bz2.compress(GOOD[:23]), ["document 0"]),
        ("a.jsonl", b'{"text": "' + b"w" * 3_000_000 + b'"}', ["w" * 3_000_000]),
    ],
)
def test_texts_are_read_as_they_are(write, name, content, texts, streaming):
    extension = name.split(".")[1].replace("jsonl", "json")
    other = b"other" if extension == "txt" else b'{"text": "other"}'
    folder = write({name: content, f"z.{extension}": other})
    assert texts_of(folder, streaming=streaming) == sorted([*texts, "other"])


def test_hidden_files_are_no_documents_unless_they_are_named(write, tmp_path):
    hidden = ["._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "sub/.git/c.txt", "sub/.hidden/deep/d.txt"]
    folder = write({"a.txt": b"a", "sub/b.txt": b"b"} | {name: b"hidden" for name in hidden})
    for pattern in (folder, str(folder / "**/*.txt")):
        assert texts_of(pattern) == ["a", "b"]
    assert texts_of([folder / "a.txt", folder / "._a.txt"]) == ["a", "hidden"]
    assert texts_of([str(folder / "a.txt"), str(folder / "sub/.git/c.txt")]) == ["a", "hidden"]
    (tmp_path / ".corpus").mkdir()
    (tmp_path / "texts").rename(tmp_path / ".corpus/texts")  # a hidden folder that is named is meant
    assert texts_of(tmp_path / ".corpus/texts") == ["a", "b"]


def test_a_file_named_twice_is_read_once(write):
    folder = write({"a.txt": b"a", "b.txt": b"b", "sub/c.txt": b"c"})
    (folder / "link.txt").symlink_to(folder / "a.txt")
    assert texts_of([folder / "a.txt", folder / "b.txt", folder / "sub/../a.txt", folder / "link.txt"]) == ["a", "b"]


def test_a_file_that_changes_is_read_again(write):
    assert texts_of(write({"a.txt": b"a", "b.txt": b"b"})) == ["a", "b"]
    assert texts_of(write({"a.txt": b"other"})) == ["b", "other"]


def test_a_stream_names_what_is_wrong_when_it_comes_there(write):
    rows = "".join(json.dumps({"text": f"{i} {'word ' * 50}"}) + "\n" for i in range(2000)).encode()
    stream = load_corpus(write({"a.jsonl": rows + GOOD[:-5]}), streaming=True)["train"]
    with pytest.raises(ValueError, match="a.jsonl', line 2006 is not JSON"):
        list(stream)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "3?", "answer": 3}, "line 3: question and answer must be text, not '3[?]', 3"),
        ({"question": "3?"}, "line 3: question and answer must be text, not '3[?]', None"),
        ({"question": ["3?"], "answer": "3"}, "must be text"),
    ],
)
def test_rows_to_fine_tune_on_are_named(write, row, message):
    rows = [{"question": f"{i}?", "answer": f"{i}"} for i in range(2)] + [row]
    folder = write({"rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    with pytest.raises(ValueError, match=message):
        load_conversations(folder)


SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": SAID}, {"messages": []}], r"line 2: messages must be a list of messages, each .*, not \[\]"),
        ([{"messages": SAID}, {"messages": "a"}], "line 2: messages must be a list of messages"),
        (
            [{"messages": [{"role": "user", "content": ["a"]}]}],
            "line 1: messages must be a list of messages, each with a role",
        ),
        (
            [{"prompt": "a", "completion": SAID[1:]}],
            "line 1: prompt and completion must be both text or both lists of messages",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": SAID[:1], "completion": SAID[1:]}],
            "line 2: 'prompt' is messages, and text in the rows before",
        ),
    ],
)
def test_chats_are_named(write, rows, message):
    folder = write({"rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    with pytest.raises(ValueError, match=message):
        load_conversations(folder)
