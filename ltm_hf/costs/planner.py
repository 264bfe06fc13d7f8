"""What a training run needs: batch per GPU, memory, days and FLOPs, in closed form from the configuration.

    python -m ltm_hf.costs.planner --preset ltm-large --gpus 8 --tokens 3e9

Symbols: B sequences on a GPU at a time, S tokens of a sequence, L layers, n latents a layer, D hidden, V vocabulary,
T inference steps, P parameters.

Memory is what autograd saves under SDPA attention, with no dropout and no kernel fused. Logits exist in chunks only, in
the fast loop (`token_losses`) and in the slow step (`mean_loss`). Where the slow step needs all of them (adapters on
the head, label smoothing, FSDP2, ZeRO-3), three float32 arrays of B·S·V live at the start of its backward pass instead:
log-softmax, its gradient and the loss's.

MFU is defined by the paper's own account: `paper_training_flops` x tokens a second / (GPUs x the peak of dense
bfloat16), whatever the precision. The two published step times imply 0.166 (LTM-Medium) and 0.162 (LTM-Large).
"""

import math
from dataclasses import dataclass

from .. import cli
from ..configuration_ltm import LTMConfig
from ..losses_ltm import CHUNK_BYTES
from ..methods_ltm import method_of
from ..presets import PRESETS, preset_config
from .flops import checked_length, count_parameters, paper_training_flops, training_flops, widths

PAPER_MFU = 0.164
PAPER_BATCH = 512  # sequences of one optimiser step
USABLE_MEMORY = 0.9  # the rest is for the CUDA context, NCCL and fragments

PRECISIONS = ("bf16", "fp32")
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class GPU:
    """memory: bytes, as the driver reports them. peak: dense bfloat16 FLOPs a second."""

    memory: int
    peak: float


GPUS = {
    "h100": GPU(81_559 * 2**20, 989e12),
    "h200": GPU(143_771 * 2**20, 989e12),
    "a100": GPU(81_920 * 2**20, 312e12),
}


# ------------------------------------------------------------------ memory


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    weights, gradients, adam: float32, this GPU's share; gathered copies and DDP's buckets are counted with them.
    slow_activations, fast_activations: what autograd saves in the slow step and in a fast step, logits aside.
    slow_logits, fast_logits: of a chunk and what stands beside it, or of all tokens, at the start of the backward pass.
        With gradient checkpointing, of a layer computed again where that is more.
    latents: posteriors, their optimiser and the samples of the fast loop; not needed in the slow step.
    """

    weights: int
    gradients: int
    adam: int
    slow_activations: int
    fast_activations: int
    slow_logits: int
    fast_logits: int
    latents: int

    @property
    def slow_step(self) -> int:
        return self.weights + self.gradients + self.adam + self.slow_activations + self.slow_logits

    @property
    def fast_loop(self) -> int:
        return self.weights + self.gradients + self.adam + self.fast_activations + self.fast_logits + self.latents

    @property
    def peak(self) -> int:
        return max(self.slow_step, self.fast_loop)


def training_memory(
    config: LTMConfig,
    batch_size: int,
    sequence_length: int | None = None,
    *,
    num_gpus: int = 1,
    precision: str = "bf16",
    sharding: str = "ddp",
    gradient_checkpointing: bool = False,
) -> Memory:
    """Memory of a training step on one GPU, by what torch saves for the backward passes.

    batch_size: B, sequences of one forward pass on one GPU.
    sequence_length: S, default `max_position_embeddings`.
    precision: "bf16", autocast over float32 weights, or "fp32".
    sharding: "ddp" (also one GPU) keeps all on each GPU; "zero2" shares out gradients and Adam's moments; "zero3" and
        "fsdp2" the weights as well, which the fast loop then gathers whole.
    Raises ValueError for numbers that are no integers of 1 or more, or an unknown precision or sharding.
    """
    _check_counts(batch_size=batch_size, num_gpus=num_gpus)
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("sharding", sharding, SHARDINGS)
    tokens = checked_length(config, sequence_length)
    scored, sharded = batch_size * (tokens - 1), sharding in ("zero3", "fsdp2")
    sizes = (config, batch_size, tokens, precision)
    learning = _Saved(*sizes, learns=True)
    slow_logits = learning.memory_passing() if config.has_memory else _chunk(config, scored, precision, frozen=False)
    if sharded:  # a head whose weight is gathered by hooks takes all tokens at once
        slow_logits = 3 * 4 * batch_size * tokens * config.vocab_size
    slow, slow_again = _activations(learning, gradient_checkpointing, not sharded)
    fast = fast_logits = latents = 0
    if config.reading_layers:
        fast, fast_again = _activations(_Saved(*sizes, learns=False), gradient_checkpointing)
        fast_logits = max(_chunk(config, scored, precision, frozen=True), fast_again)
        arrays = 6 + method_of(config).num_kept  # mean, log-variance, the best of both, noise and sample
        latents = arrays * 4 * batch_size * math.prod(config.latent_shape)
    weights = gradients = 4 * count_parameters(config)
    adam = 2 * weights
    if sharding != "ddp":
        gradients, adam = gradients // num_gpus, adam // num_gpus
    elif num_gpus > 1:
        gradients *= 2  # DDP's buckets
    if sharded and num_gpus > 1:
        weights += weights // num_gpus
    return Memory(weights, gradients, adam, slow, fast, max(slow_logits, slow_again), fast_logits, latents)


def _chunk(config: LTMConfig, scored: int, precision: str, frozen: bool) -> int:
    """Bytes of a chunk's logits and log-softmax, and of all hidden states, which are copied to leave some out."""
    bf16, size = precision == "bf16", config.hidden_size * config.vocab_size
    rows = min(max(1, scored), max(1, CHUNK_BYTES // (4 * config.vocab_size)))
    rows = -(-scored // max(1, -(-scored // rows)))  # chunks are even
    chunk = rows * config.vocab_size * (2 + 4 + 4 if bf16 else 4 + 4)  # log-softmax makes a copy of bf16
    copies = 2 * size if bf16 else 0
    states = 4 * scored * config.hidden_size
    if frozen:
        return chunk + copies + 3 * states
    if bf16:  # a chunk's product, on its way into the weight's gradient
        chunk = max(chunk, rows * config.vocab_size * (4 + 2) + 2 * size)
    return max(chunk + copies + states, 3 * states)  # or, in the backward pass, the last norm's


class _Saved:
    """Bytes that autograd saves of parts of a forward pass.

    learns: whether all weights want a gradient, or the latents alone.
    """

    def __init__(self, config: LTMConfig, batch: int, length: int, precision: str, learns: bool):
        self.config, self.batch, self.length, self.learns = config, batch, length, learns
        self.tokens, self.bf16 = batch * length, precision == "bf16"
        self.size = 2 if self.bf16 else 4  # of what matrix products read and write; the residual stream is float32
        self.hidden, self.queries, self.keys = widths(config)
        # SDPA's mask becomes a bias, and repeats the keys for each query.
        self.masked = config.sliding_window is not None and config.sliding_window < length
        # Casts of an attention's weights.
        self.copies = 4 * (self.hidden * self.queries + self.hidden * self.keys) if self.bf16 else 0

    def norm(self, products: int) -> int:
        """Of a token: an RMSNorm, and what the `products` after it read."""
        saved = 4 * self.hidden + 4
        if self.learns:
            saved += 4 * self.hidden  # before its weight
            # Autocast makes each product a copy of its own.
            saved += 2 * self.hidden * products if self.bf16 else 4 * self.hidden
        return saved

    def attention(self) -> int:
        """Of a token: queries, keys, values, output and log-sum-exp."""
        config, keys = self.config, self.queries if self.masked else self.keys
        saved = self.size * (2 * self.queries + 2 * keys) + 4 * config.num_attention_heads
        saved += self.size * self.length if self.masked else 0
        if config.self_attention == "qwen3":  # a norm on each head, which casts to float32 and back
            normed = self.queries + self.keys
            saved += 4 * normed + 4 * (config.num_attention_heads + config.num_key_value_heads)
            saved += self.size * normed if self.learns else 0
        return saved

    def layer(self) -> int:
        inner = self.config.intermediate_size
        mlp = self.size * inner * (4 if self.learns else 3)
        casts = self.copies + (2 * 3 * self.hidden * inner if self.bf16 else 0)
        return self.tokens * (self.norm(3) + self.attention() + self.norm(2) + mlp) + casts

    def reading(self) -> int:
        """What a layer that reads latents has more."""
        config = self.config
        attention = self.size * 2 * self.queries + 4 * config.num_attention_heads
        gate = self.size * self.hidden if self.learns and config.latent_gate_init is not None else 0
        latents = self.size * config.latents_per_layer * (2 * self.keys + (2 * self.hidden if self.learns else 0))
        return self.tokens * (self.norm(1) + attention + gate) + self.batch * latents + self.copies

    def memory(self) -> int:
        """What a memory has, once for all layers: of reading the text once, and of doing so again with a graph.

        Counted, not derived: bytes of a channel, of a token's weights of latents, and of a chunk's posterior.
        """
        config = self.config
        weights = config.num_attention_heads * config.num_latents
        posterior = (config.num_latents * self.hidden + weights) / config.latent_chunk
        channel, weight, moment = (28, 12.5, 8.2) if self.bf16 else (37, 16.5, 12)
        return int(self.tokens * (channel * self.hidden + weight * weights + moment * posterior))

    def memory_passing(self) -> int:
        """What a memory has beside `memory` for a while: a chunk's logits, or the gradients of its posteriors."""
        config, matrix = self.config, self.hidden * self.config.vocab_size
        rows = self.batch * config.latent_chunk
        logits = rows * config.vocab_size * (10 if self.bf16 else 8) + (4 * matrix if self.bf16 else 0)
        moments = self.tokens * config.num_latents * self.hidden / config.latent_chunk
        backward = 4 * matrix + 4 * self.tokens * self.hidden
        return int(max(logits, backward, (16 if self.bf16 else 12) * moments))

    def head(self, chunked: bool) -> int:
        """The head's gradients, if it has given them already, or its copy."""
        vocab = self.config.vocab_size
        saved = self.tokens * self.norm(1)
        if chunked:
            saved += 4 * self.tokens * self.hidden
            if self.learns:  # and does not keep what it read
                saved += 4 * self.hidden * vocab - self.tokens * self.size * self.hidden
        elif self.bf16:
            saved += 2 * self.hidden * vocab
        return saved


def _activations(saved: _Saved, checkpointing: bool, chunked: bool = True) -> tuple[int, int]:
    """Bytes that autograd saves in one forward pass, logits aside, and those that the backward pass computes again.

    chunked: the head's gradients are taken in the forward pass.
    """
    config, hidden, tokens = saved.config, saved.hidden, saved.tokens
    layer, head = saved.layer(), saved.head(chunked)
    reading = saved.reading() if config.reading_layers else 0
    memory = saved.memory() if config.has_memory else 0
    if checkpointing:
        # A layer's input is kept, and the mask. One layer at a time is computed again, once the logits are gone, beside
        # the gradients of what enters and leaves it.
        mask = tokens * saved.length if saved.masked else 0
        kept = config.num_hidden_layers * tokens * 4 * hidden + mask + head + memory
        # The peak comes when head and MLP have let go of what they had for their own weights.
        gone = tokens * (4 * hidden + saved.size * config.intermediate_size) if chunked and saved.learns else 0
        return kept, layer + reading + 2 * 4 * tokens * hidden - gone
    total = config.num_hidden_layers * layer + len(config.reading_layers) * reading + head + memory
    if not saved.learns:  # before the first cross-attention nothing depends on latents
        total -= min(config.reading_layers, default=0) * layer
        total -= tokens * (saved.norm(3) + saved.attention() + saved.norm(1))
        total -= saved.copies + 2 * hidden * saved.queries if saved.bf16 else 0
    return total, 0


# ------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Plan:
    """A run of `num_steps` optimiser steps; its effective batch is per_device x accumulation x num_gpus sequences.

    flops: of the whole run by the paper's account; library_flops: what this library multiplies for it.
    seconds_per_step, days: by the paper's account at the given MFU.
    """

    per_device: int
    accumulation: int
    num_gpus: int
    memory: Memory
    num_steps: int
    seconds_per_step: float
    flops: float
    library_flops: float

    @property
    def days(self) -> float:
        return self.num_steps * self.seconds_per_step / 86_400


def plan(
    config: LTMConfig,
    tokens: float,
    *,
    num_gpus: int = 1,
    gpu: str = "h100",
    mfu: float = PAPER_MFU,
    global_batch_size: int = PAPER_BATCH,
    per_device_batch_size: int | None = None,
    sequence_length: int | None = None,
    precision: str = "bf16",
    sharding: str = "ddp",
    gradient_checkpointing: bool = False,
) -> Plan:
    """Plan the training of a configuration on a number of tokens; T is `config.num_inference_steps`.

    num_gpus: of all nodes. gpu: h100 (80 GB), h200 (141 GB) or a100 (80 GB).
    mfu: share of the GPUs' peak that is reached by the paper's account, above 0 and at most 1; it may exceed what the
        hardware is busy for, since this library needs fewer FLOPs than the account charges.
    global_batch_size: sequences of an optimiser step, a multiple of num_gpus; default the paper's 512.
    per_device_batch_size: default the largest power of two that fits `USABLE_MEMORY` of a GPU and divides the batch.
    The others are as in `training_memory`.

    Raises ValueError for arguments out of range, a batch that cannot be shared out evenly, and a model of which not
    even one sequence fits.
    """
    _check_counts(num_gpus=num_gpus, global_batch_size=global_batch_size)
    _check_choice("gpu", gpu, GPUS)
    length = checked_length(config, sequence_length)
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must lie above 0 and at most at 1, got {mfu}.")
    if not length <= tokens < math.inf:
        raise ValueError(f"tokens must be at least one sequence ({length}) and finite, got {tokens}.")
    if global_batch_size % num_gpus:
        raise ValueError(f"global_batch_size ({global_batch_size}) must be a multiple of num_gpus ({num_gpus}).")
    share = global_batch_size // num_gpus
    setting = dict(num_gpus=num_gpus, precision=precision, sharding=sharding)
    setting["gradient_checkpointing"] = gradient_checkpointing

    def memory(batch):
        return training_memory(config, batch, length, **setting)

    if per_device_batch_size is None:
        per_device_batch_size = _largest_fitting(share, memory, gpu)
    _check_counts(per_device_batch_size=per_device_batch_size)
    if share % per_device_batch_size:
        raise ValueError(f"per_device_batch_size ({per_device_batch_size}) must divide a GPU's {share} sequences.")
    num_steps = math.ceil(tokens / (global_batch_size * length))
    read = num_steps * global_batch_size * length
    flops = float(read * paper_training_flops(config, length))
    return Plan(
        per_device=per_device_batch_size,
        accumulation=share // per_device_batch_size,
        num_gpus=num_gpus,
        memory=memory(per_device_batch_size),
        num_steps=num_steps,
        seconds_per_step=flops / num_steps / (num_gpus * GPUS[gpu].peak * mfu),
        flops=flops,
        library_flops=read * training_flops(config, length).training_step,
    )


def _largest_fitting(share: int, memory, gpu: str) -> int:
    """The largest power of two that divides a GPU's share of a batch and fits."""
    usable = USABLE_MEMORY * GPUS[gpu].memory
    fitting = [2**i for i in range(share.bit_length()) if share % 2**i == 0 and memory(2**i).peak <= usable]
    if not fitting:
        raise ValueError(
            f"One sequence needs {memory(1).peak / 2**30:.1f} GiB and a {gpu} has {usable / 2**30:.1f} GiB to use: "
            "take gradient checkpointing, sharding or shorter sequences."
        )
    return max(fitting)


def _check_counts(**counts) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer of 1 or more, got {count!r}.")


def _check_choice(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


# ------------------------------------------------------------------ on the command line


def report(plan: Plan) -> str:
    """A plan in words and units."""
    memory, effective = plan.memory, plan.per_device * plan.accumulation * plan.num_gpus
    lines = {
        "batch": f"{plan.per_device} sequences a GPU x {plan.accumulation} accumulated x {plan.num_gpus} GPU(s) "
        f"= {effective} a step",
        "memory": f"{_gib(memory.peak)} a GPU",
        "  kept": f"weights {_gib(memory.weights)}, gradients {_gib(memory.gradients)}, Adam {_gib(memory.adam)}",
        "  slow step": f"activations {_gib(memory.slow_activations)}, logits {_gib(memory.slow_logits)}",
        "  fast loop": f"activations {_gib(memory.fast_activations)}, logits {_gib(memory.fast_logits)}, "
        f"latents {_gib(memory.latents)}",
        "time": f"{plan.days:.2f} days: {plan.num_steps:,} steps of {plan.seconds_per_step:.2f} s",
        "FLOPs": f"{plan.flops:.3g} by the paper's account, {plan.library_flops:.3g} in this library",
    }
    if memory.fast_activations:  # else there is no fast loop
        lines["memory"] += f", the larger of slow step {_gib(memory.slow_step)} and fast loop {_gib(memory.fast_loop)}"
    else:
        del lines["  fast loop"]
    return "\n".join(f"{name:<12}{line}" for name, line in lines.items())


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


@cli.one_sentence()
def main() -> None:
    parser = cli.Parser(description="What a training run needs: batch per GPU, memory, days and FLOPs.")
    add = parser.add_argument
    add("--preset", required=True, choices=PRESETS, help=f"one of {', '.join(PRESETS)}")
    add("--tokens", type=float, default=3e9, help="to train on; default 3e9")
    add("--sequence-length", type=cli.positive_int, help="tokens; default: the preset's max_position_embeddings")
    add("--gpus", type=int, default=1, help="of all nodes together; default 1")
    add("--gpu", choices=GPUS, default="h100", help="default h100")
    add("--num-inference-steps", type=int, help="fast steps of a training step; default: the preset's")
    add("--mfu", type=float, default=PAPER_MFU, help=f"by the paper's account; default {PAPER_MFU}")
    add("--global-batch-size", type=int, default=PAPER_BATCH, help="sequences a step; default 512")
    add("--per-device-batch-size", type=int, help="default: the largest power of two that fits")
    add("--precision", choices=PRECISIONS, default="bf16", help="default bf16 (autocast)")
    add("--sharding", choices=SHARDINGS, default="ddp", help="default ddp")
    add("--gradient-checkpointing", action="store_true", help="recompute layers in the backward pass")
    args = vars(parser.parse_args())
    preset, tokens, num_gpus, steps = (args.pop(name) for name in ("preset", "tokens", "gpus", "num_inference_steps"))
    config = preset_config(preset, **({} if steps is None else {"num_inference_steps": steps}))
    if steps is not None and not config.reading_layers:
        raise ValueError(f"--num-inference-steps does nothing with {preset}, whose training has no fast loop.")
    print(report(plan(config, tokens, num_gpus=num_gpus, **args)))


if __name__ == "__main__":
    main()
