"""Let a Latent Thought Model write, from a folder or the Hub, with or without the package ltm_hf.

python examples/generate.py outputs/ltm-tiny --prompt "The people" --num_inference_steps 16
python examples/generate.py outputs/ltm-tiny                  # no prompt
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed


def main():
    parser = argparse.ArgumentParser(description="Stream text from a Latent Thought Model.")
    parser.add_argument("model", help="folder of a checkpoint, or its name on the Hub")
    parser.add_argument("--prompt", help="text to continue; without one, latents come from the prior, or are 0 by map")
    parser.add_argument("--max_new_tokens", type=int, default=100)
    parser.add_argument("--num_inference_steps", type=int, help="how long to think about the prompt")
    parser.add_argument("--greedy", action="store_true", help="the likeliest token each time, instead of sampling")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=True).eval()
    set_seed(options.seed)
    sampling = {} if options.greedy else {"temperature": options.temperature, "top_p": options.top_p}
    if options.prompt:
        sampling |= dict(tokenizer(options.prompt, return_tensors="pt").to(model.device))
        sampling["num_inference_steps"] = options.num_inference_steps
    elif model.config.num_latents and model.config.inference_optimizer != "map":  # else it starts from z = 0
        sampling["latents"] = model.sample_prior(1, seed=options.seed)
    model.generate(
        **sampling,
        do_sample=not options.greedy,
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


if __name__ == "__main__":
    main()
