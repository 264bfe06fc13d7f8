"""The memory reader: latents that hold a Gaussian posterior given the text so far, updated as it is read.

Shapes: B batch, S tokens, H heads of width d, N latents a head, D = H·d hidden, C tokens of a chunk, K chunks.

Latents z ~ N(0, I) are (H, N, d), and each head has a learned address for each of its own. Token t weighs them by
a_t = softmax(q(h_t)·addresses / √d), (H, N), and reads r_t = σ Σ_n a_tn z_n, a vector a head; the residual stream that
leaves the last layer becomes u_t = h_t + g ⊙ M r_t, with a gate g and a square map M. z = 0 reads nothing.

Inference maximises E[log p(text|z)] - κ KL(q || prior), κ = `inference_kl_weight`, by one natural-gradient step for
each chunk of C tokens, from the posterior before it. With errors e_s = ∂nats_s/∂r_s at what token s read, ē² their mean
square in a head, and a learned λ for each head (1 at first):

    precision ← precision + (λ σ²/κ) Σ_s a_s² ē_s²
    mean      ← mean - (σ/κ) Σ_s a_s e_s / precision

A chunk's tokens read what was known at its start; those before them in the chunk are within the attention window. So
the logits that give a token's loss give its error as well. Chunks are counted from a row's first real token, in
training, inference and generation alike. Errors are constants of the slow step: the decoder is frozen where it infers.
(`relive_through_errors` is for a comparison with a slow step that is not.)
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from .configuration_ltm import LTMConfig
from .grid_ltm import Grid, rows_of
from .layers_ltm import LTMGate
from .losses_ltm import IGNORED, HeadPass
from .posterior_ltm import SAMPLE, LatentPosterior, keyed_normal, mixed

# ------------------------------------------------------------------ the reader


class LTMAddresses(nn.Module):
    """(H, N, d), of latents. A module of its own, so that offloading moves the parameter."""

    SHARPNESS = 2.4  # their standard deviation at first, and of queries: sharp whatever the width

    def __init__(self, heads: int, latents: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, latents, width))

    def forward(self) -> torch.Tensor:
        return self.weight


class LTMScales(nn.Module):
    """σ and λ of each head, (H, 1, 1) each: how strongly it reads, and how much errors say of precision."""

    READ = 0.07  # σ at first

    def __init__(self, heads: int):
        super().__init__()
        self.log_read = nn.Parameter(torch.full((heads,), math.log(self.READ)))
        self.log_precision = nn.Parameter(torch.zeros(heads))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(x.float().exp()[:, None, None] for x in (self.log_read, self.log_precision))


class MemoryReader(nn.Module):
    def __init__(self, config: LTMConfig):
        super().__init__()
        self.heads, hidden = config.num_attention_heads, config.hidden_size
        width = hidden // self.heads
        self.scaling = width**-0.5
        self.chunk, self.kl_weight = config.latent_chunk, config.inference_kl_weight
        self.norm = MistralRMSNorm(hidden, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.addresses = LTMAddresses(self.heads, config.num_latents, width)
        self.scales = LTMScales(self.heads)
        self.map = nn.Linear(hidden, hidden, bias=False)
        self.q_proj.is_sharp = self.map.starts_as_identity = True  # for `_init_weights`
        self.gate = LTMGate(hidden, config.latent_gate_init)

    def weights(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, S, N) float32: how much of each latent a token reads, and how much of its error each latent gets."""
        queries = self.heads_apart(self.q_proj(self.norm(hidden_states)))
        return (queries @ self.addresses().mT.to(queries.dtype) * self.scaling).softmax(dim=-1, dtype=torch.float32)

    def add(self, hidden_states: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """The residual stream (B, S, D) after what is read, (B, H, S, d)."""
        return hidden_states + self.gate(self.map(read.transpose(1, 2).flatten(2).to(hidden_states.dtype)))

    def forward(self, hidden_states: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """All tokens read the same latents (B, 1, N, D)."""
        sigma, _ = self.scales()
        return self.add(hidden_states, sigma * (self.weights(hidden_states) @ self.heads_apart(latents[:, 0]).float()))

    def heads_apart(self, states: torch.Tensor) -> torch.Tensor:
        """(B, S, D) to (B, H, S, d)."""
        return states.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def gains(self, weights: torch.Tensor, errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What tokens add: to precision·mean, (…, H, N, d), and to the precision, (…, H, N, 1).

        weights: (…, H, C, N). errors: (…, H, C, d) float32.
        """
        sigma, factor = self.scales()
        moved = (-sigma / self.kl_weight) * (weights.mT @ errors)
        sharpened = (factor * sigma**2 / self.kl_weight) * (
            weights.mT.square() @ errors.square().mean(-1, keepdim=True)
        )
        return moved, sharpened


# ------------------------------------------------------------------ the state


@dataclass
class MemoryState:
    """What reading a text has left: of constant size, whatever the length. All float32.

    mean, precision: (B, H, N, d) and (B, H, N, 1), of the posterior that the present chunk reads.
    moved, sharpened: of the same shapes, what the chunk has added so far.
    count: (B,) tokens read. Of the last of them, whose error comes with the token after it: weights (B, H, 1, N),
        residual (B, 1, D) and `open` (B,), whether it will add anything.
    """

    mean: torch.Tensor
    precision: torch.Tensor
    moved: torch.Tensor
    sharpened: torch.Tensor
    count: torch.Tensor
    weights: torch.Tensor
    residual: torch.Tensor
    open: torch.Tensor

    @classmethod
    def of(cls, start: torch.Tensor, hidden_size: int) -> "MemoryState":
        """Before any text. start: (B, H, N, d + 1), mean and precision of the latents (see `latent_state`)."""
        rows, heads, latents, _ = start.shape
        mean, precision = start[..., :-1], start[..., -1:]
        return cls(
            mean,
            precision,
            torch.zeros_like(mean),
            torch.zeros_like(precision),
            start.new_zeros(rows, dtype=torch.long),
            start.new_zeros(rows, heads, 1, latents),
            start.new_zeros(rows, 1, hidden_size),
            start.new_zeros(rows, dtype=torch.bool),
        )

    def rows(self, choose) -> "MemoryState":
        """With each tensor as `choose` makes it of the rows there are."""
        return MemoryState(*(choose(getattr(self, field.name)) for field in fields(self)))

    def where(self, rows: torch.Tensor, other: "MemoryState") -> "MemoryState":
        """The other's rows where `rows` (B,) is False."""
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return MemoryState(*(torch.where(rows.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))

    def committed(self) -> "MemoryState":
        """With what the chunk has added in the posterior."""
        precision = self.precision + self.sharpened
        mean = self.mean + self.moved / precision
        nothing = torch.zeros_like(self.moved), torch.zeros_like(self.sharpened)
        return MemoryState(mean, precision, *nothing, self.count, self.weights, self.residual, self.open)

    def posterior(self, keys: torch.Tensor | None = None) -> LatentPosterior:
        """q(z | what was read), as (B, 1, N, D)."""
        now = self.committed()
        mean, log_variance = now.mean, -now.precision.log().expand_as(now.mean)
        mean, log_variance = (x.transpose(1, 2).flatten(2)[:, None] for x in (mean, log_variance))
        return LatentPosterior(mean, log_variance, keys=keys)


def prior_state(config: LTMConfig, rows: int, device=None) -> torch.Tensor:
    """(B, H, N, d + 1): a memory of nothing."""
    heads = config.num_attention_heads
    start = torch.zeros(rows, heads, config.num_latents, config.hidden_size // heads + 1, device=device)
    start[..., -1] = 1
    return start


def check_memory(config: LTMConfig, memory, input_ids, latents, **given: torch.Tensor | None) -> None:
    """Raise a ValueError for what goes with a memory and has none to go with, or does not fit to the tokens.

    memory: what the cache holds, or latent_state. given: `latent_state`, `latent_noise`, `latent_writes`, or None.
    """
    given = {name: x for name, x in given.items() if x is not None}
    if given and (memory is None or not config.has_memory):
        raise ValueError(f"{next(iter(given))} is of a memory: it needs latent_reader='memory' and a latent_state.")
    if memory is None:
        return
    if input_ids is None:
        raise ValueError("A memory learns from token ids: pass input_ids (inputs_embeds alone has none).")
    if latents is not None:
        raise ValueError("A memory holds its latents: only one of latents and latent_state can be given.")
    heads, shape = config.num_attention_heads, tuple(input_ids.shape)
    shapes = {
        "latent_state": (shape[0], heads, config.num_latents, config.hidden_size // heads + 1),
        "latent_noise": (*shape, config.hidden_size),
        "latent_writes": shape,
    }
    for name, x in given.items():
        if x.shape != shapes[name]:
            raise ValueError(f"{name} must have the shape {shapes[name]}, got {tuple(x.shape)}.")


def state_of(posterior: LatentPosterior, heads: int) -> torch.Tensor:
    """(B, H, N, d + 1): where a memory starts that holds a posterior (B, 1, N, D); a point counts as of precision 1."""
    mean, log_variance = (
        x[:, 0].unflatten(-1, (heads, -1)).transpose(1, 2) for x in (posterior.mean, posterior.log_variance)
    )
    precision = torch.where(log_variance.isneginf(), 1.0, (-log_variance).exp()).mean(dim=-1, keepdim=True)
    return torch.cat((mean, precision), dim=-1)


def token_noise(keys: torch.Tensor, length: int, mask: torch.Tensor | None, hidden_size: int, seed: int):
    """(B, S, D) standard normal noise, a function of seed, a row's key and the place of a token among its real ones."""
    if mask is None:
        place = torch.arange(length, device=keys.device).expand(len(keys), -1)
    else:
        place = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    of_tokens = mixed(keys[:, None], place).flatten()
    return keyed_normal(of_tokens, (hidden_size,), seed, SAMPLE).view(len(keys), length, hidden_size)


# ------------------------------------------------------------------ reading a text


class Lesson(NamedTuple):
    """What a memory is to learn of a text, (B, S) each.

    targets: the token after each, or the label of it where it is scored; -100 where none is known. writes: bool, whose
    errors the memory takes. is_scored: bool. mask: bool, real tokens, or None for all. first: (B,), each row's first
        token, -100 where it may not be learned from.
    """

    targets: torch.Tensor
    writes: torch.Tensor
    is_scored: torch.Tensor
    mask: torch.Tensor | None
    first: torch.Tensor

    @classmethod
    def of(cls, input_ids, attention_mask=None, scored=None, writes=None) -> "Lesson":
        """scored: (B, S), already shifted; None for all. writes: (B, S), tokens that may be learned from; None for all.
        attention_mask: (B, tokens of a cache and S)."""
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :].bool()
        targets = F.pad(input_ids[:, 1:], (0, 1), value=IGNORED)
        if mask is not None:
            targets = targets.masked_fill(~(mask & F.pad(mask[:, 1:], (0, 1))), IGNORED)
        known = targets != IGNORED
        is_scored = known if scored is None else known & (scored != IGNORED)
        targets = targets if scored is None else torch.where(is_scored, scored, targets)
        learned = input_ids if writes is None else input_ids.masked_fill(~writes.bool(), IGNORED)
        first = learned[:, 0] if mask is None else learned.gather(1, mask.int().argmax(dim=1, keepdim=True)).squeeze(1)
        writes = known if writes is None else known & F.pad(writes[:, 1:], (0, 1)).bool()
        return cls(targets, writes, is_scored, mask, first)

    @property
    def scored(self) -> torch.Tensor:
        """(B, S): the targets that are scored."""
        return self.targets.masked_fill(~self.is_scored, IGNORED)

    def until(self, length: int) -> "Lesson":
        """Of so many tokens of the text, the last of which is followed by none that is known."""

        def known(states, fill):
            return F.pad(states[:, : length - 1], (0, 1), value=fill)

        mask = None if self.mask is None else self.mask[:, :length]
        targets, writes, is_scored = (
            known(self.targets, IGNORED),
            known(self.writes, False),
            known(self.is_scored, False),
        )
        return Lesson(targets, writes, is_scored, mask, self.first)


class Thought(NamedTuple):
    """What reading a text gave, without a graph.

    residual: (B, S, D), with what was read, before the decoder's last norm. nats: (B, S), of the targets.
    gradient: (B, S, D), of the nats, after that norm. errors: (B, K, H, C, d). start, state: as the first chunk reads
        it, and after the text; the latter None where nobody asked.
    """

    residual: torch.Tensor
    nats: torch.Tensor
    gradient: torch.Tensor
    errors: torch.Tensor
    grid: Grid
    start: MemoryState
    state: MemoryState | None


@torch.inference_mode(False)  # in which errors could not be taken
@torch.no_grad()
def think(
    reader: MemoryReader,
    norm: nn.Module,
    head_pass: HeadPass,
    hidden_states: torch.Tensor,
    lesson: Lesson,
    state: torch.Tensor | MemoryState,
    scores: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    keep: bool = False,
) -> Thought:
    """Read a text, and infer from it on the way.

    hidden_states: (B, S, D), as the last layer leaves them. state: of the text before, or where a text starts,
    (B, H, N, d + 1). scores: (B, S), the weight of each token's nats in the loss. noise: (B, S, D), standard normal:
    each token reads a fresh sample of its posterior; None: the mean. keep: return the state after the text.
    """
    mask = lesson.mask
    begun = isinstance(state, MemoryState)
    offset = state.count % reader.chunk if begun else None
    if begun:
        state = _close(reader, norm, head_pass, state, lesson, hidden_states.dtype)
    else:
        state = MemoryState.of(state.float(), hidden_states.shape[-1])  # FSDP2 casts what goes in
    grid = Grid(hidden_states.shape[:2], reader.chunk, mask, offset)
    weights = grid.chunks(reader.weights(hidden_states).transpose(1, 2)).transpose(2, 3)  # (B, K, H, C, N)
    hidden, wanted = grid.chunks(hidden_states), grid.chunks(lesson.targets, IGNORED)
    writing = grid.chunks(lesson.writes)
    scored = None if scores is None else grid.chunks(scores)
    noise = None if noise is None else reader.heads_apart(grid.chunks(noise.float()))
    found, start = [], None
    for number in range(grid.num_chunks):
        begins = grid.begins(number)
        if begins is True:
            state = state.committed() if number else state
        else:
            state = state.committed().where(begins, state)
        start = start or state
        read = read_of(reader, weights[:, number], state, None if noise is None else noise[:, number])
        residual, nats, gradient, errors = _errors(
            reader, norm, head_pass, hidden[:, number], read, wanted[:, number],
            None if scored is None else scored[:, number],
        )  # fmt: skip
        errors = errors * writing[:, number, None, :, None]
        moved, sharpened = reader.gains(weights[:, number], errors)
        state = MemoryState(state.mean, state.precision, state.moved + moved, state.sharpened + sharpened,
                            state.count, state.weights, state.residual, state.open)  # fmt: skip
        found.append((residual, nats, gradient, errors))
    residual, nats, gradient, errors = (torch.stack(part, dim=1) for part in zip(*found, strict=True))
    residual = grid.tokens(residual)
    if keep:
        state = _left_open(state, grid.tokens(weights.transpose(2, 3)).transpose(1, 2), residual, mask)
    return Thought(residual, grid.tokens(nats), grid.tokens(gradient), errors, grid, start, state if keep else None)


def read_of(reader: MemoryReader, weights: torch.Tensor, state, noise: torch.Tensor | None) -> torch.Tensor:
    """(…, H, C, d): the mean of what tokens read, or a sample by noise of that shape."""
    sigma, _ = reader.scales()
    read = weights @ state.mean
    if noise is not None:
        variance = weights.square() @ state.precision.reciprocal()
        read = read + variance.clamp(min=1e-20).sqrt() * noise  # places without a token have none
    return sigma * read


def _errors(reader, norm, head_pass, hidden, read, targets, scores):
    """(B, C, D) residual, (B, C) nats, their gradients after the norm (B, C, D) and in what was read (B, H, C, d)."""
    with torch.enable_grad():
        read = read.detach().requires_grad_()
        residual = reader.add(hidden.detach(), read)
        states = norm(residual)
    nats, gradient = head_pass(
        states.detach().flatten(0, 1), targets.flatten(), None if scores is None else scores.flatten()
    )
    gradient = gradient.view_as(states)
    (errors,) = torch.autograd.grad(states, read, gradient.to(states.dtype))
    return residual.detach(), nats.view(targets.shape), gradient, errors.float()


def _close(reader, norm, head_pass, state, lesson: Lesson, dtype: torch.dtype) -> MemoryState:
    """With the error of the last token read, now that the next one is known."""
    rows = state.open if lesson.mask is None else state.open & lesson.mask.any(dim=1)
    targets = torch.where(rows, lesson.first, IGNORED)[:, None]
    residual = state.residual.to(dtype)
    nothing = reader.heads_apart(torch.zeros_like(residual))
    _, _, _, errors = _errors(reader, norm, head_pass, residual, nothing, targets, None)
    moved, sharpened = reader.gains(state.weights, errors)
    return MemoryState(state.mean, state.precision, state.moved + moved, state.sharpened + sharpened,
                       state.count, state.weights, state.residual, state.open & ~rows)  # fmt: skip


def _left_open(state, weights, residual, mask) -> MemoryState:
    """The state after a text, whose last token's error is yet to come."""
    length, residual = residual.shape[1], residual.float()
    if mask is None:
        last, rows, count = weights[:, :, -1:], residual[:, -1:], length
        return MemoryState(state.mean, state.precision, state.moved, state.sharpened, state.count + count,
                           last, rows, torch.ones_like(state.open))  # fmt: skip
    positions = torch.arange(length, device=mask.device)
    index = (positions * mask).amax(dim=1)[:, None]
    read_some = mask.any(dim=1)
    after = MemoryState(
        state.mean, state.precision, state.moved, state.sharpened, state.count + mask.sum(dim=1),
        rows_of(weights.transpose(1, 2), index).transpose(1, 2), rows_of(residual, index), read_some,
    )  # fmt: skip
    return after.where(read_some, state)


def relive(
    reader: MemoryReader, hidden_states: torch.Tensor, thought: Thought, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """The residual stream (B, S, D) of `think`, with a graph; the errors are constants, and so is where it started.

    All chunks at once: with the errors known, what each reads is a sum over those before.
    """
    grid, start = thought.grid, thought.start
    weights = grid.chunks(reader.weights(hidden_states).transpose(1, 2)).transpose(2, 3)
    moved, sharpened = reader.gains(weights, thought.errors)
    moved[:, 0] += start.moved
    sharpened[:, 0] += start.sharpened
    after = start.precision[:, None] + sharpened.cumsum(dim=1)
    steps = moved / after
    before = _Moments(start.mean[:, None] + steps.cumsum(dim=1) - steps, after - sharpened)
    noise = None if noise is None else reader.heads_apart(grid.chunks(noise.float()))
    read = read_of(reader, weights, before, noise)  # (B, K, H, C, d)
    return reader.add(hidden_states, grid.tokens(read.transpose(2, 3)).transpose(1, 2))


def relive_through_errors(
    reader: MemoryReader,
    norm: nn.Module,
    head: nn.Module,
    hidden_states: torch.Tensor,
    lesson: Lesson,
    start: torch.Tensor,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """The residual stream (B, S, D) of `think`, with a graph that goes through the errors as well.

    By second derivatives, chunk after chunk, with the logits of all tokens: what the constants of `relive` leave out.
    """
    state = MemoryState.of(start, hidden_states.shape[-1])
    grid = Grid(hidden_states.shape[:2], reader.chunk, lesson.mask)
    weights = grid.chunks(reader.weights(hidden_states).transpose(1, 2)).transpose(2, 3)
    hidden, wanted = grid.chunks(hidden_states), grid.chunks(lesson.targets, IGNORED)
    writing = grid.chunks(lesson.writes)
    noise = None if noise is None else reader.heads_apart(grid.chunks(noise.float()))
    residuals = []
    for number in range(grid.num_chunks):
        state = state.committed() if number else state
        read = read_of(reader, weights[:, number], state, None if noise is None else noise[:, number])
        residuals.append(reader.add(hidden[:, number], read))
        logits = head(norm(residuals[-1])).float().flatten(0, 1)
        nats = F.cross_entropy(logits, wanted[:, number].flatten(), ignore_index=IGNORED, reduction="sum")
        (errors,) = torch.autograd.grad(nats, read, create_graph=True)
        moved, sharpened = reader.gains(weights[:, number], errors.float() * writing[:, number, None, :, None])
        state = MemoryState(state.mean, state.precision, state.moved + moved, state.sharpened + sharpened,
                            state.count, state.weights, state.residual, state.open)  # fmt: skip
    return grid.tokens(torch.stack(residuals, dim=1))


class _Moments(NamedTuple):
    mean: torch.Tensor
    precision: torch.Tensor
