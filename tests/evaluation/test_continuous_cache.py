"""A continuous cache against its definition, token by token."""

import math

import pytest
import torch

from ltm_hf.evaluation.continuous_cache import THETAS, WEIGHTS, ContinuousCache, cache_losses, tune_cache
from ltm_hf.memory_ltm import prior_state


@pytest.fixture
def blocks(make_ids):
    return [{"input_ids": row.tolist()} for row in make_ids(3, 12) % 7]  # few tokens, which come again


def naive(model, ids, theta, weight):
    """Nats of each token but the first, of one text."""
    given = {"latent_state": prior_state(model.config, 1)} if model.config.has_memory else {}
    probabilities = model(ids[None], **given).logits[0].softmax(dim=-1)
    states = model.model(ids[None]).last_hidden_state[0]
    states = states / states.norm(dim=-1, keepdim=True)
    nats = []
    for t in range(len(ids) - 1):
        p = probabilities[t, ids[t + 1]]
        if t:
            votes = [math.exp(theta * (states[t] @ states[s])) for s in range(t)]
            share = sum(vote for s, vote in enumerate(votes) if ids[s + 1] == ids[t + 1]) / sum(votes)
            p = (1 - weight) * p + weight * share
        nats.append(-p.log())
    return torch.stack(nats)


@pytest.mark.parametrize("overrides", [dict(num_latents=0), dict(latent_reader="memory")], ids=str)
@torch.no_grad()
def test_definition(make_model, blocks, overrides):
    model = make_model(**overrides)
    losses = cache_losses(model, blocks, ContinuousCache(8.0, 0.3), batch_size=2)
    for row, found in zip(blocks, losses, strict=True):
        torch.testing.assert_close(found, naive(model, torch.tensor(row["input_ids"]), 8.0, 0.3), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tuning_takes_the_best(make_model, blocks):
    model = make_model(num_latents=0)
    best = tune_cache(model, blocks, batch_size=2)
    totals = {
        (theta, weight): cache_losses(model, blocks, ContinuousCache(theta, weight)).sum()
        for theta in THETAS
        for weight in WEIGHTS
    }
    assert totals[best] <= min(totals.values()) + 1e-4


def test_blocks_of_several_lengths_are_refused(make_model, blocks):
    with pytest.raises(ValueError, match="blocks of one length"):
        cache_losses(make_model(num_latents=0), [*blocks, {"input_ids": [1, 2]}], ContinuousCache(8.0, 0.3))
