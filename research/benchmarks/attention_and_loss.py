"""Which attention within a window, and which vocabulary projection with its loss, is the fastest and smallest here.

    python -m research.benchmarks.attention_and_loss
    python -m research.benchmarks.attention_and_loss --preset ltm-small --batch_size 2 --sequence_length 1024 \\
        --threads 1 --output attention_and_loss.json

Three comparisons at the sizes of a preset, on random input (seeded), each against a naive reference:

- attention: of one layer, forward and the gradients of queries, keys and values, all heads, causal within the preset's
  window. The mask is made once before, as for all layers of a model. Reference: eager.
- frozen loss: the vocabulary projection and cross-entropy of a fast step, forward and the gradient of the hidden states
  alone. Reference: all logits. "padded" has zero rows added to the weight beforehand, up to a multiple of 64.
- learning loss: the same of a slow step, forward and the gradients of hidden states and weight.

All candidates of a comparison take turns in one process. Milliseconds are medians of the repeats, with the smallest and
largest; warm-up is left out. Peak memory is, on a GPU, that of torch beyond the input; on a CPU that of a process that
does nothing else, less that of one that only makes the input (`--only`). What is not available says why. Results that
differ from the reference's by more than rounding end the script with an error. A process for each candidate takes its
time to start: `--memory` asks for these.
"""

import importlib.util
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mistral.modeling_mistral import eager_attention_forward

from ltm_hf import cli, losses_ltm
from ltm_hf.losses_ltm import mean_loss, token_losses

from . import common

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ------------------------------------------------------------------ attention


def attention_candidates(args, config) -> dict:
    """Functions that return output and gradients, all (B, heads, S, d); or the reason why there is none."""
    shape = (args.batch_size, args.length, config.num_attention_heads, config.head_dim)
    # As projections give them: heads next to each other in memory.
    states = [torch.randn(shape, device=args.device, dtype=args.dtype).transpose(1, 2).requires_grad_() for _ in "qkv"]
    weights = torch.randn(shape, device=args.device, dtype=args.dtype)
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False, layer_idx=0)
    embeddings = torch.empty(args.batch_size, args.length, 1, device=args.device, dtype=args.dtype)
    window, scaling = config.sliding_window, config.head_dim**-0.5

    def through_transformers(name):
        config._attn_implementation = name
        mask = create_sliding_window_causal_mask(config, embeddings, None, None, None)
        attend = eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]

        def run():
            output = attend(module, *states, mask, scaling=scaling, dropout=0.0, sliding_window=window)[0]
            return output.detach(), *torch.autograd.grad(output, states, weights)

        return run

    def varlen():
        from torch.nn.attention.varlen import varlen_attn

        bounds = torch.arange(args.batch_size + 1, device=args.device, dtype=torch.int32) * args.length

        def run():
            packed = [x.transpose(1, 2).flatten(0, 1) for x in states]
            ends = (bounds, bounds, args.length, args.length)
            output = varlen_attn(*packed, *ends, scale=scaling, window_size=(window - 1, 0)).view(shape)
            return output.detach(), *torch.autograd.grad(output, states, weights)

        return run

    def flash():
        from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

        lazy_import_flash_attention("flash_attention_3")
        return through_transformers("flash_attention_3")

    cuda, half = args.device.type == "cuda", args.dtype != torch.float32
    candidates = {name: through_transformers(name) for name in ("eager", "sdpa", "banded_sdpa")}
    candidates["flex_attention"] = through_transformers("flex_attention") if cuda else "has no backward on the CPU"
    kernels = {"varlen_attn": (varlen, "torch.nn.attention.varlen"), "flash_attention_3": (flash, "kernels")}
    for name, (make, package) in kernels.items():
        if not cuda:
            candidates[name] = "needs a CUDA device"
        elif not half:
            candidates[name] = "needs --precision bfloat16"
        elif not importable(package):
            candidates[name] = f"{package} is not installed"
        else:
            candidates[name] = make()
    return candidates


# ------------------------------------------------------------------ losses


class PaddedHead(nn.Linear):
    """A head whose last outputs belong to no token: probability 0, and no gradient."""

    def __init__(self, weight: torch.Tensor):
        rows = -len(weight) % 64
        super().__init__(weight.shape[1], len(weight) + rows, bias=False, device="meta")
        self.weight = nn.Parameter(F.pad(weight, (0, 0, 0, rows)), requires_grad=False)
        self.vocab_size = len(weight)

    def forward(self, states):
        logits = super().forward(states)
        logits.detach()[..., self.vocab_size :] = -torch.inf  # not for autograd, in which nothing depends on it
        return logits


def with_chunks_of(bytes_, function):
    def run():
        before = losses_ltm.CHUNK_BYTES
        losses_ltm.CHUNK_BYTES = bytes_
        try:
            return function()
        finally:
            losses_ltm.CHUNK_BYTES = before

    return run


def loss_candidates(args, config, learns: bool) -> dict:
    """Functions that return the loss summed over tokens, or its mean, and the gradients; or why there is none."""
    size = (args.batch_size, args.length, config.hidden_size)
    states = torch.randn(size, device=args.device, dtype=args.dtype).requires_grad_()
    head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=args.device, dtype=args.dtype)
    nn.init.normal_(head.weight, std=config.initializer_range)
    head.requires_grad_(learns)
    targets = torch.randint(config.vocab_size, size[:2], device=args.device)
    reduction = "mean" if learns else "sum"

    def gradients(loss_of):
        def run():
            loss = loss_of()
            wanted = [states, head.weight] if learns else [states]
            return loss.detach().float(), *torch.autograd.grad(loss, wanted)

        return run

    def all_logits():
        return F.cross_entropy(head(states).float().flatten(0, 1), targets.flatten(), reduction=reduction)

    def chunked(with_head=head):
        return mean_loss(head, states, targets) if learns else token_losses(with_head, states, targets).sum()

    flat = states.flatten(0, 1), head.weight, targets.flatten()

    def torchs(**options):
        return lambda: F.linear_cross_entropy(*flat, reduction=reduction, **options)

    candidates = {"all logits": gradients(all_logits), "chunked": gradients(chunked)}
    for factor in (1 / 4, 4):
        size_ = int(factor * losses_ltm.CHUNK_BYTES)
        candidates[f"chunks of {size_ // 2**20} MiB"] = with_chunks_of(size_, gradients(chunked))
    if not learns:
        padded = PaddedHead(head.weight.detach())
        candidates["chunked, padded"] = gradients(lambda: chunked(padded))
    for name in ("linear_cross_entropy", "linear_cross_entropy, chunked"):
        if not hasattr(F, "linear_cross_entropy"):
            candidates[name] = "this torch has none"
        elif name.endswith("chunked"):
            candidates[name] = gradients(torchs(options=nn.LinearCrossEntropyOptions()))
        else:
            candidates[name] = gradients(torchs())

    def liger():
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return gradients(lambda: liger_fused_linear_cross_entropy(*flat, reduction=reduction))

    def cut():
        from cut_cross_entropy import linear_cross_entropy

        return gradients(lambda: linear_cross_entropy(*flat, reduction=reduction))

    for name, make in (("liger_kernel", liger), ("cut_cross_entropy", cut)):
        if args.device.type != "cuda":
            candidates[name] = "needs a CUDA device"
        else:
            candidates[name] = make() if importable(name) else "is not installed"
    return candidates


# ------------------------------------------------------------------ measuring

COMPARISONS = {
    "attention": attention_candidates,
    "frozen loss": lambda *given: loss_candidates(*given, learns=False),
    "learning loss": lambda *given: loss_candidates(*given, learns=True),
}


def prepare(args, comparison: str) -> dict:
    torch.manual_seed(args.seed)
    return COMPARISONS[comparison](args, common.config_of(args))


def peak_alone(comparison: str, name: str, arguments: list[str]) -> int:
    """Bytes: the peak of a process that makes the input and runs this candidate once, or "nothing"."""
    command = [sys.executable, "-m", "research.benchmarks.attention_and_loss", *arguments, "--only", comparison, name]
    done = subprocess.run(command, cwd=common.ROOT, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def compare(args, comparison: str, arguments: list[str]) -> dict[str, dict]:
    """Figures of each candidate by name: milliseconds, their range, peak bytes, difference; or why it is not there."""
    candidates = prepare(args, comparison)
    available = {name: run for name, run in candidates.items() if callable(run)}
    cuda = args.device.type == "cuda"
    times, peaks = {name: [] for name in available}, {}
    # One candidate's results at a time beside the reference's: all together would not leave the memory to measure.
    reference = next(iter(available.values()))()
    differences = {
        name: common.relative_difference(zip(reference, run(), strict=True)) for name, run in available.items()
    }
    del reference
    for _ in range(args.warmup + args.repeats):
        for name, run in available.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() - before
            times[name].append((time.perf_counter() - start) * 1000)
    if not cuda:
        names = available if args.memory else ()
        idle = peak_alone(comparison, "nothing", arguments) if names else 0
        peaks = {name: max(0, peak_alone(comparison, name, arguments) - idle) for name in names}
    figures = {}
    for name, run in candidates.items():
        if name not in available:
            figures[name] = {"not available": run}
            continue
        kept = times[name][args.warmup :]
        figures[name] = {
            "milliseconds": statistics.median(kept),
            "milliseconds_range": [min(kept), max(kept)],
            "peak_memory_bytes": peaks.get(name),
            "relative_difference": differences[name],
        }
    return figures


def report(result: dict) -> str:
    settings = result["settings"]
    lines = [
        f"{settings['preset']}, {settings['batch_size']} x {settings['sequence_length']} tokens, "
        f"{settings['precision']}",
        common.in_words(result["environment"]),
    ]
    for comparison, figures in result["comparisons"].items():
        rows = [(comparison, "ms", "range", "peak MiB", "difference", "/ reference")]
        reference = next(iter(figures.values()))["milliseconds"]
        for name, one in figures.items():
            if "not available" in one:
                continue
            low, high = one["milliseconds_range"]
            rows.append(
                (
                    name,
                    f"{one['milliseconds']:.1f}",
                    f"{low:.1f}-{high:.1f}",
                    "" if one["peak_memory_bytes"] is None else f"{one['peak_memory_bytes'] / 2**20:,.0f}",
                    f"{one['relative_difference']:.1e}",
                    f"{one['milliseconds'] / reference:.2f}",
                )
            )
        lines += ["", *common.aligned(rows)]
        lines += [
            f"{name}: not available here: {one['not available']}" for name, one in figures.items() if len(one) == 1
        ]
    return "\n".join(lines)


def parse():
    options = common.parser("Attention within a window, and the vocabulary projection with its loss.")
    common.add_preset(options, "ltm-tiny")
    common.add_timing(options)
    options.add_argument("--precision", choices=TOLERANCES, default="float32", help="of all input; default float32")
    options.add_argument("--batch_size", type=cli.positive_int, default=4, help="sequences; default 4")
    options.add_argument("--sequence_length", type=cli.block, help="tokens; default: the preset's maximum")
    options.add_argument("--memory", action="store_true", help="on a CPU, peak memory too: a process a candidate")
    options.add_argument("--only", nargs=2, metavar=("COMPARISON", "NAME"), help="run one and print the peak bytes")
    args = options.parse_args()
    args.dtype = getattr(torch, args.precision)
    args.length = args.sequence_length or common.config_of(args).max_position_embeddings
    return args


@cli.one_sentence()
def main() -> None:
    args = parse()
    common.begin(args)
    if args.only:
        comparison, name = args.only
        candidates = prepare(args, comparison)
        if name != "nothing":
            candidates[name]()
        print(common.peak_of_this_process())
        return
    result = {
        "settings": {
            "preset": args.preset,
            "device": args.device.type,
            "precision": args.precision,
            "batch_size": args.batch_size,
            "sequence_length": args.length,
            "repeats": args.repeats,
            "seed": args.seed,
        },
        "environment": common.environment(args.device),
        "comparisons": {name: compare(args, name, sys.argv[1:]) for name in COMPARISONS},
    }
    print(report(result))
    common.write(args, result)
    tolerance = TOLERANCES[args.precision]
    for comparison, figures in result["comparisons"].items():
        for name, one in figures.items():
            difference = one.get("relative_difference", 0.0)
            if not difference <= tolerance:
                raise SystemExit(
                    f"{name} does not agree with the reference of {comparison}: relative difference {difference:.1e}, "
                    f"above {tolerance:g}."
                )


if __name__ == "__main__":
    main()
