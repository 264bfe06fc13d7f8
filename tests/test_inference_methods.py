"""Inference methods: their traits and settings, one of your own, and the ablations: Langevin chains and an encoder."""

import logging
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ltm_hf import LatentPosterior, LTMConfig, LTMForCausalLM, LTMModel, elbo, infer_posterior, methods_ltm
from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.evaluation import evaluate_likelihood
from ltm_hf.inference_ltm import amortized_posterior
from ltm_hf.likelihood_ltm import Text, negative_log_likelihood
from ltm_hf.methods_ltm import INFERENCE_METHODS, InferenceMethod, method_of, register_inference_method, step_size

SHAPE = (2, 2, 32)  # layers, latents a layer, hidden
LANGEVIN = dict(inference_method="langevin", inference_learning_rate=0.05)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def model(paper_model):
    return paper_model


@pytest.fixture
def encoder(make_encoder):
    return make_encoder()


# ------------------------------------------------------------------ settings and traits


def paper(**settings):
    return LTMConfig(latent_reader="paper", num_latents=24, **settings)


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("natural", [0.5, 0.5 / 1.5, 0.5 / 2]),
        ("adamw", [0.3] * 3),
        ("lbfgs", [0.5] * 3),
        ("langevin", [0.1] * 3),
    ],
)
def test_step_sizes_of_a_method_s_own(method, sizes):
    """By a configuration of it, and by a call that asks for it of a model that has another."""
    own = InferenceSettings.of(paper(inference_method=method))
    other = paper(inference_method="lbfgs" if method == "adamw" else "adamw", inference_learning_rate=0.7)
    for settings in (own, InferenceSettings.of(other, inference_method=method)):
        assert method_of(settings) is INFERENCE_METHODS[method]
        assert [step_size(settings, step) for step in range(3)] == pytest.approx(sizes)


def test_step_sizes_that_are_asked_for():
    config = paper(num_inference_steps=4, inference_learning_rate=0.2, inference_lr_schedule="cosine")
    for settings in (InferenceSettings.of(config), InferenceSettings.of(config, inference_method="natural")):
        assert step_size(settings, 0) == pytest.approx(0.2) and step_size(settings, 4) == pytest.approx(0.02)
    given = InferenceSettings.of(config, inference_method="langevin", inference_learning_rate=0.02)
    assert step_size(given, 0) == step_size(given, 3) == 0.02


def test_traits_are_what_methods_do(make_thinker, way, ids):
    """What others ask of a method, against what it does to a posterior."""
    thinker = make_thinker(way)
    method, noise = method_of(thinker.config), {} if way == "memory" else dict(inference_noise="fixed")
    posterior = thinker.infer_posterior(ids, num_inference_steps=3)
    assert (len(posterior.elbo_trace) == 3) == method.takes_steps
    assert posterior.log_variance.isneginf().all() == method.is_point
    assert posterior.kl_divergence().isfinite().all() == method.has_variance
    if way == "memory":
        return
    again = thinker.infer_posterior(ids, num_inference_steps=3, seed=1)
    assert (again == posterior) == (method.at_mean or not method.takes_steps)
    fixed = thinker.infer_posterior(ids, num_inference_steps=3, **noise)
    assert (fixed == posterior) == ("inference_noise" not in method.settings)


@pytest.fixture
def registered(monkeypatch):
    """The registry, restored after."""
    monkeypatch.setattr(methods_ltm, "INFERENCE_METHODS", dict(INFERENCE_METHODS))
    monkeypatch.setitem(InferenceSettings.CHOICES, "inference_method", tuple(INFERENCE_METHODS))


def test_a_method_of_one_s_own(registered, model, ids, make_noise, make_model):
    """A step downhill in the mean alone, at a sample or at the mean; by its name and from a configuration."""

    class Downhill(InferenceMethod):
        default_step_size = 0.25
        default_schedule = "inverse"

        def update(self, gradient, epsilon, step_size):
            self.mean = self.mean - step_size * (self.mean + gradient)

    class FromOne(Downhill):
        at_mean = True

        @classmethod
        def start(cls, keys, shape, seed):
            return torch.ones(len(keys), *shape), torch.zeros(len(keys), *shape)

    with pytest.raises(ValueError, match="must be one of.*'downhill'"):
        model.infer_posterior(ids, inference_method="downhill")
    register_inference_method("downhill", Downhill)
    register_inference_method("from one", FromOne)
    epsilon = make_noise(2, 3, *SHAPE)
    configured = make_model(latent_reader="paper", inference_method="from one")
    for fitted, mean, noise in (
        (model.infer_posterior(ids, inference_method="downhill", epsilon=epsilon), torch.zeros(3, *SHAPE), epsilon),
        (configured.infer_posterior(ids, epsilon=epsilon), torch.ones(3, *SHAPE), torch.zeros_like(epsilon)),
    ):
        for rate, at in zip((0.25, 0.25 / 1.25), noise, strict=True):
            z = (mean + at).requires_grad_()
            (gradient,) = torch.autograd.grad(negative_log_likelihood(model, Text.of(model, ids), z).sum(), z)
            mean = mean - rate * (mean + gradient)
        close(fitted.mean, mean)
        assert not fitted.log_variance.any()


def test_starts(model, ids):
    prior = model.infer_posterior(ids, num_inference_steps=0)
    assert not prior.mean.any() and not prior.log_variance.any() and prior.elbo_trace.shape == (0, 3)
    narrow = model.infer_posterior(ids, num_inference_steps=0, inference_method="adamw")
    assert narrow.mean.mean().abs() < 0.003 and narrow.mean.std().item() == pytest.approx(0.01, rel=0.2)
    assert narrow.log_variance.mean().item() == pytest.approx(-5, abs=0.03)
    assert narrow.log_variance.std().item() == pytest.approx(0.1, rel=0.2)
    other_seed = model.infer_posterior(ids, num_inference_steps=0, inference_method="adamw", seed=1)
    assert not torch.allclose(other_seed.mean, narrow.mean)


# ------------------------------------------------------------------ Langevin dynamics


@pytest.fixture
def quadratic(make_quadratic):
    weights = torch.tensor([[1.0, 0.9, 0.0], [0.9, 0.3, 0.5], [0.5, 0.8, 0.1], [0.1, 0.7, 0.7]])
    return make_quadratic(weights, torch.tensor([1.0, 0.5, -1.5, 2.0]))


def assert_law(chains, mean, covariance, bias=0.0):
    """Mean and covariance of independent chains (B, D), to five standard errors and a bias."""
    count, variances = len(chains), covariance.diagonal()
    error = (variances / count).sqrt()
    assert ((chains.mean(dim=0) - mean).abs() < 5 * error + bias).all()
    error = ((variances[:, None] * variances + covariance**2) / count).sqrt()
    assert ((chains.T.cov() - covariance).abs() < 5 * error + bias).all()


def test_law_of_a_chain_after_few_steps(quadratic):
    """Of a Gaussian target it is Gaussian: m ← m - s (Am - b), C ← (I - sA) C (I - sA) + 2s I, from the prior."""
    (precision, shift), step, eye = quadratic.precision(), 0.1, torch.eye(3)
    posterior = infer_posterior(
        quadratic,
        quadratic.texts(4000),
        num_inference_steps=3,
        inference_method="langevin",
        inference_learning_rate=step,
    )
    mean, covariance = torch.zeros(3), eye
    for _ in range(3):
        mean = mean - step * (precision @ mean - shift)
        covariance = (eye - step * precision) @ covariance @ (eye - step * precision) + 2 * step * eye
    assert_law(posterior.mean.flatten(start_dim=1), mean, covariance)


def test_a_long_chain_of_small_steps_samples_the_posterior(quadratic):
    """Its stationary covariance is A⁻¹ (I - sA/2)⁻¹: larger than the posterior's by at most a few hundredths here."""
    precision, shift = quadratic.precision()
    covariance = torch.linalg.inv(precision)
    posterior = infer_posterior(
        quadratic,
        quadratic.texts(4000),
        num_inference_steps=250,
        inference_method="langevin",
        inference_learning_rate=0.02,
    )
    samples = posterior.mean.flatten(start_dim=1)
    assert_law(samples, covariance @ shift, covariance, bias=0.02)
    assert (samples.T.cov() - torch.eye(3)).abs().max() > 0.3  # which is not where it began


def test_langevin_against_its_definition(model, ids, make_noise):
    """z ← z - s ∂(NLL + |z|²/2)/∂z + √(2s) ε by autograd, from a given point."""
    noise, start, step = make_noise(4, 3, *SHAPE), make_noise(3, *SHAPE, seed=1), 0.05
    point = LatentPosterior(start, torch.full_like(start, -torch.inf))
    seen = []
    posterior = model.infer_posterior(
        ids, num_inference_steps=4, initial_posterior=point, epsilon=noise, callback=lambda *step: seen.append(step),
        **LANGEVIN,
    )  # fmt: skip
    z, energies, states = start, [], []
    for epsilon in noise:
        z = z.detach().requires_grad_()
        energy = negative_log_likelihood(model, Text.of(model, ids), z) + 0.5 * z.square().sum(dim=(1, 2, 3))
        (gradient,) = torch.autograd.grad(energy.sum(), z)
        energies.append(energy.detach())
        states.append(z.detach())
        z = z - step * gradient + math.sqrt(2 * step) * epsilon
    close(posterior.mean, z.detach())
    close(posterior.elbo_trace, -torch.stack(energies))
    close(torch.stack([latents for _, latents, _ in seen]), torch.stack(states))
    close(torch.stack([value for _, _, value in seen]), -torch.stack(energies))
    close(point.mean, make_noise(3, *SHAPE, seed=1), 0)  # left alone


def test_a_chain_starts_at_a_sample_of_the_prior_or_of_the_given_posterior(model, make_ids, make_noise):
    ids = make_ids(rows=40)
    start = model.infer_posterior(ids, num_inference_steps=0, **LANGEVIN)
    assert abs(start.mean.mean()) < 0.05 and abs(start.mean.std() - 1) < 0.05
    assert start.log_variance.isneginf().all() and start.elbo_trace.shape == (0, 40)
    assert not torch.equal(start.mean, model.infer_posterior(ids, num_inference_steps=0, seed=1, **LANGEVIN).mean)
    given = LatentPosterior(make_noise(40, *SHAPE), make_noise(40, *SHAPE, seed=1) - 1)
    other = model.infer_posterior(ids, num_inference_steps=0, initial_posterior=given, **LANGEVIN)
    close(other.mean, given.mean + (0.5 * given.log_variance).exp() * start.mean)


def test_settings_of_a_fit_do_not_touch_a_chain(model, ids):
    expected = model.infer_posterior(ids, num_inference_steps=12, **LANGEVIN)
    for setting in (
        dict(inference_noise="fixed"),
        dict(inference_lr_schedule="cosine"),
        dict(inference_tolerance=100.0),
    ):
        found = model.infer_posterior(ids, num_inference_steps=12, **LANGEVIN, **setting)
        assert torch.equal(found.mean, expected.mean) and len(found.elbo_trace) == 12, setting


def test_a_chain_that_turns_non_finite_keeps_its_best_point(model, ids, make_noise, caplog):
    noise = make_noise(6, 3, *SHAPE)
    noise[3, 1, 0, 0, 0] = 1e30  # whose square is too large
    seen = []
    settings = dict(num_inference_steps=6, epsilon=noise, callback=lambda *step: seen.append(step), **LANGEVIN)
    with caplog.at_level(logging.WARNING):
        posterior = model.infer_posterior(ids, **settings)
    assert posterior.num_non_finite == 1 and "1 of 3" in caplog.text
    values = torch.stack([value[1] for _, _, value in seen[:4]])
    assert (
        torch.equal(posterior.mean[1], seen[int(values.argmax())][1][1]) and posterior.log_variance[1].isneginf().all()
    )
    others = model.infer_posterior(ids[[0, 2]], num_inference_steps=6, epsilon=noise[:, [0, 2]], **LANGEVIN)
    close(posterior.mean[[0, 2]], others.mean)

    noise[:] = 1e30  # only the start is finite
    assert torch.equal(model.infer_posterior(ids, **settings).mean, seen[-6][1])


# ------------------------------------------------------------------ by name


def test_bad_settings_are_refused_before_any_computation(model, encoder, ids, make_noise, monkeypatch):
    with pytest.raises(
        ValueError, match="inference_method must be one of natural, adamw, lbfgs, langevin, amortized; got 'vae'"
    ):
        paper(inference_method="vae")
    point = LatentPosterior(make_noise(3, *SHAPE), torch.full((3, *SHAPE), -torch.inf))
    for given in (model, encoder, encoder.encoder):
        monkeypatch.setattr(given, "forward", None)
    with pytest.raises(ValueError, match="inference_method must be one of.*'mcmc'"):
        model.infer_posterior(ids, inference_method="mcmc")
    for function in (model.infer_posterior, model.generate):
        with pytest.raises(ValueError, match="'amortized' needs a model with an encoder"):
            function(ids, inference_method="amortized")
    with pytest.raises(ValueError, match="needs a model with an encoder"):
        amortized_posterior(model, Text.of(model, ids))
    with pytest.raises(ValueError, match="initial_posterior.*takes no step"):
        encoder.infer_posterior(ids, initial_posterior=point)
    with pytest.raises(ValueError, match="initial_posterior must have the shape"):
        model.infer_posterior(ids[:2], initial_posterior=point, **LANGEVIN)


@pytest.mark.parametrize("settings", [dict(inference_method="langevin", num_inference_steps=3), {}], ids=str)
def test_generation_reads_the_latents_of_the_method(encoder, ids, settings):
    """As an argument, and as a field of a generation config."""
    posterior = encoder.infer_posterior(ids, **settings)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8)
    expected = encoder.generate(ids, latents=posterior.mean, **options)
    output = encoder.generate(ids, return_dict_in_generate=True, **settings, **options)
    assert torch.equal(output.sequences, expected) and torch.equal(output.posterior.mean, posterior.mean)
    assert not torch.equal(encoder.generate(ids, inference_method="natural", **options), expected)
    encoder.generation_config.inference_method = "natural"
    assert not torch.equal(encoder.generate(ids, **options), expected)


# ------------------------------------------------------------------ the amortised encoder


@pytest.mark.parametrize("self_attention", ["mistral", "qwen2", "qwen3"])
def test_an_encoder_starts_at_the_prior(make_model, ids, self_attention):
    model = make_model(latent_reader="paper", inference_method="amortized", self_attention=self_attention)
    posterior = model.infer_posterior(ids)
    assert not posterior.mean.any() and not posterior.log_variance.any()
    assert posterior.kl_divergence().tolist() == [0.0] * 3


def test_only_amortised_models_have_an_encoder(make_model, make_encoder):
    plain, amortized = make_model(latent_reader="paper"), make_encoder()
    assert {name for name in amortized.state_dict() if name not in plain.state_dict()} == {
        name for name in amortized.state_dict() if name.startswith("encoder.")
    }
    twin = make_model(latent_reader="paper", num_latents=0, inference_method="amortized")
    assert set(twin.state_dict()) == set(make_model(num_latents=0).state_dict())


def test_attention_implementations_agree(encoder, ids):
    expected = encoder.infer_posterior(ids)
    encoder.set_attn_implementation("eager")
    close(encoder.infer_posterior(ids).mean, expected.mean)


def test_an_encoder_reads_both_ways_and_in_order(encoder, make_ids):
    """Every token matters to every latent, further than the decoder's window of 4; so does their order."""
    ids = make_ids(1)
    expected = encoder.infer_posterior(ids).mean
    for position in range(ids.shape[1]):
        other = ids.clone()
        other[0, position] = (other[0, position] - 2) % 58 + 3
        assert (encoder.infer_posterior(other).mean - expected).abs().amax(dim=-1).min() > 1e-4, position
    assert (encoder.infer_posterior(ids.flip(1)).mean - expected).abs().max() > 1e-2
    assert (expected[0, 0, 0] - expected[0, 1, 1]).abs().max() > 1e-2  # latents are not copies of one


def test_an_encoder_reads_no_further_than_what_is_scored(encoder, ids):
    """As a fit, which asks a causal decoder: here tokens 4 to 6."""
    labels = torch.full_like(ids, -100)
    labels[:, 4:7] = ids[:, 4:7]
    posterior = encoder.infer_posterior(ids, labels=labels)
    close(posterior.mean, encoder.infer_posterior(ids[:, :7]).mean)
    prompt_matters = ids.clone()
    prompt_matters[:, 0] = 3 + (ids[:, 0] - 2) % 58
    assert (encoder.infer_posterior(prompt_matters, labels=labels).mean - posterior.mean).abs().max() > 1e-3
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    close(encoder.infer_posterior(ids, mask).mean, posterior.mean)


def test_gradient_reaches_encoder_and_embeddings_in_training_alone(encoder, ids):
    posterior = amortized_posterior(encoder, Text.of(encoder, ids))
    posterior.kl_divergence().sum().backward()
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {n for n, _ in encoder.encoder.named_parameters(prefix="encoder")} | {"model.embed_tokens.weight"}
    encoder.zero_grad()
    for inferred in (encoder.infer_posterior(ids), encoder.infer_posterior(ids, inference_method="natural")):
        assert not inferred.mean.requires_grad
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    close(inferred.keys, posterior.keys, 0)
    close(encoder.infer_posterior(ids).mean, posterior.mean.detach())


def test_a_fit_can_start_where_the_encoder_ends(encoder, ids):
    start = encoder.infer_posterior(ids)
    same = encoder.infer_posterior(ids, inference_method="natural", initial_posterior=start, num_inference_steps=0)
    assert torch.equal(same.mean, start.mean) and torch.equal(same.log_variance, start.log_variance)
    fitted = encoder.infer_posterior(ids, inference_method="natural", initial_posterior=start, num_inference_steps=16)
    with torch.no_grad():
        before, after = (elbo(encoder, ids, q, num_particles=16).elbo for q in (start, fitted))
    assert (after > before + 1).all()


def test_latents_are_float32_whatever_the_model(encoder, ids):
    expected = encoder.infer_posterior(ids)
    found = encoder.to(torch.bfloat16).infer_posterior(ids)
    assert found.mean.dtype == found.log_variance.dtype == torch.float32
    assert (found.mean - expected.mean).norm() < 0.1 * expected.mean.norm()


def test_saved_and_loaded(encoder, make_model, ids, tmp_path, caplog):
    encoder.save_pretrained(tmp_path / "encoder")
    expected = encoder.infer_posterior(ids)
    loaded = LTMForCausalLM.from_pretrained(tmp_path / "encoder")
    assert torch.equal(loaded.infer_posterior(ids).mean, expected.mean)
    _, report = LTMModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not report["missing_keys"] and not [name for name in report["unexpected_keys"] if "encoder" in name]

    # A decoder that is to learn an encoder: its own start is the prior.
    make_model(latent_reader="paper").save_pretrained(tmp_path / "plain")
    grown = LTMForCausalLM.from_pretrained(tmp_path / "plain", inference_method="amortized")
    assert grown.infer_posterior(ids).kl_divergence().tolist() == [0.0] * 3
    assert grown.encoder.queries.weight.std() > 0.1


def test_a_backbone_can_learn_an_encoder(ids):
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape)).eval()
    model = LTMForCausalLM.from_pretrained_backbone(
        backbone, latent_reader="paper", num_latents=4, inference_method="amortized", freeze_backbone=True
    ).eval()
    posterior = model.infer_posterior(ids)
    assert posterior.kl_divergence().tolist() == [0.0] * 3
    close(model(ids, latents=posterior.sample(0)).logits, backbone(ids).logits)
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())
    assert not model.model.embed_tokens.weight.requires_grad


def test_figures_by_another_method(encoder, make_ids):
    """Of a chain only exact losses given its latents are finite. A decoder can be scored by another method."""
    ids = make_ids(4, 10)
    rows, half, tokens = [{"input_ids": row.tolist()} for row in ids], ids[:, :5], 36
    labels = ids.clone()
    labels[:, :5] = -100
    prefixes = set()
    for settings in ({}, dict(inference_method="natural"), LANGEVIN):
        found = evaluate_likelihood(
            encoder, rows, progress=False, figures=("bound", "kl", "prefix"), seed=0, **settings
        )
        posterior, prefix = encoder.infer_posterior(ids, **settings), encoder.infer_posterior(half, **settings)
        with torch.no_grad():
            bound = -elbo(encoder, ids, posterior).elbo.sum().item() / tokens
            scored = Text.of(encoder, ids, labels=labels)
            loss = negative_log_likelihood(encoder, scored, prefix.mean).sum().item() / 20
        assert found["bound"] == pytest.approx(bound) and found["prefix"] == pytest.approx(loss)
        assert math.isinf(found["bound"]) == math.isinf(found["kl"]) == (settings is LANGEVIN)
        prefixes.add(round(loss, 3))
    assert len(prefixes) == 3


def test_an_encoder_is_the_definition(encoder, ids):
    """Layer by layer, with attention written out and no mask: row 0 of the batch, single precision."""
    states = torch.cat((encoder.model.embed_tokens(ids[:1]), encoder.encoder.queries.weight[None]), dim=1)
    stride = encoder.config.latent_position_stride
    positions = torch.tensor([*range(12), 0, stride, 0, stride])  # two latents a layer, each at its rotary position
    angles = positions[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotate(x):
        return x * cos + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * sin

    def norm(x, module):
        return F.rms_norm(x, x.shape[-1:], module.weight, 1e-5)

    with torch.no_grad():
        for layer in encoder.encoder.layers:
            x, attention = norm(states, layer.input_layernorm), layer.self_attn
            q, k, v = (getattr(attention, f"{n}_proj")(x).view(1, 16, -1, 8).transpose(1, 2) for n in "qkv")
            q, k, v = rotate(q), rotate(k).repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
            attended = ((q @ k.mT / 8**0.5).softmax(dim=-1) @ v).transpose(1, 2).flatten(start_dim=2)
            states = states + attention.o_proj(attended)
            x, mlp = norm(states, layer.post_attention_layernorm), layer.mlp
            states = states + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        moments = encoder.encoder.head(norm(states[:, -4:], encoder.encoder.norm)).view(2, 2, 64)
    posterior = encoder.infer_posterior(ids)
    close(posterior.mean[0], moments[..., :32])
    close(posterior.log_variance[0], moments[..., 32:])
