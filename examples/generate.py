"""Let a Latent Thought Model write, from a folder or the Hub.

python examples/generate.py outputs/ltm-tiny --prompt "The people"
python examples/generate.py outputs/ltm-tiny-paper --prompt "The people" --num_inference_steps 64    # think for longer
python examples/generate.py outputs/ltm-tiny                                                         # no prompt

Without the package ltm_hf, --trust_remote_code lets the Python in the model's folder do it.
"""

import math
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

try:
    from ltm_hf.cli import Parser, count, one_sentence, positive_int, seed, share, temperature
    from ltm_hf.loading import load_causal_lm
except ModuleNotFoundError:
    from argparse import ArgumentParser as Parser
    from contextlib import contextmanager

    count = positive_int = seed = int
    temperature = share = float

    @contextmanager
    def one_sentence():
        try:
            yield
        except (OSError, ValueError) as error:
            print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
            sys.exit(2)

    def load_causal_lm(name, trust_remote_code):
        if not trust_remote_code:
            raise ValueError(
                "The package ltm_hf is not installed: --trust_remote_code lets the Python in the model's folder run."
            )
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=True)


def parser_for(description):
    parser = Parser(description=description)
    parser.add_argument("model", help="folder of a checkpoint, or its name on the Hub")
    parser.add_argument("--max_new_tokens", type=positive_int, help="default: 100, or what the model has room for")
    parser.add_argument(
        "--num_inference_steps", type=count, help="how long to think (a memory: how often to read the prompt)"
    )
    parser.add_argument("--greedy", action="store_true", help="the likeliest token each time, instead of sampling")
    parser.add_argument("--temperature", type=temperature, help="of sampling; default 1.0")
    parser.add_argument("--top_p", type=share, help="of sampling; default 0.9")
    parser.add_argument("--seed", type=seed, help="default 0")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the Python in the model's folder if need be"
    )
    return parser


def load(options):
    """The model, its tokenizer, and what the options say to generate()."""
    if options.greedy and (options.temperature, options.top_p) != (None, None):
        raise ValueError("--temperature and --top_p do nothing with --greedy: leave them out.")
    model, tokenizer = load_causal_lm(options.model, trust_remote_code=options.trust_remote_code)
    if model.config.model_type != "ltm":
        raise ValueError(f"{options.model!r} is a {model.config.model_type!r} model, not an LTM.")
    if options.num_inference_steps is not None and not model.config.num_latents:
        raise ValueError("--num_inference_steps does nothing with a model without latents: leave it out.")
    settings = {"do_sample": not options.greedy, "pad_token_id": tokenizer.pad_token_id}
    if not options.greedy:
        settings["temperature"] = 1.0 if options.temperature is None else options.temperature
        settings["top_p"] = 0.9 if options.top_p is None else options.top_p
    return model, tokenizer, settings


def main():
    parser = parser_for("Stream text from a Latent Thought Model.")
    parser.add_argument("--prompt", help="text to continue; without one, a memory is empty, other latents the prior's")
    options = parser.parse_args()
    if options.prompt == "":
        raise ValueError("--prompt is empty: leave it out to write without one.")
    if options.prompt is None and options.num_inference_steps is not None:
        raise ValueError("--num_inference_steps does nothing without --prompt, which is what it thinks about.")
    if options.prompt and options.greedy and options.seed is not None:
        raise ValueError("--seed does nothing with --prompt and --greedy: leave it out.")

    model, tokenizer, settings = load(options)
    inputs = tokenizer(options.prompt, return_tensors="pt") if options.prompt else {}
    length = inputs["input_ids"].shape[1] if inputs else 1  # begin-of-text
    most = model.config.max_position_embeddings
    if model.config.has_memory and model.config.sliding_window:  # which goes on without end
        most = math.inf
    more = max(1, min(100, most - length)) if options.max_new_tokens is None else options.max_new_tokens
    if length + more > most:
        raise ValueError(f"The model takes {most} tokens: a prompt of {length} leaves no room for {more} more.")
    set_seed(options.seed or 0)
    if options.prompt:
        settings |= dict(inputs.to(model.device)) | {"num_inference_steps": options.num_inference_steps}
    elif model.config.num_latents and not model.config.has_memory:
        settings["latents"] = model.sample_prior(1, seed=options.seed or 0)
    model.generate(
        **settings,
        max_new_tokens=more,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


if __name__ == "__main__":
    with one_sentence():
        main()
