"""What the cells of a study say together: tables, and a picture of what thinking buys."""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from ltm_hf.evaluation.figures import markdown_rows, mean_and_error, ratio_and_error, with_error

from .grid import Study

Cells = dict[tuple[str, str, int], dict]  # by setting, model and seed
Seeds = dict[int, dict]  # a model's cells in a setting


class Estimate(NamedTuple):
    """Nats a token over the seeds, with standard errors over documents and over seeds; NaN where one is not known."""

    value: float
    over_documents: float
    over_seeds: float

    def __str__(self):
        errors = [f"± {error:.4f}" for error in self[1:] if not math.isnan(error)]
        return " ".join([with_error(self.value, None, 4), *errors])


def estimate(cells: Seeds, figure: str, minus: Seeds | None = None, other: str = "") -> Estimate:
    """A figure, over the seeds; or what it lies above another of the same tokens, over the seeds that both have."""
    seeds = sorted(cells.keys() & minus.keys() if minus else cells)
    if not seeds:
        return Estimate(math.nan, math.nan, math.nan)
    score = cells[seeds[0]]["scores"][figure]
    tokens, documents = torch.tensor(score["tokens"]).double(), torch.tensor(score["documents"])
    nats = _nats(cells, seeds, figure)
    if minus:
        nats -= _nats(minus, seeds, other)
    value, over_documents = ratio_and_error(nats.mean(dim=0), tokens, documents)
    return Estimate(value, over_documents, mean_and_error(nats.sum(dim=1) / tokens.sum())[1])


def _nats(cells: Seeds, seeds: list[int], figure: str) -> torch.Tensor:
    """(seeds, blocks); NaN for what was not finite."""
    rows = [cells[seed]["scores"][figure]["nats"] for seed in seeds]
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows]).double()


def in_words(study: Study, cells: Cells) -> str:
    """Markdown: for each setting, what models cost and predict at equal tokens, and at equal training FLOPs; and what
    longer thinking at test time buys."""
    about = study.scoring
    parts = [
        f"Nats a token of held-out blocks. loss: exact, of all tokens, each from what comes before it; latents that "
        f"layers read are inferred anew every {about.reinfer_every} tokens, by as many steps as in training. second: "
        f"the same of second halves; latents that layers read are of the first halves, after {about.at} steps. bound: "
        f"with fresh noise; of latents fitted to the whole text NLL + KL after {about.at} steps, of a memory the loss "
        f"by a sample for each token. iw: importance-weighted, {about.importance_samples} samples. Differences are "
        f"from {study.reference}'s exact losses, block by block, ± standard error over documents ± over seeds. MFLOPs "
        f"and ms (of this run, whatever else the machine did) are of training, a token and a step."
    ]
    for setting in study.settings:
        by_model = _by_model(study, cells, setting)
        equal = [name for name in by_model if study.models[name].flops_of is None]
        scaled = [name for name in by_model if study.models[name].flops_of in by_model]
        like = {study.models[name].flops_of for name in scaled}
        if equal:
            parts += [f"## {setting}, equal tokens", _costs(study, by_model, equal)]
        if scaled:
            chosen = [name for name in by_model if name in like or name in scaled]
            parts += [f"## {setting}, equal training FLOPs", _costs(study, by_model, chosen)]
        thinking = [name for name in by_model if f"prefix@{about.at}" in _figures(by_model[name])]
        if thinking:
            parts += [f"## {setting}, inference steps at test time", _thinking(study, by_model, thinking)]
    return "\n\n".join(parts) + "\n"


def _by_model(study: Study, cells: Cells, setting: str) -> dict[str, Seeds]:
    """Of the models that have any cell."""
    found = {
        name: {seed: cells[setting, name, seed] for seed in study.seeds if (setting, name, seed) in cells}
        for name in study.models
    }
    return {name: seeds for name, seeds in found.items() if seeds}


def _figures(cells: Seeds) -> dict:
    """Scores of one seed, by figure."""
    return next(iter(cells.values()))["scores"]


# Of a model's figures, which are compared, and with which exact one of the reference.
_COMPARED = {"loss": "loss", "second": "second", "bound": "loss"}


def _costs(study: Study, by_model: dict[str, Seeds], names: list[str]) -> str:
    rows = ["model seeds parameters MFLOPs steps ms".split()]
    rows[0] += [cell for figure in _COMPARED for cell in (figure, "difference")] + ["kl", "iw"]
    for name in names:
        cells = by_model[name]
        one = next(iter(cells.values()))
        row = [name, str(len(cells)), f"{one['parameters']:,}", f"{one['flops'] / 1e6:.2f}", f"{one['steps']:,}"]
        row.append(f"{1000 * statistics.median(cell['seconds'] for cell in cells.values()):.0f}")
        for figure in _COMPARED:
            row += [_value(cells, figure), _difference(study, by_model, name, figure, _COMPARED[figure])]
        rows.append([*row, _value(cells, "kl"), _value(cells, "iw")])
    return markdown_rows(rows)


def _value(cells: Seeds, figure: str) -> str:
    return with_error(estimate(cells, figure).value, None, 4) if figure in _figures(cells) else ""


def _difference(study: Study, by_model: dict[str, Seeds], name: str, figure: str, exact: str) -> str:
    """Of a model's figure from an exact one of the reference; nothing where there is none."""
    reference = by_model.get(study.reference)
    if reference is None or name == study.reference or figure not in _figures(by_model[name]):
        return ""
    return str(estimate(by_model[name], figure, reference, exact))


def _thinking(study: Study, by_model: dict[str, Seeds], names: list[str]) -> str:
    steps = study.scoring.all_steps
    rows = [["model", "", *map(str, steps)]]
    for name in names:
        for kind in ("bound", "prefix"):
            if f"{kind}@{steps[0]}" in _figures(by_model[name]):
                rows.append([name, kind, *(_value(by_model[name], f"{kind}@{number}") for number in steps)])
        above = [_difference(study, by_model, name, f"prefix@{number}", "second") for number in steps]
        rows.append([name, "prefix, difference", *above])
    return markdown_rows(rows)


def plot(study: Study, cells: Cells, path: Path) -> None:
    """Write a PNG: losses against inference steps, a row for each setting; of all tokens, and of second halves.

    Bars are standard errors, over documents, of differences from the reference. Level lines are exact predictors:
    dashed of models without latents, dotted of those with.
    """
    from matplotlib.figure import Figure

    settings = {setting: found for setting in study.settings if (found := _by_model(study, cells, setting))}
    figure, all_steps = Figure(figsize=(13, 4.2 * len(settings)), layout="constrained"), study.scoring.all_steps
    grid = figure.subplots(len(settings), 2, squeeze=False)
    panels = (("bound", "loss", "all tokens"), ("prefix", "second", "second halves"))
    for row, (setting, by_model) in zip(grid, settings.items(), strict=True):
        reference = by_model.get(study.reference)
        for axes, (kind, exact, words) in zip(row, panels, strict=True):
            for index, (name, found) in enumerate(by_model.items()):
                thinks, color = f"prefix@{all_steps[0]}" in _figures(found), f"C{index}"
                style = ":" if thinks else "--"
                axes.axhline(estimate(found, exact).value, color=color, ls=style, lw=1.3, label=name)
                steps = [number for number in all_steps if f"{kind}@{number}" in _figures(found)]
                values = [estimate(found, f"{kind}@{number}").value for number in steps]
                errors = [estimate(found, f"{kind}@{number}", reference, exact).over_documents for number in steps]
                axes.errorbar(range(len(steps)), values, errors, fmt="o-", color=color, ms=4, capsize=3)
            axes.set_xticks(range(len(all_steps)), list(map(str, all_steps)))
            axes.set(xlabel="inference steps at test time", ylabel="nats a token", title=f"{setting}: {words}")
        row[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
