"""A plain continuous cache beside a language model (Grave et al. 2017): what copying from the text so far gives.

It needs no training. Each earlier place s of a text votes for the token that came after it, by how alike the last
hidden states h are:

    p(x_t) = (1 - weight) p_model(x_t) + weight Σ_{s<t} softmax_s(theta h_t·h_s) [x_s is followed by x_t]

with h of length one. Its state grows with the text: a measure for memories of constant size.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..data import collate_blocks
from ..data.numbers import check_at_least
from ..likelihood_ltm import Text
from .figures import evaluating
from .likelihood import no_text_yet

THETAS = (4.0, 8.0, 16.0, 32.0, 64.0)
WEIGHTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


class ContinuousCache(NamedTuple):
    """theta: how much likeness counts. weight: the cache's share of each probability."""

    theta: float
    weight: float


class _Places(NamedTuple):
    """Of the scored places of some blocks: log p of the model (B, S - 1); how alike two places are, and whether they
    are followed by one token, (B, S - 1, S - 1)."""

    log_likelihoods: torch.Tensor
    alike: torch.Tensor
    same: torch.Tensor

    def nats(self, cache: ContinuousCache, votes: torch.Tensor) -> torch.Tensor:
        """(B, S - 1). votes: what `votes` gave for this theta."""
        share = cache.weight * (torch.arange(votes.shape[1], device=votes.device) > 0)  # the first has none before it
        likelihoods = (1 - share) * self.log_likelihoods.exp() + share * votes
        return -likelihoods.clamp(min=1e-12).log()

    def votes(self, theta: float) -> torch.Tensor:
        """(B, S - 1): the probability of each token by the cache alone."""
        length = self.alike.shape[-1]
        later = torch.ones(length, length, dtype=torch.bool, device=self.alike.device).triu()
        shares = (theta * self.alike).masked_fill(later, -torch.inf).softmax(dim=-1).nan_to_num()
        return (shares * self.same).sum(dim=-1)


@torch.no_grad()
def tune_cache(model, blocks, batch_size: int = 16) -> ContinuousCache:
    """The best of `THETAS` and `WEIGHTS` on blocks that are not those to be scored. Arguments as in `cache_losses`."""
    sums = dict.fromkeys(map(ContinuousCache._make, product(THETAS, WEIGHTS)), 0.0)
    for places in _batches(model, blocks, batch_size):
        votes = {theta: places.votes(theta) for theta in THETAS}
        for cache in sums:
            sums[cache] += places.nats(cache, votes[cache.theta]).sum().item()
    return min(sums, key=sums.get)


@torch.no_grad()
def cache_losses(model, blocks, cache: ContinuousCache, batch_size: int = 16) -> torch.Tensor:
    """(blocks, S - 1) nats of each token of a model with a cache beside it.

    model: a decoder of this package; one with a memory reads that as well. blocks: rows with `input_ids`, all of one
    length S. Raises ValueError for blocks of several.
    """
    batches = _batches(model, blocks, batch_size)
    return torch.cat([places.nats(cache, places.votes(cache.theta)).cpu() for places in batches])


def _batches(model, blocks, batch_size: int) -> Iterator[_Places]:
    check_at_least(1, batch_size=batch_size)
    rows = [blocks[index] for index in range(len(blocks))]
    if len({len(row["input_ids"]) for row in rows}) != 1:
        raise ValueError("A continuous cache is scored on blocks of one length.")
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = collate_blocks([{"input_ids": row["input_ids"]} for row in rows[start : start + batch_size]])
            text = Text.of(model, batch["input_ids"].to(model.device))
            ids = text.input_ids
            losses = model(
                input_ids=ids, shift_labels=text.targets, loss_reduction="none", use_cache=False,
                **no_text_yet(model, len(ids)),
            ).loss[:, :-1]  # fmt: skip
            # By the model's own call, which gathers weights that are sharded.
            given = dict(output_hidden_states=True, logits_to_keep=1, use_cache=False)
            states = F.normalize(model(ids, **given).hidden_states[-1][:, :-1].float(), dim=-1)
            followed_by = ids[:, 1:]
            yield _Places(-losses.float(), states @ states.mT, followed_by[:, :, None] == followed_by[:, None])
