"""A corpus tokenised and packed once, into shards on disk that are mapped into memory and not read into it.

A folder of prepared data:

    index.json                       what it was made from, and of each finished shard its documents, blocks and sha256
    train-00000-of-00012.arrow …     blocks as `datasets` stores them: uint16 or uint32 by the vocabulary
    validation-00000-of-00001.arrow …
    tokenizer/                       as save_pretrained writes it

A shard is made from `documents_per_shard` neighbouring documents and packed by itself, whoever makes it: the bytes do
not depend on the number of processes. It is written under another name and renamed, then entered in the index, so that
what the index lists is whole, and a run that was killed goes on where it stopped.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .packing import blocks_of, check_packing

INDEX = "index.json"
TOKENIZER = "tokenizer"
FORMAT = 1
_SAMPLE = 1000  # documents of a split whose text identifies it


def prepare(
    corpus: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    folder: str | Path,
    *,
    source: str = "",
    documents_per_shard: int = 10_000,
    num_proc: int = 1,
) -> DatasetDict:
    """Tokenise and pack a corpus into a folder, and open it as `load_prepared` does.

    Blocks are those of `pack`, made shard by shard: of each shard, the end that does not fill a block is dropped.
    Called again with the same arguments it makes what is missing and nothing else. The same arguments give the same
    bytes, whatever `num_proc`.

    Args:
        corpus: documents in a column `text`, as from `load_corpus`; every split is prepared.
        tokenizer: with `bos_token` and `eos_token`, as from `load_tokenizer` or `train_tokenizer`; it is saved along.
        block_size: tokens in a block, begin-of-text included; at least 2.
        folder: where to write; made if need be.
        source: a name for the corpus, kept in the index.
        documents_per_shard: documents of a shard, at least 1. Smaller shards lose less work when killed, and more text.
        num_proc: shards made at a time, each in a process of its own.

    Raises:
        ValueError: a number out of range, a tokenizer that lacks a token, a split too small for one block, or a folder
            that holds something made from other arguments.
    """
    for name, number in (("documents_per_shard", documents_per_shard), ("num_proc", num_proc)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}.")
    for name, documents in corpus.items():
        check_packing(documents, tokenizer, block_size, name)
    folder = Path(folder)
    made_from = {
        "format": FORMAT,
        "source": source,
        "block_size": block_size,
        "dtype": "uint16" if len(tokenizer) <= 2**16 else "uint32",
        "documents_per_shard": documents_per_shard,
        "splits": {name: _identity(documents) for name, documents in corpus.items()},
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "vocab_size": len(tokenizer),
            "sha256": _sha256(tokenizer.backend_tokenizer.to_str().encode()),
        },
    }
    index = _begin(folder, made_from)
    tokenizer.save_pretrained(folder / TOKENIZER)
    jobs = [job for name in corpus for job in _jobs(name, corpus[name], documents_per_shard)]
    todo = [job for job in jobs if job[0] not in index["shards"] or not (folder / job[0]).is_file()]
    total = sum(map(len, corpus.values()))
    with tqdm(total=total, unit="documents", desc="Tokenising and packing") as bar:
        bar.update(total - sum(len(documents) for _, documents in todo))
        for shard, facts in _work(folder, todo, tokenizer, block_size, index["dtype"], num_proc):
            index["shards"][shard] = facts
            _write(folder, index)
            bar.update(facts["documents"])
    return load_prepared(folder, verify=False)


def load_prepared(folder: str | Path, verify: bool = True) -> DatasetDict:
    """Open a folder that `prepare` or examples/prepare_data.py has made: its splits, with rows of `input_ids`.

    Blocks stay on disk and are mapped into memory. `ltm_hf.data.load_tokenizer(folder / "tokenizer")` reads them.

    verify: compare every shard with its checksum, which reads it once (a few gigabytes a second). Sizes are always
        compared.

    Raises:
        FileNotFoundError: there is no prepared data in the folder.
        ValueError: it is not finished, or a shard is missing, torn or altered; named.
    """
    folder = Path(folder)
    index = _read(folder)
    if index is None:
        raise FileNotFoundError(
            f"There is no prepared data ({INDEX}) in {str(folder)!r}: make it with prepare_data.py."
        )
    names = [shard for name, split in index["splits"].items() for shard in _names(name, split["documents"], index)]
    missing = [name for name in names if name not in index["shards"]]
    if missing:
        raise ValueError(
            f"The data in {str(folder)!r} is not finished: {len(missing)} of {len(names)} shards are missing. "
            "Run prepare_data.py again with the same arguments."
        )
    for name in names:
        path, facts = folder / name, index["shards"][name]
        if not path.is_file():
            raise ValueError(f"The shard {str(path)!r} is missing: run prepare_data.py again with the same arguments.")
        if path.stat().st_size != facts["bytes"]:
            raise ValueError(_broken(path, f"torn: {path.stat().st_size:,} bytes in place of {facts['bytes']:,}"))
    if verify:
        with ThreadPoolExecutor() as pool:
            for name, found in zip(names, pool.map(_sha256_of, [folder / name for name in names]), strict=True):
                if found != index["shards"][name]["sha256"]:
                    raise ValueError(_broken(folder / name, "altered: its checksum is not the one it was made with"))
    return DatasetDict(
        {
            name: concatenate_datasets(
                [
                    Dataset.from_file(str(folder / shard))
                    for shard in _names(name, split["documents"], index)
                    if index["shards"][shard]["blocks"]
                ]
            )
            for name, split in index["splits"].items()
        }
    )


# ------------------------------------------------------------------ shards


def _names(split: str, documents: int, made_from: dict) -> list[str]:
    count = math.ceil(documents / made_from["documents_per_shard"])
    return [f"{split}-{number:05d}-of-{count:05d}.arrow" for number in range(count)]


def _jobs(split: str, documents: Dataset, documents_per_shard: int) -> Iterator[tuple[str, Dataset]]:
    names = _names(split, len(documents), {"documents_per_shard": documents_per_shard})
    for number, name in enumerate(names):
        start = number * documents_per_shard
        yield name, documents.select(range(start, min(start + documents_per_shard, len(documents))))


def _work(folder, jobs, tokenizer, block_size, dtype, num_proc) -> Iterator[tuple[str, dict]]:
    """Make the shards, and yield each with its facts when it is there."""
    arguments = [(folder / name, documents, tokenizer, block_size, dtype) for name, documents in jobs]
    if min(num_proc, len(jobs)) <= 1:
        for job in arguments:
            yield job[0].name, _make(*job)
        return
    # spawn: a forked process inherits the locks of the tokenizer's threads
    with ProcessPoolExecutor(min(num_proc, len(jobs)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_make, *job): job[0].name for job in arguments}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _make(path: Path, documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, dtype: str) -> dict:
    """Write one shard, and say what the index shall hold of it."""
    features = Features({"input_ids": List(Value(dtype), length=block_size)})
    part = path.with_suffix(".part")
    blocks = 0
    with ArrowWriter(path=str(part), features=features, writer_batch_size=1000) as writer:
        for block in blocks_of(documents, tokenizer, block_size):
            writer.write(block)
            blocks += 1
        writer.finalize()
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    facts = {"documents": len(documents), "blocks": blocks, "bytes": part.stat().st_size, "sha256": _sha256_of(part)}
    os.replace(part, path)
    return facts


def _identity(documents: Dataset) -> dict:
    """Tells a split from another: how many documents, and the text of some of them all over it."""
    rows = range(0, len(documents), max(1, len(documents) // _SAMPLE))
    texts = json.dumps(documents.select(rows)["text"][:])
    return {"documents": len(documents), "sample_sha256": _sha256(texts.encode())}


def _broken(path: Path, how: str) -> str:
    return f"The shard {str(path)!r} is {how}. Delete it and run prepare_data.py again with the same arguments."


# ------------------------------------------------------------------ the index


def _begin(folder: Path, made_from: dict) -> dict:
    """The index to go on with: the folder's own, or a new one."""
    index = _read(folder)
    if index is None:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(f"{str(folder)!r} is not empty and holds no prepared data: name another folder.")
        index = made_from | {"shards": {}}
        _write(folder, index)
    differing = [name for name, value in made_from.items() if index.get(name) != value]
    if differing:
        raise ValueError(
            f"{str(folder)!r} holds data made from another {', '.join(differing)}: name another folder or delete it."
        )
    return index


def _read(folder: Path) -> dict | None:
    path = folder / INDEX
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(folder: Path, index: dict) -> None:
    index["shards"] = dict(sorted(index["shards"].items()))  # the same bytes in whatever order they were finished
    part = folder / f"{INDEX}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / INDEX)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
