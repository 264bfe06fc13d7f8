"""Inference methods: each moves a posterior by what the decoder says of one sample of it.

Shapes: B batch, L layers, N latents a layer, D hidden. g = ∂NLL/∂z, (B, L, N, D), is all that a method needs from the
decoder; the prior's part is known in closed form.
"""

import math
from collections import deque
from typing import ClassVar

import torch

from .configuration_ltm import InferenceSettings
from .posterior_ltm import START, keyed_normal


class InferenceMethod:
    """What a method is: where a fit starts, how a step moves it, and what others may ask of it.

    A step's gradient is at a sample of the posterior, mean + std·epsilon. Each sequence must depend on itself alone.
    """

    at_mean: ClassVar[bool] = False  # gradients are at the mean: no noise is drawn
    has_variance: ClassVar[bool] = True  # the posterior's variance says something, and so its KL, bound and samples do
    is_point: ClassVar[bool] = False  # what it finds is no Gaussian but a point
    takes_steps: ClassVar[bool] = True  # else an encoder of the model's gives the posterior
    default_step_size: ClassVar[float] = 0.5
    default_schedule: ClassVar[str] = "constant"
    growth: ClassVar[float] = 1.0  # of the step size over training, unless told otherwise
    num_kept: ClassVar[int] = 0  # arrays of the mean's size that it keeps from step to step
    settings: ClassVar[tuple[str, ...]] = (  # fields of `InferenceSettings` that it goes by
        "num_inference_steps", "inference_learning_rate", "inference_lr_schedule", "inference_noise",
        "inference_kl_weight", "inference_tolerance",
    )  # fmt: skip

    mean: torch.Tensor  # (B, L, N, D) float32, as is
    log_variance: torch.Tensor

    def __init__(self, mean: torch.Tensor, log_variance: torch.Tensor):
        self.mean, self.log_variance = mean, log_variance

    @classmethod
    def start(cls, keys: torch.Tensor, shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance (B, *shape) of each sequence before the first step, by its key: the prior."""
        zeros = torch.zeros(len(keys), *shape, device=keys.device)
        return zeros, zeros.clone()

    def update(self, gradient: torch.Tensor, epsilon: torch.Tensor, step_size: float) -> None:
        """One step, given the gradient of the likelihood's nats, divided by the KL's weight."""
        raise NotImplementedError


class AdamWInference(InferenceMethod):
    """The paper's (section 2): torch's AdamW on (mean, log-variance) of NLL + KL, by the reparameterisation gradient.

    It starts narrow: mean 0.01·N(0, 1), log-variance -5 + 0.1·N(0, 1).
    """

    default_step_size = 0.3
    growth = 0.34 / 0.30  # the paper goes from 0.30 to 0.34
    num_kept = 6  # gradients and moments, of mean and log-variance
    WEIGHT_DECAY = 0.01  # torch's own, which the released code leaves on

    def __init__(self, mean, log_variance):
        super().__init__(mean, log_variance)
        parameters = [mean, log_variance]
        self._adamw = torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=self.WEIGHT_DECAY)

    @classmethod
    def start(cls, keys, shape, seed):
        mean, log_variance = (keyed_normal(keys, shape, seed, START, which) for which in (0, 1))
        return 0.01 * mean, -5.0 + 0.1 * log_variance

    def update(self, gradient, epsilon, step_size):
        variance = self.log_variance.exp()
        self.mean.grad = gradient + self.mean
        self.log_variance.grad = 0.5 * (gradient * epsilon * variance.sqrt() + variance - 1)
        self._adamw.param_groups[0]["lr"] = step_size
        self._adamw.step()


class NaturalInference(InferenceMethod):
    """Natural gradient in (mean, precision): variational online Newton, as in IVON (Shen et al. 2024, section 3).

    With S = 1/σ² and ρ the step size: h = g·ε·√S estimates the curvature (Stein's identity), u = ρ (1 + h - S)/S,
    S ← S (1 + u + ½u²), which stays positive, then mean ← mean - ρ (mean + g)/S. The 1 and the mean are the prior's.

    One sample's h is mostly noise where the likelihood is sharp. Two bounds keep a fit from being thrown further than
    it can come back: a step changes S by u in [-½, 1], and moves a mean by at most half a standard deviation.
    """

    default_schedule = "inverse"

    def update(self, gradient, epsilon, step_size):
        precision, reach = (-self.log_variance).exp(), 0.5 * (0.5 * self.log_variance).exp()
        excess = 1 + gradient * epsilon * precision.sqrt() - precision
        change = (step_size * excess / precision).clamp(-0.5, 1.0)
        precision = precision * (1 + change + 0.5 * change**2)
        self.log_variance = -precision.log()
        self.mean = self.mean - (step_size * (self.mean + gradient) / precision).clamp(-reach, reach)


class LBFGSInference(InferenceMethod):
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
    num_kept = 2 * HISTORY + 2
    settings = tuple(name for name in InferenceMethod.settings if name != "inference_noise")

    def __init__(self, mean, log_variance):
        super().__init__(mean, log_variance)
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


class LangevinInference(InferenceMethod):
    """Unadjusted Langevin dynamics: z ← z - s (z + g) + √(2s) ε, whose law tends to p(z|x) as s → 0 and s·T → ∞.

    It holds no Gaussian but the point where the chain is: mean = z, log_variance = -inf. Then ε moves the chain alone.
    """

    has_variance = False
    is_point = True
    default_step_size = 0.1
    settings = ("num_inference_steps", "inference_learning_rate", "inference_kl_weight")

    @classmethod
    def start(cls, keys, shape, seed):
        state = keyed_normal(keys, shape, seed, START, 0)
        return state, torch.full_like(state, -torch.inf)

    def update(self, gradient, epsilon, step_size):
        self.mean = self.mean - step_size * (self.mean + gradient) + math.sqrt(2 * step_size) * epsilon


class AmortizedInference(InferenceMethod):
    """The paper's ablation: the model's encoder gives the posterior, and no step is taken."""

    takes_steps = False
    settings = ()


INFERENCE_METHODS: dict[str, type[InferenceMethod]] = {
    "natural": NaturalInference,
    "adamw": AdamWInference,
    "lbfgs": LBFGSInference,
    "langevin": LangevinInference,
    "amortized": AmortizedInference,
}


def register_inference_method(name: str, method: type[InferenceMethod]) -> None:
    """Have `inference_method=name` mean one of your own, in this process: a subclass of `InferenceMethod`.

    A checkpoint whose configuration names it loads where it is registered.
    """
    INFERENCE_METHODS[name] = method
    InferenceSettings.CHOICES["inference_method"] = tuple(INFERENCE_METHODS)


def method_of(settings: InferenceSettings) -> type[InferenceMethod]:
    """The class that settings, or a configuration, name."""
    return INFERENCE_METHODS[settings.inference_method]


def step_size(settings: InferenceSettings, step: int) -> float:
    """The step size at step 0 … T - 1: constant, cosine to a tenth over T steps, or ρ / (1 + ρ·step)."""
    method, rate, schedule = method_of(settings), settings.inference_learning_rate, settings.inference_lr_schedule
    rate, schedule = rate or method.default_step_size, schedule or method.default_schedule
    if method.is_point:  # of a chain it is time, which passes evenly
        return rate
    if schedule == "cosine":
        return rate * (0.1 + 0.45 * (1 + math.cos(math.pi * step / settings.num_inference_steps)))
    return rate / (1 + rate * step) if schedule == "inverse" else rate


__all__ = ["InferenceMethod", "register_inference_method"]
