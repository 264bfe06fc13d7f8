"""What generation costs: thinking about the prompt, then tokens, beside plain decoders of the same size.

    python -m research.benchmarks.generate
    python -m research.benchmarks.generate --preset ltm-small --config_overrides '{"num_inference_steps": 4}'

The models are newly initialised and the prompts are random (seeded): the cost does not depend on what they are.
Decoders of the same width, depth, heads, feed-forward size and vocabulary write greedily:

- ltm: a memory thinks while it reads and writes; the paper's reader after inference, which is timed apart.
- twin: the same class with num_latents=0.
- mistral: transformers' MistralForCausalLM, which is a Llama with a sliding window, here of the preset's.
- llama: transformers' LlamaForCausalLM, whose attention reaches over the whole text.

- inference: one `model.infer_posterior(...)` call; none for a memory.
- prefill: `generate` of one token, after inference. The first token takes both.
- a token: `generate` of 1 + n tokens less `generate` of one, divided by n. All that transformers does is in it.
- caches: dynamic; static; static with the decoding step compiled.

All take turns in each repeat. Milliseconds are medians of the repeats, with their smallest and largest; the ratio to
mistral is the median of the repeats' own. Warm-up, which compiles, is left out, and nothing may compile after it.

What should give the same result is compared, and a difference is an error: tokens with and without a cache, of all
caches, of a batch and of its prompts alone; of the paper's reader also texts sampled from one posterior and from one
inferred anew for each, and the posteriors of prompts of different lengths in buckets and in one padded batch.
"""

import os
import shutil
import statistics
import time

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ltm_hf import LTMForCausalLM, cli
from ltm_hf.generation_ltm import buckets, infer_in_buckets

from . import common

CACHES = ("dynamic", "static", "compiled")
WRITE = dict(do_sample=False, eos_token_id=None, pad_token_id=0)  # no text ends early


def build_models(args) -> dict[str, torch.nn.Module]:
    config = common.config_of(args)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names = (*names, "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    same = {name: getattr(config, name) for name in names} | {"bos_token_id": None, "eos_token_id": None}
    args.config_overrides = args.config_overrides | {"num_latents": 0}
    models = {
        "ltm": LTMForCausalLM(config),
        "twin": LTMForCausalLM(common.config_of(args)),
        "mistral": MistralForCausalLM(MistralConfig(**same, sliding_window=config.sliding_window)),
        "llama": LlamaForCausalLM(LlamaConfig(**same)),
    }
    return {name: model.to(args.device).eval() for name, model in models.items()}


def cache_settings(cache: str, model, args) -> dict:
    if cache != "compiled":
        return {} if cache == "dynamic" else {"cache_implementation": cache}
    mode = "reduce-overhead" if args.device.type == "cuda" else None
    whole = not getattr(model.config, "has_memory", False)  # what a memory does at each token is not compiled
    compile_config = CompileConfig(fullgraph=whole, mode=mode, backend=args.compile_backend)
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


# ------------------------------------------------------------------ tokens


@torch._dynamo.config.patch(recompile_limit=64)  # of a function: one is shared, with a few graphs for each model
def measure_decoding(models, batch_size: int, args) -> tuple[dict, dict[str, bool]]:
    """Figures of inference, prefill and decoding for one batch size, and what agrees."""
    torch._dynamo.reset()
    ltm = models["ltm"]
    ids, mask = prompts_of([args.prompt_length] * batch_size, ltm.config.vocab_size, args.device)
    watch, texts, num_graphs, thoughts = Stopwatch(args.device), {}, 0, {}
    for repeat in range(args.warmup + args.repeats):
        if repeat == args.warmup:
            num_graphs = counters["stats"]["unique_graphs"]
        if not ltm.config.has_memory:
            thoughts = {"posterior": watch("inference", ltm.infer_posterior, ids)}
        for cache in args.caches:
            for name, model in models.items():
                settings = WRITE | {"attention_mask": mask} | cache_settings(cache, model, args)
                settings |= thoughts if model is ltm else {}
                for tokens in (1, 1 + args.new_tokens):
                    texts[name, cache] = watch(
                        (name, cache, tokens), model.generate, ids, max_new_tokens=tokens, **settings
                    )
    agree = {
        f"{name}: {cache} and {args.caches[0]} cache": torch.equal(text, texts[name, args.caches[0]])
        for (name, cache), text in texts.items()
        if cache != args.caches[0]
    }
    uncached = ltm.generate(ids, max_new_tokens=1 + args.new_tokens, use_cache=False, **thoughts, **WRITE)
    agree["ltm: with and without a cache"] = torch.equal(uncached, texts["ltm", args.caches[0]])
    agree["graphs before and after warm-up"] = counters["stats"]["unique_graphs"] == num_graphs
    times = {name: values[args.warmup :] for name, values in watch.times.items()}
    return {"batch_size": batch_size, **_figures(times, list(texts), batch_size, args)}, agree


def _figures(times: dict, cells: list[tuple[str, str]], batch_size: int, args) -> dict:
    per_token = {
        (name, cache): [
            (long - short) / args.new_tokens
            for short, long in zip(times[name, cache, 1], times[name, cache, 1 + args.new_tokens], strict=True)
        ]
        for name, cache in cells
    }
    thinking, decoders = times.get("inference", [0.0] * args.repeats), []
    for (name, cache), values in per_token.items():
        ratios = [ours / theirs for ours, theirs in zip(values, per_token["mistral", cache], strict=True)]
        prefill = times[name, cache, 1]
        first = [sum(pair) for pair in zip(thinking, prefill, strict=True)] if name == "ltm" else prefill
        found = {"decoder": name, "cache": cache, "prefill": summary(prefill), "first_token": summary(first)}
        found |= {"token": summary(values), "tokens_per_second": 1000 * batch_size / statistics.median(values)}
        decoders.append(found | {"ratio_to_mistral": summary(ratios)})
    return {"inference": summary(thinking), "decoders": decoders}


# ------------------------------------------------------------------ prompts


def mixed_prompts(args, vocab_size: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Of different lengths, from 16 up."""
    rows, longest = args.mixed_batch_size, args.longest_prompt
    lengths = [16 + (longest - 16) * row // max(rows - 1, 1) for row in range(rows)]
    return lengths, *prompts_of(lengths, vocab_size, args.device)


def batch_and_alone(ltm, args) -> dict[str, bool]:
    lengths, ids, mask = mixed_prompts(args, ltm.config.vocab_size)
    write = WRITE | {"max_new_tokens": args.new_tokens}
    together = ltm.generate(ids, attention_mask=mask, **write)
    alone = [ltm.generate(row[None, -length:], **write) for row, length in zip(ids, lengths, strict=True)]
    same = (torch.equal(a[-args.new_tokens :], b[0, -args.new_tokens :]) for a, b in zip(together, alone, strict=True))
    return {"ltm: a batch and its prompts alone": all(same)}


def measure_inference(ltm, args) -> tuple[dict, dict[str, bool]]:
    """Prompts of different lengths in buckets and padded, and continuations of one posterior; and what agrees."""
    lengths, ids, mask = mixed_prompts(args, ltm.config.vocab_size)
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
    difference = common.relative_difference(
        ((padded.mean, bucketed.mean), (padded.log_variance, bucketed.log_variance))
    )
    agree = {
        "ltm: in buckets and padded": difference <= 1e-3,
        "ltm: inferred once and anew": all(torch.equal(*pair) for pair in zip(once, anew, strict=True)),
    }
    times, parts = {name: summary(values[args.warmup :]) for name, values in watch.times.items()}, buckets(lengths)
    in_buckets = sum(len(part) * max(lengths[row] for row in part) for part in parts)
    mixed = {
        "lengths": lengths,
        "num_buckets": len(parts),
        "tokens": {"real": sum(lengths), "in_buckets": in_buckets, "padded": ids.numel()},
        "posterior_difference": difference,
        "in_buckets": times["in buckets"],
        "padded": times["padded"],
    }
    several = {"texts": num_texts, **{way: times[way] for way in ("inferred anew", "inferred once", "one batch")}}
    return {"mixed_lengths": mixed, "continuations": several}, agree


# ------------------------------------------------------------------ all of it


def benchmark(args) -> dict:
    common.begin(args)
    models = build_models(args)
    ltm, decoding, agree, inference = models["ltm"], [], {}, {}
    for batch_size in args.batch_sizes:
        figures, compared = measure_decoding(models, batch_size, args)
        decoding.append(figures)
        agree |= {f"{batch_size} x {what}": same for what, same in compared.items()}
    agree |= batch_and_alone(ltm, args)
    if not ltm.config.has_memory:
        inference, compared = measure_inference(ltm, args)
        agree |= compared
    settings = {
        "preset": args.preset,
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "device": args.device.type,
        "precision": "float32",
        "latent_reader": ltm.config.latent_reader,
        "sliding_window": ltm.config.sliding_window,
        "num_inference_steps": ltm.config.num_inference_steps,
        "prompt_length": args.prompt_length,
        "new_tokens": args.new_tokens,
        "compile_backend": args.compile_backend,
        "repeats": args.repeats,
        "warmup": args.warmup,
        "seed": args.seed,
    }
    where = common.environment(args.device)
    return {"settings": settings, "environment": where, "decoding": decoding, **inference, "agree": agree}


def spread(figure: dict) -> str:
    return f"{figure['median']:.2f} ({figure['range'][0]:.2f}-{figure['range'][1]:.2f})"


def report(result: dict) -> str:
    settings = result["settings"]
    lines = [
        f"{settings['preset']} ({settings['latent_reader']}), window {settings['sliding_window']}, "
        f"{settings['num_inference_steps']} inference steps; prompts of {settings['prompt_length']} tokens, "
        f"{settings['new_tokens']} new tokens; float32",
        "Parameters: " + ", ".join(f"{name} {count:,}" for name, count in settings["parameters"].items()),
        common.in_words(result["environment"]),
        "",
    ]
    head = "decoder batch cache prefill_ms first_token_ms ms_a_token range tokens/s of_mistral's_ms"
    rows = [tuple(cell.replace("_", " ") for cell in head.split())]
    for one in result["decoding"]:
        for found in one["decoders"]:
            low, high = found["token"]["range"]
            rows.append(
                (
                    found["decoder"],
                    str(one["batch_size"]),
                    found["cache"],
                    f"{found['prefill']['median']:.2f}",
                    f"{found['first_token']['median']:.2f}",
                    f"{found['token']['median']:.3f}",
                    f"{low:.3f}-{high:.3f}",
                    f"{found['tokens_per_second']:,.0f}",
                    f"{found['ratio_to_mistral']['median']:.2f}",
                )
            )
    lines += common.aligned(rows)
    if "mixed_lengths" in result:
        lines += _inference_in_words(result)
    if all(result["agree"].values()):
        lines.append(f"All {len(result['agree'])} comparisons agree.")
    return "\n".join(lines)


def _inference_in_words(result: dict) -> list[str]:
    mixed, several = result["mixed_lengths"], result["continuations"]
    lengths, tokens = mixed["lengths"], mixed["tokens"]
    return [
        "",
        *(f"Inference, a batch of {one['batch_size']}: {spread(one['inference'])} ms" for one in result["decoding"]),
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens, {tokens['real']:,} in all: "
        f"{mixed['num_buckets']} buckets ({tokens['in_buckets']:,} tokens with padding) "
        f"{spread(mixed['in_buckets'])} ms, one padded batch ({tokens['padded']:,}) {spread(mixed['padded'])} ms; "
        f"posteriors differ by {mixed['posterior_difference']:.1e} (relative).",
        f"{several['texts']} sampled continuations of a prompt: inferring anew each time "
        f"{spread(several['inferred anew'])} ms, once {spread(several['inferred once'])} ms, "
        f"once and all in one batch {spread(several['one batch'])} ms.",
    ]


def parse():
    options = common.parser("What generation costs.")
    common.add_preset(options, "ltm-tiny")
    common.add_timing(options)
    number = cli.positive_int
    options.add_argument("--batch_sizes", type=number, nargs="+", default=[1, 8], help="prompts; default 1 8")
    options.add_argument("--caches", choices=CACHES, nargs="+", default=CACHES, help="default: all")
    options.add_argument("--compile_backend", default="inductor", help="of the compiled step; default inductor")
    options.add_argument("--prompt_length", type=cli.block, default=64, help="tokens; default 64")
    options.add_argument("--new_tokens", type=number, default=64, help="default 64")
    options.add_argument("--mixed_batch_size", type=cli.block, default=8, help="of different lengths; default 8")
    options.add_argument("--longest_prompt", type=number, default=192, help="of these, from 16 up; default 192")
    options.add_argument("--continuations", type=cli.block, default=4, help="of one prompt; default 4")
    args = options.parse_args()
    inductor = "compiled" in args.caches and args.compile_backend == "inductor"
    if inductor and args.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("Compiling for the CPU needs a C++ compiler, g++; without one: --caches dynamic static.")
    return args


@cli.one_sentence()
def main() -> None:
    args = parse()
    result = benchmark(args)
    print(report(result))
    common.write(args, result)
    differ = [what for what, same in result["agree"].items() if not same]
    if differ:
        raise SystemExit(f"These should give the same result and do not: {'; '.join(differ)}.")


if __name__ == "__main__":
    main()
