"""A corpus tokenised and packed once, into shards on disk that are mapped into memory and not read into it.

A folder of prepared data:

    index.json                       what it was made from, of each finished shard its documents, blocks and sha256, and
                                     the sha256 of the tokenizer's files
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
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .numbers import check_at_least
from .packing import blocks_of, check_packing

INDEX = "index.json"
TOKENIZER = "tokenizer"
FORMAT = 2  # of the folder, and of the tokens that a text becomes
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
        ValueError: a number out of range, a tokenizer that lacks a token, a split too small for one block or cut into
            shards that are, or a folder that holds something made from other arguments.
    """
    check_at_least(1, documents_per_shard=documents_per_shard, num_proc=num_proc)
    folder = Path(folder)
    index = _open(folder)
    if not corpus:
        raise ValueError("There is no split to prepare.")
    for name, documents in corpus.items():
        _check_split(name, documents, tokenizer, block_size, documents_per_shard)
    made_from = _origin(corpus, tokenizer, block_size, source, documents_per_shard)
    index = _begin(folder, index, made_from)
    tokenizer.save_pretrained(folder / TOKENIZER)
    index["tokenizer_files"] = {path.name: _sha256_of(path) for path in _files(folder / TOKENIZER)}
    _write(folder, index)
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
    The folder is only read, also by a later `shuffle` or `map`: what `datasets` makes of blocks goes to its cache.

    verify: compare every shard with its checksum, which reads it once (a few gigabytes a second). Sizes are always
        compared.

    Raises:
        FileNotFoundError: there is no prepared data in the folder.
        ValueError: it is not finished, of another version, without a block, or something in it is missing, torn or
            altered; named.
    """
    folder = Path(folder)
    index = _read(folder)
    if index is None:
        raise FileNotFoundError(
            f"There is no prepared data ({INDEX}) in {str(folder)!r}: make it with prepare_data.py."
        )
    splits = _finished(folder, index)
    facts = {folder / shard: index["shards"].get(shard) for shards in splits.values() for shard in shards}
    for path, fact in facts.items():
        if fact is None or not path.is_file():
            raise ValueError(f"The shard {str(path)!r} is missing: run prepare_data.py again with the same arguments.")
        if path.stat().st_size != fact["bytes"]:
            raise ValueError(_broken(path, f"torn: {path.stat().st_size:,} bytes in place of {fact['bytes']:,}"))
    _check_files({folder / TOKENIZER / name: digest for name, digest in index["tokenizer_files"].items()})
    if verify:
        _check_files({path: fact["sha256"] for path, fact in facts.items()})
    features, blocks = _features(index["dtype"], index["block_size"]), DatasetDict()
    for split, shards in splits.items():
        parts = [_mapped(folder / shard, features, index["shards"][shard]["blocks"]) for shard in shards]
        if not any(map(len, parts)):
            raise ValueError(f"The {split} in {str(folder)!r} has no block: prepare it with more documents a shard.")
        blocks[split] = concatenate_datasets([part for part in parts if len(part)])
    return blocks


def _finished(folder: Path, index: dict) -> dict[str, list[str]]:
    """The names of each split's shards. Raises ValueError where the index has fewer."""
    counts = {name: _count(split["documents"], index["documents_per_shard"]) for name, split in index["splits"].items()}
    missing = sum(counts.values()) - len(index["shards"])
    if missing > 0:
        raise ValueError(
            f"The data in {str(folder)!r} is not finished: {missing} of {sum(counts.values())} shards are missing. "
            "Run prepare_data.py again with the same arguments."
        )
    return {split: _names(split, count) for split, count in counts.items()}


def _check_files(digests: dict[Path, str]) -> None:
    """Raise a ValueError for a file that is missing or has another checksum."""
    for path in digests:
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is missing: run prepare_data.py again with the same arguments.")
    with ThreadPoolExecutor() as pool:
        for (path, digest), found in zip(digests.items(), pool.map(_sha256_of, digests), strict=True):
            if found != digest:
                raise ValueError(_broken(path, "altered: its checksum is not the one it was made with"))


def _mapped(path: Path, features: Features, blocks: int) -> Dataset:
    """A shard, through a link in the cache of `datasets`, which keeps what it makes of a file beside it."""
    place = path.parent.resolve()
    link = Path(datasets.config.HF_DATASETS_CACHE) / "prepared" / _sha256(str(place).encode())[:16] / path.name
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(place / path.name)
    except FileExistsError:
        pass
    except OSError:  # no cache, or no links
        link = path
    try:
        shard = Dataset.from_file(str(link))
    except Exception as error:
        raise ValueError(_broken(path, f"unreadable ({' '.join(str(error).split())})")) from error
    if shard.features != features or len(shard) != blocks:
        raise ValueError(_broken(path, f"altered: it holds {len(shard)} rows of {', '.join(shard.column_names)}"))
    return shard


# ------------------------------------------------------------------ shards


def _check_split(name: str, documents: Dataset, tokenizer, block_size: int, documents_per_shard: int) -> None:
    """Raise the errors of `prepare` for a split, before anything is written."""
    if not re.fullmatch(_NAME, name):
        raise ValueError(f"{name!r} cannot name files: a split's name is made of letters, digits, '_', '-' and '.'.")
    if not isinstance(documents, Dataset):
        raise ValueError(f"The {name} is a stream: load the corpus without streaming=True to prepare it.")
    check_packing(documents, tokenizer, block_size, name)
    shards = (shard for _, shard in _jobs(name, documents, documents_per_shard))
    if all(next(blocks_of(shard, tokenizer, block_size), None) is None for shard in shards):
        raise ValueError(
            f"No shard of the {name}, {documents_per_shard} documents, fills a block of {block_size} tokens: "
            "take a larger documents_per_shard or a smaller block."
        )


def _count(documents: int, documents_per_shard: int) -> int:
    return math.ceil(documents / documents_per_shard)


def _names(split: str, count: int) -> list[str]:
    return [f"{split}-{number:05d}-of-{count:05d}.arrow" for number in range(count)]


def _jobs(split: str, documents: Dataset, documents_per_shard: int) -> Iterator[tuple[str, Dataset]]:
    for number, name in enumerate(_names(split, _count(len(documents), documents_per_shard))):
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
    features = _features(dtype, block_size)
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


def _features(dtype: str, block_size: int) -> Features:
    return Features({"input_ids": List(Value(dtype), length=block_size)})


def _origin(corpus: DatasetDict, tokenizer, block_size: int, source: str, documents_per_shard: int) -> dict:
    """What decides the bytes of a folder."""
    return {
        "format": FORMAT,
        "source": source,
        "block_size": block_size,
        "dtype": "uint16" if len(tokenizer) <= 2**16 else "uint32",
        "documents_per_shard": documents_per_shard,
        "splits": {name: _identity(documents) for name, documents in corpus.items()},
        "tokenizer": {
            "name": tokenizer.name_or_path,
            "vocab_size": len(tokenizer),
            "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "sha256": _sha256(_vocabulary(tokenizer).encode()),
        },
    }


def _identity(documents: Dataset) -> dict:
    """Tells a split from another: how many documents, and the text of some of them all over it."""
    rows = range(0, len(documents), max(1, len(documents) // _SAMPLE))
    texts = json.dumps(documents.select(rows)["text"][:])
    return {"documents": len(documents), "sample_sha256": _sha256(texts.encode())}


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides what a text's tokens are."""
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())


def _broken(path: Path, how: str) -> str:
    return f"{str(path)!r} is {how}. Delete it and run prepare_data.py again with the same arguments."


# ------------------------------------------------------------------ the index

_NAME = r"\w[\w.-]*"  # of files, without a folder


def _open(folder: Path) -> dict | None:
    """The index of a folder to write into, if it has one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file: name a folder.")
    index = _read(folder)
    if index is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty and holds no prepared data: name another folder.")
    return index


def _begin(folder: Path, index: dict | None, made_from: dict) -> dict:
    """The index to go on with: the folder's own, or a new one."""
    if index is None:
        folder.mkdir(parents=True, exist_ok=True)
        index = made_from | {"shards": {}, "tokenizer_files": {}}
    differing = [name for name, value in made_from.items() if index.get(name) != value]
    if differing:
        raise ValueError(
            f"{str(folder)!r} holds data made from another {', '.join(differing)}: name another folder or delete it."
        )
    return index


def _read(folder: Path) -> dict | None:
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON, or cut ({error}). Prepare the data into another folder.") from None
    if flaw := _flaw(index):
        raise ValueError(
            f"{str(path)!r} is not as this version writes it: {flaw}. Prepare the data into another folder."
        )
    return index


def _flaw(index) -> str | None:
    """What is wrong with an index, in words."""

    def counts(entry, **least: int) -> bool:
        numbers = [entry.get(name) for name in least] if isinstance(entry, dict) else [None]
        return all(type(number) is int and number >= n for number, n in zip(numbers, least.values(), strict=False))

    if not isinstance(index, dict) or index.get("format") != FORMAT:
        return f"its format is not {FORMAT}"
    if not counts(index, block_size=2, documents_per_shard=1) or index.get("dtype") not in ("uint16", "uint32"):
        return "block_size, documents_per_shard and dtype must be numbers and uint16 or uint32"
    for part in ("splits", "shards", "tokenizer_files"):
        if not isinstance(index.get(part), dict) or not all(re.fullmatch(_NAME, name) for name in index[part]):
            return f"{part} must have names, without folders"
    if not index["splits"] or not all(counts(split, documents=0) for split in index["splits"].values()):
        return "splits must have their documents"
    facts = dict(documents=0, blocks=0, bytes=0)
    if not all(counts(shard, **facts) and isinstance(shard.get("sha256"), str) for shard in index["shards"].values()):
        return "shards must have their documents, blocks, bytes and sha256"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


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
