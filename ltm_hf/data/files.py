"""Local files of texts or rows, read so that what is wrong with one is said by its name and line, however late."""

import codecs
import glob
import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pyarrow.parquet import ParquetFile

FILE_TYPES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_FIRST = 1000  # rows that tell a file's columns


def local_files(name_or_files: str | Path | Sequence[str | Path]) -> list[str] | None:
    """The files meant, each once, all there and all of one type; None if a data set of the Hub is meant.

    Hidden files, and those in hidden folders, are meant only by their names: what editors and systems leave behind is
    nobody's text. Empty files are left out.
    """
    if isinstance(name_or_files, (str, Path)):
        path = Path(name_or_files).expanduser()
        if path.is_dir():
            files = [file for file in visible(path, "**/*") if file_type(file)]
        elif not path.exists() and glob.has_magic(str(path)):
            files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        elif isinstance(name_or_files, Path) or path.exists() or file_type(path) or not is_hub_name(name_or_files):
            files = [path]
        else:
            return None
    elif isinstance(name_or_files, Sequence) and all(isinstance(file, (str, Path)) for file in name_or_files):
        files = [Path(file).expanduser() for file in name_or_files]
    else:
        raise ValueError(f"Files are named by strings or paths, not by {name_or_files!r}.")

    if not files:
        raise FileNotFoundError(f"No files to read in {name_or_files!r}.")
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no file {str(file)!r}.")
        if not file_type(file):
            raise ValueError(f"{str(file)!r} is of an unknown type; known are {', '.join(FILE_TYPES)}.")
    if len({file_type(file) for file in files}) > 1:
        raise ValueError(f"{name_or_files!r} mixes text, json or parquet files; name files of one type only.")
    once = {}
    for file in files:
        once.setdefault(Path(file).resolve(), str(file))
    files = [file for file in once.values() if Path(file).stat().st_size]
    if not files:
        raise ValueError("The corpus is empty: there is nothing in its files.")
    return files


def visible(folder: str | Path, pattern: str) -> list[Path]:
    """The files under a folder that a pattern matches, in order, but those that are hidden or in hidden folders."""
    found = sorted(file for file in Path(folder).glob(pattern) if file.is_file())
    return [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def file_type(file: str | Path) -> str | None:
    file = Path(str(file).lower())
    return FILE_TYPES.get(file.with_suffix("").suffix if file.suffix in COMPRESSED else file.suffix)


def is_hub_name(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


# ------------------------------------------------------------------ rows


def read_rows(file: str, columns: Sequence[str] | None = None) -> Iterator[tuple[str, dict]]:
    """The rows of a file, each with its place in words: of text a single one, `text`, whose line ends are "\\n".

    columns: the only ones to be read of parquet, where it has them; all rows of JSON hold all that they have.
    Raises ValueError, by file and line or row, for what is not UTF-8, is cut, or is not what the file's name says.
    """
    reader = {"text": _text, "json": _json, "parquet": _parquet}[file_type(file)]
    try:
        with LocalFileSystem().open(file, "rb", compression="infer") as stream:
            yield from reader(stream, repr(file), columns)
    except Exception as error:  # also of the disk, of one of the compressions, of parquet
        if repr(file) in str(error):
            raise
        raise ValueError(f"{file!r} cannot be read: {' '.join(str(error).split())}") from error


def columns_of(files: Sequence[str]) -> dict[str, bool]:
    """The columns of files, and whether each may hold strings: by the first rows, of parquet by the schema."""
    if file_type(files[0]) == "text":
        return {"text": True}
    if file_type(files[0]) == "parquet":
        next(read_rows(files[0]), None)  # raises where it is no parquet
        with LocalFileSystem().open(files[0], "rb", compression="infer") as stream:
            schema = ParquetFile(stream).schema_arrow
        return {field.name: field.type in (pa.string(), pa.large_string(), pa.string_view()) for field in schema}
    columns = {}
    for _, row in islice(chain.from_iterable(map(read_rows, files)), _FIRST):
        for name, value in row.items():
            columns[name] = columns.get(name, False) or isinstance(value, str)
    return columns


def _text(stream, file: str, columns) -> Iterator[tuple[str, dict]]:
    text = _decoded(stream.read().removeprefix(codecs.BOM_UTF8), file, 1)
    yield file, {"text": text.replace("\r\n", "\n").replace("\r", "\n")}


def _json(stream, file: str, columns) -> Iterator[tuple[str, dict]]:
    """A row a line, or a list of rows, or a single one over several lines."""
    begun = False
    for number, line in enumerate(stream, start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        if not begun and (line.lstrip().startswith(b"[") or line.strip() == b"{"):
            whole = _parsed(line + stream.read(), file, number)
            rows = whole if isinstance(whole, list) else [whole]
            yield from (_row(f"{file}, row {index}", row) for index, row in enumerate(rows, start=1))
            return
        begun = True
        yield _row(f"{file}, line {number}", _parsed(line, file, number))


def _row(place: str, row) -> tuple[str, dict]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be an object with named fields, not {repr(row)[:40]}.")
    return place, row


def _parsed(content: bytes, file: str, number: int):
    """The value of JSON that begins in this line. Strings hold characters only, no halves of UTF-16's pairs."""
    text = _decoded(content, file, number)
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line, why = number + error.lineno - 1, f"{error.msg} (column {error.colno})"
        raise ValueError(f"{file}, line {line} is not JSON, or cut: {why}.") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        raise ValueError(f"{file}, line {number}: {half} is half of a pair, which is no character.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}, line {number} cannot be read: {error}") from None
    return value


def _decoded(content: bytes, file: str, number: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line, byte = number + content.count(b"\n", 0, error.start), content[error.start]
        raise ValueError(f"{file}, line {line} is not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8.") from None


def _parquet(stream, file: str, columns) -> Iterator[tuple[str, dict]]:
    parquet, number = ParquetFile(stream), 0
    columns = columns if columns and set(columns) <= set(parquet.schema_arrow.names) else None
    for batch in parquet.iter_batches(_FIRST, columns=columns):
        for index in range(len(batch)):
            number += 1
            place = f"{file}, row {number}"
            try:
                yield place, {name: batch[name][index].as_py() for name in batch.schema.names}
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} is not UTF-8 ({error.reason}).") from None
