"""The fast loop: against its definition, row by row, and with the decoder as a fixed function.

What memory_ltm.py has of its own is in test_memory*.py, each method's in test_inference_methods.py.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from ltm_hf import LatentPosterior, infer_posterior
from ltm_hf.likelihood_ltm import Text
from ltm_hf.methods_ltm import INFERENCE_METHODS, AdamWInference, NaturalInference

SHAPE = (2, 2, 32)  # of the paper's reader: layers, latents a layer, hidden
ZEROS = torch.zeros(3, *SHAPE)
THOSE_THAT_DRAW = pytest.mark.parametrize("method", ["natural", "adamw"])


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same_posterior(actual, expected, tolerance=1e-5):
    close(actual.mean, expected.mean, tolerance)
    close(actual.log_variance, expected.log_variance, tolerance)


@pytest.fixture
def random_posterior(make_noise):
    def make(*shape, rows=3):
        shape = (rows, *(shape or SHAPE))
        return LatentPosterior(make_noise(*shape), 0.5 * make_noise(*shape, seed=1) - 1)

    return make


def naive_nll(model, ids, latents):
    """(B,) nats, from the definition."""
    log_probabilities = model(ids, latents=latents).logits[:, :-1].log_softmax(dim=-1)
    return -log_probabilities.gather(-1, ids[:, 1:, None]).sum(dim=(1, 2))


def naive_objective(model, ids, mean, log_variance, epsilon, kl_weight=1.0):
    """(B,) nats: what inference lowers, divided by the weight of the KL."""
    latents = mean + (0.5 * log_variance).exp() * epsilon
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), prior).sum(dim=(1, 2, 3))
    return naive_nll(model, ids, latents) / kl_weight + kl


def naive_adamw(model, ids, start, epsilons, rates, kl_weight):
    """The paper's loop with nothing worked out by hand: autograd through the whole objective, torch's AdamW."""
    mean, log_variance = (x.clone().requires_grad_() for x in (start.mean, start.log_variance))
    optimizer = torch.optim.AdamW([mean, log_variance], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    bounds = []
    for epsilon, rate in zip(epsilons, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        bounds.append(-naive_objective(model, ids, mean, log_variance, epsilon).detach())
        naive_objective(model, ids, mean, log_variance, epsilon, kl_weight).sum().backward()
        optimizer.step()
    return LatentPosterior(mean.detach(), log_variance.detach(), torch.stack(bounds))


def naive_natural(model, ids, start, epsilons, rates, kl_weight):
    """Variational online Newton as written: precision S, curvature h, d = 1 + h - S; with its two bounds."""
    m, S = start.mean, (-start.log_variance).exp()
    bounds = []
    for epsilon, rho in zip(epsilons, rates, strict=True):
        z = (m + epsilon / S.sqrt()).requires_grad_()
        bounds.append(-naive_objective(model, ids, m, -S.log(), epsilon).detach())
        (g,) = torch.autograd.grad(naive_nll(model, ids, z).sum() / kl_weight, z)
        furthest = 0.5 / S.sqrt()
        d = 1 + g * epsilon * S.sqrt() - S
        d = torch.maximum(torch.minimum(d, S / rho), -S / (2 * rho))
        S = S + rho * d + rho**2 * d**2 / (2 * S)
        step = -rho * (m + g) / S
        m = m + torch.where(step.abs() > furthest, furthest * step.sign(), step)
    return LatentPosterior(m, -S.log(), torch.stack(bounds))


def naive_rates(schedule, rate, steps):
    return {
        "constant": [rate for _ in range(steps)],
        "cosine": [0.1 * rate + 0.9 * rate * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)],
        "inverse": [rate / (1 + rate * t) for t in range(steps)],
    }[schedule]


# ------------------------------------------------------------------ gradients


@pytest.fixture
def recorded(monkeypatch):
    """What "natural" is given and what gradients "adamw" makes of it, of the last step."""
    last = {}

    class Natural(NaturalInference):
        def update(self, gradient, epsilon, step_size):
            last.update(gradient=gradient.clone(), epsilon=epsilon.clone())
            super().update(gradient, epsilon, step_size)

    class AdamW(AdamWInference):
        def update(self, gradient, epsilon, step_size):
            super().update(gradient, epsilon, step_size)
            last.update(mean=self.mean.grad.clone(), log_variance=self.log_variance.grad.clone())

    monkeypatch.setitem(INFERENCE_METHODS, "natural", Natural)
    monkeypatch.setitem(INFERENCE_METHODS, "adamw", AdamW)
    return last


@torch.no_grad()
def test_gradients_are_slopes(paper_model, ids, random_posterior, make_noise, recorded, monkeypatch):
    """Of the likelihood in z, and of the objective in mean and log-variance; by finite differences, in double."""

    def norm(self, hidden_states):  # Mistral's rounds to single precision
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon)

    monkeypatch.setattr(MistralRMSNorm, "forward", norm)
    model, start, epsilon = paper_model.double(), random_posterior(), make_noise(3, *SHAPE, seed=2)
    for method in ("natural", "adamw"):
        settings = dict(inference_method=method, num_inference_steps=1, initial_posterior=start, epsilon=epsilon)
        model.infer_posterior(ids, **settings)
    assert torch.equal(recorded["epsilon"], epsilon)
    epsilon = epsilon.double()
    point = {name: getattr(start, name).double() for name in ("mean", "log_variance")}
    point["gradient"] = point["mean"] + (0.5 * point["log_variance"]).exp() * epsilon  # z

    def objective(name, value):
        if name == "gradient":
            return naive_nll(model, ids, value)[0]
        given = {"mean": point["mean"], "log_variance": point["log_variance"], name: value}
        return naive_objective(model, ids, **given, epsilon=epsilon)[0]

    for name, at in point.items():
        for entry in torch.randperm(math.prod(SHAPE), generator=torch.Generator().manual_seed(0))[:6]:  # of row 0
            moved = torch.zeros_like(at)
            moved.view(-1)[entry] = 1e-5
            slope = (objective(name, at + moved) - objective(name, at - moved)) / 2e-5
            close(recorded[name].view(-1)[entry], slope.float())
        assert recorded[name].abs().max() > 0.1


# ------------------------------------------------------------------ the loop against its definition


@pytest.mark.parametrize(("schedule", "kl_weight"), [("constant", 1.0), ("cosine", 0.25), ("inverse", 2.0)])
@pytest.mark.parametrize(("method", "naive"), [("adamw", naive_adamw), ("natural", naive_natural)])
def test_the_loop(paper_model, ids, random_posterior, make_noise, method, naive, schedule, kl_weight):
    start, epsilons = random_posterior(), make_noise(5, 3, *SHAPE, seed=2)
    expected = naive(paper_model, ids, start, epsilons, naive_rates(schedule, 0.3, 5), kl_weight)
    actual = paper_model.infer_posterior(
        ids,
        num_inference_steps=5,
        inference_method=method,
        inference_learning_rate=0.3,
        inference_lr_schedule=schedule,
        inference_kl_weight=kl_weight,
        initial_posterior=start,
        epsilon=epsilons,
    )
    same_posterior(actual, expected, 1e-4)
    close(actual.elbo_trace, expected.elbo_trace, 1e-4)


def test_one_noise_for_all_steps(paper_model, ids, make_noise):
    epsilon = make_noise(3, *SHAPE)
    constant = paper_model.infer_posterior(ids, num_inference_steps=4, epsilon=epsilon)
    repeated = paper_model.infer_posterior(ids, num_inference_steps=4, epsilon=epsilon.expand(4, -1, -1, -1, -1))
    same_posterior(constant, repeated, 0)


@THOSE_THAT_DRAW
def test_noise_fresh_or_fixed(paper_model, ids, method):
    latents = {}
    for noise in ("fresh", "fixed"):
        seen = latents[noise] = []
        paper_model.infer_posterior(
            ids,
            num_inference_steps=3,
            inference_method=method,
            inference_learning_rate=1e-9,
            inference_noise=noise,
            callback=lambda step, z, bound, seen=seen: seen.append(z),
        )
    assert torch.equal(latents["fresh"][0], latents["fixed"][0])
    close(latents["fixed"][1], latents["fixed"][0])
    close(latents["fixed"][2], latents["fixed"][0])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (latents["fresh"][one] - latents["fresh"][other]).abs().mean() > 1e-3


@THOSE_THAT_DRAW
def test_seeds(paper_model, ids, method):
    settings = dict(inference_method=method)
    first, again, other = (paper_model.infer_posterior(ids, seed=seed, **settings) for seed in (0, None, 1))
    same_posterior(first, again, 0)
    assert not torch.allclose(first.mean, other.mean, atol=1e-3)


def test_equal_rows_get_equal_noise_and_others_do_not(paper_model, make_ids):
    noise = []
    paper_model.infer_posterior(make_ids(rows=2)[[0, 1, 0]], callback=lambda step, z, bound: noise.append(z))
    assert torch.equal(noise[0][0], noise[0][2])
    assert not torch.allclose(noise[0][0], noise[0][1], atol=0.1)


def test_initial_posterior_is_left_alone(thinker, way, ids, random_posterior):
    if way == "amortized":
        pytest.skip("An encoder starts nowhere.")
    start = random_posterior(*thinker.config.latent_shape)
    before = copy.deepcopy(start)
    moved = thinker.infer_posterior(ids, num_inference_steps=2, initial_posterior=start)
    assert start == before and not torch.allclose(moved.mean, start.mean)
    if way not in ("langevin", "memory"):  # a chain begins at a sample; a memory has one precision a latent
        same_posterior(thinker.infer_posterior(ids, num_inference_steps=0, initial_posterior=start), start, 0)


def test_defaults_come_from_the_configuration(make_model, paper_model, ids):
    settings = dict(
        num_inference_steps=3,
        inference_method="adamw",
        inference_learning_rate=0.11,
        inference_lr_schedule="cosine",
        inference_noise="fixed",
        inference_kl_weight=0.5,
    )
    configured = make_model(latent_reader="paper", **settings)
    same_posterior(configured.infer_posterior(ids), paper_model.infer_posterior(ids, **settings), 0)


def test_trace_and_callback(thinker, way, ids):
    seen = []
    posterior = thinker.infer_posterior(ids, num_inference_steps=4, callback=lambda *step: seen.append(step))
    steps = 0 if way == "amortized" else 4
    assert posterior.elbo_trace.shape == (steps, 3) and posterior.elbo_trace.dtype == torch.float32
    assert [step for step, _, _ in seen] == list(range(steps))
    assert all(latents.shape == (3, *thinker.config.latent_shape) for _, latents, _ in seen)
    for bound, (_, _, told) in zip(posterior.elbo_trace, seen, strict=True):
        assert torch.equal(bound, told)


@torch.no_grad()
@THOSE_THAT_DRAW
def test_inference_raises_the_bound(make_model, make_ids, method):
    model = make_model(latent_reader="paper", inference_method=method, initializer_range=0.15, latent_gate_init=2.0)
    ids = make_ids(rows=4, length=20)
    before, after = (
        model.elbo(ids, model.infer_posterior(ids, num_inference_steps=steps), num_particles=32).elbo.sum()
        for steps in (0, 16)
    )
    assert after > before + 4


def test_a_method_of_the_model_is_the_function(model, ids):
    posterior = model.infer_posterior(ids)
    assert infer_posterior(model, ids) == posterior == model.infer_posterior(Text.of(model, ids))


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(thinker, ids, pad_rows, side):
    rows = [ids[0], ids[1, :5], ids[2, :2], ids[1, :9]]
    batch, mask = pad_rows(rows, side, fill=9)
    together = thinker.infer_posterior(batch, mask, num_inference_steps=4)
    scores = thinker.elbo(batch, together, mask, num_particles=2)
    for index, row in enumerate(rows):
        alone = thinker.infer_posterior(row[None], num_inference_steps=4)
        same_posterior(together[index], alone)
        close(together.elbo_trace[:, index], alone.elbo_trace[:, 0], 1e-4)
        for batched, single in zip(scores, thinker.elbo(row[None], alone, num_particles=2), strict=True):
            close(batched[index], single[0], 1e-4)
        close(together.sample(seed=4)[index], alone.sample(seed=4)[0], 1e-4)
    assert together.num_non_finite == 0 and not torch.allclose(together.mean[0], together.mean[3], atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_with_nothing_to_explain_get_the_prior(thinker, way, ids, pad_rows, random_posterior, side):
    rows = [ids[0], ids[1, :0], ids[2, :1], ids[1]]
    labels = [row.clone() for row in rows]
    labels[3][:] = -100
    batch, mask = pad_rows(rows, side)
    targets, _ = pad_rows(labels, side, fill=-100)
    starts = [None] if way == "amortized" else [None, random_posterior(*thinker.config.latent_shape, rows=4)]
    for start in starts:
        posterior = thinker.infer_posterior(batch, mask, targets, initial_posterior=start)
        assert not posterior.mean[1:].any() and not posterior.log_variance[1:].any()
        assert posterior.num_non_finite == 0
        assert posterior.elbo_trace[:, 0].isfinite().all()
        alone = thinker.infer_posterior(ids[:1], initial_posterior=None if start is None else start[0])
        same_posterior(posterior[0], alone)


@pytest.mark.parametrize("shape", [(2, 1), (2, 0), (0, 5)])
def test_batches_with_nothing_to_explain(thinker, way, shape):
    if way == "amortized" and not shape[0]:
        pytest.skip("An encoder is transformers' layers, which take no batch of none.")
    posterior = thinker.infer_posterior(torch.full(shape, 5))
    assert posterior.mean.shape == (shape[0], *thinker.config.latent_shape)
    assert not posterior.mean.any() and not posterior.log_variance.any()


def test_labels_choose_what_is_explained(model, reader, ids, make_noise):
    labels = ids.clone()
    labels[:, 6:] = -100
    seen = model.infer_posterior(ids, labels=labels)
    assert not torch.allclose(seen.mean, model.infer_posterior(ids).mean, atol=1e-3)
    # Attention is causal: what follows the labels matters to the noise alone.
    noise = {} if reader == "memory" else dict(epsilon=make_noise(3, *SHAPE))
    same_posterior(model.infer_posterior(ids, labels=labels, **noise), model.infer_posterior(ids[:, :6], **noise))


# ------------------------------------------------------------------ non-finite objectives


@THOSE_THAT_DRAW
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_row_that_turns_non_finite_keeps_its_best(paper_model, ids, make_noise, caplog, method, bad):
    settings = dict(inference_method=method, inference_lr_schedule="constant")
    epsilon = make_noise(4, 3, *SHAPE)
    healthy = paper_model.infer_posterior(ids, num_inference_steps=4, epsilon=epsilon, **settings)
    assert healthy.num_non_finite == 0 and not caplog.records
    broken = epsilon.clone()
    broken[2, 1] = bad
    posterior = paper_model.infer_posterior(ids, num_inference_steps=4, epsilon=broken, **settings)
    assert posterior.num_non_finite == 1
    assert "1 of 3 sequences turned non-finite" in caplog.text
    assert posterior[[0, 2]] == healthy[[0, 2]]
    best = int(healthy.elbo_trace[:2, 1].argmax())  # the steps before the bad one
    until_best = paper_model.infer_posterior(ids, num_inference_steps=best, epsilon=epsilon[:best], **settings)
    assert posterior[1] == until_best[1]


def test_a_row_that_was_never_finite_gets_the_prior(make_thinker, way, ids, caplog):
    model = make_thinker(way, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = float("nan")
    ids[ids == 60] = 59
    healthy = model.infer_posterior(ids[[0, 2]])
    assert not caplog.records
    ids[1, 3] = 60
    posterior = model.infer_posterior(ids)
    assert posterior.num_non_finite == 1 and "1 of 3" in caplog.text
    assert not posterior.mean[1].any() and not posterior.log_variance[1].any()
    same_posterior(posterior[[0, 2]], healthy)


def test_a_gradient_that_is_not_finite_where_the_objective_is(paper_model, ids, caplog):
    def poison(module, arguments):
        arguments[0].register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(1), float("nan")))

    healthy = paper_model.infer_posterior(ids)
    paper_model.model.layers[0].cross_attn.k_proj.register_forward_pre_hook(poison)
    posterior = paper_model.infer_posterior(ids)
    assert posterior.num_non_finite == 1 and "1 of 3" in caplog.text
    assert not posterior.mean[1].any() and not posterior.log_variance[1].any()
    assert posterior[[0, 2]] == healthy[[0, 2]]


def test_a_step_that_overflows(paper_model, ids, caplog):
    posterior = paper_model.infer_posterior(ids, inference_method="adamw", inference_learning_rate=1e30)
    assert posterior.num_non_finite == 3 and "3 of 3" in caplog.text
    assert posterior.mean.isfinite().all() and posterior.log_variance.isfinite().all()


# ------------------------------------------------------------------ early stop


def test_early_stop_is_the_loop_cut_short_row_by_row(paper_model, make_ids):
    """Each row's posterior is that of the plain loop at the step where its own ELBO ceased to gain."""
    ids, steps, tolerance = make_ids(4, 12), 40, 0.01
    stopped = paper_model.infer_posterior(ids, num_inference_steps=steps, inference_tolerance=tolerance)
    plain = paper_model.infer_posterior(ids, num_inference_steps=steps)
    lengths = []
    for row in range(4):
        trace = plain.elbo_trace[:, row]
        gains = [(trace[t - 4 : t].mean() - trace[t - 8 : t - 4].mean()).item() / 11 for t in range(8, steps + 1)]
        lengths.append(8 + next(index for index, gain in enumerate(gains) if gain < tolerance))
        alone = paper_model.infer_posterior(ids[row : row + 1], num_inference_steps=lengths[-1])
        same_posterior(stopped[row], alone)
    assert len(stopped.elbo_trace) == max(lengths) < steps
    assert len(set(lengths)) > 1  # or the rows were not told apart


def test_early_stop_that_never_comes_changes_nothing(paper_model, ids):
    never = paper_model.infer_posterior(ids, num_inference_steps=12, inference_tolerance=-1e6)
    assert never == paper_model.infer_posterior(ids, num_inference_steps=12)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(num_inference_steps=-1), "num_inference_steps must be an integer of 0 or more, got -1"),
        (dict(num_inference_steps=True), "num_inference_steps must be an integer of 0 or more, got True"),
        (dict(inference_learning_rate=0.0), "inference_learning_rate must be positive and finite, got 0.0"),
        (dict(inference_learning_rate="0.1"), "inference_learning_rate must be positive and finite, got '0.1'"),
        (dict(inference_kl_weight=math.nan), "inference_kl_weight must be positive and finite, got nan"),
        (dict(inference_tolerance=math.inf), "inference_tolerance must be None or finite, got inf"),
        (dict(inference_method="sgd"), "inference_method must be one of natural, adamw, lbfgs.*; got 'sgd'"),
        (dict(inference_lr_schedule="linear"), "inference_lr_schedule.*constant.*linear"),
        (dict(inference_noise="none"), "inference_noise.*fresh, fixed.*none"),
        (dict(seed="x"), "seed must be an integer, got 'x'"),
        (dict(epsilon=torch.zeros(3, 4, 32)), r"epsilon.*\(3, 2, 2, 32\).*\(3, 4, 32\)"),
        (dict(epsilon=torch.zeros(5, 3, *SHAPE)), r"epsilon.*\(2, 3, 2, 2, 32\)"),
        (dict(initial_posterior=ZEROS), "initial_posterior must be a LatentPosterior, got Tensor"),
        (dict(initial_posterior=LatentPosterior(ZEROS[:2], ZEROS[:2])), "initial_posterior must have the shape"),
        (dict(initial_posterior=LatentPosterior(ZEROS, ZEROS - math.inf)), "initial_posterior is a point"),
    ],
)
def test_bad_settings_are_refused_before_any_computation(paper_model, ids, monkeypatch, settings, words):
    monkeypatch.setattr(paper_model, "forward", None)
    with pytest.raises(ValueError, match=words):
        paper_model.infer_posterior(ids, **settings)


def test_numbers_of_numpy_and_tokens_and_masks_of_any_type(paper_model, ids):
    expected = paper_model.infer_posterior(ids, num_inference_steps=3, inference_learning_rate=0.25)
    rates = dict(num_inference_steps=np.int64(3), inference_learning_rate=np.float32(0.25), seed=np.int32(0))
    for mask in (ids > 0, torch.ones(ids.shape), torch.ones_like(ids)):
        same_posterior(paper_model.infer_posterior(ids.int(), mask, **rates), expected)


def test_the_twin_has_nothing_to_infer(make_model, ids):
    with pytest.raises(ValueError, match="num_latents=0: it has no latents to infer"):
        make_model(num_latents=0).infer_posterior(ids)
