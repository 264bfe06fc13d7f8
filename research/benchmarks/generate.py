"""What generation costs: inference of the latents once, then tokens, beside plain decoders of the same size.

    python examples/benchmarks/generate.py
    python examples/benchmarks/generate.py --preset ltm-small --num-inference-steps 4 --output generate.json

The models are newly initialised and the prompts are random (seeded): the cost does not depend on what they are.
Decoders of the same width, depth, heads, feed-forward size and vocabulary write greedily:

- ltm: after inference, which the next column times; it reads its latents as keys and values.
- twin: the same class with num_latents=0.
- mistral: transformers' MistralForCausalLM, which is a Llama with a sliding window, here of the preset's.
- llama: transformers' LlamaForCausalLM, whose attention reaches over the whole text.

- inference: one `model.infer_posterior(...)` call, T fast steps.
- prefill: `generate` of one token, after inference. The first token takes both.
- a token: `generate` of 1 + n tokens less `generate` of one, divided by n. All that transformers does is in it.
- caches: dynamic; static; static with the decoding step compiled.

All take turns in each repeat. Milliseconds are medians of the repeats, with their smallest and largest; the ratio to
mistral is the median of the repeats' own. Warm-up, which compiles, is left out, and nothing may compile after it.

What should give the same result is compared, and a difference is an error: tokens with and without a cache, of all
caches, of a batch and of its prompts alone; texts sampled from one posterior and from one inferred anew for each; the
posteriors of prompts of different lengths in buckets and in one padded batch.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from train_step import at_least, environment
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, set_seed

from ltm_hf import PRESETS, LTMForCausalLM, preset_config
from ltm_hf.generation_ltm import buckets, infer_in_buckets

CACHES = ("dynamic", "static", "compiled")
WRITE = dict(do_sample=False, eos_token_id=None, pad_token_id=0)  # no text ends early


def build_models(args) -> dict[str, torch.nn.Module]:
    given = dict(num_inference_steps=args.num_inference_steps)
    config = preset_config(args.preset, **{name: value for name, value in given.items() if value is not None})
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names = (*names, "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    same = {name: getattr(config, name) for name in names} | {"bos_token_id": None, "eos_token_id": None}
    models = {
        "ltm": LTMForCausalLM(config),
        "twin": LTMForCausalLM(preset_config(args.preset, num_latents=0)),
        "mistral": MistralForCausalLM(MistralConfig(**same, sliding_window=config.sliding_window)),
        "llama": LlamaForCausalLM(LlamaConfig(**same)),
    }
    return {name: model.to(args.device).eval() for name, model in models.items()}


def cache_settings(cache: str, args) -> dict:
    if cache != "compiled":
        return {} if cache == "dynamic" else {"cache_implementation": cache}
    mode = "reduce-overhead" if args.device.type == "cuda" else None
    compile_config = CompileConfig(fullgraph=True, mode=mode, backend=args.compile_backend)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators only, unless told
    return {"cache_implementation": "static", "compile_config": compile_config}


class Stopwatch:
    """Milliseconds of each thing that is done, by name, in the order of the repeats."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, {}

    def __call__(self, name, function, *args, **kwargs):
        self._wait()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self._wait()
        self.times.setdefault(name, []).append((time.perf_counter() - start) * 1000)
        return result

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def summary(values: list[float]) -> dict:
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def prompts_of(lengths, vocab_size: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of the given lengths, padded on the left, and their mask."""
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    ids = torch.randint(1, vocab_size, mask.shape) * mask
    return ids.to(device), mask.long().to(device)


@torch._dynamo.config.patch(recompile_limit=64)  # of a function: one is shared, with a few graphs for each model
def measure_decoding(models, batch_size: int, args) -> tuple[dict, dict[str, bool]]:
    """Figures of inference, prefill and decoding for one batch size, and what agrees."""
    torch._dynamo.reset()
    ltm = models["ltm"]
    ids, mask = prompts_of([args.prompt_length] * batch_size, ltm.config.vocab_size, args.device)
    watch, texts, num_graphs = Stopwatch(args.device), {}, 0
    for repeat in range(args.warmup + args.repeats):
        if repeat == args.warmup:
            num_graphs = counters["stats"]["unique_graphs"]
        posterior = watch("inference", ltm.infer_posterior, ids)
        for cache in args.caches:
            for name, model in models.items():
                settings = WRITE | {"attention_mask": mask} | cache_settings(cache, args)
                settings |= {"posterior": posterior} if model is ltm else {}
                for tokens in (1, 1 + args.new_tokens):
                    texts[name, cache] = watch(
                        (name, cache, tokens), model.generate, ids, max_new_tokens=tokens, **settings
                    )
    agree = {
        f"{name}: {cache} and {args.caches[0]} cache": torch.equal(text, texts[name, args.caches[0]])
        for (name, cache), text in texts.items()
        if cache != args.caches[0]
    }
    uncached = ltm.generate(ids, posterior=posterior, max_new_tokens=1 + args.new_tokens, use_cache=False, **WRITE)
    agree["ltm: with and without a cache"] = torch.equal(uncached, texts["ltm", args.caches[0]])
    agree["graphs before and after warm-up"] = counters["stats"]["unique_graphs"] == num_graphs

    times = {name: values[args.warmup :] for name, values in watch.times.items()}
    per_token = {
        (name, cache): [
            (long - short) / args.new_tokens
            for short, long in zip(times[name, cache, 1], times[name, cache, 1 + args.new_tokens], strict=True)
        ]
        for name, cache in texts
    }
    figures = {"batch_size": batch_size, "inference": summary(times["inference"]), "decoders": []}
    for (name, cache), values in per_token.items():
        ratios = [ours / theirs for ours, theirs in zip(values, per_token["mistral", cache], strict=True)]
        prefill = times[name, cache, 1]
        thinking = times["inference"] if name == "ltm" else [0.0] * args.repeats
        first = [sum(pair) for pair in zip(thinking, prefill, strict=True)]
        found = {"decoder": name, "cache": cache, "prefill": summary(prefill), "first_token": summary(first)}
        found |= {"token": summary(values), "tokens_per_second": 1000 * batch_size / statistics.median(values)}
        figures["decoders"].append(found | {"ratio_to_mistral": summary(ratios)})
    return figures, agree


def measure_inference(ltm, args) -> tuple[dict, dict[str, bool]]:
    """Prompts of different lengths in buckets and padded, and continuations of one posterior; and what agrees."""
    rows, longest = args.mixed_batch_size, args.longest_prompt
    lengths = [16 + (longest - 16) * row // max(rows - 1, 1) for row in range(rows)]
    ids, mask = prompts_of(lengths, ltm.config.vocab_size, args.device)
    watch, num_texts = Stopwatch(args.device), args.continuations
    settings = WRITE | {"do_sample": True, "max_new_tokens": args.new_tokens}
    prompt = ids[:1, -lengths[0] :]

    def write(seed, **given):
        torch.manual_seed(seed)
        return ltm.generate(prompt, **given, **settings)

    def infer_anew():
        return [write(seed) for seed in range(num_texts)]

    def infer_once():
        posterior = ltm.infer_posterior(prompt)
        return [write(seed, posterior=posterior) for seed in range(num_texts)]

    for _ in range(args.warmup + args.repeats):
        bucketed = watch("in buckets", infer_in_buckets, ltm, ids, mask)
        padded = watch("padded", ltm.infer_posterior, ids, mask)
        once = watch("inferred once", infer_once)
        anew = watch("inferred anew", infer_anew)
        watch("one batch", ltm.generate, prompt, num_return_sequences=num_texts, **settings)
    pairs = ((bucketed.mean, padded.mean), (bucketed.log_variance, padded.log_variance))
    difference = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)
    write_greedily = WRITE | {"max_new_tokens": args.new_tokens}
    together = ltm.generate(ids, attention_mask=mask, **write_greedily)
    alone = [ltm.generate(row[None, -length:], **write_greedily) for row, length in zip(ids, lengths, strict=True)]
    agree = {
        "ltm: a batch and its prompts alone": all(
            torch.equal(text[-args.new_tokens :], other[0, -args.new_tokens :])
            for text, other in zip(together, alone, strict=True)
        ),
        "ltm: in buckets and padded": difference <= 1e-3,
        "ltm: inferred once and anew": all(torch.equal(*pair) for pair in zip(once, anew, strict=True)),
    }
    times = {name: summary(values[args.warmup :]) for name, values in watch.times.items()}
    parts = buckets(lengths)
    mixed = {
        "lengths": lengths,
        "num_buckets": len(parts),
        "tokens": {
            "real": sum(lengths),
            "in_buckets": sum(len(part) * max(lengths[row] for row in part) for part in parts),
            "padded": ids.numel(),
        },
        "posterior_difference": difference,
        "in_buckets": times["in buckets"],
        "padded": times["padded"],
    }
    several = {"texts": num_texts, **{way: times[way] for way in ("inferred anew", "inferred once", "one batch")}}
    return {"mixed_lengths": mixed, "continuations": several}, agree


def benchmark(args) -> dict:
    set_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    models = build_models(args)
    ltm, decoding, agree = models["ltm"], [], {}
    for batch_size in args.batch_sizes:
        figures, compared = measure_decoding(models, batch_size, args)
        decoding.append(figures)
        agree |= {f"{batch_size} x {what}": same for what, same in compared.items()}
    inference, compared = measure_inference(ltm, args)
    settings = {
        "preset": args.preset,
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "device": args.device.type,
        "precision": "float32",
        "sliding_window": ltm.config.sliding_window,
        "num_inference_steps": ltm.config.num_inference_steps,
        "prompt_length": args.prompt_length,
        "new_tokens": args.new_tokens,
        "compile_backend": args.compile_backend,
        "repeats": args.repeats,
        "warmup": args.warmup,
        "seed": args.seed,
    }
    return {
        "settings": settings,
        "environment": environment(args.device),
        "decoding": decoding,
        **inference,
        "agree": agree | compared,
    }


def spread(figure: dict) -> str:
    return f"{figure['median']:.2f} ({figure['range'][0]:.2f}-{figure['range'][1]:.2f})"


def report(result: dict) -> str:
    settings, where, mixed = result["settings"], result["environment"], result["mixed_lengths"]
    lines = [
        f"{settings['preset']}, window {settings['sliding_window']}, {settings['num_inference_steps']} inference "
        f"steps; prompts of {settings['prompt_length']} tokens, {settings['new_tokens']} new tokens; float32",
        "Parameters: " + ", ".join(f"{name} {count:,}" for name, count in settings["parameters"].items()),
        f"{where['hardware']}; torch {where['torch']}, transformers {where['transformers']}; {where['date']}",
        "",
        *(f"Inference, a batch of {one['batch_size']}: {spread(one['inference'])} ms" for one in result["decoding"]),
        "",
    ]
    rows = [
        (
            "batch",
            "decoder",
            "cache",
            "prefill ms",
            "first token ms",
            "ms a token",
            "range",
            "tokens/s",
            "of mistral's ms",
        )
    ]
    for one in result["decoding"]:
        for found in one["decoders"]:
            token = found["token"]
            rows.append(
                (
                    str(one["batch_size"]),
                    found["decoder"],
                    found["cache"],
                    f"{found['prefill']['median']:.2f}",
                    f"{found['first_token']['median']:.2f}",
                    f"{token['median']:.3f}",
                    f"{token['range'][0]:.3f}-{token['range'][1]:.3f}",
                    f"{found['tokens_per_second']:,.0f}",
                    f"{found['ratio_to_mistral']['median']:.2f}",
                )
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(map(str.rjust, row, widths)) for row in rows]
    lengths, tokens, several = mixed["lengths"], mixed["tokens"], result["continuations"]
    lines += [
        "",
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, {tokens['real']:,} in all: "
        f"{mixed['num_buckets']} buckets ({tokens['in_buckets']:,} tokens with padding) "
        f"{spread(mixed['in_buckets'])} ms, one padded batch ({tokens['padded']:,}) {spread(mixed['padded'])} ms; "
        f"posteriors differ by {mixed['posterior_difference']:.1e} (relative).",
        f"{several['texts']} sampled continuations of a prompt: inferring anew each time "
        f"{spread(several['inferred anew'])} ms, once {spread(several['inferred once'])} ms, "
        f"once and all in one batch {spread(several['one batch'])} ms.",
    ]
    if all(result["agree"].values()):
        lines.append(f"All {len(result['agree'])} comparisons agree.")
    return "\n".join(lines)


def parse(arguments=None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--preset", choices=PRESETS, default="ltm-tiny-natural")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--batch-sizes", type=at_least(1), nargs="+", default=[1, 8], help="prompts; default 1 8")
    parser.add_argument("--caches", choices=CACHES, nargs="+", default=CACHES, help="default: all")
    parser.add_argument("--compile-backend", default="inductor", help="of the compiled step; default inductor")
    parser.add_argument("--prompt-length", type=at_least(2), default=64, help="tokens; default 64")
    parser.add_argument("--new-tokens", type=at_least(1), default=64, help="default 64")
    parser.add_argument("--num-inference-steps", type=at_least(1), help="default: the preset's")
    parser.add_argument("--mixed-batch-size", type=at_least(2), default=8, help="of different lengths; default 8")
    parser.add_argument("--longest-prompt", type=at_least(17), default=256, help="of these, from 16 up; default 256")
    parser.add_argument("--continuations", type=at_least(2), default=4, help="of one prompt; default 4")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU; default: torch's. 1 where others compute too")
    parser.add_argument("--repeats", type=at_least(1), default=7, help="default 7")
    parser.add_argument("--warmup", type=at_least(1), default=2, help="repeats left out before; default 2")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights and prompts; default 0")
    parser.add_argument("--output", help="JSON file to write the same figures to")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here.")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        parser.error(f"--output: there is no folder {Path(args.output).parent}.")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    inductor = "compiled" in args.caches and args.compile_backend == "inductor"
    if inductor and args.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        parser.error("Compiling for the CPU needs a C++ compiler, g++; without one: --caches dynamic static.")
    return args


def main() -> None:
    args = parse()
    result = benchmark(args)
    print(report(result))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    differ = [what for what, same in result["agree"].items() if not same]
    if differ:
        raise SystemExit(f"These should give the same result and do not: {'; '.join(differ)}.")


if __name__ == "__main__":
    main()
