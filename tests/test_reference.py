"""The released code's figures, which are facts: `reference/mha` holds a small random model and what it computes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltm_hf import LatentPosterior
from ltm_hf.conversion.original import convert

FOLDER = Path(__file__).parent / "reference" / "mha"


@pytest.fixture(scope="module")
def model():
    return convert(FOLDER / "original_weights.safetensors", FOLDER / "params.json").eval()


@pytest.fixture(scope="module")
def expected():
    """Latents, and all that has their shape, as (batch, layers, latents a layer, hidden)."""
    tensors = load_file(FOLDER / "expected.safetensors")
    return {name: x.view(3, 3, 8, 64) if x.shape == (3, 24, 64) else x for name, x in tensors.items()}


@pytest.fixture(scope="module")
def sequences(expected):
    """The tokens that are read and, one place on, those that are predicted, as one sequence."""
    inputs, targets = expected["input_ids"], expected["target_ids"]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    return torch.cat((inputs, targets[:, -1:]), dim=1)


def assert_equal(actual, expected):
    """Equal within 1e-4 of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@torch.no_grad()
def test_logits(model, expected):
    assert_equal(model(expected["input_ids"], latents=expected["latents"]).logits, expected["logits"])


@torch.no_grad()
def test_elbo(model, expected, sequences):
    posterior = LatentPosterior(expected["elbo.mu"], expected["elbo.log_var"])
    score = model.elbo(sequences, posterior, epsilon=expected["elbo.noise"])
    assert_equal(score.nll.sum(), expected["elbo.nll_sum"])
    assert_equal(score.kl, expected["elbo.kl_per_sequence"])
    assert_equal(score.kl.sum(), expected["elbo.kl_sum"])
    assert_equal(-score.elbo.sum(), expected["elbo.nelbo_sum"])
    assert score.num_tokens.tolist() == [96, 96, 96]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_fast_loop(model, expected, sequences, schedule):
    figures = {name.split(".")[1]: x for name, x in expected.items() if name.startswith(f"fast_{schedule}.")}
    noise = figures["noise"]
    posterior = model.infer_posterior(
        sequences,
        inference_lr_schedule=schedule,
        initial_posterior=LatentPosterior(figures["mu0"], figures["log_var0"]),
        epsilon=noise,
    )
    assert_equal(posterior.mean, figures["mu"])
    assert_equal(posterior.log_variance, figures["log_var"])
    assert_equal(posterior.reparameterize(noise), figures["latents"])
    assert_equal(-posterior.elbo_trace.sum(dim=1), figures["nelbo_sum_per_step"])
    with torch.no_grad():
        score = model.elbo(sequences, posterior, epsilon=noise)
    assert_equal(score.nll.mean(), figures["nll_mean_per_sequence"])
    assert_equal(score.kl.mean(), figures["kl_mean_per_sequence"])


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_continuation(model, expected, use_cache):
    ids = model.generate(
        expected["greedy.prompt_ids"],
        latents=expected["latents"],
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        use_cache=use_cache,
    )
    assert torch.equal(ids, expected["greedy.sequence_ids"])


def test_inference_settings_of_the_released_code(model):
    config = model.config
    assert (config.num_inference_steps, config.inference_learning_rate) == (8, 0.3)
    assert (config.inference_method, config.inference_lr_schedule) == ("adamw", "cosine")
    assert (config.inference_noise, config.inference_kl_weight) == ("fixed", 1.0)
