"""Documents cut into blocks to score, each block from one document, with the bytes that its tokens stand for."""

from collections.abc import Iterable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .numbers import check_at_least
from .tokenization import encode


def document_blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """Each document in blocks one after the other: every token of it stands in one block, after begin-of-text.

    Args:
        texts: documents.
        tokenizer: a fast one. Blocks begin with its begin-of-text token, or its end-of-text where it has none.
        block_size: tokens of a block at most, begin-of-text included; at least 2.

    Returns:
        Rows with `input_ids`; `token_bytes`, the UTF-8 bytes of the document that each token stands for (0 for
        begin-of-text), which add up to the document's; and `document`, its number in `texts`.

    Raises:
        ValueError: a document without any text, by number; a block size below 2; a tokenizer that has neither token or
            does not know where its tokens stand in the text.
    """
    _check(tokenizer, block_size)
    rows = []
    for number, text in enumerate(texts):
        tokens, sizes = _tokens_and_bytes(number, text, tokenizer)
        for start in range(0, len(tokens), block_size - 1):
            rows.append(_row(tokenizer, tokens, sizes, slice(start, start + block_size - 1), number))
    return Dataset.from_list(rows)


def prefix_blocks(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int, prefix_length: int | None = None
) -> Dataset:
    """Blocks whose first part is to be read and the rest to be predicted: the rests make up the document without its
    beginning, each token once.

    A document that fills one block or less gives one. A longer one gives blocks that overlap: the first
    `prefix_length` tokens of each are the ones that the block before it predicted last.

    prefix_length: tokens of the first part, begin-of-text included; default half of a block, and half of the document
        where it is shorter than a block.

    Returns the rows of `document_blocks`, with their `prefix_length`. A document too short to have anything after its
    prefix gives no row. Raises ValueError as `document_blocks` does, and for a prefix that leaves a block no token.
    """
    _check(tokenizer, block_size)
    check_prefix_length(prefix_length, block_size)
    prefix, rows = prefix_length or block_size // 2, []
    for number, text in enumerate(texts):
        tokens, sizes = _tokens_and_bytes(number, text, tokenizer)
        short = prefix_length is None and len(tokens) + 1 < block_size
        first = (len(tokens) + 1) // 2 if short else prefix
        # The token before the first one to predict is the last of the prefix, begin-of-text is its first.
        for start in range(0, len(tokens) + 1 - first, block_size - first):
            row = _row(tokenizer, tokens, sizes, slice(start, start + block_size - 1), number)
            rows.append(row | {"prefix_length": first})
    return Dataset.from_list(rows)


def check_prefix_length(prefix_length: int | None, block_size: int) -> None:
    """Raise a ValueError for a prefix that leaves a block no token."""
    if prefix_length is not None:
        check_at_least(1, prefix_length=prefix_length)
        if prefix_length >= block_size:
            raise ValueError(f"prefix_length must be below the block size {block_size}, not {prefix_length}.")


def _check(tokenizer, block_size) -> None:
    check_at_least(2, block_size=block_size)
    if _begin(tokenizer) is None:
        raise ValueError("The tokenizer has neither a begin-of-text nor an end-of-text token to begin blocks with.")
    if not tokenizer.is_fast:
        raise ValueError("Bytes of tokens need a fast tokenizer, which knows where its tokens stand in the text.")


def _begin(tokenizer) -> int | None:
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _tokens_and_bytes(number: int, text: str, tokenizer) -> tuple[list[int], list[int]]:
    if not isinstance(text, str) or not text or text.isspace():
        raise ValueError(f"Document {number} has no text.")
    encoded = encode(tokenizer, [text], return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"][0], encoded["offset_mapping"][0]
    # A token's bytes reach from where it starts to where the next one does; of a character's parts the last has them.
    starts = [0, *(start for start, _ in offsets[1:]), len(text)]
    pairs = zip(starts, starts[1:], strict=False)
    return tokens, [len(text[start:end].encode()) for start, end in pairs]


def _row(tokenizer, tokens, sizes, part: slice, number: int) -> dict:
    return {
        "input_ids": [_begin(tokenizer), *tokens[part]],
        "token_bytes": [0, *sizes[part]],
        "document": number,
    }
