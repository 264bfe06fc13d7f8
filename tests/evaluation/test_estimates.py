"""Bounds against a decoder whose log p(x) is known: the likelihood of its text is Gaussian in z."""

import math
from types import SimpleNamespace

import pytest
import torch

from ltm_hf import LatentPosterior, LTMConfig, elbo, infer_posterior
from ltm_hf.evaluation import evaluate_likelihood, importance_weighted_bound, ratio_and_error, score_blocks
from ltm_hf.likelihood_ltm import Text, negative_log_likelihood

SCALE = 0.5  # p(token 1) at its largest


class GaussianDecoder(torch.nn.Module):
    """Token t of a text is 1 with probability SCALE · exp(-(w_t·z - y_t)²/2), else 0; so for a text of ones

    log p(x) = S log SCALE - log det(I + WWᵀ)/2 - yᵀ(I + WWᵀ)⁻¹y/2,   q(z|x) ∝ exp(-|z|²/2 - |Wz - y|²/2).
    """

    def __init__(self, weights, targets):
        super().__init__()
        self.config = LTMConfig(
            vocab_size=2, hidden_size=weights.shape[1], num_hidden_layers=1, num_attention_heads=1, head_dim=2,
            num_latents=1, latent_reader="paper", num_inference_steps=400, inference_learning_rate=0.3,
        )  # fmt: skip
        self.device = torch.device("cpu")
        self.weights, self.targets = torch.nn.Parameter(weights), targets

    def forward(self, input_ids=None, state=None, latents=None, shift_labels=None, until_latents=False, **_):
        """In two stages, as a decoder: no latent changes the tokens."""
        if until_latents:
            return input_ids
        if latents is None:
            latents = torch.zeros(len(shift_labels), *self.config.latent_shape)
        errors = latents[:, 0, 0] @ self.weights.T - self.targets  # (B, S - 1)
        ones = math.log(SCALE) - 0.5 * errors**2
        logits = torch.stack((torch.log1p(-ones.exp()), ones), dim=-1)
        losses = -logits.log_softmax(dim=-1).gather(2, shift_labels[:, :-1, None]).squeeze(2)
        return SimpleNamespace(loss=losses)

    def exact(self) -> float:
        """log p(1 … 1)."""
        covariance = torch.eye(len(self.weights)) + self.weights @ self.weights.T
        energy = self.targets @ torch.linalg.solve(covariance, self.targets) + torch.logdet(covariance)
        return (len(self.weights) * math.log(SCALE) - 0.5 * energy).item()

    def posterior(self):
        """Mean and covariance of p(z|x)."""
        covariance = torch.linalg.inv(torch.eye(self.weights.shape[1]) + self.weights.T @ self.weights)
        return covariance @ self.weights.T @ self.targets, covariance


def ones(decoder, rows=1):
    return torch.ones(rows, len(decoder.weights) + 1, dtype=torch.long)


@pytest.fixture
def axes():
    """Each token asks for a latent channel of its own: the posterior is a diagonal Gaussian."""
    return GaussianDecoder(torch.diag(torch.tensor([1.5, -0.7, 2.0])), torch.tensor([1.0, 0.5, -1.5]))


@pytest.fixture
def skewed():
    """Tokens ask for the same channels: no diagonal Gaussian is the posterior."""
    weights = torch.tensor([[1.0, 0.9, 0.0], [0.9, 0.3, 0.5], [0.5, 0.8, 0.1], [0.1, 0.7, 0.7]])
    return GaussianDecoder(weights, torch.tensor([1.0, 0.5, -1.5, 2.0]))


def best_diagonal(decoder, rows=1):
    """The diagonal Gaussian nearest to the posterior: its mean, and the inverse of its precision's diagonal."""
    mean, covariance = decoder.posterior()
    variance = 1 / torch.linalg.inv(covariance).diagonal()
    return LatentPosterior(*(x.expand(rows, 1, 1, -1) for x in (mean, variance.log())))


@torch.no_grad()
def bounds(decoder, posterior, num_samples):
    """ELBO and importance-weighted bound, means over rows whose noise is independent."""
    text = Text.of(decoder, ones(decoder, len(posterior)))
    weighted = importance_weighted_bound(
        posterior, lambda latents: -negative_log_likelihood(decoder, text, latents), num_samples
    )
    return elbo(decoder, text, posterior, num_particles=num_samples).elbo.mean().item(), weighted.mean().item()


def test_at_the_true_posterior_a_single_sample_is_exact(axes):
    """Every importance weight is p(x) itself."""
    _, weighted = bounds(axes, best_diagonal(axes), num_samples=1)
    assert weighted == pytest.approx(axes.exact(), abs=1e-5)


def test_elbo_of_the_true_posterior_is_exact(axes):
    lower, _ = bounds(axes, best_diagonal(axes, rows=20_000), num_samples=1)
    assert lower == pytest.approx(axes.exact(), abs=0.03)


def test_inference_finds_the_posterior(axes):
    posterior = infer_posterior(axes, ones(axes))
    mean, covariance = axes.posterior()
    torch.testing.assert_close(posterior.mean.flatten(), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(posterior.log_variance.flatten().exp(), covariance.diagonal(), rtol=0.3, atol=0)


def test_bounds_are_in_order_and_the_importance_weighted_one_reaches_the_truth(skewed):
    """ELBO <= importance-weighted <= log p(x); the first by the KL to the posterior, known in closed form."""
    _, covariance = skewed.posterior()
    gap = 0.5 * (torch.linalg.inv(covariance).diagonal().log().sum() + torch.logdet(covariance)).item()
    assert gap > 0.15
    lower, weighted = bounds(skewed, best_diagonal(skewed, rows=200), num_samples=300)
    assert lower == pytest.approx(skewed.exact() - gap, abs=0.03)
    assert weighted == pytest.approx(skewed.exact(), abs=0.02)


def test_more_samples_are_nearer_on_average(skewed):
    posterior = best_diagonal(skewed, rows=4000)
    lower, one = bounds(skewed, posterior, num_samples=1)
    assert lower == pytest.approx(one, abs=0.05)  # one sample: the ELBO with its KL estimated
    few, more, many = (bounds(skewed, posterior, num_samples)[1] for num_samples in (2, 8, 32))
    assert one < few < more < many < skewed.exact() + 0.01


def test_table_of_the_toy(skewed):
    rows = [{"input_ids": [1] * 5, "token_bytes": [0, 1, 1, 1, 3], "document": number} for number in range(2)]
    likelihood = evaluate_likelihood(
        skewed, rows, figures=("bound", "iw-300", "no_latents"), num_particles=300, progress=False
    )
    exact = -skewed.exact() / 4
    assert likelihood["iw-300"] == pytest.approx(exact, abs=0.02) and likelihood["bound"] > exact + 0.05
    assert likelihood.figures["no_latents"][0] == pytest.approx(
        (skewed.targets.square().sum().item() / 2 - 4 * math.log(SCALE)) / 4, abs=1e-6
    )
    assert likelihood.bits_per_byte["iw-300"][0] == pytest.approx(likelihood["iw-300"] * 4 / 6 / math.log(2))
    assert likelihood.num_documents == 2 and likelihood.num_tokens == 8


def test_ratio_and_its_error_by_hand():
    """Documents of (4 nats, 2 tokens) and (8, 2): pooled 3; residuals ∓2 over a mean of 2 tokens, their error 1."""
    sums, counts = (torch.tensor(x, dtype=torch.float64) for x in ([1, 3, 8, 0], [1, 1, 2, 0]))
    groups = torch.tensor([7, 7, 3, 5])
    assert ratio_and_error(sums, counts, groups) == pytest.approx((3.0, 1.0))
    ratio, error = ratio_and_error(sums[:2], counts[:2], groups[:2])
    assert ratio == 2 and math.isnan(error)


def test_error_covers_the_truth_as_often_as_it_says():
    """Ratios of 400 corpora of 30 documents of random lengths: 95 % lie within 1.96 errors."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        counts = torch.randint(5, 50, (30,), generator=generator).double()
        rates = 3 + torch.randn(30, generator=generator).double()
        ratio, error = ratio_and_error(rates * counts, counts, torch.arange(30))
        covered += abs(ratio - 3) < 1.96 * error
    assert 0.91 < covered / 400 < 0.98


def test_refuses(axes):
    row = {"input_ids": [1] * 4}
    for name in ("loss", "iw", "iw-0", "from_prompt"):
        with pytest.raises(ValueError, match=f"no figure '{name}'"):
            score_blocks(axes, [row], figures=[name])
    with pytest.raises(ValueError, match="num_samples must be an integer of 1 or more, got 0"):
        importance_weighted_bound(best_diagonal(axes), None, 0)
