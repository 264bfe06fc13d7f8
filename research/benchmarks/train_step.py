"""What a training step costs: inference and the slow step, beside the twin's step and the published way.

    python -m research.benchmarks.train_step
    python -m research.benchmarks.train_step --preset ltm-small --batch_size 4 --sequence_length 256 \\
        --config_overrides '{"num_inference_steps": 4}' --compile --memory --output step.json

The model is newly initialised and the token ids are random (seeded): the cost does not depend on what they are. It
learns by its own objective.

- fast step: inference before the slow step, divided by its T steps, all included: checking the input, drawing the start
  and the noise, T forwards, T gradients of the latents, T updates. A memory has none: it infers within the slow step.
- slow step: forward, backward and an AdamW step (fused, as `Trainer` has it) on the weights, with the loss that
  `LTMTrainer` asks for; gradient clipping is not included.
- twin step: the slow step of the same configuration without latents.
- published way, where there are fast steps: the same two done naively. The decoder is not frozen in the fast loop, so
  that every step also computes and accumulates the weight gradients; every step, fast or slow, makes all logits of the
  batch, and nothing is kept from step to step. Checked to give the same posterior, slow loss and gradients.
- compiled (`--compile`): the fast and the slow step with the same weights under torch.compile, as `torch_compile=True`
  has them in `LTMTrainer`; checked likewise, and graphs are counted over the whole run.
- peak memory: of each phase, weights and optimiser state included; on a CPU (`--memory`) of a process that runs nothing
  but that phase (`--only`), Python and torch included; there not of the compiled steps.
- FLOPs: the closed forms of `ltm_hf.costs.flops`, with all S x S scores whatever the window.

All phases take turns in each repeat. Milliseconds are medians of the repeats, with their smallest and largest; warm-up
is left out. A training step is T fast steps and the slow one.
"""

import statistics
import subprocess
import sys
import time
from functools import partial

import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from ltm_hf import LatentPosterior, LTMForCausalLM, cli, infer_posterior
from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.costs.flops import count_parameters, paper_training_flops, training_flops
from ltm_hf.likelihood_ltm import Text
from ltm_hf.methods_ltm import method_of, step_size
from ltm_hf.posterior_ltm import keyed_normal
from ltm_hf.training import LTMTrainingArguments
from ltm_hf.training.objectives import Now, objective_of

from . import common

WAYS = ("", "compiled_", "published_")


class Learner:
    """A decoder as it learns: by inference, and by a step of its weights with what that gave."""

    def __init__(self, decoder, config, input_ids: torch.Tensor):
        self.decoder, self.input_ids = decoder, input_ids
        self.arguments = LTMTrainingArguments(output_dir="outputs", report_to="none")
        self.objective = objective_of(config, self.arguments)
        self.num_steps = self.arguments.inference_steps(config)[1]
        self.thoughts = None

    def infer(self):
        text = Text.of(self.decoder, self.input_ids)
        self.thoughts = self.objective.step(self.decoder, text, 0, Now(0, 1))

    def loss(self, loss_reduction: str | None = "mean") -> torch.Tensor:
        """Nats a token of what inference gave last; None for the reduction makes all logits."""
        if self.thoughts is None or not self.num_steps:
            self.infer()
        given = dict(input_ids=self.input_ids, labels=self.input_ids, use_cache=False, loss_reduction=loss_reduction)
        losses = [self.decoder(**given, **one).loss for one in self.thoughts.passes]
        extra = 0 if self.thoughts.extra is None else self.thoughts.extra / self.input_ids[:, 1:].numel()
        return sum(losses) / len(losses) + extra


# ------------------------------------------------------------------ the published way


def infer_posterior_unfrozen(model, input_ids: torch.Tensor) -> LatentPosterior:
    """A naive reference: `backward` on a decoder whose weights all want their gradient too, and all logits."""
    settings = InferenceSettings.of(model.config)
    start = model.infer_posterior(input_ids, num_inference_steps=0)
    method = method_of(settings)(start.mean, start.log_variance)
    for step in range(settings.num_inference_steps):
        epsilon = _noise(start, step)
        latents = LatentPosterior(method.mean, method.log_variance).reparameterize(epsilon).detach().requires_grad_()
        logits = model(input_ids=input_ids, latents=latents, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum").backward()
        with torch.no_grad():
            method.update(latents.grad / settings.inference_kl_weight, epsilon, step_size(settings, step))
    return LatentPosterior(method.mean.detach(), method.log_variance.detach())


def _noise(start: LatentPosterior, step: int) -> torch.Tensor:
    return keyed_normal(start.keys, start.mean.shape[1:], step)


def differences(learner: Learner, other: Learner | None = None) -> dict[str, float]:
    """Of the posterior and of the slow step's loss and gradients: ours and the published way's, or the other's."""
    model, found = learner.decoder, {}
    if learner.num_steps:
        start = model.infer_posterior(learner.input_ids, num_inference_steps=0)
        epsilon = torch.stack([_noise(start, step) for step in range(learner.num_steps)])
        if other is None:
            two = infer_posterior_unfrozen(model, learner.input_ids)
        else:
            two = infer_posterior(other.decoder, learner.input_ids, epsilon=epsilon)
        one = infer_posterior(model, learner.input_ids, epsilon=epsilon)
        pairs = ((one.mean, two.mean), (one.log_variance, two.log_variance))
        found["posterior"] = common.relative_difference(pairs)
    results = []
    for one, reduction in ((learner, "mean"), (learner, None) if other is None else (other, "mean")):
        model.zero_grad()
        loss = one.loss(reduction)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    model.zero_grad()
    found["slow_step"] = common.relative_difference(zip(*results, strict=True))
    return found


# ------------------------------------------------------------------ what is measured


def make_phases(learner: Learner, twin: Learner, compiled: Learner | None = None) -> dict:
    """What is measured, by name. The optimisers have their states from the start, as in training after its first step.

    compiled: the same model under torch.compile, whose steps are then measured too.
    """
    optimizers = {one: _optimizer(one.decoder) for one in (learner, twin)}

    def slow_step(one, optimizer, loss_reduction="mean"):
        one.loss(loss_reduction).backward()
        optimizer.step()
        optimizer.zero_grad()

    def published_fast_loop():
        infer_posterior_unfrozen(learner.decoder, learner.input_ids)
        optimizers[learner].zero_grad()

    phases = {"slow_step": partial(slow_step, learner, optimizers[learner])}
    phases["twin_step"] = partial(slow_step, twin, optimizers[twin])
    if compiled is not None:
        phases["compiled_slow_step"] = partial(slow_step, compiled, optimizers[learner])
    if not learner.num_steps:
        return phases
    fast = {"fast_step": learner.infer, "published_fast_step": published_fast_loop}
    if compiled is not None:
        fast["compiled_fast_step"] = compiled.infer
    published = partial(slow_step, learner, optimizers[learner], None)
    return fast | phases | {"published_slow_step": published}


def _optimizer(model) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for parameter in model.parameters():  # moments written to memory
        moments = {name: torch.empty_like(parameter).fill_(0) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def measure(phases: dict, num_steps: int, args) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of each phase in each repeat, and on a GPU its peak memory in bytes. The phases take turns."""
    cuda, times, peaks = args.device.type == "cuda", {phase: [] for phase in phases}, {}
    for _ in range(args.warmup + args.repeats):
        for phase, function in phases.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
                peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            divisor = num_steps if phase.endswith("fast_step") else 1
            times[phase].append((time.perf_counter() - start) * 1000 / divisor)
    return {phase: values[args.warmup :] for phase, values in times.items()}, peaks


def flops(config, twin, length: int, published: bool) -> dict[str, float]:
    """A token's."""
    cost = training_flops(config, length)
    found = {"forward": cost.forward, "slow_step": cost.slow_step}
    found["twin_step"] = training_flops(twin, length).slow_step
    if published:
        found |= {"fast_step": cost.fast_step, "published_fast_step": 3 * cost.forward}
        found["published_slow_step"] = 3 * cost.forward
    return found


def add_training_steps(figures: dict, num_steps: int, join=lambda fast, slow, steps: steps * fast + slow) -> None:
    """T fast steps and the slow one, for each way there is."""
    for way in WAYS:
        fast, slow = figures.get(f"{way}fast_step", 0), figures.get(f"{way}slow_step")
        if slow is not None:
            figures[f"{way}training_step"] = join(fast, slow, num_steps)


def prepare(args) -> tuple[Learner, Learner]:
    """A model and its twin, with the token ids of a batch, all random."""
    common.begin(args)
    config = common.config_of(args)
    args.config_overrides = args.config_overrides | {"num_latents": 0}
    twin = common.config_of(args)
    length = args.sequence_length or config.max_position_embeddings
    input_ids = torch.randint(config.vocab_size, (args.batch_size, length)).to(args.device)
    learners = []
    for each in (config, twin):
        model = LTMForCausalLM(each).to(args.device).train()
        if args.precision == "bfloat16":
            model.to(torch.bfloat16)
        elif args.precision == "autocast":  # as accelerate does it: around forward alone
            model.forward = torch.autocast(args.device.type, torch.bfloat16)(model.forward)
        learners.append(Learner(model, each, input_ids))
    return tuple(learners)


def peak_of_process(phase: str, arguments: list[str]) -> int:
    """Bytes: the peak of a process that runs this phase alone; or "nothing", after building models and optimisers."""
    command = [sys.executable, "-m", "research.benchmarks.train_step", *arguments, "--only", phase]
    done = subprocess.run(command, cwd=common.ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def benchmark(args, arguments: list[str]) -> dict:
    learner, twin = prepare(args)
    config, steps, length = learner.decoder.config, learner.num_steps, learner.input_ids.shape[1]
    compiled = None
    if args.compile:  # the weights are the model's
        compiled = Learner(torch.compile(learner.decoder, backend=args.compile), config, learner.input_ids)
    same = differences(learner)
    if compiled is not None:
        same |= {f"compiled_{name}": value for name, value in differences(learner, compiled).items()}
    phases = make_phases(learner, twin, compiled)
    times, peaks = measure(phases, steps, args)
    if args.memory and args.device.type != "cuda":
        alone = [phase for phase in phases if not phase.startswith("compiled")]
        peaks = {phase: peak_of_process(phase, arguments) for phase in (*alone, "nothing")}
    milliseconds = {phase: statistics.median(values) for phase, values in times.items()}
    counted = flops(config, twin.decoder.config, length, published=bool(steps))
    add_training_steps(milliseconds, steps)
    add_training_steps(counted, steps)
    add_training_steps(peaks, steps, lambda fast, slow, _: max(fast, slow))
    return {
        "settings": {
            "preset": args.preset,
            "parameters": count_parameters(config),
            "device": args.device.type,
            "precision": args.precision,
            "objective": type(learner.objective).__name__,
            "inference_method": config.inference_method,
            "num_inference_steps": steps,
            "batch_size": args.batch_size,
            "sequence_length": length,
            "compile": args.compile,
            "repeats": args.repeats,
            "seed": args.seed,
            "token_ids": "random, seeded",
        },
        "environment": common.environment(args.device),
        "milliseconds": milliseconds,
        "milliseconds_range": {phase: [min(values), max(values)] for phase, values in times.items()},
        "tokens_per_second": 1000 * learner.input_ids.numel() / milliseconds["training_step"],
        "flops_per_token": counted,
        "paper_flops_per_token": paper_training_flops(config, length),
        "peak_memory_bytes": peaks,
        "relative_difference": same,
        "compiled_graphs": counters["stats"]["unique_graphs"] if args.compile else None,
    }


def report(result: dict) -> str:
    settings, peaks, times = result["settings"], result["peak_memory_bytes"], result["milliseconds"]
    tokens, counted = settings["batch_size"] * settings["sequence_length"], result["flops_per_token"]
    rows = [("", "ms", "range", "tokens/s", "MFLOPs/token", "forwards", "/ twin step", "peak MiB")]
    names = [f"{way}{step}_step" for way in WAYS for step in ("fast", "slow", "training")] + ["twin_step"]
    for name in (name for name in names if name in times):
        spread, cost = result["milliseconds_range"].get(name), counted.get(name)
        rows.append(
            (
                name.replace("_", " "),
                f"{times[name]:.1f}",
                f"{spread[0]:.1f}-{spread[1]:.1f}" if spread else "",
                f"{1000 * tokens / times[name]:,.0f}" if name.endswith("training_step") else "",
                f"{cost / 1e6:,.1f}" if cost else "",
                f"{cost / counted['forward']:.2f}" if cost else "",
                f"{times[name] / times['twin_step']:.2f}",
                f"{peaks[name] / 2**20:,.0f}" if name in peaks else "",
            )
        )
    lines = [
        f"{settings['preset']} ({settings['parameters']:,} parameters), {settings['batch_size']} x "
        f"{settings['sequence_length']} random tokens, {settings['num_inference_steps']} inference steps before the "
        f"slow one ({settings['inference_method']}), {settings['precision']}",
        common.in_words(result["environment"]),
        "",
        *common.aligned(rows),
        "",
    ]
    if "published_training_step" in times:
        ratio = times["training_step"] / times["published_training_step"]
        lines.append(f"A training step takes {ratio:.2f} of the published way's time.")
    if settings["compile"]:
        ratio = times["compiled_training_step"] / times["training_step"]
        lines.append(
            f"Compiled ({settings['compile']}, {result['compiled_graphs']} graphs), it takes {ratio:.2f} of its time."
        )
    differing = (f"{name.replace('_', ' ')} {value:.1e}" for name, value in result["relative_difference"].items())
    lines.append(f"Relative differences: {', '.join(differing)}.")
    if "nothing" in peaks:
        lines.append(f"Peak of a process that builds models and optimisers: {peaks['nothing'] / 2**20:,.0f} MiB.")
    return "\n".join(lines)


def parse():
    options = common.parser("What a training step costs.")
    common.add_preset(options, "ltm-tiny")
    common.add_timing(options)
    options.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "autocast"),
        default="float32",
        help="bfloat16 casts the weights, autocast keeps them float32; latents are always float32",
    )
    options.add_argument("--batch_size", type=cli.positive_int, default=8, help="sequences; default 8")
    options.add_argument("--sequence_length", type=cli.block, help="tokens; default: the preset's maximum")
    options.add_argument(
        "--compile",
        nargs="?",
        const="inductor",
        choices=("inductor", "aot_eager", "eager"),
        help="also the compiled steps, by this backend; default inductor, which needs a C++ compiler",
    )
    options.add_argument("--memory", action="store_true", help="on a CPU, peak memory too: a process for each phase")
    options.add_argument("--only", help="run this phase once and print the process's peak bytes")
    return options.parse_args()


@cli.one_sentence()
def main() -> None:
    args = parse()
    if args.only:
        phases = {"nothing": lambda: None} | make_phases(*prepare(args))
        if args.only not in phases:
            raise ValueError(f"--only must be one of {', '.join(phases)}; got {args.only!r}.")
        phases[args.only]()
        print(common.peak_of_this_process())
        return
    result = benchmark(args, sys.argv[1:])
    print(report(result))
    common.write(args, result)
    tolerance = 1e-3 if args.precision == "float32" else 1e-1
    for what, difference in result["relative_difference"].items():
        if not difference <= tolerance:
            raise SystemExit(
                f"The two ways differ in the {what.replace('_', ' ')}: {difference:.1e}, above {tolerance:g}."
            )


if __name__ == "__main__":
    main()
