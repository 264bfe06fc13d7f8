"""Candidates for the fast loop's optimiser, for `inference_steps.py`: what the library has, and what lost to it.

A candidate is an `InferenceOptimizer` and how the loop is to feed it. Its cost is counted in gradients of the
likelihood: one for each step of the loop, two where a step's curvature takes another.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.posterior_ltm import AdamWInference, InferenceOptimizer, LBFGSInference, NaturalInference


def constant(rate: float) -> Callable[[int], float]:
    return lambda step: rate


def inverse(rate: float) -> Callable[[int], float]:
    return lambda step: rate / (1 + rate * step)


class NaturalVariant:
    """`NaturalInference`, with one thing or another about it changed.

    rates: step to ρ. curvature: of the likelihood, what S follows beside the prior's 1; "stein", g·ε·√S; "centred",
    (g + m)·ε·√S, whose mean is the same and whose noise is less where g is near -m, its place of rest; "square", g²;
    "fisher", squares of gradients at labels that the model draws; "secant", one number for each latent, what a move of
    the means changed of the gradient, along the move, which S - 1 becomes; None holds S. momentum: of the mean's steps.
    damping: added to S where it divides. limit: most that a channel's mean moves in a step, in standard deviations.
    bounds: least and most of u = ρ d/S, the relative change of S, which becomes S (1 + u + ½u²).
    layers: factor of ρ for each layer's means. particles: gradients to average for each step; `antithetic` ones come
    in pairs of ε and -ε. average: from this share of the T steps on, end at the mean of the iterates.
    """

    fisher: Callable[[torch.Tensor, int], torch.Tensor]  # of the batch: latents and step to squared gradients

    def __init__(
        self, mean, log_variance, settings: InferenceSettings, rates=None, curvature="stein", momentum=0.0, damping=0.0,
        limit=0.5, bounds=(-0.5, 1.0), layers=None, particles=1, average=None,
    ):  # fmt: skip
        self.mean, self.log_variance = mean, log_variance
        self.rates, self.curvature, self.momentum, self.damping = rates or inverse(0.5), curvature, momentum, damping
        self.limit, self.bounds, self.particles, self.average = limit, bounds, particles, average
        self.layers = 1.0 if layers is None else torch.tensor(layers).view(-1, 1, 1)
        self.steps, self.num_steps = 0, settings.num_inference_steps // particles
        self.held, self.velocity, self.iterates, self.last = [], torch.zeros_like(mean), [], None

    def update(self, gradient, epsilon, step_size):
        self.held.append((gradient, (gradient + self.mean if self.curvature == "centred" else gradient) * epsilon))
        if len(self.held) < self.particles:
            return
        gradient, product = (torch.stack(terms).mean(dim=0) for terms in zip(*self.held, strict=True))
        self.held = []
        rate, precision = self.rates(self.steps), (-self.log_variance).exp()
        spread = precision.rsqrt()
        if self.curvature == "secant":
            if self.last is not None:
                moved, changed = self.mean - self.last[0], gradient - self.last[1]
                curvature = (moved * changed).sum(-1, keepdim=True) / (moved**2).sum(-1, keepdim=True).clamp(min=1e-12)
                precision = 1 + curvature.clamp(min=0).expand_as(moved)
                self.log_variance = -precision.log()
            self.last = self.mean, gradient
        elif self.curvature is not None:
            if self.curvature == "square":
                curvature = gradient**2
            elif self.curvature == "fisher":
                curvature = type(self).fisher(self.mean + epsilon * spread, self.steps)
            else:
                curvature = product / spread
            change = (rate * (1 + curvature - precision) / precision).clamp(*self.bounds)
            precision = precision * (1 + change + 0.5 * change**2)
            self.log_variance = -precision.log()
        move = rate * self.layers * (self.mean + gradient) / (precision + self.damping)
        move = move.clamp(-self.limit * spread, self.limit * spread)
        self.velocity = self.momentum * self.velocity - move
        self.mean = self.mean + self.velocity
        self.steps += 1
        if self.average is not None and self.steps > self.average * self.num_steps:
            self.iterates.append((self.mean, self.log_variance.exp()))
            if self.steps == self.num_steps:
                means, variances = (torch.stack(values).mean(dim=0) for values in zip(*self.iterates, strict=True))
                self.mean, self.log_variance = means, variances.log()


class MeansAlone(LBFGSInference):
    """L-BFGS that leaves the precision alone."""

    def _curvature(self):
        return torch.zeros_like(self._moves[-1])


class TwoSchedules(AdamWInference):
    """AdamW with a rate of its own for log σ², 5.5/T: from -5 it must come to the prior's 0 in T steps."""

    def __init__(self, mean, log_variance, settings):
        super().__init__(mean, log_variance, settings)
        rate = 5.5 / max(1, settings.num_inference_steps)
        groups = [{"params": [mean]}, {"params": [log_variance], "lr": rate}]  # `update` sets the first one's
        self._adamw = torch.optim.AdamW(groups, weight_decay=settings.inference_weight_decay)


class AveragedAdamW(AdamWInference):
    """AdamW that ends at the mean of the second half of its iterates."""

    def __init__(self, mean, log_variance, settings):
        super().__init__(mean, log_variance, settings)
        self._steps, self._num_steps, self._iterates = 0, settings.num_inference_steps, []

    def update(self, gradient, epsilon, step_size):
        super().update(gradient, epsilon, step_size)
        self._steps += 1
        if 2 * self._steps > self._num_steps:
            self._iterates.append((self.mean.clone(), self.log_variance.clone()))
        if self._steps == self._num_steps:
            for value, values in zip((self.mean, self.log_variance), zip(*self._iterates, strict=True), strict=True):
                value.copy_(torch.stack(values).mean(dim=0))


@dataclass(frozen=True)
class Candidate:
    """How a candidate is run.

    optimizer: from (mean, log_variance, settings). settings: of `infer_posterior`. start: "own" (the optimiser's),
    "prior", or "read-out" (learned, see `inference_steps.py`). noise: "fresh"; "antithetic"; "none", the gradient at
    the mean. gradients: for each step of the loop. anytime: whether T steps begin as 2T do, so that one run shows all.
    """

    optimizer: Callable[..., InferenceOptimizer]
    settings: dict = field(default_factory=dict)
    start: str = "own"
    noise: str = "fresh"
    gradients: int = 1
    anytime: bool = True


_DEFAULT = dict(
    inference_optimizer="natural", inference_learning_rate=0.5, inference_lr_schedule="inverse",
    inference_precision="stein",
)  # fmt: skip


def natural(noise="fresh", start="own", gradients=1, **options) -> Candidate:
    """A `NaturalVariant` with these options, from the prior unless told otherwise."""
    variant = partial(NaturalVariant, **options)
    return Candidate(variant, _DEFAULT, start, noise, gradients, anytime=options.get("average") is None)


def adamw(rate, schedule, optimizer=AdamWInference, start="own") -> Candidate:
    """AdamW with this step size, from its own narrow start unless told otherwise."""
    settings = dict(inference_optimizer="adamw", inference_learning_rate=rate, inference_lr_schedule=schedule)
    anytime = schedule == "constant" and optimizer is AdamWInference
    return Candidate(optimizer, settings, start, anytime=anytime)


CANDIDATES: dict[str, Candidate] = {
    "natural (default)": Candidate(NaturalInference, _DEFAULT),
    "L-BFGS": Candidate(LBFGSInference, _DEFAULT | {"inference_optimizer": "lbfgs"}),
    "L-BFGS from a read-out": Candidate(LBFGSInference, _DEFAULT | {"inference_optimizer": "lbfgs"}, "read-out"),
    "L-BFGS, precision 1": Candidate(MeansAlone, _DEFAULT | {"inference_optimizer": "lbfgs"}),
    "natural, unbounded": natural(limit=math.inf, bounds=(-math.inf, math.inf)),
    "natural, step 0.3": natural(rates=constant(0.3)),
    "natural, steps 1/(1 + t)": natural(rates=inverse(1.0)),
    "natural, precision 1, step 0.3": natural(rates=constant(0.3), curvature=None),
    "natural, precision 1": natural(curvature=None),
    "natural, squared gradients": natural(curvature="square"),
    "natural, Gauss-Newton": natural(curvature="fisher", gradients=2),
    "natural, momentum 0.5": natural(momentum=0.5),
    "natural, damping 1": natural(damping=1.0),
    "natural, centred": natural(curvature="centred"),
    "natural, steps 0.7/(1 + 0.7 t)": natural(rates=inverse(0.7)),
    "natural, means by 0.25 at most": natural(limit=0.25),
    "natural, antithetic pairs": natural(particles=2, noise="antithetic"),
    "natural, two particles": natural(particles=2),
    "natural at the mean, precision 1": natural(curvature=None, noise="none"),
    "natural at the mean, precision 1, step 1": natural(curvature=None, noise="none", rates=constant(1.0)),
    "natural at the mean, precision 1, step 0.7": natural(curvature=None, noise="none", rates=constant(0.7)),
    "natural at the mean, secant": natural(curvature="secant", noise="none"),
    "natural at the mean, Gauss-Newton": natural(curvature="fisher", noise="none", gradients=2),
    "natural, step 0.3, averaged": natural(rates=constant(0.3), average=0.5),
    "natural from a read-out": natural(start="read-out"),
    "natural, precision held, from a read-out": natural(start="read-out", curvature=None),
    "AdamW 0.3, constant (paper)": adamw(0.3, "constant"),
    "AdamW 0.3, cosine (released code)": adamw(0.3, "cosine"),
    "AdamW 0.34, cosine, log σ² 5.5/T": adamw(0.34, "cosine", TwoSchedules),
    "AdamW 0.1, cosine, from the prior": adamw(0.1, "cosine", start="prior"),
    "AdamW 0.1, averaged, from the prior": adamw(0.1, "constant", AveragedAdamW, start="prior"),
}
