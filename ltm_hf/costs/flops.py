"""What a Latent Thought Model costs: parameters, and FLOPs per token, in closed form.

A multiply-add is 2 FLOPs. Symbols: S tokens of a sequence, L layers, n latents a layer, D hidden, T inference steps.

`paper_training_flops` is the paper's own account, (T + 1)·(6·P + 12·L·D·S/2): every fast step pays for weight
gradients, attention counts half the S x S scores, cross-attention's scores and the latents' keys and values are free.
`training_flops` is what this library multiplies, with the decoder frozen in the fast loop.

    python -m ltm_hf.costs.flops    # a table of all presets
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch.utils.flop_counter import FlopCounterMode

from .. import cli
from ..configuration_ltm import LTMConfig
from ..presets import PRESETS, preset_config

ATTENTIONS = ("dense", "window")


def count_parameters(config: LTMConfig) -> int:
    """Parameters of `LTMForCausalLM(config)`, tied embeddings counted once. No model is built."""
    hidden, queries, keys = widths(config)
    attention = 2 * hidden * queries + 2 * hidden * keys
    extra = {"mistral": 0, "qwen2": queries + 2 * keys, "qwen3": 2 * config.head_dim}[config.self_attention]
    layer = attention + extra + 3 * hidden * config.intermediate_size + 2 * hidden  # two norms
    # What a layer that reads latents has more: its norm, the attention, a gate.
    reading = hidden + attention + (0 if config.latent_gate_init is None else hidden)
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    encoder = memory = 0
    if config.has_encoder:
        encoder = config.num_hidden_layers * layer + config.num_latents * hidden  # its queries
        encoder += hidden + 2 * hidden**2  # its norm and head
    if config.has_memory:
        memory = 2 * hidden**2 + config.num_latents * hidden + 2 * hidden + 2 * config.num_attention_heads
    layers = config.num_hidden_layers * layer + len(config.reading_layers) * reading
    return embeddings + layers + hidden + encoder + memory


def paper_training_flops(config: LTMConfig, sequence_length: int | None = None) -> int:
    """The paper's training FLOPs per token (its column trFLOPs/token): (T + 1)·(6·P + 12·L·D·S/2).

    T = config.num_inference_steps. Without a fast loop, of a decoder without latents or one with a memory, it is 6·P
    as the paper has it for the former.
    sequence_length: S, default `max_position_embeddings`. Raises ValueError if it is not an integer of 1 or more, and
    for a model with an encoder, which the paper does not account for.
    """
    parameters, tokens = count_parameters(config), checked_length(config, sequence_length)
    if config.has_encoder:
        raise ValueError("The paper gives no account of an encoder (inference_method='amortized'): use training_flops.")
    if not config.reading_layers:
        return 6 * parameters
    attention = 6 * config.num_hidden_layers * config.hidden_size * tokens
    return (config.num_inference_steps + 1) * (6 * parameters + attention)


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs per token: matrix products and attention; norms, softmax, optimisers and rotary tables are left out.

    forward: logits of all positions, from tokens and latents.
    fast_step: logits of all positions but the last, and the gradient of the latents, no weight gradient; a share of
        what comes before the first cross-attention, which is computed once for all steps. 0 without latents, with a
        memory, and with an encoder.
    slow_step: a forward and the gradient of all weights, at latents that need none; with a memory, what it infers on
        the way; with an encoder, all of its work and the latents' gradient.
    num_inference_steps: fast steps of a training step.
    """

    forward: float
    fast_step: float
    slow_step: float
    num_inference_steps: int

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
    cost = _Sequence(config, tokens, attention)
    return TrainingFlops(
        forward=cost.forward / tokens,
        fast_step=cost.fast_step() / tokens,
        slow_step=cost.slow_step() / tokens,
        num_inference_steps=config.num_inference_steps if cost.has_fast_loop else 0,
    )


class _Sequence:
    """FLOPs of one sequence. Backward, a product with a weight costs its forward once for its input and once for the
    weight; a product of two activations costs it once for each."""

    def __init__(self, config: LTMConfig, tokens: int, attention: str):
        self.config, self.tokens = config, tokens
        hidden, queries, keys = widths(config)
        window = min(config.sliding_window or tokens, tokens)
        pairs = tokens**2 if attention == "dense" else tokens * window - window * (window - 1) // 2
        self.reading = config.reading_layers
        self.has_fast_loop = bool(self.reading) and not config.has_encoder
        # Forward, of a layer and its reading of latents:
        self.projections = tokens * 2 * hidden * (2 * queries + 2 * keys)
        self.scores = 4 * queries * pairs  # queries with keys, then weights with values
        self.mlp = tokens * 6 * hidden * config.intermediate_size
        self.cross_query = tokens * 2 * hidden * queries  # and as much for the output
        self.latent_projections = config.latents_per_layer * 4 * hidden * keys
        self.cross_scores = 4 * queries * tokens * config.latents_per_layer
        # Of a memory: queries and the map, the weights of latents, what they read.
        self.square = tokens * 2 * hidden**2 * config.has_memory
        self.latents = tokens * 2 * hidden * config.num_latents * config.has_memory
        self.head = 2 * hidden * config.vocab_size  # of one token
        cross = 2 * self.cross_query + self.latent_projections
        self.linear = config.num_hidden_layers * (self.projections + self.mlp) + len(self.reading) * cross
        self.linear += tokens * self.head
        self.attended = config.num_hidden_layers * self.scores + len(self.reading) * self.cross_scores
        self.forward = self.linear + self.attended + 2 * self.square + 2 * self.latents

    def fast_step(self) -> float:
        if not self.has_fast_loop:
            return 0
        before, steps = self.reading[0], self.config.num_inference_steps
        # What comes before the first cross-attention, and its queries, are constant, and computed once for all steps.
        constant = before * (self.projections + self.scores + self.mlp) + self.projections + self.scores
        backward = self.linear - before * (self.projections + self.mlp) - self.projections - self.cross_query
        backward += 2 * (self.attended - (before + 1) * self.scores) - self.cross_scores // 2
        step = self.forward + backward - 2 * self.head  # the last token predicts nothing
        return step - constant * (1 - 1 / steps) if steps else step

    def slow_step(self) -> float:
        if self.config.has_memory:
            return self._prediction()
        learned = 3 * self.forward - len(self.reading) * self.latent_projections  # latents need no gradient
        return learned + self._encoder() if self.config.has_encoder else learned

    def _encoder(self) -> float:
        config, hidden = self.config, self.config.hidden_size
        _, queries, _ = widths(config)
        read = self.tokens + config.num_latents  # tokens and queries, each of which attends to all
        encoder = config.num_hidden_layers * (read * (self.projections + self.mlp) // self.tokens)
        encoder += config.num_hidden_layers * 4 * queries * read**2
        encoder += config.num_latents * 4 * hidden**2  # the head
        return len(self.reading) * self.latent_projections + 3 * encoder

    def _prediction(self) -> float:
        """Of a memory, read once without a graph, chunk after chunk, and once more with one (memory_ltm.py)."""
        config, places = self.config, -(-self.tokens // self.config.latent_chunk) * self.config.latent_chunk
        per_place = places / self.tokens
        learned = 3 * (self.linear - self.tokens * self.head + self.attended)
        errors = 3 * places * self.head  # logits, and the gradients in states and weight
        precision = places * 2 * config.num_attention_heads * config.num_latents
        read_once = (1 + 2 * per_place) * self.square + (1 + 2 * per_place) * self.latents + 2 * precision
        again = 6 * self.square + (3 + 5 * per_place) * self.latents + 5 * precision
        return learned + errors + read_once + again


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
                str(config.num_inference_steps) if ours.fast_step else "–",
                *(f"{cost / 1e6:,.1f}" for cost in costs),
                f"{ours.fast_step / ours.forward:.2f}" if ours.fast_step else "–",
                f"{ours.training_step / paper:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


@cli.one_sentence()
def main() -> None:
    parser = cli.Parser(description="Training cost of the presets, in MFLOPs per token.")
    parser.add_argument(
        "--sequence-length", type=cli.positive_int, help="tokens; default: each preset's max_position_embeddings"
    )
    parser.add_argument("--attention", choices=ATTENTIONS, default="dense", help="which self-attention scores count")
    args = parser.parse_args()
    print(table(args.sequence_length, args.attention))
    print(
        "\nMFLOPs per token. paper: (T + 1)(6 P + 12 L D S / 2), the published account. The rest is this "
        f"implementation,\ndecoder frozen in the fast loop, {args.attention} attention. training: T fast steps and "
        "the slow one; /paper: its ratio\nto the paper's. A memory infers within the slow step: it has no fast ones."
    )


if __name__ == "__main__":
    main()
