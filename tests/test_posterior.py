"""Posteriors and the prior as things, and the noise that they are sampled with."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributions import Normal, kl_divergence

from ltm_hf import LatentPosterior
from ltm_hf.posterior_ltm import keyed_normal, mixed, sequence_keys

SHAPE = (2, 2, 32)  # layers, latents a layer, hidden
close = torch.testing.assert_close


@pytest.fixture
def posterior(make_noise):
    """As inference leaves one."""
    mean, log_variance = make_noise(3, *SHAPE), 0.5 * make_noise(3, *SHAPE, seed=1) - 1
    return LatentPosterior(mean, log_variance, make_noise(4, 3), torch.tensor([7, -5, 2**62]))


@pytest.fixture
def point(make_noise):
    """As Langevin dynamics leave one."""
    return LatentPosterior(make_noise(3, *SHAPE, seed=2), torch.full((3, *SHAPE), -torch.inf))


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
    others.append(keyed_normal(mixed(keys, torch.tensor(3)), SHAPE, 5, 0, 2))
    samples = [x.flatten() for draw in (noise, *others) for x in draw]
    correlations = torch.corrcoef(torch.stack(samples)).fill_diagonal_(0)
    assert correlations.abs().max() < 0.45  # 32 samples of 128; a repeated draw would give 1


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


# ------------------------------------------------------------------ samples and nats


def test_kl_divergence(posterior):
    prior = Normal(torch.zeros(3, *SHAPE), torch.ones(3, *SHAPE))
    expected = kl_divergence(Normal(posterior.mean, (0.5 * posterior.log_variance).exp()), prior).sum(dim=(1, 2, 3))
    close(posterior.kl_divergence(), expected)
    assert not LatentPosterior(torch.zeros(3, *SHAPE), torch.zeros(3, *SHAPE)).kl_divergence().any()


def test_samples_of_a_posterior():
    rows, mean, log_variance = 400, 0.5, -1.0
    posterior = LatentPosterior(torch.full((rows, *SHAPE), mean), torch.full((rows, *SHAPE), log_variance))
    sample = posterior.sample(seed=3)
    assert torch.equal(sample, posterior.sample(seed=3))
    assert not torch.allclose(sample, posterior.sample(seed=4))
    assert sample.mean().item() == pytest.approx(mean, abs=0.02)
    assert sample.var().item() == pytest.approx(math.exp(log_variance), rel=0.03)
    assert len(posterior) == rows


def test_a_point_is_all_its_samples(point):
    assert torch.equal(point.sample(seed=3), point.mean) and torch.equal(point.scoring_sample(2), point.mean)
    assert point.kl_divergence().tolist() == [math.inf] * 3


def test_samples_of_the_prior(model):
    sample = model.sample_prior(500, seed=0)
    assert sample.shape == (500, *model.config.latent_shape) and sample.dtype == torch.float32
    assert sample.mean().item() == pytest.approx(0, abs=0.02)
    assert sample.var().item() == pytest.approx(1, rel=0.03)
    assert not torch.allclose(sample[0], sample[1], atol=0.1)
    assert torch.equal(model.sample_prior(500, seed=0), sample)


def test_unseeded_samples_follow_the_global_generator(memory_model, posterior):
    for draw in (posterior.sample, lambda: memory_model.sample_prior(3)):
        torch.manual_seed(5)
        first, second = draw(), draw()
        torch.manual_seed(5)
        assert torch.equal(draw(), first)
        assert not torch.allclose(first, second)


def test_what_cannot_be_drawn(make_model, memory_model):
    with pytest.raises(ValueError, match="num_latents=0: it has no latents to draw"):
        make_model(num_latents=0).sample_prior(1)
    with pytest.raises(ValueError, match="batch_size must be an integer of 1 or more, got 0"):
        memory_model.sample_prior(0)
    with pytest.raises(ValueError, match="seed must be an integer, got 1.5"):
        memory_model.sample_prior(1, seed=1.5)


# ------------------------------------------------------------------ as things


def test_shapes_are_checked(make_noise):
    with pytest.raises(ValueError, match=r"one shape, got \(3, 2, 2, 32\) and \(2, 2, 2, 32\)"):
        LatentPosterior(make_noise(3, *SHAPE), make_noise(2, *SHAPE))


def test_save_and_load(posterior, point, tmp_path):
    posterior.save_pretrained(tmp_path / "thought")
    loaded = LatentPosterior.from_pretrained(tmp_path / "thought")
    for name in ("mean", "log_variance", "elbo_trace", "keys"):
        assert torch.equal(getattr(loaded, name), getattr(posterior, name)), name
    assert torch.equal(loaded.sample(seed=1), posterior.sample(seed=1))
    assert loaded == posterior and loaded != posterior[[1, 0, 2]] and loaded != "thought"
    point.save_pretrained(tmp_path)
    assert LatentPosterior.from_pretrained(tmp_path) == point


def test_a_posterior_of_one_tensor_is_saved(tmp_path):
    zeros = torch.zeros(1, *SHAPE)
    LatentPosterior(zeros, zeros).save_pretrained(tmp_path)
    assert LatentPosterior.from_pretrained(tmp_path) == LatentPosterior(zeros, zeros)


def test_files_that_hold_no_posterior(tmp_path):
    with pytest.raises(FileNotFoundError, match="latent_posterior.safetensors"):
        LatentPosterior.from_pretrained(tmp_path)
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
def test_rows_of_a_posterior(posterior, rows):
    part = posterior[rows]
    picked = torch.arange(3)[list(rows) if isinstance(rows, (tuple, range)) else rows].reshape(-1)
    assert torch.equal(part.mean, posterior.mean[picked])
    assert torch.equal(part.elbo_trace, posterior.elbo_trace[:, picked])
    assert torch.equal(part.sample(seed=1), posterior.sample(seed=1)[picked])


def test_between_two_thoughts(posterior):
    other = LatentPosterior(-posterior.mean[[1, 2, 0]], posterior.log_variance[[2, 0, 1]] + 1)
    for weight in (0.0, 0.25, 1.0):
        between = posterior.lerp(other, weight)
        close(between.mean, (1 - weight) * posterior.mean + weight * other.mean)
        close(between.log_variance, (1 - weight) * posterior.log_variance + weight * other.log_variance)
    with pytest.raises(ValueError, match=r"one shape, got \(3, 2, 2, 32\) and \(1, 2, 2, 32\)"):
        posterior.lerp(other[0], 0.5)


@pytest.mark.parametrize("weight", [0.25, 0.75])
def test_between_points_there_are_points(point, posterior, weight):
    for other in (point[[2, 0, 1]], posterior):
        for one, two in ((point, other), (other, point)):
            between = one.lerp(two, weight)
            close(between.sample(seed=0), (1 - weight) * one.mean + weight * two.mean)
            assert between.log_variance.isneginf().all()
