"""Inference: from tokens to a posterior over latents, by gradient steps on the ELBO with the decoder frozen.

Shapes: B batch, S tokens, T inference steps, L layers, N latents a layer, D hidden.

    ELBO(x) = E_q[log p(x|z)] - KL(q(z|x) || N(0, I)),   q = N(mean, diag exp(log_variance)),   z = mean + std·ε

Everything here is in nats and summed over a sequence's tokens; nothing is averaged over the batch, so that a
sequence's fit does not depend on its batch mates. The one gradient that the loop needs from the decoder is
g = ∂NLL/∂z; the KL's is known in closed form.
"""

import copy
import math
import operator
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.utils import logging

from .configuration_ltm import InferenceSettings, whole_number

logger = logging.get_logger(__name__)

IGNORED = -100  # the label that is not scored, as everywhere in transformers


# ------------------------------------------------------------------ noise, keyed by what it is for

_GOLDEN = 0x9E3779B97F4A7C15
_FIT, _START, _SAMPLE, _SCORE = range(4)  # the uses of noise: no two share a draw


def _signed(number: int) -> int:
    """A Python integer modulo 2⁶⁴, as int64."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""

    def shift(x, n):  # logical, where int64's own is arithmetic
        return (x >> n) & ((1 << (64 - n)) - 1)

    bits = (bits ^ shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ shift(bits, 31)


def sequence_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B,) int64 keys that depend on a sequence's unmasked tokens and their order, and on nothing else."""
    positions = attention_mask.long().cumsum(dim=-1)
    return (_mix(input_ids.long() + positions * _signed(_GOLDEN)) * attention_mask.long()).sum(dim=-1)


def keyed_normal(keys: torch.Tensor, shape: tuple[int, ...], *words: int) -> torch.Tensor:
    """(B, *shape) float32 standard normal noise; row b is a function of keys[b] and the words alone.

    Counter-based (SplitMix64, then Box-Muller): the same on every device, in every batch, whatever the state of
    torch's generators.
    """
    for word in words:
        keys = _mix(keys + _signed((word + 1) * _GOLDEN))
    size = math.prod(shape)
    counters = torch.arange((size + 1) // 2, device=keys.device) * _signed(_GOLDEN)
    bits = _mix(keys[:, None] + counters)
    radius = (-2 * torch.log((((bits >> 32) & 0xFFFFFFFF).float() + 1) * 2.0**-32).clamp(max=0)).sqrt()
    angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :size].reshape(-1, *shape)


def _drawn_seed(seed: int | None) -> int:
    """`seed`, or one from torch's global generator, so that `torch.manual_seed` governs unseeded samples."""
    return int(torch.randint(2**62, ())) if seed is None else whole_number("seed", seed)


# ------------------------------------------------------------------ the posterior

_FILE = "latent_posterior.safetensors"


def kl_terms(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """(B, L, N, D) nats: KL(N(mean, exp(log_variance)) || N(0, 1)) of each channel, which sum to the sequence's."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """(B,) nats: KL(N(mean, exp(log_variance)) || N(0, I)) of each sequence."""
    return kl_terms(mean, log_variance).flatten(start_dim=1).sum(dim=1)


@dataclass(eq=False)
class LatentPosterior:
    """q(z|x) = N(mean, diag exp(log_variance)) of a batch of sequences.

    mean, log_variance: (B, L, N, D), float32. A log-variance of -inf makes a point of it, as Langevin dynamics do: all
        samples are the mean, and the KL is infinite.
    elbo_trace: (T, B), the ELBO in nats at each inference step, with the noise of that step, or None. For "fixed"
        noise this is the objective of the fit and not a bound; score with `elbo`, whose noise no fit has seen. Nor is
        that of "lbfgs" and "map", at the mean. Of Langevin dynamics it is log p(x, z), less the prior's constant.
    keys: (B,) int64, what identifies the sequences to the noise; None numbers the rows.
    num_non_finite: sequences whose objective turned non-finite, and which kept their best finite posterior.
    """

    mean: torch.Tensor
    log_variance: torch.Tensor
    elbo_trace: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    num_non_finite: int = 0

    def __post_init__(self):
        if self.mean.shape != self.log_variance.shape:
            raise ValueError(
                "mean and log_variance must have one shape, "
                f"got {tuple(self.mean.shape)} and {tuple(self.log_variance.shape)}."
            )
        if self.keys is None:
            self.keys = torch.arange(len(self.mean), device=self.mean.device)

    def __len__(self) -> int:
        return len(self.mean)

    def __eq__(self, other) -> bool:
        """Whether both are the same distribution of the same sequences."""
        if not isinstance(other, LatentPosterior):
            return NotImplemented
        return all(torch.equal(getattr(self, x), getattr(other, x)) for x in ("mean", "log_variance", "keys"))

    def __getitem__(self, rows) -> "LatentPosterior":
        """The posterior of some of the sequences: an index, a slice, or a list, an array or a tensor of rows."""
        try:
            rows = [operator.index(rows)]  # one row stays a batch
        except TypeError:
            rows = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=self.mean.device)
        trace = None if self.elbo_trace is None else self.elbo_trace[:, rows]
        return LatentPosterior(self.mean[rows], self.log_variance[rows], trace, self.keys[rows])

    def lerp(self, other: "LatentPosterior", weight: float) -> "LatentPosterior":
        """Between two thoughts: means and log-variances on the line from this one (0) to the other (1).

        Where one of them is a point, so is what lies between. Raises ValueError for posteriors of different shapes.
        """
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"Both posteriors must have one shape, got {tuple(self.mean.shape)} and {tuple(other.mean.shape)}."
            )
        log_variance = self.log_variance.lerp(other.log_variance, weight)
        point = self.log_variance.isneginf() | other.log_variance.isneginf()  # on a line from -inf there is NaN
        return LatentPosterior(
            self.mean.lerp(other.mean, weight), log_variance.masked_fill(point, -torch.inf), keys=self.keys
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `latent_posterior.safetensors` to the folder, which is made if need be."""
        os.makedirs(folder, exist_ok=True)
        tensors = {"mean": self.mean, "log_variance": self.log_variance, "keys": self.keys}
        if self.elbo_trace is not None:
            tensors["elbo_trace"] = self.elbo_trace
        # Copies: safetensors refuses tensors that share memory.
        save_file({name: x.detach().clone().contiguous() for name, x in tensors.items()}, os.path.join(folder, _FILE))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "LatentPosterior":
        """What `save_pretrained` wrote, on the CPU.

        Raises FileNotFoundError if the folder has none, ValueError if the file is torn or holds something else.
        """
        path = os.path.join(folder, _FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no {_FILE} in {os.fspath(folder)!r}.")
        try:
            posterior = cls(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path} holds no posterior: {error}.") from error
        check_posterior(posterior)
        return posterior

    def reparameterize(self, epsilon: torch.Tensor) -> torch.Tensor:
        """z = mean + std·ε."""
        return self.mean + (0.5 * self.log_variance).exp() * epsilon

    def sample(self, seed: int | None = None) -> torch.Tensor:
        """(B, L, N, D) latents drawn from q. `seed=None` draws one from torch's global generator."""
        return self.reparameterize(keyed_normal(self.keys, self.mean.shape[1:], _drawn_seed(seed), _SAMPLE))

    def scoring_sample(self, number: int, seed: int | None = None) -> torch.Tensor:
        """(B, L, N, D) latents drawn from q to score it: sample 0, 1, …, with noise that no fit has seen."""
        return self.reparameterize(keyed_normal(self.keys, self.mean.shape[1:], seed or 0, _SCORE, number))

    def kl_divergence(self) -> torch.Tensor:
        """(B,) nats: KL(q || N(0, I)) of each sequence."""
        return kl_divergence(self.mean, self.log_variance)


def sample_prior(model, batch_size: int, seed: int | None = None) -> torch.Tensor:
    """(batch_size, L, N, D) float32 latents from N(0, I). `seed=None` draws one from torch's global generator."""
    if not model.config.num_latents:
        raise ValueError("This model was built with num_latents=0: it has no latents to draw.")
    device = "cpu" if model.device.type == "meta" else model.device  # all weights are offloaded
    keys = torch.arange(whole_number("batch_size", batch_size, least=1), device=device)
    return keyed_normal(keys, model.config.latent_shape, _drawn_seed(seed), _SAMPLE)


# ------------------------------------------------------------------ the likelihood and the bound


def check_posterior(posterior, batch_size: int | None = None, name: str = "posterior") -> None:
    """Refuse, with a ValueError, what is no posterior, holds NaN, or is of another number of sequences.

    By what it holds and not by its class, of which a checkpoint's own code has another.
    """
    mean, log_variance = getattr(posterior, "mean", None), getattr(posterior, "log_variance", None)
    if not (torch.is_tensor(mean) and torch.is_tensor(log_variance)):
        raise ValueError(f"{name} must be a LatentPosterior, got {type(posterior).__name__}.")
    if not (mean.isfinite().all() and (log_variance < torch.inf).all()):
        raise ValueError(f"{name} holds numbers that are not finite.")
    if batch_size not in (None, len(mean)):
        raise ValueError(f"{name} is of {len(mean)} sequences, where there are {batch_size}.")


def check_sequences(model, input_ids, attention_mask=None, labels=None) -> None:
    """Refuse, with a ValueError, token ids, masks and labels that do not fit the model or each other."""
    for name, tensor in (("input_ids", input_ids), ("attention_mask", attention_mask), ("labels", labels)):
        if not torch.is_tensor(tensor) and (tensor is not None or name == "input_ids"):
            raise ValueError(f"{name} must be a tensor (batch, tokens), got {type(tensor).__name__}.")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (batch, tokens), got the shape {tuple(input_ids.shape)}.")
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(tensor.shape)}."
            )
    if attention_mask is not None and not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask must be 1 for real tokens and 0 for padding, and holds something else.")
    for name, tokens in (("input_ids", input_ids), ("labels", labels)):
        if tokens is None:
            continue
        if tokens.dtype not in (torch.long, torch.int):
            raise ValueError(f"{name} must be int64 or int32, got {tokens.dtype}.")
        if name == "labels":
            tokens = tokens[tokens != IGNORED]
        if not tokens.numel():
            continue
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= model.config.vocab_size:
            raise ValueError(
                f"{name} must be at least 0 and below vocab_size ({model.config.vocab_size}), "
                f"got {low if low < 0 else high}."
            )


def scored_tokens(input_ids, attention_mask=None, labels=None) -> torch.Tensor:
    """(B, S - 1) targets of positions 0 … S - 2, with -100 where nothing is scored.

    A token is scored if it and the token before it are real: the first token of a sequence has nothing to be
    predicted from, on whichever side the padding is.
    """
    targets = (input_ids if labels is None else labels)[:, 1:]
    if attention_mask is not None:
        real = attention_mask.bool()
        targets = targets.masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)
    return targets


@dataclass
class Prelude:
    """What the fast loop makes of a batch before it reads any latent: the same at every step for a frozen decoder.

    The first step fills it, without a graph, and later ones start from it. A compiled decoder leaves its own part, all
    but the labels, empty: its graph would not be the same at the first step. With frozen=False there is a graph.
    """

    frozen: bool = True
    labels: torch.Tensor | None = None  # (B, S), -100 where nothing is scored
    inputs: tuple[torch.Tensor, dict] | None = None  # of the layers: embeddings; mask, positions, rotary tables
    hidden_states: torch.Tensor | None = None  # (B, S, D), which enter the first cross-attention
    scored: tuple[tuple[torch.Tensor, ...], torch.Tensor] | None = None  # of M tokens: rows and positions; targets


def negative_log_likelihood(
    model, input_ids, latents=None, attention_mask=None, labels=None, prelude: Prelude | None = None
) -> torch.Tensor:
    """(B,) nats: -log p(x|z) of each sequence, the sum over its scored tokens.

    `latents=None`: of the plain decoder, or of any other causal language model. prelude: of this batch, for an LTM.
    """
    if prelude is not None and prelude.labels is not None:
        labels = prelude.labels
    else:
        labels = F.pad(scored_tokens(input_ids, attention_mask, labels), (1, 0), value=IGNORED)
    given = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    if latents is not None:
        given["latents"] = latents
    if getattr(getattr(model, "config", None), "model_type", None) == "ltm":  # which can do without the logits
        if prelude is not None:
            given["prelude"], prelude.labels = prelude, labels
        return model(**given, labels=labels, loss_reduction="none").loss.sum(dim=1)
    logits, targets = model(**given).logits, labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten().long(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets.shape).sum(dim=1)


class ELBO(NamedTuple):
    """Estimates for each sequence, (B,) each; nats, except `num_tokens`. elbo = -(nll + kl) <= log p(x) on average."""

    nll: torch.Tensor
    kl: torch.Tensor
    elbo: torch.Tensor
    num_tokens: torch.Tensor


def elbo(
    model,
    input_ids: torch.Tensor,
    posterior: LatentPosterior,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    num_particles: int = 1,
    seed: int | None = None,
    epsilon: torch.Tensor | None = None,
) -> ELBO:
    """The evidence lower bound of each sequence under its posterior, with noise that the fit has not seen.

    num_particles: samples of z that the likelihood is averaged over. seed: default 0; no seed gives the noise of a fit.
    epsilon: (B, L, N, D) noise to use instead, for one particle. Differentiable; wrap it in `torch.no_grad` to score.
    """
    check_sequences(model, input_ids, attention_mask, labels)
    check_posterior(posterior, len(input_ids))
    if epsilon is not None and epsilon.shape != posterior.mean.shape:
        raise ValueError(f"epsilon must have the shape {tuple(posterior.mean.shape)}, got {tuple(epsilon.shape)}.")
    num_particles = whole_number("num_particles", num_particles, least=1)
    if epsilon is not None and num_particles != 1:
        raise ValueError(f"num_particles must be 1 with a given epsilon, got {num_particles}.")
    nll = 0
    for particle in range(num_particles):
        latents = posterior.scoring_sample(particle, seed) if epsilon is None else posterior.reparameterize(epsilon)
        nll = nll + negative_log_likelihood(model, input_ids, latents, attention_mask, labels) / num_particles
    kl = posterior.kl_divergence()
    num_tokens = (scored_tokens(input_ids, attention_mask, labels) != IGNORED).sum(dim=1)
    return ELBO(nll, kl, -(nll + kl), num_tokens)


# ------------------------------------------------------------------ inference optimisers


class InferenceOptimizer(Protocol):
    """Moves a posterior by what the decoder says of one sample of it; of its mean, for a class whose `at_mean` is True.

    Built from the start's (mean, log_variance) and the settings; holds the current two, (B, L, N, D) float32. Each
    sequence's must depend on that sequence alone.
    """

    mean: torch.Tensor
    log_variance: torch.Tensor

    def update(self, gradient: torch.Tensor, epsilon: torch.Tensor, step_size: float) -> None:
        """One step, given gradient = ∂NLL/∂z at z = mean + std·epsilon. The prior's part is the optimiser's own."""


class AdamWInference:
    """The paper's: torch's AdamW on (mean, log-variance) of NLL + KL, by the reparameterisation gradient."""

    def __init__(self, mean: torch.Tensor, log_variance: torch.Tensor, settings: InferenceSettings):
        self.mean, self.log_variance = mean, log_variance
        self._adamw = torch.optim.AdamW(
            [mean, log_variance], betas=(0.9, 0.999), eps=1e-8, weight_decay=settings.inference_weight_decay
        )

    def update(self, gradient, epsilon, step_size):
        variance = self.log_variance.exp()
        self.mean.grad = gradient + self.mean
        self.log_variance.grad = 0.5 * (gradient * epsilon * variance.sqrt() + variance - 1)
        self._adamw.param_groups[0]["lr"] = step_size
        self._adamw.step()


class NaturalInference:
    """Natural gradient in (mean, precision): variational online Newton, as in IVON (Shen et al. 2024, section 3).

    With S = 1/σ² and ρ the step size: h = g·ε·√S estimates the curvature (Stein's identity), u = ρ (1 + h - S)/S,
    S ← S (1 + u + ½u²), which stays positive, then mean ← mean - ρ (mean + g)/S. The 1 and the mean are the prior's.
    `inference_precision="unit"` holds S where it starts.

    One sample's h is mostly noise where the likelihood is sharp. Two bounds keep a fit from being thrown further than
    it can come back: a step changes S by u in [-½, 1], and moves a mean by at most half a standard deviation.
    """

    def __init__(self, mean: torch.Tensor, log_variance: torch.Tensor, settings: InferenceSettings):
        self.mean, self.log_variance = mean, log_variance
        self._updates_precision = settings.inference_precision == "stein"

    def update(self, gradient, epsilon, step_size):
        precision, reach = (-self.log_variance).exp(), 0.5 * (0.5 * self.log_variance).exp()
        if self._updates_precision:
            excess = 1 + gradient * epsilon * precision.sqrt() - precision
            change = (step_size * excess / precision).clamp(-0.5, 1.0)
            precision = precision * (1 + change + 0.5 * change**2)
            self.log_variance = -precision.log()
        self.mean = self.mean - (step_size * (self.mean + gradient) / precision).clamp(-reach, reach)


class LBFGSInference:
    """L-BFGS (Nocedal and Wright 2006, algorithm 7.4) to the most probable latents of each sequence.

    The gradients are at the mean: nothing is drawn. The first step is `step_size` times the gradient, later ones are as
    the curvature along the last moves has it; none is longer than half a standard deviation of the prior, in the root
    mean square of the channels. With the moves M and what they changed of the likelihood's gradient, C, the precision
    is the diagonal of 1 + C (MᵀC)⁻¹ Cᵀ, which for a quadratic is never above the true one (Nyström's approximation).

    For decoders whose likelihood is smooth over the posterior's width. Of a rough one the mode says little, and the
    bound there may be below the prior's own: score before you trust.
    """

    at_mean = True
    HISTORY = 10  # moves

    def __init__(self, mean: torch.Tensor, log_variance: torch.Tensor, settings: InferenceSettings):
        self.mean, self.log_variance = mean, log_variance
        self._moves, self._changes = deque(maxlen=self.HISTORY), deque(maxlen=self.HISTORY)
        self._last = self._running = None

    def update(self, gradient, epsilon, step_size):
        mean, gradient = self.mean.flatten(start_dim=1), gradient.flatten(start_dim=1)
        if self._last is None:
            self._running = torch.ones_like(mean[:, :1], dtype=torch.bool)
        else:
            move, change = mean - self._last[0], gradient - self._last[1]
            # A sequence has arrived when it hardly moves: what rounding made of such a move says nothing of curvature.
            self._running = self._running & (_dot(move, move) > 1e-4 * _dot(mean, mean))
            self._moves.append(move)
            self._changes.append(change)
            log_variance = -self._curvature().log1p().view_as(self.mean)
            self.log_variance = torch.where(self._running[..., None, None], log_variance, self.log_variance)
        self._last = mean, gradient
        move = self._direction(mean + gradient, step_size)
        length = move.square().mean(dim=1, keepdim=True).sqrt()
        move = move * (0.5 / length.clamp(min=0.5)) * self._running
        self.mean = (mean - move).view_as(self.mean)

    def _direction(self, gradient: torch.Tensor, first: float) -> torch.Tensor:
        """The gradient (B, L·N·D) of the whole objective, times the inverse Hessian as far as it is known."""
        scale, pairs, factors = first, [], []
        for move, change in zip(self._moves, self._changes, strict=True):
            change = change + move  # of the prior
            along = _dot(move, change)
            known = along > 1e-6 * _dot(move, move)  # else the objective curves downwards there
            weight = torch.where(known, 1 / along, 0.0)
            pairs.append((move, change, weight))
            scale = torch.where(known, along / _dot(change, change), scale)
        for move, change, weight in reversed(pairs):
            factors.append(weight * _dot(move, gradient))
            gradient = gradient - factors[-1] * change
        gradient = scale * gradient
        for (move, change, weight), factor in zip(pairs, reversed(factors), strict=True):
            gradient = gradient + (factor - weight * _dot(change, gradient)) * move
        return gradient

    def _curvature(self) -> torch.Tensor:
        """(B, L·N·D): the diagonal of the likelihood's, as far as it is known."""
        moves, changes = (torch.stack(tuple(part), dim=-1) for part in (self._moves, self._changes))
        length = moves.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
        moves, changes = moves / length, changes / length
        products = moves.mT @ changes
        values, vectors = torch.linalg.eigh((products + products.mT) / 2)
        known = values > 1e-3 * values[:, -1:].clamp(min=1e-3)
        return (changes @ (vectors * torch.where(known, values, torch.inf).rsqrt()[:, None])).square().sum(dim=-1)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(dim=1, keepdim=True)


class MAPInference:
    """Steps of the mean alone, at precision 1 and without noise: mean ← mean - ρ (mean + g), towards the mode.

    Through these steps `slow_gradient="unrolled"` trains. Nothing bounds them, and the variance stays where it starts:
    the mean of such a decoder predicts well, and the bound needs another optimiser.
    """

    at_mean = True

    def __init__(self, mean: torch.Tensor, log_variance: torch.Tensor, settings: InferenceSettings):
        self.mean, self.log_variance = mean, log_variance

    def update(self, gradient, epsilon, step_size):
        self.mean = self.mean - step_size * (self.mean + gradient)


class LangevinInference:
    """Unadjusted Langevin dynamics: z ← z - s (z + g) + √(2s) ε, whose law tends to p(z|x) as s → 0 and s·T → ∞.

    It holds no Gaussian but the point where the chain is: mean = z, log_variance = -inf. Then ε moves the chain alone.
    """

    def __init__(self, mean: torch.Tensor, log_variance: torch.Tensor, settings: InferenceSettings):
        self.mean, self.log_variance = mean, log_variance

    def update(self, gradient, epsilon, step_size):
        self.mean = self.mean - step_size * (self.mean + gradient) + math.sqrt(2 * step_size) * epsilon


INFERENCE_OPTIMIZERS: dict[str, Callable[..., InferenceOptimizer]] = {
    "adamw": AdamWInference,
    "natural": NaturalInference,
    "lbfgs": LBFGSInference,
    "map": MAPInference,
}


def register_inference_optimizer(name: str, optimizer: Callable[..., InferenceOptimizer]) -> None:
    """Have `inference_optimizer=name` mean one of your own, in this process: a class as `InferenceOptimizer` says.

    A fit starts at the prior. A checkpoint whose configuration names it loads where it is registered.
    """
    INFERENCE_OPTIMIZERS[name] = optimizer
    InferenceSettings.CHOICES["inference_optimizer"] = tuple(INFERENCE_OPTIMIZERS)


def step_size(settings: InferenceSettings, step: int) -> float:
    """The step size at step 0 … T - 1: constant, cosine to a tenth over T steps, or ρ / (1 + ρ·step)."""
    rate = settings.inference_learning_rate
    if settings.inference_method == "langevin":
        return rate
    if settings.inference_lr_schedule == "cosine":
        return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * step / settings.num_inference_steps)))
    if settings.inference_lr_schedule == "inverse":
        return rate / (1 + rate * step)
    return rate


# ------------------------------------------------------------------ the fast loop


@contextmanager
def frozen(model):
    """The model as a fixed function: its weights ask for no gradient, and nothing in it is random as in training.

    Yields modules of its own around the same weights, so that other threads may train and use the model meanwhile.
    Where a weight is gathered or moved into the very module that needs it (FSDP2, ZeRO-3, accelerate's offloading), and
    where these are compiled, it is the model itself, which one thread at a time can have, and is set back after.
    """
    if all(map(_can_be_copied, model.modules())):
        yield _fixed_copy(model)
        return
    with _ONE_THREAD:
        trainable = {name: x for name, x in model.named_parameters() if x.requires_grad and not x.is_inference()}
        random = [module for module in model.modules() if module.training and not _stays_in_training(module)]
        for parameter in trainable.values():
            parameter.requires_grad_(False)
        for module in random:
            module.training = False
        try:
            yield model
        finally:
            now = dict(model.named_parameters())  # FSDP2 puts others in their place
            for name, parameter in trainable.items():
                parameter.requires_grad_(True)
                now[name].requires_grad_(True)
            for module in random:
                module.training = True


_ONE_THREAD = threading.RLock()


def _stays_in_training(module) -> bool:
    """Gradient checkpointing works in training mode only."""
    return module.training and getattr(module, "gradient_checkpointing", False)


def _can_be_copied(module) -> bool:
    """Whether a copy of the module's attributes around the same weights does what the module does."""
    forward = vars(module).get("forward")  # autocast binds another to the module; offloading and torch.compile wrap it
    bound = forward is None or getattr(forward, "__self__", None) is module
    gathered = hasattr(module, "unshard") or any(hasattr(x, "ds_id") for x in module.parameters(recurse=False))
    return bound and not gathered and module._compiled_call_impl is None


def _fixed_copy(model):
    copies = {module: copy.copy(module) for module in model.modules()}
    config = copy.copy(model.config)
    for module, made in copies.items():
        attributes = vars(made)
        for name, value in vars(module).items():
            if isinstance(value, MethodType) and value.__self__ is module:
                attributes[name] = MethodType(value.__func__, made)
            elif value is model.config:
                attributes[name] = config
            elif name.endswith("_hooks") and value is not None:  # transformers hangs some in when it needs them
                attributes[name] = value.copy()
        attributes["_parameters"] = {name: _fixed(x) for name, x in module._parameters.items()}
        attributes["_buffers"] = {name: _fixed(x) for name, x in module._buffers.items()}
        attributes["_modules"] = {name: copies.get(child) for name, child in module._modules.items()}
        attributes["training"] = _stays_in_training(module)
    return copies[model]


def _fixed(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    if tensor.is_inference():  # of a model built in inference mode: autograd could not save it
        return tensor.detach().clone()
    # Not detach(): there, autograd would notice steps that an optimiser takes meanwhile, and raise.
    return tensor.data if tensor.requires_grad else tensor


@contextmanager
def _differentiable_attention(model, device: torch.device):
    """torch's flex_attention has no backward on the CPU: sdpa there, which computes the same. Restored after."""
    if device.type != "cpu" or model.config._attn_implementation != "flex_attention":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("flex_attention")


class _BestFinite:
    """What each row falls back on: its posterior with the best finite ELBO so far, the prior before there is one."""

    def __init__(self, mean: torch.Tensor, log_variance: torch.Tensor):
        self.mean, self.log_variance = torch.zeros_like(mean), torch.zeros_like(mean)
        self.is_point = log_variance.isneginf()  # from the start; later it is a failure
        self.elbo = torch.full_like(mean[:, 0, 0, 0], -torch.inf)
        self.alive = torch.ones_like(self.elbo, dtype=torch.bool)

    def observe(self, mean, log_variance, elbo, gradient) -> torch.Tensor:
        """Take note of a step. Returns its gradient, zero in the rows that have turned non-finite."""
        self.alive = self.alive & elbo.isfinite() & gradient.flatten(start_dim=1).isfinite().all(dim=1)
        better = self.alive & (elbo > self.elbo)
        self.elbo = torch.where(better, elbo, self.elbo)
        self.mean = torch.where(_rows(better), mean, self.mean)
        self.log_variance = torch.where(_rows(better), log_variance, self.log_variance)
        return gradient.masked_fill(~_rows(self.alive), 0.0)

    def replace(self, mean, log_variance) -> tuple[torch.Tensor, torch.Tensor]:
        """The final posterior, with the rows that are not finite replaced."""
        spread = log_variance.masked_fill(self.is_point, 0.0)
        self.alive = self.alive & (mean + spread.exp() + spread).flatten(start_dim=1).isfinite().all(dim=1)
        keep = _rows(self.alive)
        return torch.where(keep, mean, self.mean), torch.where(keep, log_variance, self.log_variance)


class _EarlyStop:
    """Holds each row's posterior from where its ELBO ceased to gain: a row stops at the same step in any batch."""

    WINDOW = 4  # steps: a single ELBO is too noisy to compare

    def __init__(self, tolerance: float, num_tokens: torch.Tensor):
        self.least_gain = tolerance * num_tokens
        self.stopped = num_tokens == 0
        self.mean = self.log_variance = None

    def observe(self, trace: list[torch.Tensor], mean, log_variance) -> torch.Tensor:
        """Take note of a step's outcome. True once all rows have stopped."""
        if self.mean is None:
            self.mean, self.log_variance = mean.clone(), log_variance.clone()
        running = _rows(~self.stopped)
        self.mean = torch.where(running, mean, self.mean)
        self.log_variance = torch.where(running, log_variance, self.log_variance)
        if len(trace) >= 2 * self.WINDOW:
            before, now = torch.stack(trace[-2 * self.WINDOW :]).unflatten(0, (2, self.WINDOW)).mean(dim=1)
            self.stopped = self.stopped | ~(now - before >= self.least_gain)
        return self.stopped.all()


def processes_go_together(model) -> bool:
    """Whether all processes must take the same steps: in training, and where weights are sharded.

    Elsewhere each goes its own way, and one alone may infer.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    fsdp2 = any(hasattr(module, "unshard") for module in model.modules())
    return model.training or fsdp2 or any(hasattr(parameter, "ds_status") for parameter in model.parameters())


def _on_all_processes(together: bool, done: torch.Tensor) -> bool:
    """Whether no process needs another step, where they go together."""
    if together:
        done = done.to(torch.int32)
        torch.distributed.all_reduce(done, torch.distributed.ReduceOp.MIN)
    return bool(done)


def _rows(mask: torch.Tensor) -> torch.Tensor:
    return mask[:, None, None, None]


def _start(model, settings, keys, seed, initial_posterior) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of where the loop starts: the caller's posterior, the paper's start for "adamw", else the prior.

    A chain starts at a sample of the caller's posterior or of the prior.
    """
    config, shape = model.config, (len(keys), *model.config.latent_shape)
    if initial_posterior is not None and initial_posterior.mean.shape != shape:
        raise ValueError(
            f"initial_posterior must have the shape {shape} (batch, layers, latents a layer, hidden), "
            f"got {tuple(initial_posterior.mean.shape)}."
        )
    if settings.inference_method == "langevin":
        state = keyed_normal(keys, config.latent_shape, seed, _START, 0)
        if initial_posterior is not None:
            state = initial_posterior.reparameterize(state).detach().float()
        return state, torch.full_like(state, -torch.inf)
    if initial_posterior is not None:
        if initial_posterior.log_variance.isneginf().any():
            raise ValueError(
                "initial_posterior is a point (log_variance of -inf): no Gaussian can be fitted from there."
            )
        return tuple(x.detach().clone().float() for x in (initial_posterior.mean, initial_posterior.log_variance))
    if settings.inference_optimizer == "adamw":
        mean, log_variance = (keyed_normal(keys, config.latent_shape, seed, _START, which) for which in (0, 1))
        return (
            config.initial_mean_std * mean,
            config.initial_log_variance + config.initial_log_variance_std * log_variance,
        )
    return torch.zeros(shape, device=keys.device), torch.zeros(shape, device=keys.device)


def amortized_posterior(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
) -> LatentPosterior:
    """q(z|x) as the model's encoder gives it, differentiable: what training by `inference_method="amortized"` needs.

    input_ids, attention_mask, labels: (B, S). The encoder reads as far as the last token that is scored, which is as
    far as a fit could. A sequence with no token to score gets the prior.
    Raises ValueError for a model without an encoder, and for bad input.
    """
    encoder = getattr(model, "encoder", None)
    if encoder is None:
        raise ValueError(
            "inference_method='amortized' needs a model with an encoder, built with that inference_method in its "
            "configuration."
        )
    check_sequences(model, input_ids, attention_mask, labels)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    scored = scored_tokens(input_ids, attention_mask, labels) != IGNORED  # (B, S - 1)
    scored_later = scored.flip(1).cumsum(dim=1).flip(1) > 0  # than, or at, a position from 1 on
    mean, log_variance = encoder(
        model.get_input_embeddings()(input_ids), mask.bool() & F.pad(scored_later, (1, 0), value=True)
    )
    nothing_to_explain = _rows(~scored.any(dim=1))
    mean, log_variance = (x.masked_fill(nothing_to_explain, 0.0) for x in (mean, log_variance))
    return LatentPosterior(mean, log_variance, mean.new_zeros((0, len(mean))), sequence_keys(input_ids, mask))


def infer_posterior(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    num_inference_steps: int | None = None,
    inference_optimizer: str | None = None,
    inference_learning_rate: float | None = None,
    inference_lr_schedule: str | None = None,
    inference_weight_decay: float | None = None,
    inference_precision: str | None = None,
    inference_tolerance: float | None = None,
    inference_method: str | None = None,
    noise: str | None = None,
    seed: int | None = None,
    initial_posterior: LatentPosterior | None = None,
    epsilon: torch.Tensor | None = None,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> LatentPosterior:
    """Fit q(z|x) to each sequence by T gradient steps on its ELBO (paper Algorithm 1, fast loop).

    Or, by `inference_method`: "langevin" runs a chain of T steps and returns the point where it ends; "amortized"
    asks the model's encoder, without any step.

    input_ids, attention_mask, labels: (B, S); padding and labels of -100 are not explained. Default: all of input_ids.
    num_inference_steps … noise: default to the model's configuration, where they are described.
    seed: default 0. Noise is a function of (seed, the sequence's tokens, step): a sequence gets the same posterior
        alone, in any batch, padded on either side. torch's generators are left alone.
    initial_posterior: where to start. epsilon: (B, L, N, D) noise for all steps, or (T, B, L, N, D), one for each;
        "lbfgs" and "map" have no use for any.
    callback: called after each step with (step, the step's latents (B, L, N, D), its ELBO (B,)).

    The decoder is frozen: no weight gradient is computed, `param.grad` is untouched. Works inside `torch.no_grad` and
    `torch.inference_mode`. Latents are float32 whatever the model's dtype. A sequence with no token to score gets the
    prior; one whose objective turns non-finite keeps its best finite posterior, and a warning counts them.
    Raises ValueError for bad input before any computation.
    """
    if not model.config.num_latents:
        raise ValueError("This model was built with num_latents=0: it has no latents to infer.")
    settings = InferenceSettings.of(
        model.config,
        num_inference_steps=num_inference_steps,
        inference_optimizer=inference_optimizer,
        inference_learning_rate=inference_learning_rate,
        inference_lr_schedule=inference_lr_schedule,
        inference_weight_decay=inference_weight_decay,
        inference_precision=inference_precision,
        inference_noise=noise,
        inference_tolerance=inference_tolerance,
        inference_method=inference_method,
    )
    check_sequences(model, input_ids, attention_mask, labels)
    amortized, langevin = (settings.inference_method == name for name in ("amortized", "langevin"))
    if amortized and initial_posterior is not None:
        raise ValueError("initial_posterior is where inference starts, and inference_method='amortized' takes no step.")
    if initial_posterior is not None:
        check_posterior(initial_posterior, name="initial_posterior")
    steps, seed = 0 if amortized else settings.num_inference_steps, whole_number("seed", seed or 0)
    shape = (len(input_ids), *model.config.latent_shape)
    if epsilon is not None and epsilon.shape not in (shape, (steps, *shape)):
        raise ValueError(f"epsilon must have the shape {shape} or {(steps, *shape)}, got {tuple(epsilon.shape)}.")

    together = processes_go_together(model)
    # A caller's inference mode is left: what autograd saves must not be inference tensors.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        frozen(model) as decoder,
        _differentiable_attention(decoder, input_ids.device),
    ):
        input_ids, attention_mask, labels, epsilon = (
            x.clone() if x is not None and x.is_inference() else x for x in (input_ids, attention_mask, labels, epsilon)
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        keys = sequence_keys(input_ids, mask)
        num_tokens = (scored_tokens(input_ids, attention_mask, labels) != IGNORED).sum(dim=1)
        nothing_to_explain = num_tokens == 0
        if amortized:
            initial_posterior = amortized_posterior(decoder, input_ids, attention_mask, labels)
        mean, log_variance = _start(model, settings, keys, seed, initial_posterior)
        # ZeRO-3 learns the order of a forward pass's modules, to gather their weights ahead: it must not change.
        sharded = any(hasattr(parameter, "ds_status") for parameter in model.parameters())
        prelude = None if sharded else Prelude()
        make_optimizer = LangevinInference if langevin else INFERENCE_OPTIMIZERS[settings.inference_optimizer]
        optimizer = make_optimizer(mean, log_variance, settings)
        best = _BestFinite(mean, log_variance)
        tolerance = settings.inference_tolerance
        early_stop = None if tolerance is None or langevin else _EarlyStop(tolerance, num_tokens)
        trace = []
        for step in range(0 if _on_all_processes(together, nothing_to_explain.all()) else steps):
            if getattr(optimizer, "at_mean", False):
                noise_now = torch.zeros_like(mean)
            elif epsilon is None:
                draw = step if settings.inference_noise == "fresh" or langevin else 0
                noise_now = keyed_normal(keys, shape[1:], seed, _FIT, draw)
            else:
                noise_now = epsilon[step] if epsilon.ndim == 5 else epsilon
            now = LatentPosterior(optimizer.mean, optimizer.log_variance)
            latents = now.reparameterize(noise_now).detach().requires_grad_()
            nll = negative_log_likelihood(decoder, input_ids, latents, attention_mask, labels, prelude)
            (gradient,) = torch.autograd.grad(nll.sum(), latents)
            with torch.no_grad():
                prior_term = now.mean.square().flatten(start_dim=1).sum(dim=1) / 2 if langevin else now.kl_divergence()
                trace.append(-(nll + prior_term))
                gradient = best.observe(now.mean, now.log_variance, trace[-1], gradient)
                if callback is not None:
                    callback(step, latents.detach(), trace[-1])
                optimizer.update(gradient, noise_now, step_size(settings, step))
                if early_stop is not None:
                    stopped = early_stop.observe(trace, optimizer.mean, optimizer.log_variance)
                    if _on_all_processes(together, stopped):
                        break

        with torch.no_grad():
            fitted = optimizer if early_stop is None or not trace else early_stop
            mean, log_variance = best.replace(fitted.mean, fitted.log_variance)
            mean, log_variance = (x.masked_fill(_rows(nothing_to_explain), 0.0) for x in (mean, log_variance))
            num_non_finite = int((~best.alive).sum())
            elbo_trace = torch.stack(trace) if trace else mean.new_zeros((0, len(mean)))
    if num_non_finite:
        logger.warning(
            f"The objective of {num_non_finite} of {len(mean)} sequences turned non-finite during inference; "
            "they keep their best finite posterior."
        )
    return LatentPosterior(mean, log_variance, elbo_trace, keys, num_non_finite)


__all__ = ["ELBO", "LatentPosterior", "amortized_posterior", "elbo", "infer_posterior", "sample_prior"]
