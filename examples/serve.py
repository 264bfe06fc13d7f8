"""Serve a Latent Thought Model to OpenAI clients.

python examples/serve.py outputs/ltm-tiny --message "Hello"              # serve, ask, print, stop
python examples/serve.py outputs/ltm-tiny --port 8000 --device cuda      # serve until interrupted

Needs `pip install "transformers[serving]"`.
"""

import json
import threading
from argparse import RawDescriptionHelpFormatter
from contextlib import contextmanager

from ltm_hf import cli

with cli.one_sentence():  # where one is not installed
    from openai import OpenAI, OpenAIError, omit

    from ltm_hf.serving import server as serving


@contextmanager
def running(server):
    """An OpenAI client of a server, which runs as long as the block."""
    thread = threading.Thread(target=server.run)
    thread.start()
    host, port = server.listening.getsockname()[:2]
    try:
        with OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def ask(client, model, message, *, chat=True, stream=True, max_tokens=omit, **generation):
    """Yield the pieces of the answer, one if not `stream`. `generation`: what GenerationConfig holds for LTMs.

    `chat` needs a chat template; without, the message is text to continue.
    """
    request = dict(model=model, stream=stream, max_tokens=max_tokens)
    request["extra_body"] = {"generation_config": json.dumps(generation)}  # the dial is no field of OpenAI's
    if chat:
        answer = client.chat.completions.create(messages=[{"role": "user", "content": message}], **request)
    else:
        answer = client.completions.create(prompt=message, **request)
    for part in answer if stream else [answer]:
        choice = part.choices[0]
        yield (choice.delta.content if stream else choice.message.content) if chat else choice.text


def parse():
    parser = serving.parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--message", help="serve on a free port, ask this, print the answer and stop")
    parser.add_argument("--max_tokens", type=cli.positive_int, default=omit, help="of the answer")
    parser.add_argument(
        "--num_inference_steps", type=cli.count, help="how long to think (a memory: how often to read the message)"
    )
    parser.add_argument("--do_sample", action="store_true", help="instead of the likeliest token each time")
    named, options = cli.given(parser), parser.parse_args()
    asking = ("max_tokens", "num_inference_steps", "do_sample")
    cli.refuse_idle(
        named,
        (options.message is None, "without --message", asking),
        (options.message is not None, "with --message", ("host", "port", "allowed_hosts")),
    )
    return options


@cli.one_sentence()
def main():
    options = parse()
    if options.message is None:
        return serving.Server(options).run()
    options.port = 0
    server = serving.Server(options)
    request = {name: getattr(options, name) for name in ("max_tokens", "num_inference_steps", "do_sample")}
    chat = server.served.tokenizer.chat_template is not None
    with running(server) as client:
        try:
            for piece in ask(client, options.model, options.message, chat=chat, **request):
                print(piece, end="", flush=True)
        except OpenAIError as error:
            raise ValueError(str(error)) from None
        print()


if __name__ == "__main__":
    main()
