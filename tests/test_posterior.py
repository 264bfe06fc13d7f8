import copy
import functools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from ltm_hf import LatentPosterior, elbo, infer_posterior, posterior_ltm
from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.posterior_ltm import (
    INFERENCE_OPTIMIZERS,
    AdamWInference,
    NaturalInference,
    keyed_normal,
    scored_tokens,
    sequence_keys,
)

SHAPE = (2, 2, 32)  # layers, latents a layer, hidden
SETTINGS = {
    "natural": dict(inference_optimizer="natural"),
    "adamw": dict(inference_optimizer="adamw", inference_learning_rate=0.3),
    "lbfgs": dict(inference_optimizer="lbfgs"),
    "map": dict(inference_optimizer="map", inference_learning_rate=0.05),
}
ALL_OPTIMIZERS = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
THOSE_THAT_DRAW = pytest.mark.parametrize(
    "settings", [SETTINGS[name] for name in ("natural", "adamw")], ids=["natural", "adamw"]
)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same_posterior(actual, expected, tolerance=1e-5):
    close(actual.mean, expected.mean, tolerance)
    close(actual.log_variance, expected.log_variance, tolerance)


def rows_of(posterior, rows):
    return LatentPosterior(posterior.mean[rows], posterior.log_variance[rows])


def random_posterior(make_noise, rows=3):
    return LatentPosterior(make_noise(rows, *SHAPE), 0.5 * make_noise(rows, *SHAPE, seed=1) - 1)


def naive_nll(model, ids, latents):
    """(B,) nats, from the definition."""
    log_probabilities = model(ids, latents=latents).logits[:, :-1].log_softmax(dim=-1)
    return -log_probabilities.gather(-1, ids[:, 1:, None]).sum(dim=(1, 2))


def naive_kl(mean, log_variance):
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    return kl_divergence(Normal(mean, (0.5 * log_variance).exp()), prior).sum(dim=(1, 2, 3))


def naive_objective(model, ids, mean, log_variance, epsilon):
    """(B,) nats: the negative ELBO with given noise."""
    latents = mean + (0.5 * log_variance).exp() * epsilon
    return naive_nll(model, ids, latents) + naive_kl(mean, log_variance)


def naive_adamw(model, ids, start, epsilons, rates, weight_decay):
    """The paper's loop with nothing worked out by hand: autograd through the whole objective, torch's AdamW."""
    mean, log_variance = (x.clone().requires_grad_() for x in (start.mean, start.log_variance))
    optimizer = torch.optim.AdamW([mean, log_variance], betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    objectives = []
    for epsilon, rate in zip(epsilons, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        objective = naive_objective(model, ids, mean, log_variance, epsilon)
        objective.sum().backward()
        optimizer.step()
        objectives.append(objective.detach())
    return LatentPosterior(mean.detach(), log_variance.detach(), -torch.stack(objectives))


def naive_natural(model, ids, start, epsilons, rates, updates_precision):
    """Variational online Newton as written: precision S, curvature h, d = 1 + h - S; with its two bounds."""
    m, S = start.mean, (-start.log_variance).exp()
    objectives = []
    for epsilon, rho in zip(epsilons, rates, strict=True):
        z = (m + epsilon / S.sqrt()).requires_grad_()
        nll = naive_nll(model, ids, z)
        objectives.append((nll + naive_kl(m, -S.log())).detach())
        (g,) = torch.autograd.grad(nll.sum(), z)
        furthest = 0.5 / S.sqrt()
        if updates_precision:
            d = 1 + g * epsilon * S.sqrt() - S
            d = torch.maximum(torch.minimum(d, S / rho), -S / (2 * rho))
            S = S + rho * d + rho**2 * d**2 / (2 * S)
        step = -rho * (m + g) / S
        m = m + torch.where(step.abs() > furthest, furthest * step.sign(), step)
    return LatentPosterior(m, -S.log(), -torch.stack(objectives))


def naive_rates(schedule, rate, steps):
    return {
        "constant": [rate for _ in range(steps)],
        "cosine": [0.1 * rate + 0.9 * rate * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)],
        "inverse": [rate / (1 + rate * t) for t in range(steps)],
    }[schedule]


@pytest.fixture
def recorded(monkeypatch):
    """What each step of "natural" is given and what gradients "adamw" makes of it, as lists of tuples."""
    steps = {"natural": [], "adamw": []}

    class Natural(NaturalInference):
        def update(self, gradient, epsilon, step_size):
            steps["natural"].append((gradient.clone(), epsilon.clone(), step_size))
            super().update(gradient, epsilon, step_size)

    class AdamW(AdamWInference):
        def update(self, gradient, epsilon, step_size):
            super().update(gradient, epsilon, step_size)
            steps["adamw"].append((self.mean.grad.clone(), self.log_variance.grad.clone(), step_size))

    monkeypatch.setitem(INFERENCE_OPTIMIZERS, "natural", Natural)
    monkeypatch.setitem(INFERENCE_OPTIMIZERS, "adamw", AdamW)
    return steps


# ------------------------------------------------------------------ gradients


def finite_differences(function, point, entries, step=1e-5):
    slopes = []
    for entry in entries:
        moved = torch.zeros_like(point)
        moved.view(-1)[entry] = step
        slopes.append((function(point + moved) - function(point - moved)) / (2 * step))
    return torch.stack(slopes)


@pytest.fixture
def double_model(make_model, monkeypatch):
    """A model that computes in double precision throughout; Mistral's norm would round to single."""

    def norm(self, hidden_states):
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(MistralRMSNorm, "forward", norm)
    return make_model().double()


@pytest.fixture
def at(make_noise):
    """A posterior, noise, and the entries of the first row to look at."""
    start, epsilon = random_posterior(make_noise), make_noise(3, *SHAPE, seed=2)
    return start, epsilon, torch.randperm(math.prod(SHAPE), generator=torch.Generator().manual_seed(0))[:12]


@torch.no_grad()
def test_gradient_of_the_likelihood(double_model, ids, at, recorded):
    model, (start, epsilon, entries) = double_model, at
    model.infer_posterior(ids, num_inference_steps=1, initial_posterior=start, epsilon=epsilon)
    gradient, noise, _ = recorded["natural"][0]
    assert torch.equal(noise, epsilon)
    latents = start.reparameterize(epsilon).double()
    slopes = finite_differences(lambda z: naive_nll(model, ids, z)[0], latents, entries)
    assert slopes.dtype == torch.float64
    close(gradient[0].view(-1)[entries], slopes.float())
    assert slopes.abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("which", ["mean", "log_variance"])
def test_gradient_of_the_objective(double_model, ids, at, recorded, which):
    model, (start, epsilon, entries) = double_model, at
    settings = dict(inference_optimizer="adamw", num_inference_steps=1, inference_learning_rate=0.3)
    model.infer_posterior(ids, initial_posterior=start, epsilon=epsilon, **settings)
    gradients = dict(zip(("mean", "log_variance"), recorded["adamw"][0], strict=False))
    point = {name: getattr(start, name).double() for name in ("mean", "log_variance")}

    def objective(value):
        return naive_objective(model, ids, **point | {which: value}, epsilon=epsilon.double())[0]

    slopes = finite_differences(objective, point[which], entries)
    close(gradients[which][0].view(-1)[entries], slopes.float())
    assert slopes.abs().max() > 0.1


def test_elbo_is_differentiable(model, ids, make_noise):
    start, epsilon = random_posterior(make_noise), make_noise(3, *SHAPE, seed=2)
    mean, log_variance = (x.requires_grad_() for x in (start.mean, start.log_variance))
    ours = torch.autograd.grad(-model.elbo(ids, start, epsilon=epsilon).elbo.sum(), (mean, log_variance))
    naive = torch.autograd.grad(naive_objective(model, ids, mean, log_variance, epsilon).sum(), (mean, log_variance))
    close(ours[0], naive[0])
    close(ours[1], naive[1])


# ------------------------------------------------------------------ the loop against its definition


@pytest.mark.parametrize("schedule", ["constant", "cosine", "inverse"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw(model, ids, make_noise, schedule, weight_decay):
    start, epsilons = random_posterior(make_noise), make_noise(5, 3, *SHAPE, seed=2)
    expected = naive_adamw(model, ids, start, epsilons, naive_rates(schedule, 0.2, 5), weight_decay)
    actual = model.infer_posterior(
        ids,
        num_inference_steps=5,
        inference_optimizer="adamw",
        inference_learning_rate=0.2,
        inference_lr_schedule=schedule,
        inference_weight_decay=weight_decay,
        initial_posterior=start,
        epsilon=epsilons,
    )
    same_posterior(actual, expected, 1e-4)
    close(actual.elbo_trace, expected.elbo_trace, 1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "inverse"])
@pytest.mark.parametrize("precision", ["stein", "unit"])
def test_natural(model, ids, make_noise, schedule, precision):
    start, epsilons = random_posterior(make_noise), make_noise(5, 3, *SHAPE, seed=2)
    expected = naive_natural(model, ids, start, epsilons, naive_rates(schedule, 0.4, 5), precision == "stein")
    actual = model.infer_posterior(
        ids,
        num_inference_steps=5,
        inference_optimizer="natural",
        inference_learning_rate=0.4,
        inference_lr_schedule=schedule,
        inference_precision=precision,
        initial_posterior=start,
        epsilon=epsilons,
    )
    same_posterior(actual, expected, 1e-4)
    close(actual.elbo_trace, expected.elbo_trace, 1e-4)
    if precision == "unit":
        close(actual.log_variance, start.log_variance)


def test_an_optimizer_of_one_s_own(model, ids, make_noise, monkeypatch):
    """A step downhill in the mean alone, by its name and from a configuration."""
    monkeypatch.setattr(posterior_ltm, "INFERENCE_OPTIMIZERS", dict(INFERENCE_OPTIMIZERS))
    monkeypatch.setitem(InferenceSettings.CHOICES, "inference_optimizer", tuple(INFERENCE_OPTIMIZERS))

    class Downhill:
        def __init__(self, mean, log_variance, settings):
            self.mean, self.log_variance = mean, log_variance

        def update(self, gradient, epsilon, step_size):
            self.mean = self.mean - step_size * (self.mean + gradient)

    with pytest.raises(ValueError, match="must be one of.*'downhill'"):
        model.infer_posterior(ids, inference_optimizer="downhill")
    posterior_ltm.register_inference_optimizer("downhill", Downhill)
    epsilon = make_noise(1, 3, *SHAPE)
    fitted = model.infer_posterior(ids, num_inference_steps=1, inference_optimizer="downhill", epsilon=epsilon)
    z = epsilon[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(naive_nll(model, ids, z).sum(), z)
    close(fitted.mean, -0.5 * gradient)
    assert not fitted.log_variance.any()
    assert model.config.__class__(inference_optimizer="downhill").inference_optimizer == "downhill"


@pytest.mark.parametrize("name", ["lbfgs", "map"])
def test_the_mode_takes_no_noise(model, ids, make_noise, name):
    settings = SETTINGS[name]
    same_posterior(model.infer_posterior(ids, **settings), model.infer_posterior(ids, seed=3, **settings), 0)
    given = model.infer_posterior(ids, epsilon=make_noise(3, *SHAPE), **settings)
    same_posterior(given, model.infer_posterior(ids, **settings), 0)


def test_map_by_hand(model, ids):
    """Two steps of the mean, at the mean; the variance is the prior's."""
    mean = torch.zeros(3, *SHAPE)
    for rate in (0.05, 0.05 / 1.05):
        mean = mean.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(naive_nll(model, ids, mean).sum(), mean)
        mean = mean - rate * (mean + gradient)
    fitted = model.infer_posterior(ids, num_inference_steps=2, **SETTINGS["map"])
    close(fitted.mean, mean)
    assert not fitted.log_variance.any()


def test_one_noise_for_all_steps(model, ids, make_noise):
    epsilon = make_noise(3, *SHAPE)
    constant = model.infer_posterior(ids, num_inference_steps=4, epsilon=epsilon)
    repeated = model.infer_posterior(ids, num_inference_steps=4, epsilon=epsilon.expand(4, -1, -1, -1, -1))
    same_posterior(constant, repeated, 0)


@THOSE_THAT_DRAW
def test_noise_fresh_or_fixed(model, ids, settings):
    latents = {}
    for noise in ("fresh", "fixed"):
        seen = latents[noise] = []
        model.infer_posterior(
            ids,
            num_inference_steps=3,
            noise=noise,
            callback=lambda step, z, bound, seen=seen: seen.append(z),
            **settings | dict(inference_learning_rate=1e-9),
        )
    assert torch.equal(latents["fresh"][0], latents["fixed"][0])
    close(latents["fixed"][1], latents["fixed"][0])
    close(latents["fixed"][2], latents["fixed"][0])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (latents["fresh"][one] - latents["fresh"][other]).abs().mean() > 1e-3


def test_starts(model, ids):
    prior = model.infer_posterior(ids, num_inference_steps=0)
    assert not prior.mean.any() and not prior.log_variance.any()
    assert prior.elbo_trace.shape == (0, 3)
    paper = model.infer_posterior(ids, num_inference_steps=0, inference_optimizer="adamw")
    assert paper.mean.mean().abs() < 0.003 and paper.mean.std().item() == pytest.approx(0.01, rel=0.2)
    assert paper.log_variance.mean().item() == pytest.approx(-5, abs=0.03)
    assert paper.log_variance.std().item() == pytest.approx(0.1, rel=0.2)
    other_seed = model.infer_posterior(ids, num_inference_steps=0, inference_optimizer="adamw", seed=1)
    assert not torch.allclose(other_seed.mean, paper.mean)


@ALL_OPTIMIZERS
def test_initial_posterior_is_left_alone(model, ids, make_noise, settings):
    start = random_posterior(make_noise)
    before = copy.deepcopy(start)
    same_posterior(model.infer_posterior(ids, num_inference_steps=0, initial_posterior=start, **settings), start, 0)
    moved = model.infer_posterior(ids, num_inference_steps=2, initial_posterior=start, **settings)
    same_posterior(start, before, 0)
    assert not torch.allclose(moved.mean, start.mean)


def test_defaults_come_from_the_configuration(make_model, ids):
    settings = dict(
        num_inference_steps=3,
        inference_optimizer="adamw",
        inference_learning_rate=0.11,
        inference_lr_schedule="cosine",
        inference_weight_decay=0.3,
    )
    configured = make_model(**settings, inference_noise="fixed")
    same_posterior(configured.infer_posterior(ids), make_model().infer_posterior(ids, noise="fixed", **settings), 0)
    natural = make_model(inference_precision="unit")
    same_posterior(natural.infer_posterior(ids), make_model().infer_posterior(ids, inference_precision="unit"), 0)


def test_elbo_trace_and_callback(model, ids):
    seen = []
    posterior = model.infer_posterior(
        ids, num_inference_steps=4, callback=lambda step, latents, bound: seen.append((step, latents.shape, bound))
    )
    assert posterior.elbo_trace.shape == (4, 3) and posterior.elbo_trace.dtype == torch.float32
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert all(shape == (3, *SHAPE) for _, shape, _ in seen)
    assert torch.equal(torch.stack([bound for _, _, bound in seen]), posterior.elbo_trace)


@torch.no_grad()
@THOSE_THAT_DRAW
def test_inference_raises_the_bound(make_model, make_ids, settings):
    model, ids = make_model(initializer_range=0.15, cross_attention_gate_init=2.0), make_ids(rows=4, length=20)
    start = model.infer_posterior(ids, num_inference_steps=0, **settings)
    fitted = model.infer_posterior(ids, num_inference_steps=16, **settings)
    before, after = (model.elbo(ids, posterior, num_particles=32).elbo for posterior in (start, fitted))
    assert after.sum() > before.sum() + 4


# ------------------------------------------------------------------ noise


def test_moments_of_the_noise():
    noise = keyed_normal(torch.arange(2000), (2, 5, 21), 3, 1)  # an odd number a row
    assert noise.shape == (2000, 2, 5, 21) and noise.dtype == torch.float32
    x = noise.flatten(1).double()
    error = x.numel() ** -0.5
    assert abs(x.mean()) < 4 * error
    assert abs(x.var() - 1) < 4 * 2**0.5 * error
    assert abs((x**3).mean()) < 4 * 15**0.5 * error
    assert abs((x**4).mean() - 3) < 4 * 96**0.5 * error
    assert 4 < x.abs().max() < 7
    for threshold in (-2.0, -0.5, 0.3, 1.5):
        assert abs((x < threshold).double().mean() - Normal(0.0, 1.0).cdf(torch.tensor(threshold))) < 2 * error
    half = 105
    for other in (x.roll(1, 0), x.roll(1, 1), x.roll(half, 1)):  # rows, neighbours, the two values of one counter
        assert abs((x * other).mean()) < 5 * error
        assert abs((x**2 * other**2).mean() - 1) < 5 * 8**0.5 * error


def test_noise_differs_by_key_and_by_each_word():
    keys = torch.arange(4)
    noise = keyed_normal(keys, SHAPE, 5, 0, 2)
    assert torch.equal(noise, keyed_normal(keys, SHAPE, 5, 0, 2))
    assert torch.equal(noise[[2, 0]], keyed_normal(keys[[2, 0]], SHAPE, 5, 0, 2))
    others = [keyed_normal(keys, SHAPE, *words) for words in ((6, 0, 2), (5, 1, 2), (5, 0, 3), (0, 5, 2), (5, 0), ())]
    samples = [x.flatten() for draw in (noise, *others) for x in draw]
    correlations = torch.corrcoef(torch.stack(samples)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.45  # 28 samples of 128; a repeated draw would give 1


@pytest.mark.parametrize("seed", [-1, 0, 2**40, 2**63, 2**64 + 5])
def test_any_integer_seeds(seed):
    assert keyed_normal(torch.arange(2), (8,), seed).isfinite().all()


def test_keys_depend_on_tokens_and_their_order_alone(ids, pad_rows):
    ones = torch.ones_like(ids)
    keys = sequence_keys(ids, ones)
    for side in ("left", "right"):
        assert torch.equal(sequence_keys(*pad_rows(list(ids), side, fill=9)), keys)
    swapped = ids.clone()
    swapped[:, [3, 4]] = ids[:, [4, 3]]
    assert (sequence_keys(swapped, ones)[(ids[:, 3] != ids[:, 4])] != keys[(ids[:, 3] != ids[:, 4])]).all()
    assert (sequence_keys(ids[:, :-1], ones[:, :-1]) != keys).all()
    assert (sequence_keys(ids[:, 1:], ones[:, 1:]) != keys).all()


@THOSE_THAT_DRAW
def test_seeds(model, ids, settings):
    first, again, other = (model.infer_posterior(ids, seed=seed, **settings) for seed in (0, None, 1))
    same_posterior(first, again, 0)
    assert not torch.allclose(first.mean, other.mean, atol=1e-3)


def test_equal_rows_get_equal_noise_and_others_do_not(model, make_ids):
    ids = make_ids(rows=2)[[0, 1, 0]]
    noise = []
    model.infer_posterior(ids, num_inference_steps=1, callback=lambda step, z, bound: noise.append(z))
    assert torch.equal(noise[0][0], noise[0][2])
    assert not torch.allclose(noise[0][0], noise[0][1], atol=0.1)


@ALL_OPTIMIZERS
def test_generators_are_left_alone(model, ids, settings):
    before = torch.get_rng_state()
    model.elbo(ids, model.infer_posterior(ids, **settings), num_particles=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    same_posterior(model.infer_posterior(ids, **settings), model.infer_posterior(ids, **settings), 0)


def test_dropout_in_training_does_not_reach_inference(make_model, ids):
    """The attention's own, and that of a module which someone put in, as adapters are."""
    model = make_model(attention_dropout=0.5)
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Dropout(0.5))
    model.train()
    before = torch.get_rng_state()
    posterior = model.infer_posterior(ids)
    assert torch.equal(torch.get_rng_state(), before)
    same_posterior(posterior, make_model().infer_posterior(ids))
    assert all(module.training for module in model.modules())
    assert model.model.layers[0].self_attn.attention_dropout == model.model.norm[1].p == 0.5


# ------------------------------------------------------------------ rows


@ALL_OPTIMIZERS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("noise", ["fresh", "fixed"])
def test_a_row_does_not_depend_on_its_batch(model, ids, pad_rows, settings, side, noise):
    rows = [ids[0], ids[1, :5], ids[2, :2], ids[1, :9]]
    settings = settings | dict(num_inference_steps=4, noise=noise)
    batch, mask = pad_rows(rows, side, fill=9)
    together = model.infer_posterior(batch, mask, **settings)
    scores = model.elbo(batch, together, mask, num_particles=2)
    for index, row in enumerate(rows):
        alone = model.infer_posterior(row[None], **settings)
        same_posterior(rows_of(together, slice(index, index + 1)), alone)
        close(together.elbo_trace[:, index], alone.elbo_trace[:, 0], 1e-4)
        for batched, single in zip(scores, model.elbo(row[None], alone, num_particles=2), strict=True):
            close(batched[index], single[0], 1e-4)
        close(together.sample(seed=4)[index], alone.sample(seed=4)[0], 1e-4)
    assert together.num_non_finite == 0


@ALL_OPTIMIZERS
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_with_nothing_to_explain_get_the_prior(model, ids, pad_rows, make_noise, settings, side):
    rows = [ids[0], ids[1, :0], ids[2, :1], ids[1]]
    labels = [row.clone() for row in rows]
    labels[3][:] = -100
    batch, mask = pad_rows(rows, side)
    targets, _ = pad_rows(labels, side, fill=-100)
    start = random_posterior(make_noise, rows=4)
    for initial in (None, start):
        posterior = model.infer_posterior(batch, mask, targets, initial_posterior=initial, **settings)
        assert not posterior.mean[1:].any() and not posterior.log_variance[1:].any()
        assert posterior.num_non_finite == 0
        assert posterior.elbo_trace[:, 0].isfinite().all()
        first = None if initial is None else rows_of(initial, slice(0, 1))
        alone = model.infer_posterior(ids[:1], initial_posterior=first, **settings)
        same_posterior(rows_of(posterior, slice(0, 1)), alone)


@pytest.mark.parametrize("shape", [(2, 1), (2, 0), (0, 5)])
def test_batches_with_nothing_to_explain(model, shape):
    posterior = model.infer_posterior(torch.full(shape, 5))
    assert posterior.mean.shape == (shape[0], *SHAPE)
    assert not posterior.mean.any() and not posterior.log_variance.any()


def test_labels_choose_what_is_explained(model, ids):
    labels = ids.clone()
    labels[:, 6:] = -100
    seen = model.infer_posterior(ids, labels=labels, num_inference_steps=3, seed=0)
    assert not torch.allclose(seen.mean, model.infer_posterior(ids, num_inference_steps=3).mean, atol=1e-3)
    score = model.elbo(ids, seen, labels=labels)
    assert score.num_tokens.tolist() == [5, 5, 5]
    # Attention is causal: what follows the labels matters to the noise alone.
    epsilon = seen.mean
    given = model.infer_posterior(ids, labels=labels, epsilon=epsilon)
    same_posterior(given, model.infer_posterior(ids[:, :6], epsilon=epsilon))


# ------------------------------------------------------------------ non-finite objectives


@THOSE_THAT_DRAW
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_turns_non_finite_keeps_its_best(model, ids, make_noise, caplog, settings, bad):
    settings = settings | dict(inference_lr_schedule="constant")
    epsilon = make_noise(4, 3, *SHAPE)
    healthy = model.infer_posterior(ids, num_inference_steps=4, epsilon=epsilon, **settings)
    assert healthy.num_non_finite == 0 and not caplog.records
    broken = epsilon.clone()
    broken[2, 1] = bad
    posterior = model.infer_posterior(ids, num_inference_steps=4, epsilon=broken, **settings)
    assert posterior.num_non_finite == 1
    assert "1 of 3 sequences turned non-finite" in caplog.text
    same_posterior(rows_of(posterior, [0, 2]), rows_of(healthy, [0, 2]), 0)
    best = int(healthy.elbo_trace[:2, 1].argmax())  # the steps before the bad one
    until_best = model.infer_posterior(ids, num_inference_steps=best, epsilon=epsilon[:best], **settings)
    same_posterior(rows_of(posterior, [1]), rows_of(until_best, [1]), 0)


@ALL_OPTIMIZERS
def test_a_row_that_was_never_finite_gets_the_prior(make_model, ids, caplog, settings):
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = float("nan")
    ids[ids == 60] = 59
    healthy = model.infer_posterior(ids[[0, 2]], **settings)
    assert not caplog.records
    ids[1, 3] = 60
    posterior = model.infer_posterior(ids, **settings)
    assert posterior.num_non_finite == 1 and "1 of 3" in caplog.text
    assert not posterior.mean[1].any() and not posterior.log_variance[1].any()
    same_posterior(rows_of(posterior, [0, 2]), healthy)


def test_a_gradient_that_is_not_finite_where_the_objective_is(model, ids, caplog):
    def poison(module, arguments):
        arguments[0].register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(1), float("nan")))

    healthy = model.infer_posterior(ids)
    model.model.layers[0].cross_attn.k_proj.register_forward_pre_hook(poison)
    posterior = model.infer_posterior(ids)
    assert posterior.num_non_finite == 1 and "1 of 3" in caplog.text
    assert not posterior.mean[1].any() and not posterior.log_variance[1].any()
    same_posterior(rows_of(posterior, [0, 2]), rows_of(healthy, [0, 2]), 0)


def test_a_step_that_overflows(model, ids, caplog):
    posterior = model.infer_posterior(ids, inference_optimizer="adamw", inference_learning_rate=1e30)
    assert posterior.num_non_finite == 3 and "3 of 3" in caplog.text
    assert posterior.mean.isfinite().all() and posterior.log_variance.isfinite().all()


# ------------------------------------------------------------------ the frozen decoder


@ALL_OPTIMIZERS
def test_weights_get_no_gradient(model, ids, settings):
    parameters = dict(model.named_parameters())
    frozen = parameters["model.norm.weight"]
    frozen.requires_grad_(False)
    model(ids, labels=ids, latents=model.sample_prior(3, seed=0)).loss.backward()
    parameters["model.layers.0.mlp.up_proj.weight"].grad = None
    before = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    posterior = model.infer_posterior(ids, **settings)
    for name, parameter in parameters.items():
        assert parameter.requires_grad == (parameter is not frozen), name
        assert torch.equal(parameter, weights[name]), name
        assert (parameter.grad is None) == (before[name] is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, before[name]), name
    for tensor in (posterior.mean, posterior.log_variance, posterior.elbo_trace):
        assert not tensor.requires_grad and tensor.grad_fn is None


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_others_train_the_model_meanwhile(make_model, ids, attention):
    """What another thread does between two steps of inference, done in turns."""
    model = make_model(attention_dropout=0.3)
    expected = model.infer_posterior(ids, num_inference_steps=4)
    model.set_attn_implementation(attention)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = set()

    def train(step, latents, bound):
        assert model.config._attn_implementation == attention
        model.set_attn_implementation("sdpa")  # flex_attention has no backward on a CPU
        with torch.enable_grad():
            loss = model(ids, labels=ids).loss
            loss.backward()
        model.set_attn_implementation(attention)
        assert all(p.grad is not None for name, p in model.named_parameters() if ".cross_att" not in name)
        losses.add(loss.item())
        optimizer.step()
        optimizer.zero_grad()

    same_posterior(model.infer_posterior(ids, num_inference_steps=4, callback=train), expected)
    assert len(losses) == 4  # of dropout, which is theirs


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_decoder_is_frozen_inside_and_free_after_an_error(model, ids, wrapped):
    """Copies of its modules are; the model itself where something has taken hold of one, as offloading does."""
    if wrapped:
        model.model.norm.forward = functools.partial(type(model.model.norm).forward, model.model.norm)
    seen = []

    def look(module, arguments):
        seen.append([parameter.requires_grad for parameter in module.parameters()])

    def stop(step, latents, bound):
        assert not latents.requires_grad
        assert any(parameter.requires_grad for parameter in model.parameters()) is not wrapped
        raise KeyboardInterrupt

    model.train().model.register_forward_pre_hook(look)
    with pytest.raises(KeyboardInterrupt):
        model.infer_posterior(ids, callback=stop)
    assert len(seen) == 1 and not any(seen[0])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@ALL_OPTIMIZERS
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(model, make_ids, make_noise, settings, rows, context):
    ids, start, epsilon = make_ids(rows), random_posterior(make_noise, rows), make_noise(rows, *SHAPE, seed=2)
    expected = model.infer_posterior(ids, initial_posterior=start, epsilon=epsilon, **settings)
    with context():
        inputs = dict(
            input_ids=ids.clone(),
            attention_mask=torch.ones_like(ids),
            labels=ids.clone(),
            initial_posterior=LatentPosterior(start.mean.clone(), start.log_variance.clone()),
            epsilon=epsilon.clone(),
        )
        for left_out in ((), ("attention_mask",), ("attention_mask", "labels")):
            given = {name: value for name, value in inputs.items() if name not in left_out}
            actual = model.infer_posterior(**given, **settings)
            assert not torch.is_grad_enabled()
            same_posterior(actual, expected)
            assert not actual.mean.is_inference()


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_built_in_inference_mode(make_model, ids, inside):
    with torch.inference_mode():
        model = make_model()
    with torch.inference_mode(inside):
        posterior = model.infer_posterior(ids)
    same_posterior(posterior, make_model().infer_posterior(ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_latents_are_float32_whatever_the_model(make_model, ids, dtype):
    posterior = make_model().to(dtype).infer_posterior(ids)
    for tensor in (posterior.mean, posterior.log_variance, posterior.elbo_trace):
        assert tensor.dtype == torch.float32
    same_posterior(posterior, make_model().infer_posterior(ids), 1e-4 if dtype == torch.float64 else 0.5)


# ------------------------------------------------------------------ posterior, KL, likelihood, ELBO


def test_kl_divergence(make_noise):
    posterior = random_posterior(make_noise)
    close(posterior.kl_divergence(), naive_kl(posterior.mean, posterior.log_variance))
    prior = LatentPosterior(torch.zeros(3, *SHAPE), torch.zeros(3, *SHAPE))
    assert not prior.kl_divergence().any()
    assert len(prior) == 3


def test_posterior_checks_its_shapes(make_noise):
    with pytest.raises(ValueError, match="one shape"):
        LatentPosterior(make_noise(3, *SHAPE), make_noise(2, *SHAPE))


def test_samples_of_a_posterior():
    rows, mean, log_variance = 400, 0.5, -1.0
    posterior = LatentPosterior(torch.full((rows, *SHAPE), mean), torch.full((rows, *SHAPE), log_variance))
    sample = posterior.sample(seed=3)
    assert torch.equal(sample, posterior.sample(seed=3))
    assert not torch.allclose(sample, posterior.sample(seed=4))
    assert sample.mean().item() == pytest.approx(mean, abs=0.02)
    assert sample.var().item() == pytest.approx(math.exp(log_variance), rel=0.03)


def test_unseeded_samples_follow_the_global_generator(model, ids):
    posterior = model.infer_posterior(ids)
    for draw in (posterior.sample, lambda: model.sample_prior(3)):
        torch.manual_seed(5)
        first, second = draw(), draw()
        torch.manual_seed(5)
        assert torch.equal(draw(), first)
        assert not torch.allclose(first, second)


def test_samples_of_the_prior(model):
    sample = model.sample_prior(500, seed=0)
    assert sample.shape == (500, *SHAPE) and sample.dtype == torch.float32
    assert sample.mean().item() == pytest.approx(0, abs=0.02)
    assert sample.var().item() == pytest.approx(1, rel=0.03)
    assert not torch.allclose(sample[0], sample[1], atol=0.1)
    assert torch.equal(model.sample_prior(500, seed=0), sample)


def test_scored_tokens():
    ids = torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7], [5, 6, 7, 9], [9, 9, 9, 5]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1]])
    assert scored_tokens(ids).tolist() == ids[:, 1:].tolist()
    assert scored_tokens(ids, mask).tolist() == [[6, 7, 8], [-100, 6, 7], [6, 7, -100], [-100] * 3]
    labels = ids.masked_fill(torch.tensor([[0, 0, 1, 0]]).bool(), -100)
    assert scored_tokens(ids, mask, labels).tolist() == [[6, -100, 8], [-100, -100, 7], [6, -100, -100], [-100] * 3]
    for mask_type in (torch.bool, torch.float):
        assert torch.equal(scored_tokens(ids, mask.to(mask_type)), scored_tokens(ids, mask))


@torch.no_grad()
def test_elbo_terms(model, ids, make_noise):
    posterior, epsilon = random_posterior(make_noise), make_noise(3, *SHAPE, seed=2)
    score = model.elbo(ids, posterior, epsilon=epsilon)
    close(score.nll, naive_nll(model, ids, posterior.reparameterize(epsilon)), 1e-4)
    close(score.kl, naive_kl(posterior.mean, posterior.log_variance))
    close(score.elbo, -(score.nll + score.kl))
    assert score.num_tokens.tolist() == [11, 11, 11]


@torch.no_grad()
@pytest.mark.parametrize("particles", [1, 3])
def test_particles_are_averaged(model, ids, make_noise, monkeypatch, particles):
    posterior = random_posterior(make_noise)
    noise, draw = [], posterior.reparameterize
    monkeypatch.setattr(posterior, "reparameterize", lambda epsilon: noise.append(epsilon) or draw(epsilon))
    score = model.elbo(ids, posterior, num_particles=particles, seed=7)
    assert len(noise) == particles
    for index, epsilon in enumerate(noise):
        assert not any(torch.allclose(epsilon, other, atol=0.1) for other in noise[:index])
    single = torch.stack([naive_nll(model, ids, draw(epsilon)) for epsilon in noise])
    close(score.nll, single.mean(dim=0), 1e-4)
    close(score.kl, posterior.kl_divergence())


@torch.no_grad()
def test_scores_use_noise_that_no_fit_has_seen(model, ids, monkeypatch, recorded):
    for seed in range(3):
        model.infer_posterior(ids, seed=seed, num_inference_steps=4)
    posterior, scoring = model.infer_posterior(ids), []
    draw = posterior.reparameterize
    monkeypatch.setattr(posterior, "reparameterize", lambda epsilon: scoring.append(epsilon) or draw(epsilon))
    for seed in (None, 0, 1, 2):
        model.elbo(ids, posterior, seed=seed, num_particles=2)
    assert torch.equal(scoring[0], scoring[2])  # the default is seed 0
    assert not torch.equal(scoring[0], scoring[4])
    fitting = torch.stack([epsilon.flatten() for _, epsilon, _ in recorded["natural"]])
    both = torch.corrcoef(torch.cat((fitting, torch.stack(scoring).flatten(1))))[: len(fitting), len(fitting) :]
    assert both.abs().max() < 0.3


def test_methods_are_the_functions(model, ids):
    posterior = infer_posterior(model, ids)
    same_posterior(posterior, model.infer_posterior(ids), 0)
    assert torch.equal(elbo(model, ids, posterior).elbo, model.elbo(ids, posterior).elbo)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(num_inference_steps=-1), "num_inference_steps.*-1"),
        (dict(num_inference_steps=1.5), "num_inference_steps.*1.5"),
        (dict(inference_learning_rate=0.0), "inference_learning_rate.*positive"),
        (dict(inference_learning_rate=-1.0), "inference_learning_rate.*positive"),
        (dict(inference_learning_rate=float("nan")), "inference_learning_rate.*finite"),
        (dict(inference_learning_rate=float("inf")), "inference_learning_rate.*finite"),
        (dict(inference_optimizer="sgd"), "inference_optimizer.*natural, lbfgs, map, adamw.*sgd"),
        (dict(inference_lr_schedule="linear"), "inference_lr_schedule.*constant.*linear"),
        (dict(inference_precision="full"), "inference_precision.*stein.*full"),
        (dict(inference_weight_decay=-1.0), "inference_weight_decay"),
        (dict(noise="none"), "noise.*fresh, fixed.*none"),
        (dict(attention_mask=torch.ones(3, 11)), r"attention_mask.*\(3, 12\).*\(3, 11\)"),
        (dict(labels=torch.ones(2, 12)), r"labels.*\(3, 12\).*\(2, 12\)"),
        (dict(epsilon=torch.zeros(3, 4, 32)), r"epsilon.*\(3, 2, 2, 32\).*\(3, 4, 32\)"),
        (dict(epsilon=torch.zeros(5, 3, *SHAPE)), r"epsilon.*\(2, 3, 2, 2, 32\)"),
        (dict(initial_posterior=LatentPosterior(torch.zeros(2, *SHAPE), torch.zeros(2, *SHAPE))), "initial_posterior"),
    ],
)
def test_bad_settings_are_refused_before_any_computation(model, ids, monkeypatch, settings, words):
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("The model was called."))
    with pytest.raises(ValueError, match=words):
        model.infer_posterior(ids, **settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids.float(), "int64 or int32.*float32"),
        (lambda ids: ids[0], r"\(batch, tokens\).*\(12,\)"),
        (lambda ids: ids + 58, r"below vocab_size \(61\)"),
        (lambda ids: ids.masked_fill(ids == ids[1, 1], 61), r"below vocab_size \(61\), got 61"),
        (lambda ids: ids.masked_fill(ids == ids[1, 1], -1), "at least 0.*-1"),
    ],
    ids=["float", "one row", "too large", "one too large", "negative"],
)
def test_bad_tokens_are_refused_before_any_computation(model, ids, monkeypatch, change, words):
    posterior = model.infer_posterior(ids)
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("The model was called."))
    with pytest.raises(ValueError, match=words):
        model.infer_posterior(change(ids))
    with pytest.raises(ValueError, match=words):
        model.elbo(change(ids), posterior)


@pytest.mark.parametrize("label", [61, -1])
def test_labels_outside_the_vocabulary(model, ids, label):
    labels = ids.clone()
    labels[1, 4] = label
    with pytest.raises(ValueError, match=r"labels.*61"):
        model.infer_posterior(ids, labels=labels)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda ids: dict(input_ids=ids.tolist()), "input_ids must be a tensor.*got list"),
        (lambda ids: dict(attention_mask=[1] * 12), "attention_mask must be a tensor.*got list"),
        (lambda ids: dict(attention_mask=torch.full_like(ids, 2)), "attention_mask must be 1.*and 0"),
        (lambda ids: dict(attention_mask=torch.full(ids.shape, 0.5)), "attention_mask must be 1.*and 0"),
        (lambda ids: dict(seed="x"), "seed must be an integer, got 'x'"),
        (lambda ids: dict(seed=1.5), "seed must be an integer, got 1.5"),
        (lambda ids: dict(initial_posterior=ids), "initial_posterior must be a LatentPosterior, got Tensor"),
        (lambda ids: dict(num_inference_steps=True), "num_inference_steps must be an integer of 0 or more"),
        (lambda ids: dict(inference_learning_rate="0.1"), "inference_learning_rate must be positive and finite"),
    ],
)
def test_bad_arguments_are_one_sentence(model, ids, given, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        model.infer_posterior(**{"input_ids": ids} | given(ids))


def test_numbers_of_numpy_and_masks_of_any_type(model, ids):
    expected = model.infer_posterior(ids, num_inference_steps=3, inference_learning_rate=0.25)
    rates = dict(num_inference_steps=np.int64(3), inference_learning_rate=np.float32(0.25), seed=np.int32(0))
    for mask in (ids > 0, torch.ones(ids.shape), torch.ones_like(ids)):
        same_posterior(model.infer_posterior(ids, mask, **rates), expected, 0)


def test_ids_of_32_bits(model, ids):
    same_posterior(model.infer_posterior(ids.int()), model.infer_posterior(ids))


def test_bad_scores(model, ids, make_noise):
    posterior = random_posterior(make_noise)
    with pytest.raises(ValueError, match="num_particles"):
        model.elbo(ids, posterior, num_particles=0)
    with pytest.raises(ValueError, match="num_particles"):
        model.elbo(ids, posterior, num_particles=2, epsilon=posterior.mean)
    with pytest.raises(ValueError, match="posterior is of 3 sequences, where there are 2"):
        model.elbo(ids[:2], posterior)


def test_baseline_has_nothing_to_infer(make_model, ids):
    with pytest.raises(ValueError, match="num_latents=0"):
        make_model(num_latents=0).infer_posterior(ids)


# ------------------------------------------------------------------ early stop


def test_early_stop_is_the_loop_cut_short_row_by_row(model, make_ids):
    """Each row's posterior is that of the plain loop at the step where its own ELBO ceased to gain."""
    ids, steps, tolerance = make_ids(4, 12), 40, 0.01
    stopped = infer_posterior(model, ids, num_inference_steps=steps, inference_tolerance=tolerance)
    plain = infer_posterior(model, ids, num_inference_steps=steps)
    lengths = []
    for row in range(4):
        gains = [
            (plain.elbo_trace[t - 4 : t, row].mean() - plain.elbo_trace[t - 8 : t - 4, row].mean()).item() / 11
            for t in range(8, steps + 1)
        ]
        lengths.append(8 + next(index for index, gain in enumerate(gains) if gain < tolerance))
        alone = infer_posterior(model, ids[row : row + 1], num_inference_steps=lengths[-1])
        same_posterior(rows_of(stopped, slice(row, row + 1)), alone)
    assert len(stopped.elbo_trace) == max(lengths) < steps
    assert len(set(lengths)) > 1  # or the rows were not told apart


def test_early_stop_that_never_comes_changes_nothing(model, ids):
    never = infer_posterior(model, ids, num_inference_steps=12, inference_tolerance=-1e6)
    same_posterior(never, infer_posterior(model, ids, num_inference_steps=12), tolerance=0)


# ------------------------------------------------------------------ posteriors as things


def test_save_and_load(model, ids, tmp_path):
    posterior = infer_posterior(model, ids)
    posterior.save_pretrained(tmp_path / "thought")
    loaded = LatentPosterior.from_pretrained(tmp_path / "thought")
    for name in ("mean", "log_variance", "elbo_trace", "keys"):
        assert torch.equal(getattr(loaded, name), getattr(posterior, name)), name
    assert torch.equal(loaded.sample(seed=1), posterior.sample(seed=1))
    assert loaded == posterior and loaded != posterior[[1, 0, 2]] and loaded != "thought"
    with pytest.raises(FileNotFoundError, match="latent_posterior.safetensors"):
        LatentPosterior.from_pretrained(tmp_path)


def test_a_posterior_of_one_tensor_is_saved(tmp_path):
    zeros = torch.zeros(1, *SHAPE)
    LatentPosterior(zeros, zeros).save_pretrained(tmp_path)
    assert LatentPosterior.from_pretrained(tmp_path) == LatentPosterior(zeros, zeros)


def test_files_that_hold_no_posterior(tmp_path):
    file, mean = tmp_path / "latent_posterior.safetensors", torch.zeros(1, *SHAPE)
    for tensors in ({"mean": mean}, {"mean": mean, "log_variance": mean, "more": mean}):
        save_file({name: x.clone() for name, x in tensors.items()}, file)
        with pytest.raises(ValueError, match="latent_posterior.safetensors holds no posterior"):
            LatentPosterior.from_pretrained(tmp_path)
    LatentPosterior(mean * torch.nan, mean).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        LatentPosterior.from_pretrained(tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="latent_posterior.safetensors holds no posterior"):
        LatentPosterior.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "rows",
    [1, -1, np.int64(1), np.array(1), torch.tensor(1), [2, 0], (2, 0), range(2), np.array([2, 0]), slice(1, None),
     torch.tensor([True, False, True])],
    ids=repr,
)  # fmt: skip
def test_rows_of_a_posterior(model, ids, rows):
    posterior = infer_posterior(model, ids)
    part = posterior[rows]
    picked = torch.arange(3)[list(rows) if isinstance(rows, (tuple, range)) else rows].reshape(-1)
    assert torch.equal(part.mean, posterior.mean[picked])
    assert torch.equal(part.elbo_trace, posterior.elbo_trace[:, picked])
    assert torch.equal(part.sample(seed=1), posterior.sample(seed=1)[picked])


def test_between_two_thoughts(make_noise):
    first, second = (
        random_posterior(make_noise),
        random_posterior(lambda *shape, seed=0: -make_noise(*shape, seed=seed)),
    )
    same_posterior(first.lerp(second, 0.0), first)
    same_posterior(first.lerp(second, 1.0), second)
    close(first.lerp(second, 0.25).mean, 0.75 * first.mean + 0.25 * second.mean)
    with pytest.raises(ValueError, match=r"one shape, got \(3, 2, 2, 32\) and \(1, 2, 2, 32\)"):
        first.lerp(second[0], 0.5)


# ------------------------------------------------------------------ what all steps share


def count_calls(monkeypatch, module):
    calls, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    return calls


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "ZeRO-3"])
def test_what_reads_no_latents_is_computed_once(model, ids, monkeypatch, sharded):
    expected = model.infer_posterior(ids, num_inference_steps=5)
    if sharded:
        model.lm_head.weight.ds_status = "as DeepSpeed marks it"
    layers = model.model.layers
    once = [model.model.embed_tokens, model.model.rotary_emb, layers[0].input_layernorm, layers[0].self_attn]
    each = [layers[0].cross_attn, layers[0].mlp, layers[1].self_attn, model.model.norm]
    counts = [count_calls(monkeypatch, module) for module in (*once, *each)]
    same_posterior(model.infer_posterior(ids, num_inference_steps=5), expected)
    a_call = 5 if sharded else 1
    assert [len(calls) for calls in counts] == [a_call, 2 * a_call, a_call, a_call, 5, 5, 5, 5]  # tokens' and latents'


class Operations(TorchDispatchMode):
    """How often each operation runs inside."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "ZeRO-3"])
def test_targets_are_found_once(model, ids, pad_rows, monkeypatch, sharded):
    """With padding and labels: what is scored, and where; and the posterior is the same to the last bit."""
    batch, mask = pad_rows([ids[0], ids[1, :7]], "left")
    labels = batch.masked_fill(torch.arange(batch.shape[1]) < 9, -100)
    expected = [model.infer_posterior(batch, mask, labels, num_inference_steps=5) for _ in range(2)][1]
    if sharded:
        model.lm_head.weight.ds_status = "as DeepSpeed marks it"
    calls = []
    monkeypatch.setattr(
        posterior_ltm, "scored_tokens", lambda *args, made=scored_tokens: calls.append(1) or made(*args)
    )
    at_steps = []
    with Operations() as operations:
        actual = model.infer_posterior(
            batch, mask, labels, num_inference_steps=5, callback=lambda *_: at_steps.append(operations.counts.copy())
        )
    assert len(calls) == 1 + (5 if sharded else 1)  # once for the number of tokens
    for operation in (torch.ops.aten.nonzero, torch.ops.aten.constant_pad_nd):
        assert [counts[operation] for counts in at_steps] == ([1, 2, 3, 4, 5] if sharded else [1, 1, 1, 1, 1])
    for name in ("mean", "log_variance", "elbo_trace"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))


def test_layers_before_the_first_that_reads_latents_run_once(make_model, ids):
    options = dict(num_hidden_layers=3, num_latents=2, cross_attention_layers=[1])
    calls, model = [], make_model(**options)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    actual = model.infer_posterior(ids, num_inference_steps=4)
    assert calls == [0, 1, 2, 1, 2, 1, 2, 1, 2]
    naive = make_model(**options)
    naive.lm_head.weight.ds_status = "as DeepSpeed marks it"  # which keeps nothing between steps
    same_posterior(actual, naive.infer_posterior(ids, num_inference_steps=4))


def test_a_prelude_is_of_one_batch(model, ids):
    """Other labels in the next call of inference."""
    labels = ids.masked_fill(torch.arange(12) < 6, -100)
    expected = model.infer_posterior(ids, labels=labels, num_inference_steps=3)
    model.infer_posterior(ids, num_inference_steps=3)
    assert torch.equal(model.infer_posterior(ids, labels=labels, num_inference_steps=3).mean, expected.mean)


def test_gradient_checkpointing(make_model, ids, pad_rows):
    """With inputs that want a gradient too, as adapters make them."""
    batch, mask = pad_rows([ids[0], ids[1, :7]], "left")
    model = make_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for _ in range(2):
        same_posterior(
            model.infer_posterior(batch, mask, num_inference_steps=4),
            make_model().infer_posterior(batch, mask, num_inference_steps=4),
        )
