"""Serve a Latent Thought Model to OpenAI clients by `transformers serve`.

python examples/serve.py outputs/ltm-tiny --message "Hello" --num_inference_steps 16    # serve, ask, print, stop
python examples/serve.py outputs/ltm-tiny --port 8000 --device cuda                     # serve until interrupted

Needs `pip install "transformers[serving]" requests`. Options that are not named here go on to `transformers serve`.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import urlopen

import transformers
from openai import OpenAI

HOST = "127.0.0.1"


def serve(model, port, *options):
    """`transformers serve` in this process."""
    from transformers.cli.transformers import main as command_line

    # It looks for the model's class by name among transformers' own. This one loads the checkpoint's own code.
    transformers.LTMForCausalLM = transformers.AutoModelForCausalLM
    sys.argv = ["transformers", "serve", model, "--trust-remote-code", "--host", HOST, "--port", str(port), *options]
    command_line()


@contextmanager
def running_server(model, *options):
    """An OpenAI client of a server on a free port, in a process that ends with the block."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        address = f"http://{HOST}:{free.getsockname()[1]}"
    command = [sys.executable, __file__, model, "--port", address.rpartition(":")[2], *options]
    process = subprocess.Popen(command, stdout=sys.stderr)  # its log, apart from the answer
    try:
        while process.poll() is None:
            try:
                urlopen(f"{address}/health").close()
                break
            except OSError:  # not yet
                time.sleep(0.2)
        else:
            raise RuntimeError(f"The server of {model} did not start.")
        yield OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        process.wait()


def ask(client, model, message, *, chat=True, stream=True, max_tokens=100, **generation):
    """Yield the pieces of the answer, one if not `stream`. `generation`: what GenerationConfig holds for LTMs.

    `chat` needs a chat template; without, the message is text to continue.
    """
    request = dict(model=model, stream=stream, max_tokens=max_tokens)
    # The dial is no field of OpenAI's; do_sample neither, and `temperature` alone does not turn sampling on.
    request["extra_body"] = {"generation_config": json.dumps(generation)}
    if chat:
        answer = client.chat.completions.create(messages=[{"role": "user", "content": message}], **request)
    else:
        answer = client.completions.create(prompt=message, **request)
    for part in answer if stream else [answer]:
        choice = part.choices[0]
        yield (choice.delta.content if stream else choice.message.content) if chat else choice.text


def main():
    parser = argparse.ArgumentParser(description="Serve a Latent Thought Model to OpenAI clients.")
    parser.add_argument("model", help="folder of a checkpoint, or its name on the Hub")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--message", help="serve on a free port, ask this, print the answer and stop")
    parser.add_argument("--max_tokens", type=int, default=100)
    parser.add_argument("--num_inference_steps", type=int, help="how long to think about the message")
    parser.add_argument("--do_sample", action="store_true", help="instead of the likeliest token each time")
    options, serve_options = parser.parse_known_args()
    if options.message is None:
        return serve(options.model, options.port, *serve_options)

    chat = transformers.AutoTokenizer.from_pretrained(options.model, trust_remote_code=True).chat_template is not None
    with running_server(options.model, *serve_options) as client:
        request = dict(max_tokens=options.max_tokens, do_sample=options.do_sample)
        if options.num_inference_steps is not None:
            request["num_inference_steps"] = options.num_inference_steps
        for piece in ask(client, options.model, options.message, chat=chat, **request):
            print(piece or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
