"""The mean loss of a vocabulary projection that learns, chunk by chunk, against cross-entropy of all logits."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from ltm_hf import losses_ltm
from ltm_hf.losses_ltm import mean_loss
from ltm_hf.memory_ltm import prior_state

VOCABULARY, HIDDEN = 61, 32
close = torch.testing.assert_close


def naive(head, hidden_states, targets, num_items=None):
    """transformers' own, of all logits."""
    return ForCausalLMLoss(head(hidden_states), None, VOCABULARY, num_items, shift_labels=targets)


@pytest.fixture(autouse=True)
def chunks_of_four(monkeypatch):
    monkeypatch.setattr(losses_ltm, "CHUNK_BYTES", 4 * 4 * VOCABULARY + 3)


@pytest.fixture
def chunked(monkeypatch):
    """The rows of each chunk that had its gradients taken in the forward pass."""
    rows, inner = [], losses_ltm._cross_entropy_
    monkeypatch.setattr(
        losses_ltm,
        "_cross_entropy_",
        lambda logits, *args, **kwargs: rows.append(len(logits)) or inner(logits, *args, **kwargs),
    )
    return rows


@pytest.fixture
def head():
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    return head


@pytest.fixture
def states(make_noise):
    return make_noise(3, 7, HIDDEN).requires_grad_()


@pytest.fixture
def targets():
    targets = torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(1))
    targets[0, :3] = targets[1] = targets[2, 6] = -100  # ten of 21 are scored
    return targets


def loss_and_gradients(function, head, states, *given, factor=1.0):
    """The loss, and the gradients of factor x loss."""
    loss = function(head, states, *given)
    return loss, *torch.autograd.grad(factor * loss, [states, head.weight])


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("num_items", [None, 25, torch.tensor(25)], ids=["counted", "integer", "tensor"])
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_is_the_loss_of_transformers(head, states, targets, chunked, monkeypatch, chunk, num_items, factor):
    """factor: what the loss is multiplied by on its way to the gradient, as the trainer does with several processes."""
    monkeypatch.setattr(losses_ltm, "CHUNK_BYTES", chunk * 4 * VOCABULARY)
    expected = loss_and_gradients(naive, head, states, targets, num_items, factor=factor)
    actual = loss_and_gradients(mean_loss, head, states, targets, num_items, factor=factor)
    assert chunked == {1: [1] * 10, 4: [4, 4, 2], 100: [10]}[chunk]  # scored tokens alone
    close(actual[0], expected[0], rtol=1e-6, atol=1e-6)
    for gradient, naive_gradient in zip(actual[1:], expected[1:], strict=True):
        close(gradient, naive_gradient, rtol=1e-5, atol=1e-6)


def test_two_tokens_by_hand():
    """Logits (0, ln 3) make probabilities (1/4, 3/4)."""
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [1.0]])
    states = torch.full((1, 2, 1), 3.0).log().requires_grad_()
    loss = mean_loss(head, states, torch.tensor([[0, 1]]))
    loss.backward()
    close(loss, torch.tensor([4.0, 4 / 3]).log().mean())
    close(states.grad, torch.tensor([[[0.75 / 2], [-0.25 / 2]]]))
    slope = (0.75 - 0.25) / 2 * torch.tensor(3.0).log()
    close(head.weight.grad, torch.stack([-slope, slope])[:, None])


@pytest.mark.parametrize("num_items", [None, 5])
@pytest.mark.parametrize("shape", [(3, 7), (2, 0)])
def test_nothing_to_score(head, make_noise, shape, num_items):
    """NaN over no tokens, 0 over a given number, as transformers has it; no gradient in either case."""
    states, targets = make_noise(*shape, HIDDEN).requires_grad_(), torch.full(shape, -100)
    expected, actual = (loss_and_gradients(f, head, states, targets, num_items) for f in (naive, mean_loss))
    close(actual[0], expected[0], equal_nan=True)
    assert actual[0].isnan() if num_items is None else actual[0] == 0
    assert not actual[1].any() and not actual[2].any()


@pytest.mark.parametrize("precision", ["autocast", torch.bfloat16, torch.float64])
def test_precision(head, states, targets, chunked, precision):
    """Gradients have their tensors' dtypes, and are as near the truth as those of all logits."""
    _, *truth = loss_and_gradients(naive, head, states, targets)
    context = contextlib.nullcontext()
    if precision == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    else:
        head, states = head.to(precision), states.detach().to(precision).requires_grad_()
    with context:
        expected = loss_and_gradients(naive, head, states, targets)
        chunked.clear()
        actual = loss_and_gradients(mean_loss, head, states, targets)
    assert chunked == [4, 4, 2]
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
    close(actual[0], expected[0], rtol=1e-2, atol=1e-2)
    for gradient, naive_gradient, true in zip(actual[1:], expected[1:], truth, strict=True):
        error, naive_error = ((x.float() - true).norm() / true.norm() for x in (gradient, naive_gradient))
        assert error < max(1e-6, 1.1 * naive_error) and error < 0.02


def test_autocast_keeps_no_copy_without_a_graph(head, states, targets):
    """Within one autocast region, what comes after still learns."""
    with torch.autocast("cpu", torch.bfloat16):
        mean_loss(head, states, targets)
        head(states).float().square().mean().backward()
    assert head.weight.grad.abs().max() > 0


def test_gradients_add_up(head, states, targets):
    """Over micro-batches with a common count, and over backward passes through a kept graph."""
    naive(head, states, targets, 10).backward()
    expected, head.weight.grad = head.weight.grad, None
    for row in range(3):
        mean_loss(head, states[row : row + 1], targets[row : row + 1], 10).backward()
    close(head.weight.grad, expected, rtol=1e-5, atol=1e-6)
    loss, head.weight.grad = mean_loss(head, states, targets, 10), None
    for _ in range(2):
        loss.backward(retain_graph=True)
    close(head.weight.grad, 2 * expected, rtol=1e-5, atol=1e-6)


def test_a_head_alone(head, states, targets, chunked):
    """Hidden states that want no gradient; and a head that is frozen, which then has none."""
    expected = torch.autograd.grad(naive(head, states, targets), head.weight)[0]
    close(torch.autograd.grad(mean_loss(head, states.detach(), targets), head.weight)[0], expected)
    head.requires_grad_(False)
    expected = torch.autograd.grad(naive(head, states, targets), states)[0]
    chunked.clear()
    close(torch.autograd.grad(mean_loss(head, states, targets), states)[0], expected)
    with torch.no_grad():
        close(mean_loss(head, states, targets), naive(head, states, targets))
    assert chunked == [4, 4, 2] * 2


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def adapted(head):
    head.__class__ = Doubled


def offloaded(head):
    forward = head.forward
    head.forward = lambda x: forward(x.clone())


def parametrized(head):
    nn.utils.parametrize.register_parametrization(head, "weight", nn.Tanh())


def biased(head):
    head.bias = nn.Parameter(torch.arange(VOCABULARY) / 9.0)


def hooked(register):
    return lambda head: getattr(head, f"register_{register}")(lambda *call: None)


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize(
    "change", [adapted, offloaded, parametrized, biased, *map(hooked, HOOKS)], ids=lambda change: change.__name__
)
def test_a_head_that_is_more_than_its_weight(head, states, targets, chunked, change):
    """All tokens at once, through the head."""
    change(head)
    learned = [states, *head.parameters()]
    expected = torch.autograd.grad(naive(head, states, targets, 25), learned)
    actual = torch.autograd.grad(mean_loss(head, states, targets, 25), learned)
    assert not chunked
    for x, y in zip(actual, expected, strict=True):
        close(x, y, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ through the model


def grouped(loss, model):
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("overrides", [{}, dict(tie_word_embeddings=False)], ids=["tied", "untied"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("num_items", [None, 40])
def test_model(make_model, reader, ids, make_noise, chunked, overrides, checkpointing, num_items):
    """With padding, labels, latents that want a gradient; a tied weight adds up both of its uses."""
    model, labels = make_model(latent_reader=reader, **overrides).train(), ids.clone()
    latents = make_noise(3, *model.config.latent_shape).requires_grad_()
    if checkpointing:
        model.gradient_checkpointing_enable()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels[0, :5] = labels[2, 8:] = -100
    given = dict(attention_mask=mask, latents=latents, labels=labels, use_cache=False)
    if num_items:
        given["num_items_in_batch"] = torch.tensor(num_items)
    expected = model(ids, **given)
    (expected_latents,) = torch.autograd.grad(expected.loss, latents, retain_graph=True)
    expected_gradients = grouped(expected.loss, model)
    actual = model(ids, **given, loss_reduction="mean")
    assert actual.logits is None and expected.logits.shape == (3, 12, VOCABULARY)
    assert sum(chunked) == 7 + 11 + 7
    close(actual.loss, expected.loss)
    close(torch.autograd.grad(actual.loss, latents, retain_graph=True)[0], expected_latents, rtol=1e-5, atol=1e-6)
    for name, gradient in grouped(actual.loss, model).items():
        close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("state", [False, True], ids=["", "remembering"])
def test_a_loss_function_of_the_users(memory_model, ids, chunked, state):
    """It sees all logits."""
    given = dict(latent_state=prior_state(memory_model.config, 3)) if state else {}
    logits = memory_model(ids, **given).logits
    chunked.clear()
    memory_model.loss_function = lambda logits, labels, **kwargs: logits.sum() + labels.sum()
    output = memory_model(ids, labels=ids, loss_reduction="mean", **given)
    close(output.loss, logits.sum() + ids.sum())
    assert output.logits is None and bool(chunked) == state  # the memory's own


def test_labels_that_are_shifted_already(memory_model, ids):
    loss = memory_model(ids, labels=ids, shift_labels=ids, loss_reduction="mean").loss
    close(loss, F.cross_entropy(memory_model(ids).logits.flatten(0, 1), ids.flatten()))


def test_tuples(memory_model, ids):
    (loss, *_) = memory_model(ids, labels=ids, loss_reduction="mean", use_cache=False, return_dict=False)
    close(loss, memory_model(ids, labels=ids).loss)
