"""A Latent Thought Model beside its autoregressive twin on the same held-out blocks: a table, and two texts."""

import torch

from ..likelihood_ltm import Text
from .continuous_cache import cache_losses, tune_cache
from .figures import evaluating, markdown_rows, with_error
from .likelihood import BlockScores, no_text_yet, score_blocks
from .thinking import takes_steps

# Of a model, where it has them: in words, the figure of all tokens, and of second halves.
_FIGURES = (
    ("by the mean", "prediction", "prefix_prediction"),
    ("by a sample at each token", "prediction_sampled", None),
    ("its bound", "bound", None),
)


def beside_twin(
    model, twin, of_model: BlockScores, of_twin: BlockScores, blocks, tuning_blocks, batch_size: int = 16,
    progress: bool = True,
) -> str:  # fmt: skip
    """A Markdown table of nats a token: the twin, the twin with a continuous cache, and the model's figures.

    of_model, of_twin: their default figures on the blocks, from `score_blocks`. Differences from the twin are taken
    block by block, ± their standard error. tuning_blocks: other held-out blocks, by which the cache's two numbers are
    chosen. All blocks are of one length.
    """
    cache = tune_cache(twin, tuning_blocks, batch_size)
    cached = cache_losses(twin, blocks, cache, batch_size)
    first = len(blocks[0]["input_ids"]) // 2 - 1  # of second halves: targets stand one place earlier
    nats = {"twin": of_twin.nats["no_latents"], "prefix_twin": of_twin.nats["prefix_no_latents"]}
    nats |= {"cache": cached.sum(dim=1).double(), "prefix_cache": cached[:, first:].sum(dim=1).double()}
    nats |= of_model.nats
    thought = {"LTM, thought of first halves alone": "prefix"}
    if takes_steps(model):
        steps = model.config.num_inference_steps
        settings = dict(batch_size=batch_size, progress=progress, figures=("prefix",))
        nats["prefix_more"] = score_blocks(model, blocks, num_inference_steps=steps + 1, **settings).nats["prefix"]
        words = "LTM, thought of first halves alone by {} step{}"
        thought = {words.format(n, "" if n == 1 else "s"): name
                   for n, name in ((steps, "prefix"), (steps + 1, "prefix_more"))}  # fmt: skip
    scores = BlockScores([blocks[index] for index in range(len(blocks))], nats)
    name = f"twin, with a continuous cache (θ = {cache.theta:g}, weight {cache.weight:g})"
    rows = [("nats a token", "all tokens", "less the twin", "second halves", "less the twin")]
    rows += [_row(scores, "autoregressive twin", "twin", "prefix_twin"), _row(scores, name, "cache", "prefix_cache")]
    rows += [_row(scores, f"LTM, {words}", whole, half) for words, whole, half in _FIGURES if whole in nats]
    return markdown_rows(rows + [_row(scores, words, None, name) for words, name in thought.items()])


def _row(scores: BlockScores, words: str, whole: str | None, half: str | None) -> tuple[str, ...]:
    cells = [words]
    for name, twin in ((whole, "twin"), (half, "prefix_twin")):
        cells.append("–" if name is None else with_error(*scores.mean(name)))
        cells.append("–" if name in (None, twin) else with_error(*scores.mean(name, minus=twin)))
    return tuple(cells)


@torch.no_grad()
def most_helped(model, blocks, length: int = 16, batch_size: int = 16) -> list[int]:
    """The tokens of a block up to the place in its second half from which on a memory saves most over some tokens.

    Of a model without a memory, the first half of the first block.
    """
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
