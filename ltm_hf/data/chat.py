"""Conversations to fine-tune on: rows of chat, of prompt and completion, or of question and answer."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .files import file_type, local_files, read_rows
from .numbers import check_at_least
from .tokenization import encode, special_tokens_of

# Words and line breaks only, so that it works with any vocabulary. What the assistant says, its end-of-text included,
# is marked as generated, for losses on nothing else.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '' if loop.first else '\n' }}{{ message['role'] | capitalize }}:\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:\n' }}{% endif %}"
)

# Columns that make a format, and what they hold.
_FORMATS = {
    ("messages",): "a list of messages, each with a role and a content",
    ("prompt", "completion"): "both text or both lists of messages, each with a role and a content",
    ("question", "answer"): "text",
}


def set_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer that has no chat template `CHAT_TEMPLATE`: `User:` and `Assistant:` in words."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE


def load_conversations(
    name_or_files: str | Path | Sequence[str | Path],
    *,
    config_name: str | None = None,
    split: str = "train",
    validation_fraction: float = 0.05,
    seed: int = 0,
) -> DatasetDict:
    """Load rows to fine-tune on, split into `train` and `validation`, in the formats that TRL takes.

    Rows with `messages` (a list of role and content) keep that column, those with `prompt` and `completion` these two.
    Rows with `question` and `answer` (as in GSM8K) become a conversation: the question a user's turn as `prompt`, the
    answer the assistant's as `completion`. Other columns are dropped.

    Args:
        name_or_files: files (.json, .jsonl, .parquet, compressed or not) as a list, one path, a glob or a folder, or
            the name of a data set on the Hub.
        config_name, split: of a Hub data set.
        validation_fraction: share of the rows for validation, between 0 and 1. The same seed makes the same choice.

    Raises:
        FileNotFoundError: a file is missing, or a glob or folder has no files.
        ValueError: text files, none of these columns, fewer than two rows, or what is wrong in a file, by its name and
            line.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, not {validation_fraction}.")
    check_at_least(0, seed=seed)
    files = local_files(name_or_files)
    if files and file_type(files[0]) == "text":
        raise ValueError(f"{files[0]!r} is text without fields; conversations are read from json and parquet files.")
    rows = _local_rows(files) if files else load_dataset(name_or_files, config_name, split=split)
    rows = _conversations(rows)
    if len(rows) < 2:
        raise ValueError("There must be at least two rows, one to train and one to validate on.")
    parts = rows.train_test_split(test_size=validation_fraction, seed=seed)
    return DatasetDict(train=parts["train"], validation=parts["test"])


def prompt_inputs(row: dict, tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    """What a row's answer follows, as training shows it: `input_ids` and `attention_mask`, (1, tokens), for generate().

    row: of `load_conversations`; of `messages`, the last is taken for the answer.
    """
    asked = row["messages"][:-1] if "messages" in row else row["prompt"]
    if isinstance(asked, str):
        return encode(tokenizer, [asked], begin=True, return_tensors="pt")
    return encode_chat(tokenizer, asked, add_generation_prompt=True, return_tensors="pt")


# ------------------------------------------------------------------ messages that are nothing but text

_MARK = "\ufdd0"  # which Unicode keeps for such uses and no text holds


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict],
    *,
    return_assistant_tokens_mask: bool = False,
    return_tensors: str | None = None,
    **options,
) -> BatchEncoding:
    """One conversation as `apply_chat_template` encodes it, its messages nothing but text: a special token that one
    names is spelt by its letters, and only the template's own are tokens.

    options: of that method, such as `add_generation_prompt`.
    Returns `input_ids`, `attention_mask` and, where they are asked for, `assistant_masks`.
    """
    names = sorted(special_tokens_of(tokenizer).values(), key=len, reverse=True)
    plain = re.compile("|".join(map(re.escape, names)))
    marked = _each_text(messages, lambda text: plain.sub(lambda name: name[0][0] + _MARK + name[0][1:], text))
    if marked == messages:
        options |= {"return_tensors": return_tensors, "return_dict": True}
        return tokenizer.apply_chat_template(
            messages, return_assistant_tokens_mask=return_assistant_tokens_mask, **options
        )
    said = set()  # places of the marked text
    if return_assistant_tokens_mask:
        asked = {"return_assistant_tokens_mask": True, "tokenizer_kwargs": {"return_offsets_mapping": True}}
        tokens = tokenizer.apply_chat_template(marked, return_dict=True, **asked, **options)
        spans = zip(tokens["offset_mapping"], tokens["assistant_masks"], strict=True)
        said = {place for span, is_said in spans if is_said for place in range(*span)}
    names = "|".join(re.escape(name[0]) + _MARK + re.escape(name[1:]) for name in names)
    pieces = re.split(f"({names})", tokenizer.apply_chat_template(marked, tokenize=False, **options))
    ids, masks, place = [], [], 0
    for number, piece in enumerate(pieces):  # every second one is a name
        within, starts = _encode_piece(tokenizer, piece.replace(_MARK, ""), number, return_assistant_tokens_mask)
        ids += within
        masks += [int(place + start in said) for start in starts]
        place += len(piece)
    encoded = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    encoded |= {"assistant_masks": masks} if return_assistant_tokens_mask else {}
    return BatchEncoding(encoded, tensor_type=return_tensors, prepend_batch_axis=return_tensors is not None)


def _each_text(value, change: Callable[[str], str]):
    """A value of JSON with its strings changed, but for the names of fields."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_text(item, change) for name, item in value.items()}
    return [_each_text(item, change) for item in value] if isinstance(value, (list, tuple)) else value


def _encode_piece(tokenizer, piece: str, number: int, with_starts: bool) -> tuple[list[int], list[int]]:
    """Tokens of a part of a text, and where each starts in it. The parts of odd numbers are nothing but text."""
    options = {"return_offsets_mapping": True} if with_starts else {}
    if number % 2 == 0:
        options |= {"add_special_tokens": False, "verbose": False}

    def tokens(text):
        found = encode(tokenizer, [text], **options) if number % 2 else tokenizer([text], **options)
        return found["input_ids"][0], [start for start, _ in found["offset_mapping"][0]] if with_starts else []

    # After a line's end, since some tokenizers put a space before what they take for the beginning of a text.
    end_of_line, (ids, starts) = tokens("\n")[0], tokens("\n" + piece)
    if number and piece and ids[: len(end_of_line)] == end_of_line:
        return ids[len(end_of_line) :], [start - 1 for start in starts[len(end_of_line) :]]
    return tokens(piece) if piece else ([], [])


class AsText:
    """A tokenizer for TRL, to which texts and messages are nothing but text, as to `encode` and `encode_chat`.

    TRL ends a text by the name of the end-of-text token: at the end, that name is the token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> dict[str, list[int]]:
        body = text.removesuffix(self.tokenizer.eos_token)
        end = [] if body == text else [self.tokenizer.eos_token_id]
        return {"input_ids": encode(self.tokenizer, [body], begin=True)["input_ids"][0] + end}

    def apply_chat_template(self, messages, tokenize: bool, return_dict: bool, **options) -> BatchEncoding:
        """tokenize, return_dict: always."""
        return encode_chat(self.tokenizer, messages, **options)

    def __getattr__(self, name):
        if name == "tokenizer":  # not yet there while it is unpickled
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


# ------------------------------------------------------------------ rows


def _local_rows(files: Sequence[str]) -> Dataset:
    """All rows, of the first row's format."""
    rows, names, kind = [], (), None
    for file in files:
        for place, row in read_rows(file):
            names = names or _format(row)
            found = _kind(place, row, names)
            if found != (kind := kind or found):
                raise ValueError(f"{place}: {names[0]!r} is {found}, and {kind} in the rows before.")
            rows.append({name: row[name] for name in names})
    return Dataset.from_list(rows)


def _kind(place: str, row: dict, names: tuple[str, ...]) -> str:
    values = [row.get(name) for name in names]
    if names != ("messages",) and all(isinstance(value, str) for value in values):
        return "text"
    chats = all(isinstance(value, list) and value and all(map(_is_message, value)) for value in values)
    if names != ("question", "answer") and chats:
        return "messages"
    given = ", ".join(repr(value)[:40] for value in values)
    raise ValueError(f"{place}: {' and '.join(names)} must be {_FORMATS[names]}, not {given}.")


def _is_message(value) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), (str, type(None)))  # None beside calls of tools
    )


def _format(columns) -> tuple[str, ...]:
    names = next((names for names in _FORMATS if set(names) <= set(columns)), None)
    if names is None:
        raise ValueError(
            "Rows to fine-tune on need messages, prompt and completion, or question and answer; these have "
            f"{', '.join(columns)}."
        )
    return names


def _conversations(rows: Dataset) -> Dataset:
    names = _format(rows.column_names)
    rows = rows.select_columns(list(names))
    return rows.map(_ask, remove_columns=list(names)) if names == ("question", "answer") else rows


def _ask(row: dict) -> dict:
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }
