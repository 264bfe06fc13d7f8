"""examples/serve.py on this machine: what the server answers is what generate() writes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ltm_hf import LTMForCausalLM

for package in ("fastapi", "openai", "uvicorn"):  # transformers[serving]
    pytest.importorskip(package)

SCRIPT = Path(__file__).parents[2] / "examples" / "serve.py"
MESSAGE = "hello, people of Spain"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("serve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected(chat_folder):
    """What generate() writes after the message, in a chat or as it is."""
    model, tokenizer = LTMForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)

    def write(steps=None, chat=True):
        messages = [{"role": "user", "content": MESSAGE}]
        options = dict(return_tensors="pt", return_dict=True)
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
        inputs = inputs if chat else tokenizer(MESSAGE, return_tensors="pt")
        output = model.generate(**inputs, num_inference_steps=steps, do_sample=False, max_new_tokens=12)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

    return write


@pytest.fixture(scope="module")
def client(script, chat_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        with script.running_server(str(chat_folder), "--device", "cpu") as client:
            yield client


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_answers_as_generate(script, client, chat_folder, expected, chat, stream):
    texts = []
    for settings in ({}, dict(num_inference_steps=0), dict(num_inference_steps=16)):
        request = dict(chat=chat, stream=stream, max_tokens=12, **settings)
        texts.append("".join(piece or "" for piece in script.ask(client, str(chat_folder), MESSAGE, **request)))
        assert texts[-1] == expected(settings.get("num_inference_steps"), chat)
    assert len(set(texts)) == 3


def test_ordinary_request(client, chat_folder, expected):
    """One that knows nothing of latents: the folder's settings hold."""
    messages = [{"role": "user", "content": MESSAGE}]
    request = dict(model=str(chat_folder), messages=messages, temperature=0, max_tokens=12)
    assert client.chat.completions.create(**request).choices[0].message.content == expected()


def test_asks_prints_and_stops(chat_folder, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    command = [sys.executable, SCRIPT, chat_folder, "--message", MESSAGE, "--max_tokens", "12"]
    result = subprocess.run([*command, "--num_inference_steps", "16"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == expected(16) + "\n" and "Finished server process" in result.stderr
