"""One pass over the head's logits for losses, errors and the weight's gradient, against autograd through all logits."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ltm_hf import losses_ltm
from ltm_hf.losses_ltm import HeadPass, KnownLoss

VOCABULARY, HIDDEN = 61, 32
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def chunks_of_four(monkeypatch):
    monkeypatch.setattr(losses_ltm, "CHUNK_BYTES", 4 * 4 * VOCABULARY + 3)


@pytest.fixture
def head(make_noise):
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.weight.data = make_noise(VOCABULARY, HIDDEN)
    return head


@pytest.fixture
def states(make_noise):
    return make_noise(10, HIDDEN, seed=1)


@pytest.fixture
def targets():
    targets = torch.randint(VOCABULARY, (10,), generator=torch.Generator().manual_seed(1))
    targets[[0, 1, 7]] = -100
    return targets


def naive(head, states, targets, weights):
    """Nats, their gradient in the states, and that of the weighted sum in the head's weight."""
    states = states.detach().requires_grad_()
    nats = F.cross_entropy(head(states).float(), targets, ignore_index=-100, reduction="none")
    (gradient,) = torch.autograd.grad(nats.sum(), states, retain_graph=True)
    (of_weight,) = torch.autograd.grad((weights * nats).sum(), head.weight)
    return nats.detach(), gradient, of_weight


@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), ("autocast", 2e-2)], ids=str
)
def test_is_autograd_through_all_logits(head, states, targets, make_noise, precision, tolerance):
    weights = make_noise(10, seed=2)
    expected = naive(head, states, targets, weights)
    context = contextlib.nullcontext()
    if precision == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    else:
        head, states = head.to(precision), states.to(precision)
    with context:
        head_pass = HeadPass(head)
        nats, gradient = head_pass(states, targets, weights)
    assert nats.dtype == head_pass.weight_gradient.dtype == torch.float32 and gradient.dtype == states.dtype
    for actual, value in zip((nats, gradient, head_pass.weight_gradient), expected, strict=True):
        assert (actual.float() - value).norm() < tolerance * value.norm()
        assert not actual.requires_grad
    unscored = targets == -100
    assert not nats[unscored].any() and not gradient[unscored].any()


def test_the_weight_s_gradient_adds_up_over_calls(head, states, targets, make_noise):
    """Of the calls whose nats are in the loss."""
    weights = make_noise(10, seed=2)
    head_pass = HeadPass(head)
    for rows in (slice(0, 3), slice(3, 10)):
        head_pass(states[rows], targets[rows], weights[rows])
        head_pass(states[rows], targets[rows])
    close(head_pass.weight_gradient, naive(head, states, targets, weights)[2], rtol=1e-5, atol=1e-5)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def adapted(head):
    head.__class__ = Doubled


def biased(head):
    head.bias = nn.Parameter(torch.arange(VOCABULARY) / 9.0)


def hooked(head):
    head.register_forward_hook(lambda module, given, logits: logits / 2)


def frozen(head):
    head.requires_grad_(False)


@pytest.mark.parametrize("change", [adapted, biased, hooked, frozen])
def test_a_head_whose_gradient_is_not_its_own_to_compute(head, states, targets, change):
    """It is asked by its own forward and backward, and its weight learns elsewhere."""
    change(head)
    head_pass = HeadPass(head)
    with torch.no_grad():
        nats, gradient = head_pass(states, targets, torch.ones(10))
    head.requires_grad_(True)
    expected, slope, _ = naive(head, states, targets, torch.ones(10))
    close(nats, expected)
    close(gradient, slope)
    assert head_pass.weight_gradient is None and head.weight.grad is None


def test_without_a_graph_no_weight_learns(head, states, targets):
    with torch.no_grad():
        head_pass = HeadPass(head)
        nats, _ = head_pass(states, targets)
    assert head_pass.weight_gradient is None
    close(nats, naive(head, states, targets, torch.ones(10))[0])


# ------------------------------------------------------------------ a loss with known gradients


def test_a_known_loss_gives_the_gradients_that_it_was_given(head, states, targets):
    weights = torch.full((10,), 1 / 7)
    states.requires_grad_()
    head_pass = HeadPass(head)
    nats, gradient = head_pass(states.detach(), targets, weights)
    loss = KnownLoss.apply(
        states, head.weight, (nats * weights).sum(), gradient * weights[:, None], head_pass.weight_gradient
    )
    expected = F.cross_entropy(head(states), targets)
    close(loss, expected)
    pairs = (torch.autograd.grad(-2.5 * x, [states, head.weight]) for x in (loss, expected))
    for actual, value in zip(*pairs, strict=True):
        close(actual, value, rtol=1e-5, atol=1e-6)
