"""examples/serve.py on this machine: it answers as generate() writes, refuses with a sentence, and stops when asked."""

import importlib.util
import json
import signal
import socket
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from itertools import product
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ltm_hf import LTMForCausalLM

for package in ("fastapi", "openai", "uvicorn"):  # transformers[serving]
    pytest.importorskip(package)

SCRIPT = Path(__file__).parents[2] / "examples" / "serve.py"
MESSAGE = "hello, people of Spain"
FOREVER = json.dumps({"num_inference_steps": 10**8})


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("serve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def writer():
    """What generate() of the model in a folder writes after the message, in a chat or as it is."""

    def writer(folder):
        return partial(write, LTMForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))

    def write(model, tokenizer, steps=None, chat=True):
        messages = [{"role": "user", "content": MESSAGE}]
        options = dict(return_tensors="pt", return_dict=True)
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
        inputs = inputs if chat else tokenizer(MESSAGE, return_tensors="pt")
        output = model.generate(**inputs, num_inference_steps=steps, do_sample=False, max_new_tokens=12)
        return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])

    return writer


@pytest.fixture(scope="module")
def expected(writer, chat_folder):
    return writer(chat_folder)


@pytest.fixture(scope="module")
def serving(script, chat_folder):
    """A server with options, and its client, as long as the block."""

    @contextmanager
    def serving(*options, folder=chat_folder):
        server = script.serving.Server(script.serving.parser().parse_args([str(folder), "--port", "0", *options]))
        with script.running(server) as client:
            yield server, client

    return serving


@pytest.fixture(scope="module")
def served(serving):
    with serving() as (server, client):
        yield server, client


@pytest.fixture(scope="module")
def client(served):
    return served[1]


def connect(server):
    return HTTPConnection(*server.listening.getsockname(), timeout=60)


def send(server, path, body=None, headers=None):
    """The status and the JSON of an answer."""
    connection = connect(server)
    body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, body, headers or {})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, json.loads(answer) if answer.startswith(b"{") else answer


def test_answers_as_generate(script, serving, writer, chat_folders, reader):
    folder = chat_folders[reader]
    expected = writer(folder)
    with serving(folder=folder) as (_, client):
        for chat, stream in product((True, False), (True, False)):
            texts = set()
            for steps in (None, 0, 3):
                settings = {} if steps is None else dict(num_inference_steps=steps)
                request = dict(chat=chat, stream=stream, max_tokens=12, **settings)
                text = "".join(piece or "" for piece in script.ask(client, str(folder), MESSAGE, **request))
                assert text == expected(steps, chat)
                texts.add(text)
            assert len(texts) == {"memory": 2, "paper": 3}[reader]  # thinking again changes no word of this memory


def test_ordinary_request(client, chat_folder, expected):
    """One that knows nothing of latents: the folder's settings hold."""
    assert [model.id for model in client.models.list()] == [str(chat_folder)]
    messages = [{"role": "user", "content": MESSAGE}]
    request = dict(model=str(chat_folder), messages=messages, temperature=0, max_tokens=12)
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].message.content == expected() and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12 and answer.usage.total_tokens == answer.usage.prompt_tokens + 12


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_stop_strings(client, chat_folder, expected, stream):
    whole = expected(chat=False)
    stop = whole[4:6]
    assert stop in whole and whole.find(stop) > 0
    answer = client.completions.create(
        model=str(chat_folder), prompt=MESSAGE, max_tokens=12, stop=["never", stop], stream=stream
    )
    choices = [part.choices[0] for part in (answer if stream else [answer])]
    assert "".join(choice.text for choice in choices) == whole[: whole.find(stop)]
    assert choices[-1].finish_reason == "stop"


def test_sampling_by_a_seed(client, chat_folder):
    request = dict(model=str(chat_folder), prompt=MESSAGE, max_tokens=12, temperature=1.5)
    texts = [client.completions.create(**request, seed=seed).choices[0].text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [client.completions.create(**request | {"temperature": t}).choices[0].text for t in (0, 1e-30)]
    assert greedy[0] == greedy[1] not in texts


TEXT = {"prompt": "a", "max_tokens": 3}
BAD = {
    "no prompt": ({"max_tokens": 3}, 400, "prompt: Field required"),
    "an empty prompt": ({"prompt": ""}, 400, "prompt: "),
    "a prompt of another type": ({"prompt": 5}, 400, "prompt: "),
    "no text to write": (TEXT | {"max_tokens": 0}, 400, "max_tokens: "),
    "a negative temperature": (TEXT | {"temperature": -1}, 400, "temperature: "),
    "temperature not finite": (b'{"prompt": "a", "temperature": NaN}', 400, "temperature: "),
    "an unknown field": (TEXT | {"foo": 1}, 400, "foo: "),
    "an empty stop string": (TEXT | {"stop": [""]}, 400, "stop."),
    "too many stop strings": (TEXT | {"stop": ["x"] * 17}, 400, "stop: "),
    "no JSON": (b"{garbage", 400, "Invalid JSON"),
    "another model": (TEXT | {"model": "gpt2"}, 404, "There is no model 'gpt2' here"),
    "settings that are no JSON": (TEXT | {"generation_config": "{"}, 400, "generation_config: Invalid JSON"),
    "settings of another shape": (TEXT | {"generation_config": "[1]"}, 400, "generation_config: "),
    "an unknown setting": (TEXT | {"generation_config": '{"num_beams": 4}'}, 400, "generation_config.num_beams: "),
    "negative steps": (
        TEXT | {"generation_config": '{"num_inference_steps": -1}'}, 400, "num_inference_steps must be an integer",
    ),
    "an unknown method": (
        TEXT | {"generation_config": '{"inference_method": "sgd"}'}, 400, "inference_method ",
    ),
    "too many steps": (TEXT | {"generation_config": FOREVER}, 400, "100000000 inference steps are asked for"),
    "too much thinking again": (
        TEXT | {"max_tokens": 100, "generation_config": '{"num_inference_steps": 4, "reinfer_every": 1}'},
        400, "400 inference steps are asked for, and at most 256 taken",
    ),
    "too long a prompt": ({"prompt": "word " * 300}, 400, "The prompt has 1501 tokens, and at most 127 are read"),
    "too long an answer": (TEXT | {"max_tokens": 500}, 400, "500 new tokens are asked for, and at most 1"),
    "too large a body": (b" " * 1_000_001, 413, "A request may have 1000000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_bad_request_is_a_sentence(served, name, stream):
    body, status, words = BAD[name]
    body = body if isinstance(body, bytes) else body | {"stream": stream}
    answer = send(served[0], "/v1/completions", body)
    assert answer[0] == status and answer[1]["error"]["message"].startswith(words)
    assert answer[1]["error"]["type"] == "invalid_request_error"


def test_a_model_without_a_chat_template(served, monkeypatch):
    monkeypatch.setattr(served[0].served.tokenizer, "chat_template", None)
    status, answer = send(served[0], "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
    assert status == 400 and answer["error"]["message"].startswith("This model has no chat template")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "10.0.0.1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:3000"}, 403),
    ],
    ids=str,
)
def test_answers_under_its_own_name_alone(served, headers, status):
    for path in ("/health", "/v1/models"):
        assert send(served[0], path, headers=headers)[0] == status
    assert send(served[0], "/v1/completions", TEXT, headers)[0] == status


def test_listens_everywhere(serving):
    """By any address; by a name, which a stranger can point here, where it is known."""
    with serving("--host", "0.0.0.0", "--allowed_hosts", "My.Host") as (server, _):
        for host, status in {"[::1]": 200, "10.0.0.1": 200, "my.host": 200, "evil.example": 403}.items():
            assert send(server, "/health", headers={"Host": host})[0] == status


def test_loads_nothing(served, chat_folder, tmp_path):
    """`transformers chat` asks for its model to be loaded, and is told that it is."""
    status, answer = send(served[0], "/load_model", {"model": str(chat_folder)})
    assert status == 200 and answer == b'data: {"status": "ready", "cached": true}\n\n'
    assert send(served[0], "/load_model", {"model": str(tmp_path)})[0] == 404
    assert send(served[0], "/reset", {})[0] == 404 and send(served[0], "/docs")[0] == 404


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_stops_thinking_for_a_client_that_has_left(serving, stream):
    with serving("--max_inference_steps", str(10**9), "--max_requests", "1") as (server, _):
        connection = connect(server)
        connection.request(
            "POST", "/v1/completions", json.dumps(TEXT | {"stream": stream, "generation_config": FOREVER})
        )
        until(server.served.in_use.locked)
        assert send(server, "/health") == (200, {"status": "ok"})
        assert send(server, "/v1/completions", TEXT)[0] == 429
        connection.close()
        until(lambda: not server.served.in_use.locked())
        until(lambda: send(server, "/v1/completions", TEXT)[0] == 200)


def test_sigterm_ends_it_while_it_thinks(start, chat_folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("--port", port, "--device", "cpu", "--max_inference_steps", 10**9)
    process, said = start(SCRIPT, chat_folder, *options)
    statuses = []

    def ask():
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/completions", json.dumps(TEXT | {"generation_config": FOREVER}))
        statuses.append(connection.getresponse().status)

    def is_up():
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            return False
        return True

    until(is_up, 60)
    client = threading.Thread(target=ask)
    client.start()
    until(lambda: "Started server" in said[1].read_text(), 60)
    time.sleep(0.5)  # it thinks
    process.terminate()
    process.join(5)
    client.join(5)
    assert process.exitcode == -signal.SIGTERM and statuses == [503]


def test_asks_prints_and_stops(run, chat_folder, expected):
    words = (chat_folder, "--message", MESSAGE, "--max_tokens", 12, "--num_inference_steps", 16)
    result = run(SCRIPT, *words)
    assert result.stdout == expected(16) + "\n" and "Finished server process" in result.stderr
