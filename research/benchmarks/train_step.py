"""What a training step costs: the fast loop with a frozen decoder, the slow step, and the published way beside them.

    python examples/benchmarks/train_step.py
    python examples/benchmarks/train_step.py --preset ltm-small --batch-size 2 --sequence-length 256 \\
        --num-inference-steps 4 --compile --output step.json

The model is newly initialised and the token ids are random (seeded): the cost does not depend on what they are.

- fast step: the time of one `model.infer_posterior(...)` call divided by its T steps. It includes all that the call
  does: checking the input, drawing the start and the noise, T forwards, T gradients of the latents, T updates.
- slow step: forward, backward and an AdamW step (fused, as `Trainer` has it) on the weights, at latents drawn from the
  posterior, with the loss that `LTMTrainer` asks for. The draw is included, gradient clipping is not.
- published way: the same two done naively. In the fast loop the decoder is not frozen, so that every step also computes
  and accumulates the weight gradients; every step, fast or slow, makes all logits of the batch, and nothing is kept
  from step to step. Measured in turn with ours, and checked to give the same posterior, slow loss and gradient.
- compiled (`--compile`): the fast and the slow step with the same weights under torch.compile, as `torch_compile=True`
  has them in `LTMTrainer`. Measured in turn with the others, checked likewise; graphs are counted over the whole run.
- peak memory: of each phase, the weights and their optimiser's state included; on a CPU of a process that runs nothing
  but that phase, Python and torch included (`--only`); there not of the compiled steps.
- FLOPs: counted by torch on one sequence with eager attention, which computes all S x S scores whatever the window.

Milliseconds are medians of the repeats, with their smallest and largest; warm-up is left out. A training step is T
times the fast step plus the slow one.
"""

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, set_seed

from ltm_hf import PRESETS, LatentPosterior, infer_posterior, preset_config
from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.flops import count_flops, count_parameters, paper_training_flops
from ltm_hf.posterior_ltm import INFERENCE_OPTIMIZERS, keyed_normal, step_size

PHASES = ("fast_step", "slow_step", "published_fast_step", "published_slow_step")


def noise(start: LatentPosterior, step: int) -> torch.Tensor:
    return keyed_normal(start.keys, start.mean.shape[1:], step)


def naive_negative_log_likelihood(model, input_ids, latents) -> torch.Tensor:
    """(B,) nats, from the logits of all tokens."""
    logits = model(input_ids=input_ids, latents=latents, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(input_ids), -1).sum(dim=1)


def infer_posterior_unfrozen(model, input_ids, num_inference_steps: int | None = None) -> LatentPosterior:
    """The published way, as a naive reference: `backward` on a decoder whose weights all want their gradient too."""
    settings = InferenceSettings.of(model.config, num_inference_steps=num_inference_steps)
    start = model.infer_posterior(input_ids, num_inference_steps=0)
    optimizer = INFERENCE_OPTIMIZERS[settings.inference_optimizer](start.mean, start.log_variance, settings)
    for step in range(settings.num_inference_steps):
        epsilon = noise(start, step)
        posterior = LatentPosterior(optimizer.mean, optimizer.log_variance)
        latents = posterior.reparameterize(epsilon).detach().requires_grad_()
        naive_negative_log_likelihood(model, input_ids, latents).sum().backward()
        with torch.no_grad():
            optimizer.update(latents.grad, epsilon, step_size(settings, step))
    return LatentPosterior(optimizer.mean.detach(), optimizer.log_variance.detach())


def slow_loss(model, input_ids, posterior, loss_reduction: str | None = "mean") -> torch.Tensor:
    """Nats a token; None for the reduction makes all logits."""
    given = dict(latents=posterior.sample(seed=0), labels=input_ids, use_cache=False)
    return model(input_ids=input_ids, **given, loss_reduction=loss_reduction).loss


def build_model(args) -> torch.nn.Module:
    given = dict(num_inference_steps=args.num_inference_steps, inference_optimizer=args.optimizer)
    config = preset_config(args.preset, **{name: value for name, value in given.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=args.attention).to(args.device).train()
    if args.precision == "bfloat16":
        model.to(torch.bfloat16)
    elif args.precision == "autocast":  # as accelerate does it: around forward alone
        model.forward = torch.autocast(args.device.type, torch.bfloat16)(model.forward)
    return model


def relative_difference(pairs) -> float:
    """The largest |a - b| / |a| of pairs of tensors."""
    return max(float((a - b).norm() / a.norm().clamp(min=1e-12)) for a, b in pairs)


def slow_difference(model, input_ids, compiled=None) -> float:
    """Our slow step's loss and gradients and those of the published way, or ours compiled."""
    posterior, results = model.infer_posterior(input_ids, num_inference_steps=0), []
    for decoder, reduction in ((model, "mean"), (model, None) if compiled is None else (compiled, "mean")):
        loss = slow_loss(decoder, input_ids, posterior, reduction)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    return relative_difference(zip(*results, strict=True))


def posterior_difference(model, input_ids, compiled=None) -> float:
    """Our posterior, mean and log-variance, and that of the published way, or ours compiled."""
    start = model.infer_posterior(input_ids, num_inference_steps=0)
    epsilon = torch.stack([noise(start, step) for step in range(model.config.num_inference_steps)])
    ours = model.infer_posterior(input_ids, epsilon=epsilon)
    if compiled is None:
        other = infer_posterior_unfrozen(model, input_ids)
        model.zero_grad()
    else:
        other = infer_posterior(compiled, input_ids, epsilon=epsilon)
    return relative_difference(((ours.mean, other.mean), (ours.log_variance, other.log_variance)))


def count(model, input_ids) -> dict[str, int]:
    """FLOPs per token, by torch's counter."""
    row, implementation = input_ids[:1], model.config._attn_implementation
    model.set_attn_implementation("eager")
    posterior = model.infer_posterior(row, num_inference_steps=1)
    counted = {
        "forward": lambda: slow_loss(model, row, posterior, None),
        "fast_step": lambda: model.infer_posterior(row),
        "slow_step": lambda: slow_loss(model, row, posterior).backward(),
        "published_fast_step": lambda: infer_posterior_unfrozen(model, row, num_inference_steps=1),
        "published_slow_step": lambda: slow_loss(model, row, posterior, None).backward(),
    }
    flops = {name: count_flops(function) // row.numel() for name, function in counted.items()}
    flops["fast_step"] //= model.config.num_inference_steps
    model.set_attn_implementation(implementation)
    model.zero_grad()
    return flops


def make_phases(model, input_ids, compiled=None) -> dict:
    """What is measured, by name. A slow step with no fast step before it starts at the prior.

    compiled: the same model under torch.compile, whose steps are then measured too.
    The optimiser has its state from the start: in training all phases but those of the very first step find it there.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for parameter in model.parameters():
        moments = {
            name: torch.empty_like(parameter).fill_(0) for name in ("exp_avg", "exp_avg_sq")
        }  # written to memory
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    posterior = model.infer_posterior(input_ids, num_inference_steps=0)

    def fast_loop(decoder=model):
        nonlocal posterior
        posterior = infer_posterior(decoder, input_ids)

    def slow_step(decoder=model, loss_reduction="mean"):
        slow_loss(decoder, input_ids, posterior, loss_reduction).backward()
        optimizer.step()
        optimizer.zero_grad()

    def published_fast_loop():
        infer_posterior_unfrozen(model, input_ids)
        optimizer.zero_grad()

    phases = {"fast_step": fast_loop, "slow_step": slow_step}
    if compiled is not None:
        phases["compiled_fast_step"], phases["compiled_slow_step"] = (
            partial(fast_loop, compiled),
            partial(slow_step, compiled),
        )
    published_slow_step = partial(slow_step, loss_reduction=None)
    return phases | {"published_fast_step": published_fast_loop, "published_slow_step": published_slow_step}


def measure(
    model, input_ids, repeats: int, warmup: int, compiled=None
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of each phase in each repeat, and on a GPU its peak memory in bytes. The phases take turns."""
    device, steps = input_ids.device, model.config.num_inference_steps
    phases = make_phases(model, input_ids, compiled)
    times, peaks = {phase: [] for phase in phases}, {}

    def timed(phase, function, divisor=1):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
            peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated())
        times[phase].append((time.perf_counter() - start) * 1000 / divisor)

    for _ in range(warmup + repeats):
        for phase, function in phases.items():
            timed(phase, function, 1 if phase.endswith("slow_step") else steps)
    return {phase: values[warmup:] for phase, values in times.items()}, peaks


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, str]:
    cpu = f"{processor_name()}, {torch.get_num_threads()} thread(s)"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def prepare(args) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model and the token ids of a batch, both random."""
    set_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = build_model(args)
    length = args.sequence_length or model.config.max_position_embeddings
    return model, torch.randint(model.config.vocab_size, (args.batch_size, length)).to(args.device)


def peak_of_process(phase: str, arguments: list[str]) -> int:
    """Bytes: the peak of a process that runs this phase alone, at most two steps of it: later ones add nothing."""
    command = [sys.executable, __file__, *arguments, "--only", phase]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def run_alone(args) -> int:
    """Bytes: this process's peak after building model and optimiser and `args.only`, or after building them alone."""
    model, input_ids = prepare(args)
    model.config.num_inference_steps = min(2, model.config.num_inference_steps)
    phases = make_phases(model, input_ids)
    if args.only != "nothing":
        phases[args.only]()
    return peak_of_this_process()


def peak_of_this_process() -> int:
    """Bytes, Python and torch included."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss begins at the peak of the process that started this one
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def benchmark(args, arguments: list[str]) -> dict:
    model, input_ids = prepare(args)
    config = model.config
    steps, length = config.num_inference_steps, input_ids.shape[1]

    # The weights are those of `model`.
    compiled = torch.compile(model, backend=args.compile) if args.compile else None
    ways = ("", "compiled_", "published_") if args.compile else ("", "published_")
    same = {"posterior": posterior_difference(model, input_ids), "slow_step": slow_difference(model, input_ids)}
    if args.compile:
        same["compiled_posterior"] = posterior_difference(model, input_ids, compiled)
        same["compiled_slow_step"] = slow_difference(model, input_ids, compiled)
    flops = count(model, input_ids)
    times, peaks = measure(model, input_ids, args.repeats, args.warmup, compiled)
    if args.device.type != "cuda":
        peaks = {phase: peak_of_process(phase, arguments) for phase in (*PHASES, "nothing")}

    milliseconds = {phase: statistics.median(values) for phase, values in times.items()}
    for way in ways:  # a training step is T fast steps and the slow one
        fast_step, slow_step, training_step = (f"{way}{step}_step" for step in ("fast", "slow", "training"))
        for figures in (milliseconds, flops):
            if fast_step in figures:
                figures[training_step] = steps * figures[fast_step] + figures[slow_step]
        if fast_step in peaks:
            peaks[training_step] = max(peaks[fast_step], peaks[slow_step])
    result = {
        "settings": {
            "preset": args.preset,
            "parameters": count_parameters(config),
            "device": args.device.type,
            "precision": args.precision,
            "attention": args.attention,
            "optimizer": config.inference_optimizer,
            "batch_size": args.batch_size,
            "sequence_length": length,
            "num_inference_steps": steps,
            "compile": args.compile,
            "repeats": args.repeats,
            "seed": args.seed,
            "token_ids": "random, seeded",
        },
        "environment": environment(args.device),
        "milliseconds": milliseconds,
        "milliseconds_range": {phase: [min(values), max(values)] for phase, values in times.items()},
        "tokens_per_second": 1000 * input_ids.numel() / milliseconds["training_step"],
        "time_ratio": milliseconds["training_step"] / milliseconds["published_training_step"],
        "memory_ratio": peaks["training_step"] / peaks["published_training_step"],
        "flops_per_token": flops,
        "paper_flops_per_token": paper_training_flops(config, length),
        "fast_step_forwards": flops["fast_step"] / flops["forward"],
        "peak_memory_bytes": peaks,
        "relative_difference": same,
    }
    if args.compile:
        result["compiled_graphs"] = counters["stats"]["unique_graphs"]
        result["compiled_time_ratio"] = milliseconds["compiled_training_step"] / milliseconds["training_step"]
    return result


def report(result: dict) -> str:
    settings, where, peaks = result["settings"], result["environment"], result["peak_memory_bytes"]
    tokens = settings["batch_size"] * settings["sequence_length"]
    rows = [("", "ms", "range", "tokens/s", "MFLOPs/token", "forwards", "peak MiB")]
    ways = ("", "compiled_", "published_") if settings["compile"] else ("", "published_")
    for name in [f"{way}{step}_step" for way in ways for step in ("fast", "slow", "training")]:
        milliseconds, flops = result["milliseconds"][name], result["flops_per_token"].get(name)
        spread = result["milliseconds_range"].get(name)
        rows.append(
            (
                name.replace("_", " "),
                f"{milliseconds:.1f}",
                f"{spread[0]:.1f}-{spread[1]:.1f}" if spread else "",
                "" if spread else f"{1000 * tokens / milliseconds:,.0f}",
                f"{flops / 1e6:,.1f}" if flops else "",
                f"{flops / result['flops_per_token']['forward']:.2f}" if flops else "",
                f"{peaks[name] / 2**20:,.0f}" if name in peaks else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{settings['preset']} ({settings['parameters']:,} parameters), {settings['batch_size']} x "
        f"{settings['sequence_length']} random tokens, {settings['num_inference_steps']} inference steps "
        f"({settings['optimizer']}), {settings['precision']}, {settings['attention']} attention",
        f"{where['hardware']}; torch {where['torch']}, transformers {where['transformers']}; {where['date']}",
        "",
        *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows),
        "",
        f"A training step takes {result['time_ratio']:.2f} of the published way's time, "
        f"and {result['memory_ratio']:.2f} of its peak memory.",
        f"Relative differences: posteriors {result['relative_difference']['posterior']:.1e}, slow losses and gradients "
        f"{result['relative_difference']['slow_step']:.1e}.",
    ]
    if settings["compile"]:
        lines.append(
            f"Compiled ({settings['compile']}, {result['compiled_graphs']} graphs), a training step takes "
            f"{result['compiled_time_ratio']:.2f} of the eager one's time. Relative differences: "
            f"{result['relative_difference']['compiled_posterior']:.1e} and "
            f"{result['relative_difference']['compiled_slow_step']:.1e}."
        )
    if "nothing" in peaks:
        lines.append(f"Peak of a process that builds model and optimiser: {peaks['nothing'] / 2**20:,.0f} MiB.")
    return "\n".join(lines)


def at_least(smallest: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be an integer of {smallest} or more, got {text!r}")
        return int(text)

    return number


def parse(arguments=None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--preset", choices=PRESETS, default="ltm-tiny-natural")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "autocast"),
        default="float32",
        help="bfloat16 casts the weights, autocast keeps them float32; latents are always float32",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="sequences; default 8")
    parser.add_argument("--sequence-length", type=at_least(2), help="tokens; default: the preset's maximum")
    parser.add_argument("--num-inference-steps", type=at_least(1), help="default: the preset's")
    parser.add_argument("--optimizer", choices=("natural", "adamw"), help="of the latents; default: the preset's")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="sdpa")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        choices=("inductor", "aot_eager", "eager"),
        help="also the compiled steps, by this backend; default inductor, which needs a C++ compiler",
    )
    parser.add_argument("--threads", type=at_least(1), help="of the CPU; default: torch's. 1 where others compute too")
    parser.add_argument("--repeats", type=at_least(1), default=7, help="default 7")
    parser.add_argument("--warmup", type=at_least(1), default=2, help="repeats left out before; default 2")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of weights and token ids; default 0")
    parser.add_argument("--only", choices=(*PHASES, "nothing"), help="run this once and print the process's peak bytes")
    parser.add_argument("--output", help="JSON file to write the same figures to")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here.")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        parser.error(f"--output: there is no folder {Path(args.output).parent}.")
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


def main() -> None:
    args = parse()
    if args.only:
        print(run_alone(args))
        return
    result = benchmark(args, sys.argv[1:])
    print(report(result))
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    tolerance = 1e-3 if args.precision == "float32" else 1e-1
    for what, difference in result["relative_difference"].items():
        if not difference <= tolerance:
            raise SystemExit(
                f"The two ways differ in the {what.replace('_', ' ')}: {difference:.1e}, above {tolerance:g}."
            )


if __name__ == "__main__":
    main()
