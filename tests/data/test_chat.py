"""Conversations: formats in, and what a row becomes under the chat template."""

import copy
import gzip
import inspect
import json

import pytest
from tokenizers import pre_tokenizers

from ltm_hf.data import encode_chat, load_conversations, prompt_inputs, set_chat_template, train_tokenizer

MESSAGES = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": " 2 "},
    {"role": "user", "content": "and 1?"},
    {"role": "assistant", "content": "3"},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["User:\nAssistant:\n1 + 1?"], 280)
    set_chat_template(tokenizer)
    return tokenizer


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        with (gzip.open if name.endswith(".gz") else open)(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_questions_and_answers_become_conversations(write, name):
    path = write([{"question": f"{i}?", "answer": f"{i}!", "id": i} for i in range(10)], name)
    rows = load_conversations([path], validation_fraction=0.2)
    assert {split: len(part) for split, part in rows.items()} == {"train": 8, "validation": 2}
    row = rows["train"][0]
    number = row["prompt"][0]["content"][0]
    assert row == {
        "prompt": [{"role": "user", "content": f"{number}?"}],
        "completion": [{"role": "assistant", "content": f"{number}!"}],
    }
    assert load_conversations(path, validation_fraction=0.2)["train"][0] == row  # the same choice


def test_formats_of_trl_are_kept(write):
    pairs = [{"prompt": "a", "completion": "b", "source": "x"}] * 4
    assert load_conversations(write(pairs))["train"][0] == {"prompt": "a", "completion": "b"}
    rows = load_conversations(write([{"messages": MESSAGES}] * 4, "chat.jsonl"))
    assert rows["train"].column_names == ["messages"] and rows["train"][0]["messages"] == MESSAGES


def test_bad_files_are_named(write, tmp_path):
    with pytest.raises(ValueError, match="need messages, prompt and completion, or question and answer; these have a"):
        load_conversations(write([{"a": "b"}] * 2))
    with pytest.raises(ValueError, match="at least two rows"):
        load_conversations(write([{"prompt": "a", "completion": "b"}], "one.jsonl"))
    with pytest.raises(FileNotFoundError, match="no-such.jsonl"):
        load_conversations([tmp_path / "no-such.jsonl"])
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(ValueError, match="is text without fields"):
        load_conversations([tmp_path / "plain.txt"])
    with pytest.raises(ValueError, match="between 0 and 1"):
        load_conversations([tmp_path / "plain.txt"], validation_fraction=1)


def test_template_marks_what_the_assistant_says(tokenizer):
    encoded = tokenizer.apply_chat_template(
        MESSAGES, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    text = tokenizer.decode(encoded["input_ids"])
    end = "<|endoftext|>"
    assert text == f"<|beginoftext|>User:\n1 + 1?\nAssistant:\n2{end}\nUser:\nand 1?\nAssistant:\n3{end}"
    said = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(said) == f"2{end}3{end}"


@pytest.mark.parametrize(
    "row", [{"messages": MESSAGES}, {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]}], ids=["chat", "pair"]
)
def test_a_prompt_is_how_its_row_begins(tokenizer, row):
    """Token by token, so that generation starts from what training has seen."""
    inputs = prompt_inputs(row, tokenizer)
    whole = tokenizer.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]
    prompt = inputs["input_ids"][0].tolist()
    assert whole[: len(prompt)] == prompt and tokenizer.decode(whole[len(prompt) :]) == "3<|endoftext|>"
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape


def test_text_prompts_and_templates_of_their_own_are_left(tokenizer):
    assert prompt_inputs({"prompt": "1 +"}, tokenizer)["input_ids"][0].tolist() == tokenizer("1 +")["input_ids"]
    own = train_tokenizer(["a"], 258)
    own.chat_template = "{{ messages[0]['content'] }}"
    set_chat_template(own)
    assert own.chat_template == "{{ messages[0]['content'] }}"


NAMING = [
    {"role": "user", "content": "What is <|endoftext|> and <|beginoftext|><|endoftext|>?"},
    {"role": "assistant", "content": "<|endoftext|>\nends a text."},
]


@pytest.mark.parametrize("space_first", [False, True])
def test_special_tokens_in_a_message_are_text(tokenizer, space_first):
    """The template's own are tokens, and what the assistant says is marked, as in messages that name none.

    space_first: as some tokenizers have it, before what they take for the beginning of a text.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space_first)
    others = [message | {"content": message["content"].replace("|", "!")} for message in NAMING]
    options = dict(return_assistant_tokens_mask=True)
    encoded, plain = (encode_chat(tokenizer, messages, **options) for messages in (NAMING, others))
    for wanted in (None, 1):
        found, expected = (
            tokenizer.decode(
                [i for i, mask in zip(one["input_ids"], one["assistant_masks"], strict=True) if mask != wanted]
            )
            for one in (encoded, plain)
        )
        assert found == expected.replace("!", "|")
    ids = encoded["input_ids"]
    assert [i for i in ids if i in tokenizer.all_special_ids] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert encoded["attention_mask"] == [1] * len(ids)
    asked = prompt_inputs({"messages": NAMING}, tokenizer)["input_ids"][0].tolist()
    assert asked == ids[: len(asked)]
    text = tokenizer.decode(prompt_inputs({"prompt": "a <|endoftext|>"}, tokenizer)["input_ids"][0][1:])
    assert text.strip() == "a <|endoftext|>"


def test_other_messages_are_as_the_library_has_them(tokenizer):
    options = dict(return_assistant_tokens_mask=True, return_dict=True)
    library = tokenizer.apply_chat_template(MESSAGES, **options)
    assert encode_chat(tokenizer, MESSAGES, return_assistant_tokens_mask=True) == library
    if "sanitize_control_tokens" in inspect.signature(tokenizer.apply_chat_template).parameters:
        library = tokenizer.apply_chat_template(NAMING, sanitize_control_tokens=True, return_dict=True)
        assert encode_chat(tokenizer, NAMING)["input_ids"] == library["input_ids"]
