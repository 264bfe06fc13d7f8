"""Things to try that the package does not have, each by itself, on the same tokens: examples/study.py with levers.

    python examples/levers.py                                       # examples/studies/levers.yaml
    python examples/levers.py --models natural tanh-gate

Options and output are those of examples/study.py. What was found is in examples/benchmarks/RESULTS.md.
"""

import math
import random
from functools import partial

import torch
from study import main
from torch import nn
from transformers import TrainerCallback

from ltm_hf.posterior_ltm import (
    IGNORED,
    NaturalInference,
    kl_terms,
    register_inference_optimizer,
)
from ltm_hf.study import Lever
from ltm_hf.training import LTMTrainer
from ltm_hf.training.unrolled import unrolled_posterior

# ------------------------------------------------------------------ gates, and how much latents say at first


class Gate(nn.Module):
    """One factor for all channels, for each head's share of them, or for each; through tanh where asked."""

    def __init__(self, factors: int, start: float, tanh: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.full((factors,), start))
        self.tanh = tanh

    def forward(self, hidden_states):
        weight = self.weight.tanh() if self.tanh else self.weight
        return hidden_states * weight.repeat_interleave(hidden_states.shape[-1] // len(weight))


def gate(model, of: str = "channel", start: float = 0.1, tanh: bool = False):
    factors = {"all": 1, "head": model.config.num_attention_heads, "channel": model.config.hidden_size}[of]
    for layer in model.model.layers:
        layer.cross_attention_gate = Gate(factors, start, tanh)


def small_output(model, factor: float = 0.1):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.cross_attn.o_proj.weight *= factor


# ------------------------------------------------------------------ latents on their way to the decoder


def through(model, module: nn.Module):
    """The decoder reads module(latents), (B, L, N, D), which learns with it; the prior stays N(0, I) before it."""
    model.model.of_latents = module

    def before(decoder, args, kwargs):
        if kwargs.get("latents") is not None:
            kwargs["latents"] = decoder.of_latents(kwargs["latents"])
        return args, kwargs

    model.model.register_forward_pre_hook(before, with_kwargs=True)


class Affine(nn.Module):
    """A learned diagonal prior: z = shift + scale·u with u ~ N(0, I). Vectors, which Muon leaves to AdamW."""

    def __init__(self, shape):
        super().__init__()
        size = math.prod(shape)
        self.shift, self.scale = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.ones(size))

    def forward(self, latents):
        shape = latents.shape[1:]
        return self.shift.view(shape) + self.scale.view(shape) * latents


def full_prior(model):
    """A learned prior: each latent has a diagonal of its own, and all have a map of channels in common."""
    channels = nn.Linear(model.config.hidden_size, model.config.hidden_size, bias=False)
    nn.init.eye_(channels.weight)
    through(model, nn.Sequential(Affine(model.config.latent_shape), channels))


class Hierarchical(nn.Module):
    """A learned prior p(z_l | z_<l): layer l's latents are its own, and a linear map of those of the layer before."""

    def __init__(self, layers: int, hidden: int):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in range(layers - 1))
        for layer in self.maps:
            nn.init.zeros_(layer.weight)

    def forward(self, latents):
        made = [latents[:, 0]]
        for index, layer in enumerate(self.maps, start=1):
            made.append(latents[:, index] + layer(made[-1]))
        return torch.stack(made, dim=1)


class Fixed(nn.Module):
    """A map without anything to learn."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, latents):
        return self.function(latents)


def norm(latents):
    return latents * latents.square().mean(dim=-1, keepdim=True).clamp(min=1e-6).rsqrt()


def narrow(latents, share: float):
    """The first channels alone: keys and values are linear in them, as of latents that have no others."""
    kept = torch.arange(latents.shape[-1], device=latents.device) < share * latents.shape[-1]
    return latents * kept


def shared(latents):
    """All layers read layer 0's."""
    return latents[:, :1].expand_as(latents)


def in_layers(model, chosen):
    """Only some layers read latents, the others have no cross-attention."""
    for index, layer in enumerate(model.model.layers):
        if index not in [number % model.config.num_hidden_layers for number in chosen]:
            layer.cross_attention_gate = Fixed(torch.zeros_like)
            layer.cross_attn.requires_grad_(False)


# ------------------------------------------------------------------ the slow step


class GateRate(LTMTrainer):
    """Gates learn ten times as fast as the rest."""

    FACTOR = 10

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        gates = {id(p) for name, p in self.model.named_parameters() if "cross_attention_gate" in name}
        for group in list(optimizer.param_groups):
            mine = [p for p in group["params"] if id(p) in gates]
            group["params"] = [p for p in group["params"] if id(p) not in gates]
            if mine:
                rest = {name: value for name, value in group.items() if name != "params"}
                optimizer.add_param_group(rest | {"params": mine, "lr": self.FACTOR * rest["lr"]})
        return optimizer


class TwoSamples(LTMTrainer):
    """The decoder learns from two samples of the posterior."""

    def _samples(self, posterior, seed):
        return [posterior.sample(seed), posterior.sample(seed + 2**61)]


class AntitheticSamples(LTMTrainer):
    """The decoder learns from a sample and its mirror image about the mean."""

    def _samples(self, posterior, seed):
        sample = posterior.sample(seed)
        return [sample, 2 * posterior.mean - sample]


class Means(LTMTrainer):
    """The decoder learns from the posterior's mean, without noise."""

    def _samples(self, posterior, seed):
        return [posterior.mean]


class Averaged(LTMTrainer):
    """What is scored is an exponential moving average of the weights."""

    DECAY = 0.99

    def train(self, *args, **kwargs):
        averages = {name: p.detach().clone() for name, p in self.model.named_parameters()}

        class Average(TrainerCallback):
            def on_step_end(self, args, state, control, model=None, **kwargs):
                for name, parameter in model.named_parameters():
                    averages[name].lerp_(parameter.detach(), 1 - Averaged.DECAY)

        self.add_callback(Average)
        result = super().train(*args, **kwargs)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(averages[name])
        return result


def drawn_cut(trainer, length: int) -> int:
    """Where a prefix ends, between a quarter and three quarters of a block; of each step its own."""
    return random.Random(trainer._seed(trainer.state.global_step)).randrange(length // 4, 3 * length // 4)


class Continuation(LTMTrainer):
    """Every second step, latents are fitted to a prefix and the decoder learns to continue it."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step % 2 == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        cut = drawn_cut(self, inputs["labels"].shape[1])
        labels = inputs["labels"].clone()
        labels[:, :cut] = IGNORED
        self.args.infer_from = "prompt"
        try:
            return super().training_step(model, {**inputs, "labels": labels}, (labels != IGNORED).sum())
        finally:
            self.args.infer_from = "labels"


class BoundAtLast(LTMTrainer):
    """An unrolled decoder learns from the bound in the last third of its steps: NLL + KL at a sample of N(mean, I), of
    latents that one step, of size 1, has fitted to the whole text; the gradient goes through that step."""

    START = 2 / 3

    @property
    def _predicts(self):
        return super()._predicts and self.state.global_step < self.START * self.state.max_steps

    def _think(self, decoder, inputs):
        posterior, _, inputs["prelude"] = unrolled_posterior(decoder, 1, 1.0, **self._sequences(inputs))
        kl = posterior.kl_divergence().sum()
        self._beside = kl, 0, 0
        self._sums["kl"] += kl.item()
        return [posterior.sample(self._seed(self.state.global_step + 1))]


class VariationalAtLast(LTMTrainer):
    """An unrolled decoder learns as any LTM in the last third of its steps: from a sample of the posterior that the
    configuration's inference fits to the whole text, without a gradient through it. Before, by one step of size 1."""

    START = 2 / 3

    @property
    def _predicts(self):
        return super()._predicts and self.state.global_step < self.START * self.state.max_steps

    def _drawn(self, config, seed):
        if self._predicts:
            return {"num_inference_steps": 1, "inference_learning_rate": 1.0}
        return super()._drawn(config, seed)


# ------------------------------------------------------------------ inference


class Tempered(NaturalInference):
    """The KL weighs so much: as if the likelihood were raised to the power of its inverse."""

    WEIGHT = 0.5

    def update(self, gradient, epsilon, step_size):
        super().update(gradient / self.WEIGHT, epsilon, step_size)


class FreeBits(NaturalInference):
    """Channels whose KL is below so many nats do not feel the prior's pull on their mean."""

    NATS = 0.05

    def update(self, gradient, epsilon, step_size):
        free = kl_terms(self.mean, self.log_variance) < self.NATS
        super().update(gradient - torch.where(free, self.mean, 0.0), epsilon, step_size)


register_inference_optimizer("tempered", Tempered)
register_inference_optimizer("free-bits", FreeBits)

LEVERS = {
    "scalar-gate": Lever(partial(gate, of="all")),
    "head-gate": Lever(partial(gate, of="head")),
    "tanh-gate": Lever(partial(gate, tanh=True)),
    "fast-gate": Lever(gate, GateRate),
    "small-output": Lever(small_output),
    "norm": Lever(lambda model: through(model, Fixed(norm))),
    "narrow": Lever(lambda model: through(model, Fixed(partial(narrow, share=0.25)))),
    "shared": Lever(lambda model: through(model, Fixed(shared))),
    "first-layer": Lever(partial(in_layers, chosen=[0])),
    "last-layer": Lever(partial(in_layers, chosen=[-1])),
    "diagonal-prior": Lever(lambda model: through(model, Affine(model.config.latent_shape))),
    "hierarchical-prior": Lever(
        lambda model: through(model, Hierarchical(model.config.num_hidden_layers, model.config.hidden_size))
    ),
    "two-samples": Lever(trainer=TwoSamples),
    "antithetic-samples": Lever(trainer=AntitheticSamples),
    "means": Lever(trainer=Means),
    "averaged-weights": Lever(trainer=Averaged),
    "continuation": Lever(trainer=Continuation),
    "bound-at-last": Lever(trainer=BoundAtLast),
    "bound-at-last-prior": Lever(full_prior, BoundAtLast),
    "variational-at-last": Lever(full_prior, VariationalAtLast),
}

if __name__ == "__main__":
    main("levers.yaml", LEVERS)
