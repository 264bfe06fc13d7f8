"""A conversation piped into examples/chat.py, answered as generate() answers it."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ltm_hf import LTMForCausalLM

SCRIPT = Path(__file__).parents[2] / "examples" / "chat.py"
NO_PACKAGE = (
    "import sys, runpy; sys.modules['ltm_hf'] = None; sys.path.insert(0, sys.argv.pop(1)); "
    "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
)


def talk(folder, *lines, options=("--greedy", "--max_new_tokens", "12")):
    """The answers to the lines, and what was said beside them."""
    command = [sys.executable, "-c", NO_PACKAGE, SCRIPT.parent, SCRIPT, folder, "--trust_remote_code", *options]
    result = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [answer for answer in re.split(r"^(?:> )+|\n(?:> )+", result.stdout) if answer.strip()], result.stderr


@pytest.fixture
def folder(chat_folders, reader):
    return chat_folders[reader]


@pytest.fixture
def answer(folder):
    model, tokenizer = LTMForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def to(*texts, steps, template=None):
        history = [{"role": ("user", "assistant")[i % 2], "content": text.strip()} for i, text in enumerate(texts)]
        inputs = tokenizer.apply_chat_template(
            history, chat_template=template, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, num_inference_steps=steps, do_sample=False, max_new_tokens=12)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

    return to


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def test_conversation(folder, answer, reader):
    answers, beside = talk(
        folder, "hello", "Spain?", "/think 3", "people", "/think much", "/reset", "hello", "/quit", "ignored"
    )
    first = answer("hello", steps=None)
    second = answer("hello", first, "Spain?", steps=None)
    third = answer("hello", first, "Spain?", second, "people", steps=3)
    assert answers == [first, second, third, answer("hello", steps=3)]
    own = {"memory": "1", "paper": "12"}[reader]  # steps of the model's own
    assert re.findall(r"step (\d), -", beside) == [*own, *own, *"123", *"123"]
    assert "/think N, with N of 0 or more" in beside and "is forgotten" in beside
    assert "no chat template" not in beside


@pytest.mark.parametrize("reader", ["memory"], indirect=True)
def test_long_conversation_without_a_template(folder, answer, tmp_path, monkeypatch):
    """Turns go from the front; a message that does not fit by itself leaves the conversation as it was."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (plain / file.name).symlink_to(file)
    long = "the people of Spain, the people of the United States and the people of France, hello there"
    options = ("--greedy", "--max_new_tokens", "12", "--num_inference_steps", "1")
    answers, beside = talk(plain, "hello", long, "hello " * 200, "yes", options=options)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    template = runpy.run_path(str(SCRIPT))["PLAIN"]
    first = answer("hello", steps=1, template=template)
    second = answer("hello", first, long, steps=1, template=template)
    assert answers == [first, second, answer(long, second, "yes", steps=1, template=template)]
    assert "(That is too long: the model reads 116 tokens beside an answer.)" in beside
    assert "because the model cannot read as much: 1.)" in beside and "no chat template" in beside
