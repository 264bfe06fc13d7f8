"""Talk with a Latent Thought Model in the terminal, from a folder or the Hub.

python examples/chat.py outputs/ltm-tiny

It thinks about the whole conversation before each answer. /think N sets for how many steps (a memory: how often it
reads the conversation), /reset forgets the conversation, /quit leaves. Options, and what it does without the package
ltm_hf, are those of generate.py beside it.
"""

import sys

from generate import load, one_sentence, parser_for
from transformers import TextStreamer, set_seed

try:
    from ltm_hf.data import encode_chat  # to which messages are nothing but text, whatever token they name
except ModuleNotFoundError:

    def encode_chat(tokenizer, messages, **options):
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)


# For a tokenizer without a chat template: a line for each turn.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].capitalize() }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def note(text, end="\n"):
    print(text, end=end, file=sys.stderr, flush=True)


class AnswerStreamer(TextStreamer):
    """Prints the answer as it is written. The prompt arrives when thinking is over and ends the line that showed it."""

    def put(self, value):
        if self.next_tokens_are_prompt:
            note("")
        super().put(value)


def show_thinking(step, latents, objective):
    note(f"\rthinking… step {step + 1}, {objective.item():.1f} nats ", end="")


def encode(tokenizer, history, room):
    """The most of the conversation that `room` tokens hold: the turn it starts with, and its tokens. None: too long."""
    for start in range(0, len(history), 2):  # a turn: what the user said and the answer
        inputs = encode_chat(tokenizer, history[start:], add_generation_prompt=True, return_tensors="pt")
        if inputs["input_ids"].shape[1] <= room:
            return start // 2, inputs
    return None


def main():
    options = parser_for("Talk with a Latent Thought Model.").parse_args()
    if options.greedy and options.seed is not None:
        raise ValueError("--seed does nothing with --greedy: leave it out.")
    model, tokenizer, settings = load(options)
    most = model.config.max_position_embeddings
    longest = min(100, most // 2) if options.max_new_tokens is None else options.max_new_tokens
    room = most - longest
    if room < 2:
        raise ValueError(f"The model takes {most} tokens: --max_new_tokens {longest} leaves no room for a message.")
    settings |= dict(max_new_tokens=longest, num_inference_steps=options.num_inference_steps)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN
        settings |= dict(stop_strings=["\n"], tokenizer=tokenizer)
        note('(The tokenizer has no chat template: the dialogue is continued as lines of "User:" and "Assistant:".)')
    streamer = AnswerStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    set_seed(options.seed or 0)

    history = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            break
        command, _, value = line.partition(" ")
        if command == "/quit":
            break
        elif command == "/reset":
            history.clear()
            note("(The conversation is forgotten.)")
        elif command == "/think" and not model.config.num_latents:
            note("(This model has no latents to think with.)")
        elif command == "/think" and value.strip().isdecimal():
            settings["num_inference_steps"] = int(value)
        elif line.startswith("/"):
            note("(The commands are /think N, with N of 0 or more, /reset and /quit.)")
        elif line:
            history.append({"role": "user", "content": line})
            fitting = encode(tokenizer, history, room)
            if fitting is None:
                history.pop()
                note(f"(That is too long: the model reads {room} tokens beside an answer.)")
                continue
            forgotten, inputs = fitting
            if forgotten:
                del history[: 2 * forgotten]
                note(f"(Turns of the conversation forgotten, because the model cannot read as much: {forgotten}.)")
            output = model.generate(
                **inputs.to(model.device), **settings, streamer=streamer, inference_callback=show_thinking
            )
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            history.append({"role": "assistant", "content": answer.strip()})


if __name__ == "__main__":
    with one_sentence():
        main()
