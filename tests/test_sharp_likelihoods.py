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
    ("method", "steps", "share"),
    [
        *(("natural", *pair) for pair in ((1, 1.5), (2, 0.9), (4, 0.7), (16, 0.2), (64, 0.04))),
        *(("lbfgs", *pair) for pair in ((1, 1.5), (2, 0.9), (4, 0.9), (16, 0.9), (64, 0.9))),
    ],
)
def test_no_number_of_steps_diverges(sharp, method, steps, share):
    """What is left of the prior's excess; the noise of a single step may cost more than it brings."""
    prior, fitted = (
        infer_posterior(sharp, sharp.texts(TEXTS), num_inference_steps=number, inference_method=method)
        for number in (0, steps)
    )
    at_prior, left = (excess(sharp, q.mean, q.log_variance) for q in (prior, fitted))
    assert fitted.num_non_finite == 0
    assert (left > -1e-3 * at_prior).all()  # nothing is better than the best
    assert left.mean() < share * at_prior.mean()
    assert left.max() < 3 * at_prior.mean()


# ------------------------------------------------------------------ L-BFGS

CURVATURES = torch.tensor([0.5, 1.0, 3.0, 10.0])


@pytest.fixture(params=[0.3, 3.0], ids=["near", "far"])  # whether steps are held at their bound
def four_directions(request, make_quadratic):
    directions = torch.linalg.qr(torch.randn(WIDTH, 4, generator=torch.Generator().manual_seed(0))).Q.T
    targets = request.param * torch.tensor([1.0, -1.0, 2.0, 1.0])
    return make_quadratic(CURVATURES[:, None] ** 0.5 * directions, targets)


def naive_lbfgs(decoder, rate, steps):
    """(mean, precision) with the inverse Hessian and the curvature as matrices (Nocedal and Wright, equation 7.16)."""
    precision, shift = decoder.precision()
    eye, points, gradients = torch.eye(WIDTH), [], []
    mean, S = torch.zeros(WIDTH), torch.ones(WIDTH)
    for _ in range(steps):
        points.append(mean)
        gradients.append(precision @ mean - shift - mean)  # of the likelihood
        inverse = rate * eye
        if len(points) > 1:
            M, C = (torch.stack(values, dim=1).diff(dim=1) for values in (points, gradients))
            last = C[:, -1] + M[:, -1]
            inverse = (M[:, -1] @ last) / (last @ last) * eye
            for s, y in zip(M.T, (C + M).T, strict=True):
                V = eye - torch.outer(y, s) / (s @ y)
                inverse = V.T @ inverse @ V + torch.outer(s, s) / (s @ y)
            S = 1 + (C @ torch.linalg.inv(M.T @ C) @ C.T).diagonal()
        step = inverse @ (gradients[-1] + mean)
        mean = mean - step * min(1.0, 0.5 / step.square().mean().sqrt().item())
    return mean, S


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_lbfgs_against_its_matrices(four_directions, steps):
    fitted = infer_posterior(
        four_directions, four_directions.texts(2), num_inference_steps=steps, inference_method="lbfgs",
        inference_learning_rate=0.2,
    )  # fmt: skip
    mean, precision = naive_lbfgs(four_directions, 0.2, steps)
    for row in range(2):
        torch.testing.assert_close(fitted.mean[row].flatten(), mean, rtol=1e-3, atol=1e-3)
        found = (-fitted.log_variance[row].flatten()).exp()
        torch.testing.assert_close(found, precision, rtol=1e-3, atol=1e-3)


def test_lbfgs_finds_the_mode_and_the_curvature_of_a_few_directions(four_directions):
    precision, shift = four_directions.precision()
    fitted = infer_posterior(
        four_directions, four_directions.texts(2), num_inference_steps=12, inference_method="lbfgs"
    )
    mode = torch.linalg.solve(precision, shift)
    for row in range(2):
        torch.testing.assert_close(fitted.mean[row].flatten(), mode, rtol=0, atol=0.01 * mode.norm().item())
        found = (-fitted.log_variance[row].flatten()).exp()
        torch.testing.assert_close(found, precision.diagonal(), rtol=0.05, atol=0)
