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
) -> Dataset | IterableDataset | DatasetDict | IterableDatasetDict:
    """Tokenise documents, end each with end-of-text, join them, and cut the stream of tokens into blocks.

    A block is the begin-of-text token and the next `block_size - 1` tokens of the stream. Nothing of the stream is
    skipped or repeated; only the end that does not fill a block is dropped. A block holds parts of several
    documents where they are short, and **all of them then share one set of latents**.

    Args:
        dataset: documents in a column `text`, as from `load_corpus`; each split of a dict is packed by itself.
        tokenizer: with `bos_token` and `eos_token`, as from `load_tokenizer` or `train_tokenizer`.
        block_size: tokens in a block, begin-of-text included; at least 2.

    Returns:
        The same kind of data set with the one column `input_ids`, `block_size` integers a row. Blocks of a `Dataset`
        are kept on disk in the cache of `datasets`; those of a stream are made while iterating, by one worker.

    Raises:
        ValueError: the tokenizer lacks a token, the block size is below 2, or the tokens do not fill one block.
    """
    if isinstance(dataset, dict):
        return type(dataset)({name: _pack(split, tokenizer, block_size, name) for name, split in dataset.items()})
    return _pack(dataset, tokenizer, block_size, "corpus")


def _pack(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, name: str
) -> Dataset | IterableDataset:
    arguments = {"documents": dataset, "tokenizer": tokenizer, "block_size": block_size, "name": name}
    next(_blocks(**arguments))  # raises its errors here, before any work
    features = Features({"input_ids": List(Value("int32"), length=block_size)})
    kind = Dataset if isinstance(dataset, Dataset) else IterableDataset
    return kind.from_generator(_blocks, features=features, gen_kwargs=arguments)


def _blocks(
    documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, name: str
) -> Iterator[dict[str, list[int]]]:
    begin, end, body = tokenizer.bos_token_id, tokenizer.eos_token_id, block_size - 1
    if begin is None or end is None:
        raise ValueError("The tokenizer has no begin-of-text or no end-of-text token: load it with load_tokenizer.")
    if body < 1:
        raise ValueError(f"block_size must be at least 2 (begin-of-text and a token), not {block_size}.")
    stream, filled = [], False
    for batch in documents.iter(DOCUMENTS_AT_A_TIME):
        # verbose=False: a document longer than the model's input is no mistake here
        for tokens in tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*tokens, end]
        whole = len(stream) - len(stream) % body
        for start in range(0, whole, body):
            filled = True
            yield {"input_ids": [begin, *stream[start : start + body]]}
        del stream[:whole]
    if not filled:
        raise ValueError(
            f"The {name} has {len(stream)} tokens, too few for one block of {block_size} "
            f"(begin-of-text and {body} more): take a smaller block or more text."
        )


def collate_blocks(blocks: list[dict]) -> dict[str, torch.Tensor]:
    """Rows to a batch: `input_ids` and `labels`, (rows, tokens) each. Labels are the input where a row has none.

    Rows of different lengths are padded on the right: label -100, and 0 in an `attention_mask` that equal ones lack.
    """
    input_ids = [torch.tensor(block["input_ids"]) for block in blocks]
    labels = [torch.tensor(block.get("labels", block["input_ids"])) for block in blocks]
    batch = {
        "input_ids": pad_sequence(input_ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
    if len({len(ids) for ids in input_ids}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True)
    return batch
