"""A Latent Thought Model beside its autoregressive twin on the same held-out blocks: a table, and two texts."""

import torch

from ..likelihood_ltm import Text
from .continuous_cache import cache_losses, tune_cache
from .figures import evaluating, markdown_rows, with_error
from .likelihood import BlockScores, no_text_yet, score_blocks


def beside_twin(model, twin, blocks, tuning_blocks, batch_size: int = 16, progress: bool = True) -> str:
    """A Markdown table of nats a token: the twin, the twin with a continuous cache, and the model's figures.

    Differences from the twin are taken block by block, ± their standard error. tuning_blocks: other held-out blocks,
    by which the cache's two numbers are chosen. All blocks are of one length.
    """
    own = {"by the mean": "prediction", "by a sample at each token": "prediction_sampled"}
    if not model.config.has_memory:
        own = {"its bound": "bound"}
    steps = model.config.num_inference_steps
    settings = dict(batch_size=batch_size, progress=progress)
    of_twin = score_blocks(twin, blocks, figures=("no_latents", "prefix_no_latents"), **settings).nats
    half = ("prefix_prediction",) if model.config.has_memory else ()
    of_model = score_blocks(model, blocks, figures=(*own.values(), "prefix", *half), **settings).nats
    more = score_blocks(model, blocks, num_inference_steps=steps + 1, figures=("prefix",), **settings).nats
    cache = tune_cache(twin, tuning_blocks, batch_size)
    cached = cache_losses(twin, blocks, cache, batch_size)
    first = len(blocks[0]["input_ids"]) // 2 - 1  # of second halves: targets stand one place earlier
    nats = {"twin": of_twin["no_latents"], "prefix_twin": of_twin["prefix_no_latents"]}
    nats |= {"cache": cached.sum(dim=1).double(), "prefix_cache": cached[:, first:].sum(dim=1).double()}
    nats |= of_model | {"prefix_more": more["prefix"]}
    scores = BlockScores([blocks[index] for index in range(len(blocks))], nats)
    name = f"twin, with a continuous cache (θ = {cache.theta:g}, weight {cache.weight:g})"
    rows = [_row(scores, "autoregressive twin", "twin", "prefix_twin"), _row(scores, name, "cache", "prefix_cache")]
    for words, figure in own.items():
        rows.append(_row(scores, f"LTM, {words}", figure, half[0] if half and figure == "prediction" else None))
    for count, figure in ((steps, "prefix"), (steps + 1, "prefix_more")):
        words = f"LTM, thought of first halves alone by {count} step{'' if count == 1 else 's'}"
        rows.append(_row(scores, words, None, figure))
    return markdown_rows([("nats a token", "all tokens", "less the twin", "second halves", "less the twin"), *rows])


def _row(scores: BlockScores, words: str, whole: str | None, half: str | None) -> tuple[str, ...]:
    cells = [words]
    for name, twin in ((whole, "twin"), (half, "prefix_twin")):
        cells.append("–" if name is None else with_error(*scores.mean(name)))
        cells.append("–" if name in (None, twin) else with_error(*scores.mean(name, minus=twin)))
    return tuple(cells)


@torch.no_grad()
def most_helped(model, blocks, length: int = 16, batch_size: int = 16) -> list[int]:
    """The tokens of a block up to the place in its second half from which on a memory saves most over some tokens."""
    best, found = -torch.inf, []
    with evaluating(model):
        for start in range(0, len(blocks), batch_size):
            rows = [blocks[index]["input_ids"] for index in range(start, min(start + batch_size, len(blocks)))]
            text = Text.of(model, torch.tensor(rows, device=model.device))
            given = dict(input_ids=text.input_ids, shift_labels=text.targets, loss_reduction="none", use_cache=False)
            saved = model(**given).loss - model(**given, **no_text_yet(model, len(rows))).loss
            half = saved.shape[1] // 2
            later = saved[:, half:-1]
            sums = later.unfold(1, min(length, later.shape[1]), 1).sum(dim=-1)
            if sums.max() > best:
                best, place = sums.max(), int(sums.argmax())
                row, place = divmod(place, sums.shape[1])
                found = rows[row][: half + place + 1]
    return found
