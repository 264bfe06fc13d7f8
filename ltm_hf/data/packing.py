"""Documents packed into blocks of equal length, each beginning with begin-of-text."""

from collections.abc import Iterator

import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..losses_ltm import IGNORED
from .corpora import generated
from .numbers import check_at_least
from .tokenization import encode

DOCUMENTS_AT_A_TIME = 64  # tokenised together: enough to keep the cores busy, few enough for long documents


def pack(
    dataset: Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    num_shards: int = 1,
    join: bool = True,
) -> Dataset | IterableDataset | DatasetDict | IterableDatasetDict:
    """Tokenise documents, end each with end-of-text, join them, and cut the stream of tokens into blocks.

    End-of-text stands where a document ends and nowhere else: a text that names a special token is text.

    A block is the begin-of-text token and the next `block_size - 1` tokens of the stream. Nothing of the stream is
    skipped or repeated; only the end that does not fill a block is dropped. A block holds parts of several
    documents where they are short, and **all of them then share one set of latents**; with `join=False` each block is
    of one document, and the end of each document that does not fill a block is dropped.

    Args:
        dataset: documents in a column `text`, as from `load_corpus`; each split of a dict is packed by itself.
        tokenizer: with `bos_token` and `eos_token`, as from `load_tokenizer` or `train_tokenizer`.
        block_size: tokens in a block, begin-of-text included; at least 2.
        num_shards: parts of a stream that are packed by themselves, for the workers and processes of a data loader to
            share out; at most as many as the stream has, which are its files. Of each part, the end that does not fill
            a block is dropped. The blocks depend on the number of parts, and not on who makes them.

    Returns:
        The same kind of data set with the one column `input_ids`, `block_size` integers a row. Blocks of a `Dataset`
        are kept on disk in the cache of `datasets`; those of a stream are made while iterating, by `num_shards` workers
        at most. A stream's `shuffle(seed, buffer_size)` shuffles blocks, and its `state_dict` knows how far it is.

    Raises:
        ValueError: the tokenizer lacks a token, the block size is below 2, the tokens do not fill one block, a stream
            has fewer than `num_shards` parts, or a row has no string for its text; of a stream when it comes there.
    """
    if isinstance(dataset, dict):
        return type(dataset)(
            {name: _pack(split, tokenizer, block_size, num_shards, join, name) for name, split in dataset.items()}
        )
    return _pack(dataset, tokenizer, block_size, num_shards, join, "corpus")


def _pack(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    num_shards: int,
    join: bool,
    name: str,
) -> Dataset | IterableDataset:
    check_packing(dataset, tokenizer, block_size, name, join)
    features = Features({"input_ids": List(Value("int32"), length=block_size)})
    arguments = {"tokenizer": tokenizer, "block_size": block_size, "join": join}
    if isinstance(dataset, Dataset):
        return generated(_blocks_of_parts, features, {"parts": [dataset], **arguments})
    if not 1 <= num_shards <= dataset.num_shards:
        raise ValueError(
            f"num_shards must lie between 1 and the {dataset.num_shards} parts of the stream {name}, not {num_shards}: "
            "cut the corpus into more files, or take fewer."
        )
    # `datasets` shares out the members of a list
    parts = [dataset] if num_shards == 1 else [dataset.shard(num_shards, index) for index in range(num_shards)]
    return IterableDataset.from_generator(_blocks_of_parts, features=features, gen_kwargs={"parts": parts, **arguments})


def _blocks_of_parts(parts: list[Dataset | IterableDataset], **arguments) -> Iterator[dict[str, list[int]]]:
    for documents in parts:
        yield from blocks_of(documents, **arguments)


def check_packing(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    name: str,
    join: bool = True,
) -> None:
    """Raise the errors of `pack` before any work; reads documents until the first block is full."""
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no begin-of-text or no end-of-text token: load it with load_tokenizer.")
    check_at_least(2, block_size=block_size)
    if next(blocks_of(documents, tokenizer, block_size, join), None) is None:
        if not join:
            raise ValueError(
                f"No document of the {name} fills a block of {block_size} tokens: take a smaller block, or join them."
            )
        count = sum(len(tokens) + 1 for tokens in _tokens(documents, tokenizer))
        raise ValueError(
            f"The {name} has {count} tokens, too few for one block of {block_size} "
            f"(begin-of-text and {block_size - 1} more): take a smaller block or more text."
        )


def blocks_of(
    documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, join: bool = True
) -> Iterator[dict[str, list[int]]]:
    """The blocks of documents, as `pack` describes them; none where they do not fill one."""
    begin, end, body = tokenizer.bos_token_id, tokenizer.eos_token_id, block_size - 1
    stream = []
    for tokens in _tokens(documents, tokenizer):
        stream += [*tokens, end]
        whole = len(stream) - len(stream) % body
        for start in range(0, whole, body):
            yield {"input_ids": [begin, *stream[start : start + body]]}
        del stream[: whole if join else None]


def _tokens(documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Of each document."""
    number = 0
    for batch in documents.iter(DOCUMENTS_AT_A_TIME):
        if "text" not in batch:
            raise ValueError(f"Documents are in a column 'text', which there is not: only {', '.join(batch)}.")
        for text in batch["text"]:
            if not isinstance(text, str):
                raise ValueError(f"The text of document {number} must be a string, not {repr(text)[:40]}.")
            number += 1
        yield from encode(tokenizer, batch["text"])["input_ids"]


def collate_blocks(blocks: list[dict]) -> dict[str, torch.Tensor]:
    """Rows to a batch: `input_ids` and `labels`, (rows, tokens) each. Labels are the input where a row has none.

    Padding that a row's `attention_mask` marks at its ends is taken off. Rows of different lengths are then padded on
    the right: label -100, and 0 in an `attention_mask` that equal ones lack. Other columns are left out.
    Raises ValueError for a row without tokens, one whose columns differ in length, and other masks.
    """
    rows = [_unpadded(block) for block in blocks]
    batch = {
        "input_ids": pad_sequence([ids for ids, _ in rows], batch_first=True),
        "labels": pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORED),
    }
    if len({len(ids) for ids, _ in rows}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True)
    return batch


def _unpadded(row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """A row's `input_ids` and `labels`, without padding."""
    ids = torch.as_tensor(row["input_ids"])
    labels = ids if row.get("labels") is None else torch.as_tensor(row["labels"])
    mask = row.get("attention_mask")
    if len(ids) != len(labels) or (mask is not None and len(mask) != len(ids)):
        raise ValueError(
            f"A row has {len(ids)} input_ids, {len(labels)} labels and an attention_mask of "
            f"{len(ids if mask is None else mask)}: give it as many of each."
        )
    if mask is not None:
        real = real_tokens(mask)
        ids, labels = ids[real], labels[real]
    if not len(ids):
        raise ValueError("A row of the batch has no tokens: leave rows without tokens out of the data.")
    return ids, labels


def real_tokens(attention_mask) -> slice:
    """Of a row, between the padding at its ends. Raises ValueError for padding elsewhere, and for other numbers."""
    mask = torch.as_tensor(attention_mask)
    real = mask.nonzero().flatten().tolist()
    span = slice(real[0], real[-1] + 1) if real else slice(0)
    if not (mask[span] == 1).all():
        raise ValueError("A row's attention_mask must be 1 for its tokens and 0 for padding, at its ends alone.")
    return span
