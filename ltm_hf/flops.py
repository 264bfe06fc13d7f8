"""What a Latent Thought Model costs: parameters, and FLOPs per token, in closed form.

A multiply-add is 2 FLOPs. Symbols: S tokens of a sequence, L layers, n latents a layer, D hidden, T inference steps.

`paper_training_flops` is the paper's own account, (T + 1)·(6·P + 12·L·D·S/2): every fast step pays for weight
gradients, attention counts half the S x S scores, cross-attention's scores and the latents' keys and values are free.
`training_flops` is what this library multiplies, with the decoder frozen in the fast loop.

    python -m ltm_hf.flops                                                     # a table of all presets
    python -m ltm_hf.flops --plan ltm-large --gpus 8 --tokens 3e9              # a run (planner.py)
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch.utils.flop_counter import FlopCounterMode

from . import cli
from .configuration_ltm import LTMConfig
from .presets import PRESETS, preset_config

ATTENTIONS = ("dense", "window")


def count_parameters(config: LTMConfig) -> int:
    """Parameters of `LTMForCausalLM(config)`, tied embeddings counted once. No model is built."""
    hidden, queries, keys = widths(config)
    attention = 2 * hidden * queries + 2 * hidden * keys
    extra = {"mistral": 0, "qwen2": queries + 2 * keys, "qwen3": 2 * config.head_dim}[config.self_attention]
    layer = attention + extra + 3 * hidden * config.intermediate_size + 2 * hidden  # two norms
    # What a layer that reads latents has more: its norm, queries and keys, and values and output if projected.
    reading = hidden + (attention if config.cross_attention_value_projection else hidden * (queries + keys))
    reading += 0 if config.cross_attention_gate_init is None else hidden
    reading += 0 if config.latent_embedding_std is None else config.latents_per_layer * hidden
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    encoder = 0
    if _has_encoder(config):
        encoder = config.num_hidden_layers * layer + config.num_latents * hidden  # its queries
        encoder += hidden + 2 * hidden**2  # its norm and head
    return embeddings + config.num_hidden_layers * layer + len(config.reading_layers) * reading + hidden + encoder


def _has_encoder(config: LTMConfig) -> bool:
    return bool(config.num_latents) and config.inference_method == "amortized"


def paper_training_flops(config: LTMConfig, sequence_length: int | None = None) -> int:
    """The paper's training FLOPs per token (its column trFLOPs/token): (T + 1)·(6·P + 12·L·D·S/2).

    T = config.num_inference_steps. Without latents there is no fast loop, and the paper counts 6·P alone.
    sequence_length: S, default `max_position_embeddings`. Raises ValueError if it is not an integer of 1 or more, and
    for a model with an encoder, which the paper does not account for.
    """
    parameters, tokens = count_parameters(config), checked_length(config, sequence_length)
    if _has_encoder(config):
        raise ValueError("The paper gives no account of an encoder (inference_method='amortized'): use training_flops.")
    if not config.num_latents:
        return 6 * parameters
    attention = 6 * config.num_hidden_layers * config.hidden_size * tokens
    return (config.num_inference_steps + 1) * (6 * parameters + attention)


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs per token: matrix products and attention; norms, softmax, optimisers and rotary tables are left out.

    forward: logits of all positions, from tokens and latents.
    fast_step: logits of all positions but the last, and the gradient of the latents, no weight gradient; a share of
        what comes before the first cross-attention, which is computed once for all steps. 0 without latents, and with
        an encoder.
    slow_step: a forward and the gradient of all weights, at latents that need none; with an encoder, all of its work
        and the latents' gradient.
    num_inference_steps: fast steps of a training step.
    unrolled_step: what slow_gradient="unrolled" costs for each fast step, fitted to half of the tokens, to 2 in 100.
    online_step: what slow_gradient="online" costs beside the slow step; of a model that it can train.
    """

    forward: float
    fast_step: float
    slow_step: float
    num_inference_steps: int
    unrolled_step: float = 0.0
    online_step: float = 0.0

    @property
    def training_step(self) -> float:
        """The fast loop and the slow step."""
        return self.step(self.num_inference_steps)

    def step(self, fast: float, slow: float = 1.0) -> float:
        """So many fast steps and passes of the slow one, on average where they are drawn."""
        return fast * self.fast_step + slow * self.slow_step


def training_flops(config: LTMConfig, sequence_length: int | None = None, attention: str = "dense") -> TrainingFlops:
    """FLOPs per token of this implementation; the steps are `config.num_inference_steps`.

    sequence_length: S, default `max_position_embeddings`.
    attention: "dense" counts all S x S scores, what eager and SDPA attention compute under a mask; "window" only
        those that the causal window lets through, the least that a sparse kernel can compute.
    Raises ValueError for a sequence length that is not an integer of 1 or more, or another attention.
    """
    tokens = checked_length(config, sequence_length)
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}; got {attention!r}.")
    hidden, queries, keys = widths(config)
    window = min(config.sliding_window or tokens, tokens)
    pairs = tokens**2 if attention == "dense" else tokens * window - window * (window - 1) // 2

    # Forward FLOPs of one sequence. First of one layer:
    projections = tokens * 2 * hidden * (2 * queries + 2 * keys)
    scores = 4 * queries * pairs  # queries with keys, then weights with values
    mlp = tokens * 6 * hidden * config.intermediate_size
    cross_query = cross_out = latent_projections = cross_scores = 0
    if config.num_latents:
        cross_query = tokens * 2 * hidden * queries
        latent_projections = config.latents_per_layer * 2 * hidden * keys
        if config.cross_attention_value_projection:
            cross_out, latent_projections = cross_query, 2 * latent_projections
        cross_scores = 4 * queries * tokens * config.latents_per_layer
    layers, reading = config.num_hidden_layers, config.reading_layers
    cross = cross_query + cross_out + latent_projections
    head = 2 * hidden * config.vocab_size  # of one token
    linear = layers * (projections + mlp) + len(reading) * cross + tokens * head
    attended = layers * scores + len(reading) * cross_scores
    forward = linear + attended

    # Backward, a product with a weight costs its forward once for its input and once for the weight; a product of two
    # activations costs it once for each.
    weights_backward = 2 * forward
    if config.latent_embedding_std is None:  # the slow step's latents need no gradient
        weights_backward -= len(reading) * latent_projections
    # What comes before the first cross-attention, and its queries, are constant.
    before, mlp_before = min(reading, default=0), mlp if config.cross_attention_after_mlp else 0
    latents_backward = linear - before * (projections + mlp) - projections - mlp_before - cross_query
    latents_backward += 2 * (attended - (before + 1) * scores) - cross_scores // 2
    fast_step = forward + latents_backward - 2 * head if config.num_latents else 0  # the last token predicts nothing
    constant = before * (projections + scores + mlp) + projections + scores + mlp_before
    # Of a decoder that learns, what depends on latents, the logits of half of the tokens, and the gradient of both; the
    # slow step is spared these logits.
    unrolled_step = 3 * (fast_step - constant - (tokens - 1) * head)
    unrolled_step -= 3 * (tokens - 1) * head / 2 / max(1, config.num_inference_steps)
    if fast_step and config.num_inference_steps:  # and is computed once for all steps
        fast_step -= constant * (1 - 1 / config.num_inference_steps)
    slow_step = forward + weights_backward
    if _has_encoder(config):
        fast_step, read = 0, tokens + config.num_latents  # tokens and queries, each of which attends to all
        encoder = layers * (read * (projections + mlp) // tokens + 4 * queries * read**2)
        encoder += config.num_latents * 4 * hidden**2  # the head
        slow_step += len(reading) * latent_projections + 3 * encoder
    # A forward above the last cross-attention, the gradient of what it reads, and the gradient of both; attention of
    # the tokens to each other; and two cross-attentions whose output is not used, but none that learns.
    online_step = 6 * (mlp - mlp_before + (tokens - 1) * head) + 2 * cross_query - cross_scores - latent_projections
    online_step += 6 * tokens * (queries + tokens * config.num_attention_heads) * config.latents_per_layer
    online_step += 6 * tokens**2 * queries
    return TrainingFlops(
        forward=forward / tokens,
        fast_step=fast_step / tokens,
        slow_step=slow_step / tokens,
        num_inference_steps=config.num_inference_steps if fast_step else 0,
        unrolled_step=unrolled_step / tokens if fast_step else 0,
        online_step=online_step / tokens if fast_step else 0,
    )


def count_flops(function: Callable[[], object]) -> int:
    """FLOPs of one call of `function` as torch's `FlopCounterMode` counts them: what the closed forms are tested by."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def widths(config: LTMConfig) -> tuple[int, int, int]:
    """Channels of the hidden state, of all queries, of all keys."""
    return (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )


def checked_length(config: LTMConfig, sequence_length: int | None) -> int:
    tokens = config.max_position_embeddings if sequence_length is None else sequence_length
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"sequence_length must be an integer of 1 or more, got {tokens!r}.")
    return tokens


def table(sequence_length: int | None = None, attention: str = "dense") -> str:
    """A line for each preset, in units of 10⁶ FLOPs per token. Arguments as in `training_flops`."""
    rows = [("preset", "parameters", "T", "paper", "forward", "fast", "slow", "training", "fast/forward", "/paper")]
    for name in PRESETS:
        config = preset_config(name)
        paper = paper_training_flops(config, sequence_length)
        ours = training_flops(config, sequence_length, attention)
        costs = (paper, ours.forward, ours.fast_step, ours.slow_step, ours.training_step)
        rows.append(
            (
                name,
                f"{count_parameters(config):,}",
                str(config.num_inference_steps),
                *(f"{cost / 1e6:,.1f}" for cost in costs),
                f"{ours.fast_step / ours.forward:.2f}",
                f"{ours.training_step / paper:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


@cli.one_sentence()
def main() -> None:
    from . import planner  # which imports this file

    parser = cli.Parser(description="Training cost of the presets, in MFLOPs per token; or a run's plan.")
    parser.add_argument(
        "--sequence-length", type=cli.positive_int, help="tokens; default: each preset's max_position_embeddings"
    )
    parser.add_argument("--attention", choices=ATTENTIONS, default="dense", help="which self-attention scores count")
    planner.add_arguments(parser)
    named, args = cli.given(parser), parser.parse_args()
    of_plans = named - {"sequence_length", "attention", "plan"}
    cli.refuse_idle(named, (args.plan, "with --plan", ["attention"]), (not args.plan, "without --plan", of_plans))
    if args.plan:
        print(planner.report(planner.plan_from(args)))
        return
    print(table(args.sequence_length, args.attention))
    print(
        "\nMFLOPs per token. paper: (T + 1)(6 P + 12 L D S / 2), the published account. The rest is this "
        f"implementation,\ndecoder frozen in the fast loop, {args.attention} attention. training: T fast steps and "
        "the slow one; /paper: its ratio to the paper's."
    )


if __name__ == "__main__":
    main()
