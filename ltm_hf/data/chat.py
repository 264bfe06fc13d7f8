"""Conversations to fine-tune on: rows of chat, of prompt and completion, or of question and answer."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .corpora import _local_files, file_type

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

# Columns that make a format.
_FORMATS = (("messages",), ("prompt", "completion"), ("question", "answer"))


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
        ValueError: text files, none of these columns, or fewer than two rows.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie between 0 and 1, not {validation_fraction}.")
    files = _local_files(name_or_files)
    if files and file_type(files[0]) == "text":
        raise ValueError(f"{files[0]!r} is text without fields; conversations are read from json and parquet files.")
    if files:
        rows = load_dataset(file_type(files[0]), data_files=files, split="train")
    else:
        rows = load_dataset(name_or_files, config_name, split=split)
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
        return tokenizer(asked, return_tensors="pt")
    return tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")


def _conversations(rows: Dataset) -> Dataset:
    names = next((names for names in _FORMATS if set(names) <= set(rows.column_names)), None)
    if names is None:
        raise ValueError(
            "Rows to fine-tune on need messages, prompt and completion, or question and answer; these have "
            f"{', '.join(rows.column_names)}."
        )
    rows = rows.select_columns(list(names))
    return rows.map(_ask, remove_columns=list(names)) if names == ("question", "answer") else rows


def _ask(row: dict) -> dict:
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }
