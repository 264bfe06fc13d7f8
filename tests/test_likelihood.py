"""A batch of texts, its likelihood, and the bound: each against its definition, with either reader."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM

from ltm_hf import LatentPosterior, elbo
from ltm_hf.likelihood_ltm import Text, negative_log_likelihood

close = torch.testing.assert_close


@pytest.fixture
def posterior(model, make_noise):
    shape = (3, *model.config.latent_shape)
    return LatentPosterior(make_noise(*shape), 0.5 * make_noise(*shape, seed=1) - 1)


def naive_nll(model, ids, latents=None):
    """(B,) nats, from the definition."""
    given = {} if latents is None else dict(latents=latents)
    log_probabilities = model(ids, **given).logits[:, :-1].log_softmax(dim=-1)
    return -log_probabilities.gather(-1, ids[:, 1:, None]).sum(dim=(1, 2))


# ------------------------------------------------------------------ Text


def test_what_is_scored(memory_model):
    """A token is, where it and the one before it are real; its target stands at the one before."""
    none, ids = -100, torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7], [5, 6, 7, 9], [9, 9, 9, 5]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1]])
    labels = ids.masked_fill(torch.tensor([[0, 0, 1, 0]]).bool(), none)
    nothing = [none] * 4
    for given, expected in (
        ((), [[6, 7, 8, none], [5, 6, 7, none], [6, 7, 9, none], [9, 9, 5, none]]),
        ((mask,), [[6, 7, 8, none], [none, 6, 7, none], [6, 7, none, none], nothing]),
        ((mask, labels), [[6, none, 8, none], [none, none, 7, none], [6, none, none, none], nothing]),
    ):
        assert Text.of(memory_model, ids, *given).targets.tolist() == expected
        assert Text.unchecked(ids, *given).targets.tolist() == expected
    text = Text.of(memory_model, ids, mask, labels)
    assert text.num_tokens.tolist() == [2, 1, 1, 0]
    assert torch.equal(text.is_scored, text.targets != none)
    for kind in (torch.bool, torch.float):
        assert torch.equal(Text.of(memory_model, ids, mask.to(kind), labels).targets, text.targets)
    later = text.scoring(torch.arange(4)[None] > 0)
    assert later.targets.tolist() == [[none, none, 8, none], [none, none, 7, none], nothing, nothing]
    assert Text.of(memory_model, later) is later  # checked already


def test_keys_are_of_the_real_tokens(ids, pad_rows):
    keys = Text.unchecked(ids).keys
    for side in ("left", "right"):
        assert torch.equal(Text.unchecked(*pad_rows(list(ids), side, fill=9)).keys, keys)


BAD_TEXTS = {
    "a list": (lambda ids: dict(input_ids=ids.tolist()), r"input_ids must be a tensor \(batch, tokens\), got list"),
    "one row": (lambda ids: dict(input_ids=ids[0]), r"input_ids must be \(batch, tokens\), got the shape \(12,\)"),
    "floats": (lambda ids: dict(input_ids=ids.float()), "input_ids must be int64 or int32, got torch.float32"),
    "too large": (lambda ids: dict(input_ids=ids.clone().fill_(61)), r"input_ids.*below vocab_size \(61\), got 61"),
    "negative": (lambda ids: dict(input_ids=ids.where(ids > 9, -1)), "input_ids must be at least 0.*got -1"),
    "a mask of a list": (lambda ids: dict(attention_mask=[1] * 12), "attention_mask must be a tensor.*got list"),
    "a short mask": (lambda ids: dict(attention_mask=ids[:, 1:]), r"attention_mask.*\(3, 12\), got \(3, 11\)"),
    "a mask of twos": (lambda ids: dict(attention_mask=torch.full_like(ids, 2)), "attention_mask must be 1.*and 0"),
    "a mask of halves": (lambda ids: dict(attention_mask=torch.full(ids.shape, 0.5)), "attention_mask must be 1"),
    "fewer labels": (lambda ids: dict(labels=ids[1:]), r"labels.*\(3, 12\), got \(2, 12\)"),
    "labels too large": (lambda ids: dict(labels=ids.where(ids > 9, 61)), "labels.*got 61"),
    "negative labels": (lambda ids: dict(labels=ids.where(ids > 9, -1)), "labels.*got -1"),
}


@pytest.mark.parametrize(("given", "words"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_bad_texts_are_refused_before_any_computation(model, ids, posterior, monkeypatch, given, words):
    """By inference and by the bound."""
    monkeypatch.setattr(model, "forward", None)
    given = {"input_ids": ids} | given(ids)
    for function in (model.infer_posterior, lambda **text: model.elbo(posterior=posterior, **text)):
        with pytest.raises(ValueError, match=f"^{words}"):
            function(**given)


# ------------------------------------------------------------------ the likelihood


@torch.no_grad()
def test_likelihood_of_any_causal_model(model, ids, pad_rows):
    """Without latents: ours, and another's."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    other = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).eval()
    rows = [ids[0], ids[1, :7]]
    for decoder in (model, other):
        for side in ("left", "right"):
            nll = negative_log_likelihood(decoder, Text.of(decoder, *pad_rows(rows, side)))
            close(nll, torch.cat([naive_nll(decoder, row[None]) for row in rows]))


@torch.no_grad()
def test_likelihood_of_what_is_scored(model, ids, posterior):
    labels = ids.clone()
    labels[:, 6:] = -100
    nll = negative_log_likelihood(model, Text.of(model, ids, labels=labels), posterior.mean)
    close(nll, naive_nll(model, ids[:, :6], posterior.mean))


# ------------------------------------------------------------------ the bound


@torch.no_grad()
def test_terms_of_the_bound(model, ids, posterior, make_noise):
    epsilon = make_noise(*posterior.mean.shape, seed=2)
    std = (0.5 * posterior.log_variance).exp()
    score = model.elbo(ids, posterior, epsilon=epsilon)
    close(score.nll, naive_nll(model, ids, posterior.mean + std * epsilon))
    close(score.kl, kl_divergence(Normal(posterior.mean, std), Normal(0.0, 1.0)).sum(dim=(1, 2, 3)))
    close(score.elbo, -(score.nll + score.kl))
    assert score.num_tokens.tolist() == [11, 11, 11]
    assert torch.equal(elbo(model, Text.of(model, ids), posterior).elbo, model.elbo(ids, posterior).elbo)


def test_gradients_of_the_bound(model, ids, posterior, make_noise):
    epsilon, variance = make_noise(*posterior.mean.shape, seed=2), posterior.log_variance.exp()
    mean, log_variance = (x.requires_grad_() for x in (posterior.mean, posterior.log_variance))
    found = torch.autograd.grad(-model.elbo(ids, posterior, epsilon=epsilon).elbo.sum(), (mean, log_variance))
    latents = posterior.reparameterize(epsilon).detach().requires_grad_()
    (slope,) = torch.autograd.grad(naive_nll(model, ids, latents).sum(), latents)
    close(found[0], slope + mean)
    close(found[1], 0.5 * (slope * epsilon * variance.sqrt() + variance - 1))


@torch.no_grad()
def test_particles_are_averaged(model, ids, posterior, monkeypatch):
    noise, draw = [], posterior.reparameterize
    monkeypatch.setattr(posterior, "reparameterize", lambda epsilon: noise.append(epsilon) or draw(epsilon))
    score = model.elbo(ids, posterior, num_particles=3, seed=7)
    assert len(noise) == 3
    for index, epsilon in enumerate(noise):
        assert not any(torch.allclose(epsilon, other, atol=0.1) for other in noise[:index])
    close(score.nll, torch.stack([naive_nll(model, ids, draw(epsilon)) for epsilon in noise]).mean(dim=0))
    close(score.kl, posterior.kl_divergence())


@torch.no_grad()
def test_scores_use_noise_that_no_fit_has_seen(paper_model, ids, monkeypatch):
    """Of any seed; by default of seed 0."""
    prior = paper_model.infer_posterior(ids, num_inference_steps=0)
    fitting, scoring = [], []
    for seed in range(3):
        paper_model.infer_posterior(
            ids, seed=seed, num_inference_steps=4, initial_posterior=prior, inference_learning_rate=1e-9,
            callback=lambda step, latents, bound: fitting.append(latents.flatten()),
        )  # fmt: skip
    posterior = prior[:]
    draw = posterior.reparameterize
    monkeypatch.setattr(posterior, "reparameterize", lambda epsilon: scoring.append(epsilon) or draw(epsilon))
    for seed in (None, 0, 1, 2):
        paper_model.elbo(ids, posterior, seed=seed, num_particles=2)
    assert torch.equal(scoring[0], scoring[2]) and not torch.equal(scoring[0], scoring[4])
    both = torch.corrcoef(torch.cat((torch.stack(fitting), torch.stack(scoring).flatten(1))))
    assert both[: len(fitting), len(fitting) :].abs().max() < 0.3


@torch.no_grad()
def test_a_point_has_no_finite_bound(model, ids, posterior):
    point = LatentPosterior(posterior.mean, torch.full_like(posterior.mean, -torch.inf))
    score = model.elbo(ids, point, num_particles=2)
    close(score.nll, naive_nll(model, ids, point.mean))
    assert score.elbo.tolist() == [-math.inf] * 3


def test_bad_scores(model, ids, posterior):
    for given, words in (
        (dict(num_particles=0), "num_particles must be an integer of 1 or more, got 0"),
        (dict(num_particles=2, epsilon=posterior.mean), "num_particles must be 1 with a given epsilon, got 2"),
        (dict(epsilon=posterior.mean[:1]), r"epsilon must have the shape \(3, .*, got \(1, "),
        (dict(posterior=posterior.mean), "posterior must be a LatentPosterior, got Tensor"),
        (dict(posterior=posterior[:2]), "posterior is of 2 sequences, where there are 3"),
        (dict(posterior=LatentPosterior(posterior.mean * torch.nan, posterior.mean)), "posterior.*not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            model.elbo(**dict(input_ids=ids, posterior=posterior) | given)
