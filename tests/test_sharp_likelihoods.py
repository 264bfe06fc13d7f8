"""Inference where the likelihood is sharper than the prior: -log p(x|z) = |Wz - y|²/2, whatever the text."""

import pytest
import torch

from ltm_hf import infer_posterior

WIDTH, TEXTS = 32, 8


@pytest.fixture(params=[0.1, 1.0, 10.0, 100.0, 1000.0])
def curvature(request):
    return request.param


@pytest.fixture(params=[4, WIDTH], ids=["few directions", "all directions"])
def sharp(request, make_quadratic, curvature):
    """Curvature in so many directions, which are not those of the channels."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[: request.param]
    centre = torch.randn(WIDTH, generator=generator)
    weights = curvature**0.5 * directions
    return make_quadratic(weights, weights @ centre)


def excess(decoder, mean, log_variance):
    """(B,) nats: KL(q || p(z|x)) by the closed form, what the bound lies below log p(x), less that of the best q."""
    precision, shift = decoder.precision()

    def cost(mean, variance):
        quadratic = ((mean @ precision) * mean).sum(dim=-1) - 2 * mean @ shift
        return 0.5 * (quadratic + (precision.diagonal() * variance - variance.log()).sum(dim=-1))

    best = cost(torch.linalg.solve(precision, shift), 1 / precision.diagonal())
    return cost(mean.flatten(start_dim=1), log_variance.flatten(start_dim=1).exp()) - best


@pytest.mark.parametrize(
    ("optimizer", "steps", "share"),
    [
        *(("natural", *pair) for pair in ((1, 1.5), (2, 0.9), (4, 0.7), (16, 0.2), (64, 0.04))),
        *(("lbfgs", *pair) for pair in ((1, 1.5), (2, 0.9), (4, 0.9), (16, 0.9), (64, 0.9))),
    ],
)
def test_no_number_of_steps_diverges(sharp, optimizer, steps, share):
    """What is left of the prior's excess; the noise of a single step may cost more than it brings."""
    prior, fitted = (
        infer_posterior(sharp, sharp.texts(TEXTS), num_inference_steps=number, inference_optimizer=optimizer)
        for number in (0, steps)
    )
    at_prior, left = (excess(sharp, q.mean, q.log_variance) for q in (prior, fitted))
    assert fitted.num_non_finite == 0
    assert (left > -1e-3 * at_prior).all()  # nothing is better than the best
    assert left.mean() < share * at_prior.mean()
    assert left.max() < 3 * at_prior.mean()
