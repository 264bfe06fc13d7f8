"""The ablations of variational inference: Langevin dynamics and an amortised encoder."""

import json
import logging
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ltm_hf import LatentPosterior, LTMConfig, LTMForCausalLM, LTMModel, elbo, infer_posterior
from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.evaluation import evaluate_likelihood
from ltm_hf.flops import count_flops, count_parameters, paper_training_flops, training_flops
from ltm_hf.posterior_ltm import amortized_posterior, negative_log_likelihood

SHAPE = (2, 2, 32)  # layers, latents a layer, hidden
LANGEVIN = dict(inference_method="langevin", inference_learning_rate=0.05)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def make_encoder(make_model):
    """A model with an encoder whose head has left zero, so that its posteriors differ from the prior."""

    def make(**overrides):
        model = make_model(inference_method="amortized", **overrides)
        with torch.no_grad():
            weight = model.encoder.head.weight
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        return model

    return make


@pytest.fixture
def encoder(make_encoder):
    return make_encoder()


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
        energy = negative_log_likelihood(model, ids, z) + 0.5 * z.square().sum(dim=(1, 2, 3))
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


def test_a_chain_is_a_point_without_a_finite_bound(model, ids, tmp_path):
    point = model.infer_posterior(ids, **LANGEVIN)
    assert torch.equal(point.sample(seed=3), point.mean) and torch.equal(point.scoring_sample(2), point.mean)
    assert point.kl_divergence().tolist() == [math.inf] * 3
    with torch.no_grad():
        estimate = elbo(model, ids, point, num_particles=2)
        close(estimate.nll, negative_log_likelihood(model, ids, point.mean))
    assert estimate.elbo.tolist() == [-math.inf] * 3

    point.save_pretrained(tmp_path)
    loaded = LatentPosterior.from_pretrained(tmp_path)
    assert torch.equal(loaded.mean, point.mean) and loaded.log_variance.isneginf().all()
    assert torch.equal(point[1:].sample(seed=3), point.mean[1:])


@pytest.mark.parametrize("weight", [0.25, 0.75])
def test_between_points_there_are_points(model, ids, weight):
    point, gaussian = model.infer_posterior(ids, **LANGEVIN), model.infer_posterior(ids)
    for other in (point[[2, 0, 1]], gaussian):
        for one, two in ((point, other), (other, point)):
            between = one.lerp(two, weight)
            close(between.sample(seed=0), (1 - weight) * one.mean + weight * two.mean)
            assert between.log_variance.isneginf().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_chain_does_not_depend_on_its_batch(model, make_ids, pad_rows, side):
    rows = [make_ids(1, length, seed)[0] for seed, length in enumerate((12, 7, 9))]
    batch = model.infer_posterior(*pad_rows(rows, side), num_inference_steps=4, **LANGEVIN)
    for index, row in enumerate(rows):
        alone = model.infer_posterior(row[None], num_inference_steps=4, **LANGEVIN)
        close(batch.mean[index], alone.mean[0])
        close(batch.elbo_trace[:, index], alone.elbo_trace[:, 0], 1e-4)
    assert (batch.mean[0] - batch.mean[1]).abs().mean() > 0.1


def test_settings_of_a_fit_do_not_touch_a_chain(model, ids):
    expected = model.infer_posterior(ids, num_inference_steps=12, **LANGEVIN)
    for setting in (
        dict(noise="fixed"),
        dict(inference_lr_schedule="cosine"),
        dict(inference_optimizer="adamw", inference_weight_decay=0.5),
        dict(inference_tolerance=100.0),
    ):
        found = model.infer_posterior(ids, num_inference_steps=12, **LANGEVIN, **setting)
        assert torch.equal(found.mean, expected.mean) and len(found.elbo_trace) == 12, setting


def test_rows_with_nothing_to_explain_get_the_prior(model, encoder, ids):
    ids[1, 1:] = 0
    mask = (ids != 0).long()
    for given, settings in ((model, LANGEVIN), (encoder, {})):
        posterior = given.infer_posterior(ids, mask, **settings)
        assert not posterior.mean[1].any() and not posterior.log_variance[1].any()
        assert posterior.kl_divergence()[1] == 0 and posterior.num_non_finite == 0
        assert posterior.mean[0].any() and posterior.mean[2].any()
    assert amortized_posterior(encoder, ids, mask).kl_divergence()[1] == 0  # and training pays nothing for it


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


def test_langevin_chains_are_frozen_and_leave_generators_alone(model, ids):
    before = torch.get_rng_state()
    posterior = model.infer_posterior(ids, **LANGEVIN)
    assert torch.equal(torch.get_rng_state(), before)
    assert not posterior.mean.requires_grad and all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ settings


def test_step_sizes_by_method(make_model, ids):
    """A config's own is a fit's or a chain's: asked for the other, a call takes 0.1 or 0.5."""
    for method, rate in dict(variational=0.5, langevin=0.1, amortized=0.5).items():
        assert InferenceSettings.of(LTMConfig(inference_method=method)).inference_learning_rate == rate
    config = LTMConfig(inference_learning_rate=0.3)
    assert InferenceSettings.of(config).inference_learning_rate == 0.3
    assert InferenceSettings.of(config, inference_method="amortized").inference_learning_rate == 0.3
    assert InferenceSettings.of(config, inference_method="langevin").inference_learning_rate == 0.1
    both = InferenceSettings.of(config, inference_method="langevin", inference_learning_rate=0.02)
    assert both.inference_learning_rate == 0.02
    config = LTMConfig(inference_method="langevin", inference_learning_rate=0.02)
    assert InferenceSettings.of(config).inference_learning_rate == 0.02
    assert InferenceSettings.of(config, inference_method="variational").inference_learning_rate == 0.5

    chain, fit = make_model(inference_method="langevin"), make_model()
    assert torch.equal(chain.infer_posterior(ids).mean, fit.infer_posterior(ids, inference_method="langevin").mean)
    found = chain.infer_posterior(ids, inference_method="variational")
    assert torch.equal(found.log_variance, fit.infer_posterior(ids).log_variance)


def test_configurations_without_the_setting_are_variational(tmp_path):
    LTMConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["inference_method"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert LTMConfig.from_pretrained(tmp_path).inference_method == "variational"


def test_round_trip(tmp_path):
    for method in ("langevin", "amortized"):
        config = LTMConfig(inference_method=method)
        config.save_pretrained(tmp_path)
        assert LTMConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_bad_settings_are_refused_before_any_computation(model, encoder, ids, make_noise, monkeypatch):
    with pytest.raises(ValueError, match="inference_method must be one of variational, langevin, amortized; got 'vae'"):
        LTMConfig(inference_method="vae")
    point = LatentPosterior(make_noise(3, *SHAPE), torch.full((3, *SHAPE), -torch.inf))
    for given in (model, encoder, encoder.encoder):
        monkeypatch.setattr(given, "forward", None)
    with pytest.raises(ValueError, match="inference_method must be one of.*'mcmc'"):
        model.infer_posterior(ids, inference_method="mcmc")
    for function in (model.infer_posterior, model.generate):
        with pytest.raises(ValueError, match="'amortized' needs a model with an encoder"):
            function(ids, inference_method="amortized")
    with pytest.raises(ValueError, match="needs a model with an encoder"):
        amortized_posterior(model, ids)
    with pytest.raises(ValueError, match="initial_posterior is a point"):
        model.infer_posterior(ids, initial_posterior=point)
    with pytest.raises(ValueError, match="initial_posterior.*takes no step"):
        encoder.infer_posterior(ids, initial_posterior=point)
    with pytest.raises(ValueError, match="initial_posterior must have the shape"):
        model.infer_posterior(ids[:2], initial_posterior=point, **LANGEVIN)
    with pytest.raises(ValueError, match="below vocab_size"):
        amortized_posterior(encoder, ids + 61)


@pytest.mark.parametrize("settings", [dict(inference_method="langevin", num_inference_steps=3), {}], ids=str)
def test_generation_reads_the_latents_of_the_method(encoder, ids, settings):
    """As an argument, and as a field of a generation config."""
    posterior = encoder.infer_posterior(ids, **settings)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8)
    expected = encoder.generate(ids, latents=posterior.mean, **options)
    output = encoder.generate(ids, return_dict_in_generate=True, **settings, **options)
    assert torch.equal(output.sequences, expected) and torch.equal(output.posterior.mean, posterior.mean)
    assert not torch.equal(encoder.generate(ids, inference_method="variational", **options), expected)
    encoder.generation_config.inference_method = "variational"
    assert not torch.equal(encoder.generate(ids, **options), expected)


# ------------------------------------------------------------------ the amortised encoder


@pytest.mark.parametrize("self_attention", ["mistral", "qwen2", "qwen3"])
def test_an_encoder_starts_at_the_prior(make_model, ids, self_attention):
    model = make_model(inference_method="amortized", self_attention=self_attention)
    posterior = model.infer_posterior(ids)
    assert not posterior.mean.any() and not posterior.log_variance.any()
    assert posterior.kl_divergence().tolist() == [0.0] * 3


def test_only_amortised_models_have_an_encoder(make_model, make_encoder):
    plain, amortized = make_model(), make_encoder()
    assert {name for name in amortized.state_dict() if name not in plain.state_dict()} == {
        name for name in amortized.state_dict() if name.startswith("encoder.")
    }
    assert set(plain.state_dict()) == set(make_model(inference_method="langevin").state_dict())
    baseline = make_model(num_latents=0, inference_method="amortized")
    assert set(baseline.state_dict()) == set(make_model(num_latents=0).state_dict())


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_does_not_see_batch_or_padding(encoder, make_ids, pad_rows, side):
    rows = [make_ids(1, length, seed)[0] for seed, length in enumerate((12, 7, 9))]
    for fill in (0, 7):
        batch = encoder.infer_posterior(*pad_rows(rows, side, fill))
        for index, row in enumerate(rows):
            alone = encoder.infer_posterior(row[None])
            close(batch.mean[index], alone.mean[0])
            close(batch.log_variance[index], alone.log_variance[0])


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
    posterior = amortized_posterior(encoder, ids)
    posterior.kl_divergence().sum().backward()
    reached = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {n for n, _ in encoder.encoder.named_parameters(prefix="encoder")} | {"model.embed_tokens.weight"}
    encoder.zero_grad()
    for inferred in (encoder.infer_posterior(ids), encoder.infer_posterior(ids, inference_method="variational")):
        assert not inferred.mean.requires_grad
    assert all(p.grad is None and p.requires_grad for p in encoder.parameters())
    close(inferred.keys, posterior.keys, 0)
    close(encoder.infer_posterior(ids).mean, posterior.mean.detach())


def test_an_encoder_takes_no_steps(encoder, ids):
    steps = []
    posterior = encoder.infer_posterior(ids, num_inference_steps=5, callback=lambda *step: steps.append(step))
    assert not steps and posterior.elbo_trace.shape == (0, 3)
    assert torch.equal(posterior.mean, encoder.infer_posterior(ids, num_inference_steps=0, seed=4).mean)


def test_a_fit_can_start_where_the_encoder_ends(encoder, ids):
    start = encoder.infer_posterior(ids)
    same = encoder.infer_posterior(ids, inference_method="variational", initial_posterior=start, num_inference_steps=0)
    assert torch.equal(same.mean, start.mean) and torch.equal(same.log_variance, start.log_variance)
    fitted = encoder.infer_posterior(
        ids, inference_method="variational", initial_posterior=start, num_inference_steps=16
    )
    with torch.no_grad():
        before, after = (elbo(encoder, ids, q, num_particles=16).elbo for q in (start, fitted))
    assert (after > before + 1).all()


def test_an_encoder_that_turns_non_finite_gives_the_prior(encoder, ids, caplog):
    with torch.no_grad():
        encoder.model.embed_tokens.weight[ids[1, 0]] = torch.nan
    rows = ids[torch.tensor([0, 1])].clone()
    rows[0][rows[0] == ids[1, 0]] = 3 if ids[1, 0] != 3 else 4
    with caplog.at_level(logging.WARNING):
        posterior = encoder.infer_posterior(rows)
    assert posterior.num_non_finite == 1 and "1 of 2" in caplog.text
    assert not posterior.mean[1].any() and posterior.mean[0].any() and posterior.mean.isfinite().all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(encoder, ids, context):
    expected = encoder.infer_posterior(ids)
    with context():
        close(encoder.infer_posterior(ids.clone()).mean, expected.mean, 0)


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

    make_model().save_pretrained(
        tmp_path / "plain"
    )  # a decoder that is to learn an encoder: its own start is the prior
    grown = LTMForCausalLM.from_pretrained(tmp_path / "plain", inference_method="amortized")
    assert grown.infer_posterior(ids).kl_divergence().tolist() == [0.0] * 3
    assert grown.encoder.queries.weight.std() > 0.1


def test_a_backbone_can_learn_an_encoder(ids):
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape)).eval()
    model = LTMForCausalLM.from_pretrained_backbone(
        backbone, num_latents=4, inference_method="amortized", freeze_backbone=True
    ).eval()
    posterior = model.infer_posterior(ids)
    assert posterior.kl_divergence().tolist() == [0.0] * 3
    close(model(ids, latents=posterior.sample(0)).logits, backbone(ids).logits)
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())
    assert not model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize(
    "variant",
    [{}, dict(num_key_value_heads=1), dict(self_attention="qwen2", num_latents=6, head_dim=6), dict(num_latents=0)],
    ids=str,
)
def test_parameters_and_flops_of_an_encoder(make_model, make_ids, variant):
    """Equal to torch's count, less the rotary tables, which older transformers write as a product."""
    model, rows, length = make_model(inference_method="amortized", **variant), 3, 17
    model.set_attn_implementation("eager")
    config, ids = model.config, make_ids(rows, length)
    assert count_parameters(config) == model.num_parameters()
    flops = training_flops(config, length)
    assert flops.fast_step == 0 and flops.num_inference_steps == 0 and flops.training_step == flops.slow_step

    def tables(module, positions):
        return count_flops(lambda: module.rotary_emb(model.model.norm.weight, torch.arange(positions)[None]))

    rotary = tables(model.model, length)
    if config.num_latents:
        rotary += count_flops(lambda: model.model.latent_position_embeddings(model.model.norm.weight))
        rotary += rows * tables(model.encoder, length + config.num_latents)  # positions differ by row

    def step():
        latents = amortized_posterior(model, ids).sample(seed=0) if config.num_latents else None
        model(ids, latents=latents, labels=ids, use_cache=False).loss.backward()

    assert count_flops(step) == round(rows * length * flops.slow_step) + rotary
    if config.num_latents:
        with pytest.raises(ValueError, match="no account of an encoder"):
            paper_training_flops(config)


# ------------------------------------------------------------------ figures


def test_likelihood_by_each_method(encoder, make_ids):
    """Of a chain only exact losses given its latents are finite. A decoder can be scored by another method."""
    ids = make_ids(4, 10)
    rows, half, tokens = [{"input_ids": row.tolist()} for row in ids], ids[:, :5], 36
    labels = ids.clone()
    labels[:, :5] = -100

    def figures(**settings):
        return evaluate_likelihood(encoder, rows, progress=False, figures=("bound", "kl", "prefix"), **settings)

    own, fitted, chain = (figures(**s) for s in ({}, dict(inference_method="variational"), LANGEVIN))
    for found, settings in ((own, {}), (fitted, dict(inference_method="variational")), (chain, LANGEVIN)):
        posterior, prefix = encoder.infer_posterior(ids, **settings), encoder.infer_posterior(half, **settings)
        with torch.no_grad():
            bound = -elbo(encoder, ids, posterior).elbo.sum().item() / tokens
            loss = negative_log_likelihood(encoder, ids, prefix.mean, labels=labels).sum().item() / 20
        assert found["bound"] == pytest.approx(bound) and found["prefix"] == pytest.approx(loss)
    assert chain["bound"] == chain["kl"] == math.inf
    assert len({round(found["prefix"], 3) for found in (own, fitted, chain)}) == 3


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
