"""The vocabulary projection and its loss, chunk by chunk, against cross-entropy of all logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ltm_hf import losses_ltm
from ltm_hf.likelihood_ltm import Text, negative_log_likelihood
from ltm_hf.losses_ltm import token_losses

VOCABULARY, HIDDEN = 61, 32


def naive(head, hidden_states, targets):
    logits = head(hidden_states).float()
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")


def count_calls(head):
    """The rows of each call. A hook would change the path."""
    rows, forward = [], head.forward
    head.forward = lambda x: rows.append(x.shape[:-1].numel()) or forward(x)
    return rows


@pytest.fixture
def chunks_of_four(monkeypatch):
    monkeypatch.setattr(losses_ltm, "CHUNK_BYTES", 4 * 4 * VOCABULARY + 3)


@pytest.fixture
def head():
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
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


def losses_and_gradient(function, head, states, targets, weights):
    losses = function(head, states, targets)
    return losses, torch.autograd.grad((losses * weights).sum(), states)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 2e-2)])
def test_is_cross_entropy(head, states, targets, make_noise, chunks_of_four, dtype, tolerance):
    """Losses and the gradient of the states, of which each loss has a weight of its own."""
    head, states, weights = head.to(dtype), states.detach().to(dtype).requires_grad_(), make_noise(3, 7, seed=3)
    expected = losses_and_gradient(naive, head, states, targets, weights)
    rows = count_calls(head)
    losses, gradient = losses_and_gradient(token_losses, head, states, targets, weights)
    assert rows == [4, 4, 2]  # scored tokens alone
    assert losses.dtype == torch.float32 and gradient.dtype == dtype
    close = torch.testing.assert_close
    close(losses, expected[0], rtol=tolerance, atol=tolerance * expected[0].max().item())
    close(gradient, expected[1], rtol=tolerance, atol=tolerance * expected[1].abs().max().item())
    assert not losses[targets == -100].any() and not gradient[targets == -100].any()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_scores_without_a_graph(head, states, targets, chunks_of_four, context):
    """Also under weights that would want a gradient."""
    expected = naive(head, states, targets).detach()
    head.requires_grad_(True)
    rows = count_calls(head)
    with context():
        losses = token_losses(head, states.detach(), targets)
    assert rows == [4, 4, 2] and not losses.requires_grad
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 7), (2, 0), (0, 5)])
def test_nothing_to_score(head, make_noise, shape):
    states = make_noise(*shape, HIDDEN).requires_grad_()
    losses = token_losses(head, states, torch.full(shape, -100))
    losses.sum().backward()
    assert losses.shape == shape and not losses.any() and not states.grad.any()


def test_certain_and_hopeless_tokens(head, targets, states):
    """Logits in the thousands: exact losses of 0 and of the gap, and no overflow."""
    states = 1e4 * states.detach()
    losses = token_losses(head, states, targets)
    gaps = (head(states).amax(dim=-1) - head(states).gather(-1, targets.clamp(min=0)[..., None])[..., 0])[
        targets != -100
    ]
    torch.testing.assert_close(losses[targets != -100], gaps, rtol=1e-5, atol=1e-2)
    best = head(states).argmax(dim=-1)
    assert token_losses(head, states, best).max() < 1e-3


def test_a_row_that_is_not_finite_stays_alone(head, states, targets, chunks_of_four):
    broken = states.detach().clone()
    broken[0, 3] = torch.nan
    losses, expected = token_losses(head, broken, targets), token_losses(head, states.detach(), targets)
    assert losses[0, 3].isnan()
    losses[0, 3] = expected[0, 3]
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("why", ["learns", "hook"])
def test_all_tokens_at_once(head, states, targets, chunks_of_four, make_noise, why):
    expected = losses_and_gradient(naive, head, states, targets, make_noise(3, 7))
    if why == "learns":
        head.requires_grad_(True)
        naive(head, states, targets).sum().backward()
        weight_gradient, head.weight.grad = head.weight.grad, None
    else:
        calls = []
        head.register_forward_hook(lambda *call: calls.append(call))
    losses, gradient = losses_and_gradient(token_losses, head, states, targets, make_noise(3, 7))
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-5)
    if why == "learns":
        token_losses(head, states, targets).sum().backward()
        torch.testing.assert_close(head.weight.grad, weight_gradient, rtol=1e-5, atol=1e-5)
    else:
        assert len(calls) == 1


# ------------------------------------------------------------------ through the model


def masked(ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 9:] = 0
    return mask


@pytest.mark.parametrize("overrides", [{}, dict(tie_word_embeddings=False)], ids=["tied", "untied"])
def test_likelihood_in_chunks(make_model, reader, ids, make_noise, monkeypatch, overrides):
    """With padding, labels, a vocabulary that was resized, and latents that want a gradient."""
    model, mask = make_model(latent_reader=reader, **overrides).requires_grad_(False), masked(ids)
    model.resize_token_embeddings(90)
    ids[2, 5] = 85
    labels = ids.clone()
    labels[2, 8:] = -100
    latents = make_noise(3, *model.config.latent_shape).requires_grad_()
    log_probabilities = model(ids, attention_mask=mask, latents=latents).logits[:, :-1].log_softmax(dim=-1)
    picked = log_probabilities.gather(-1, ids[:, 1:, None])[..., 0]
    scored = torch.tensor([[4, 11], [0, 8], [0, 7]])  # of the eleven predictions: first, last + 1
    expected = torch.stack([-picked[row, first:last].sum() for row, (first, last) in enumerate(scored)])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), latents)

    monkeypatch.setattr(losses_ltm, "CHUNK_BYTES", 10 * 4 * 90)
    rows = count_calls(model.lm_head)
    nll = negative_log_likelihood(model, Text.of(model, ids, mask, labels), latents)
    assert rows == [8, 8, 6]  # 22 tokens, in chunks of at most 10, evenly
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(nll.sum(), latents)[0], expected_gradient, rtol=1e-5, atol=1e-5)


def test_inference_in_chunks(make_model, ids, monkeypatch):
    """The fast loop leaves no logits behind, and finds what it finds with all of them."""
    model, whole = (make_model(latent_reader="paper") for _ in range(2))
    whole.lm_head.register_forward_hook(lambda *call: None)
    monkeypatch.setattr(losses_ltm, "CHUNK_BYTES", 10 * 4 * VOCABULARY)
    rows = count_calls(model.lm_head)
    expected = whole.infer_posterior(ids, masked(ids), num_inference_steps=3)
    actual = model.infer_posterior(ids, masked(ids), num_inference_steps=3)
    assert max(rows) <= 10 and sum(rows) == 3 * (7 + 8 + 11)
    torch.testing.assert_close(actual.mean, expected.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.elbo_trace, expected.elbo_trace, rtol=1e-5, atol=1e-4)


def test_losses_of_tokens(model, ids):
    output = model(ids, labels=ids, loss_reduction="none", use_cache=False)
    assert output.logits is None and output.loss.shape == (3, 11)
    torch.testing.assert_close(output.loss.mean(), model(ids, labels=ids).loss)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_bad_reduction(model, ids, reduction):
    sentence = "loss_reduction must be None or, with labels, 'mean' or 'none'; got"
    with pytest.raises(ValueError, match=f"{sentence} {reduction!r}"):
        model(ids, labels=ids if reduction == "sum" else None, loss_reduction=reduction)
