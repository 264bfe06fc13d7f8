"""Likelihood of held-out blocks: bounds with noise that no fit has seen; the published protocol by its own name."""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..data import collate_blocks
from ..posterior_ltm import IGNORED, elbo, infer_posterior, keyed_normal, negative_log_likelihood, sequence_keys

DESCRIPTIONS = {
    "bound": "bound with fresh noise: NLL + KL at a sample that the fit has not seen; what an LTM may claim",
    "nll": "its first part: NLL given latents fitted to the same text",
    "kl": "its second part: what those latents cost",
    "no_latents": "exact loss without latents",
    "from_prompt": "exact loss of the scored tokens, latents from the prompt before them only",
    "prefix": "exact loss of each block's second half, latents from its first half only; compare with an AR model's",
    "prefix_no_latents": "exact loss of the same second halves, without latents",
    "released": "log of the released protocol's perplexity: the fit's own noise, mean of exp over blocks; NOT a bound",
}


@dataclass(frozen=True)
class Likelihood:
    """Nats a token, each with its standard error over blocks. `released` is the log of a mean of perplexities.

    A standard error that nobody measured is NaN, a count that nobody made None.
    """

    figures: dict[str, tuple[float, float]]
    num_tokens: int | None
    num_blocks: int | None

    def __getitem__(self, name: str) -> float:
        return self.figures[name][0]

    def __contains__(self, name: str) -> bool:
        return name in self.figures


def _in_order(names) -> list[str]:
    return [name for name in DESCRIPTIONS if name in names]


def markdown_table(columns: dict[str, Likelihood]) -> str:
    """A Markdown table with a row for each figure, a column for each model, and what each figure is."""
    names = _in_order({name for likelihood in columns.values() for name in likelihood.figures})
    rows = [["nats a token", *columns, "what it is"]]
    for name in names:
        cells = [
            f"{likelihood.figures[name][0]:.3f} ± {likelihood.figures[name][1]:.3f}" if name in likelihood else "–"
            for likelihood in columns.values()
        ]
        rows.append([name, *cells, DESCRIPTIONS[name]])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def evaluate_likelihood(
    model,
    blocks,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    num_particles: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Likelihood:
    """Every figure of `DESCRIPTIONS` on blocks of equal length; for a model with `num_latents=0`, its exact losses.

    blocks: a data set with `input_ids`, as from `ltm_hf.data.pack`. num_inference_steps: default the model's.
    num_particles: samples of z that the bound is averaged over. Raises ValueError if there is no block.
    """
    figures = {}
    for name, losses in block_losses(
        model, blocks, batch_size, num_inference_steps, num_particles, seed, progress
    ).items():
        if name == "released":  # the mean of exponentials over blocks is the protocol's own
            mean, error = mean_and_error(losses.exp())
            figures[name] = (math.log(mean), error / mean)
        else:
            figures[name] = mean_and_error(losses)
    scored = len(blocks[0]["input_ids"]) - 1
    return Likelihood(figures, scored * len(blocks), len(blocks))


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean and its standard error, NaN for a single value."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


@torch.no_grad()
def block_losses(
    model,
    blocks,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    num_particles: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """What `evaluate_likelihood` averages, to be compared block by block: (blocks,) nats a token for each figure."""
    if not len(blocks):
        raise ValueError("There is no block to evaluate on.")
    was_training = model.training
    model.eval()
    sums = defaultdict(list)  # a sum in nats for each block
    for start in tqdm(range(0, len(blocks), batch_size), desc="Evaluating", disable=not progress, leave=False):
        batch = [blocks[index] for index in range(start, min(start + batch_size, len(blocks)))]
        input_ids = collate_blocks(batch)["input_ids"].to(model.device)
        for name, values in _score(model, input_ids, num_inference_steps, num_particles, seed).items():
            sums[name].append(values.double().cpu())
    model.train(was_training)
    length = input_ids.shape[1]
    scored, scored_after_prefix = length - 1, length - length // 2
    return {
        name: torch.cat(sums[name]) / (scored_after_prefix if name.startswith("prefix") else scored)
        for name in _in_order(sums)
    }


def _score(model, input_ids, num_inference_steps, num_particles, seed) -> dict[str, torch.Tensor]:
    """(B,) sums in nats of each figure."""
    half = input_ids.shape[1] // 2
    second_half = input_ids.clone()
    second_half[:, :half] = IGNORED
    plain = {
        "no_latents": negative_log_likelihood(model, input_ids),
        "prefix_no_latents": negative_log_likelihood(model, input_ids, labels=second_half),
    }
    if not model.config.num_latents:
        return plain

    settings = {"num_inference_steps": num_inference_steps, "seed": seed}
    posterior = infer_posterior(model, input_ids, **settings)
    estimate = elbo(model, input_ids, posterior, num_particles=num_particles, seed=seed)
    from_prefix = infer_posterior(model, input_ids[:, :half], **settings)
    noise = keyed_normal(sequence_keys(input_ids, torch.ones_like(input_ids)), model.config.latent_shape, seed)
    fitted_to_noise = infer_posterior(model, input_ids, epsilon=noise, **settings)
    return plain | {
        "bound": -estimate.elbo,
        "nll": estimate.nll,
        "kl": estimate.kl,
        "prefix": negative_log_likelihood(model, input_ids, from_prefix.mean, labels=second_half),
        "released": -elbo(model, input_ids, fitted_to_noise, epsilon=noise).elbo,
    }
