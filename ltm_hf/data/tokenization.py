"""Tokenizers with a begin-of-text and an end-of-text token: trained on a corpus, or loaded and completed."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .numbers import check_at_least

BEGIN_OF_TEXT = "<|beginoftext|>"
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, model_max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE as GPT-2's on texts; it encodes every text without loss.

    `tokenizer(text)` begins with the begin-of-text token, as a packed block does, and
    `tokenizer(text, add_special_tokens=False)` is the text alone. It pads on the left, as batched generation needs.

    Args:
        texts: texts to learn from, one at a time.
        vocab_size: entries in all: `<|endoftext|>` (also the padding), `<|beginoftext|>`, the 256 bytes and the
            merges; at least 258. A small corpus may not have as many merges: `len(tokenizer)` tells.
        model_max_length: longest input of the model in tokens; without one there is no limit.

    Raises:
        ValueError: vocab_size is below 258.
    """
    special_tokens = [END_OF_TEXT, BEGIN_OF_TEXT]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    check_at_least(len(special_tokens) + len(alphabet), vocab_size=vocab_size)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        add_bos_token=True,
        padding_side="left",
        model_max_length=model_max_length,
    )


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer of the Hub or of a folder, and see that it has begin-of-text, end-of-text and padding tokens.

    One with a begin-of-text token of its own keeps it. To others (GPT-2 has a single token for begin and end)
    `<|beginoftext|>` is added as one more entry, which makes 50,258 for GPT-2, and `tokenizer(text)` begins with it.
    Padding is end-of-text where there was none, and on the left, as batched generation needs.

    Raises:
        ValueError: the tokenizer has no end-of-text token.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_folder, padding_side="left")
    if tokenizer.eos_token is None:
        raise ValueError(f"The tokenizer {str(name_or_folder)!r} has no end-of-text token (eos_token).")
    if tokenizer.bos_token in (None, tokenizer.eos_token):
        tokenizer.add_special_tokens({"bos_token": BEGIN_OF_TEXT})
        tokenizer.add_bos_token = True
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """By their ids, the tokens that stand for something else than their letters, such as end-of-text."""
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], begin: bool = False, **options) -> BatchEncoding:
    """`tokenizer(texts)`, each text nothing but text: a special token that it names is spelt by its letters.

    begin: with what the tokenizer puts around a text, such as begin-of-text. options: of the tokenizer's call.
    Raises ValueError for a tokenizer that makes a special token of letters.
    """
    if not texts:
        return BatchEncoding({"input_ids": []})
    # verbose=False: a document longer than the model's input is no mistake here
    options |= {"add_special_tokens": begin, "split_special_tokens": True, "verbose": False}
    encoded = tokenizer(list(texts), **options)
    if not begin:
        special = special_tokens_of(tokenizer)
        special.pop(tokenizer.unk_token_id, None)  # which a text may well have
        found = special.keys() & set(chain.from_iterable(encoded["input_ids"]))
        if found:
            name = special[found.pop()]
            raise ValueError(f"The tokenizer cannot tell {name!r} in a text from its special token of that name.")
    return encoded
