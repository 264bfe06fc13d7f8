"""Documents packed into blocks of equal length, each beginning with begin-of-text."""

from collections.abc import Iterator

import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, List, Value
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..posterior_ltm import IGNORED

DOCUMENTS_AT_A_TIME = 64  # tokenised together: enough to keep the cores busy, few enough for long documents


def pack(
    dataset: Dataset | IterableDataset | DatasetDict | IterableDatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    num_shards: int = 1,
    join: bool = True,
) -> Dataset | IterableDataset | DatasetDict | IterableDatasetDict:
    """Tokenise documents, end each with end-of-text, join them, and cut the stream of tokens into blocks.

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
        ValueError: the tokenizer lacks a token, the block size is below 2, the tokens do not fill one block, or a
            stream has fewer than `num_shards` parts.
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
        return Dataset.from_generator(blocks_of, features=features, gen_kwargs={"documents": dataset, **arguments})
    if not 1 <= num_shards <= dataset.num_shards:
        raise ValueError(
            f"num_shards must lie between 1 and the {dataset.num_shards} parts of the stream {name}, not {num_shards}: "
            "cut the corpus into more files, or take fewer."
        )
    # `datasets` shares out the members of a list
    parts = [dataset] if num_shards == 1 else [dataset.shard(num_shards, index) for index in range(num_shards)]
    return IterableDataset.from_generator(_blocks_of_parts, features=features, gen_kwargs={"parts": parts, **arguments})


def _blocks_of_parts(parts: list[IterableDataset], **arguments) -> Iterator[dict[str, list[int]]]:
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
    if block_size < 2:
        raise ValueError(f"block_size must be at least 2 (begin-of-text and a token), not {block_size}.")
    if next(blocks_of(documents, tokenizer, block_size, join), None) is None:
        if not join:
            raise ValueError(
                f"No document of the {name} fills a block of {block_size} tokens: take a smaller block, or join them."
            )
        texts = (text for batch in documents.iter(DOCUMENTS_AT_A_TIME) for text in batch["text"])
        count = sum(len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) + 1 for text in texts)
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
    for batch in documents.iter(DOCUMENTS_AT_A_TIME):
        # verbose=False: a document longer than the model's input is no mistake here
        for tokens in tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*tokens, end]
            whole = len(stream) - len(stream) % body
            for start in range(0, whole, body):
                yield {"input_ids": [begin, *stream[start : start + body]]}
            del stream[: whole if join else None]


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
