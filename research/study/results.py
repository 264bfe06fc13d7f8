"""What the cells of a study say together: tables, and a picture of what thinking buys."""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from ..evaluation.figures import markdown_rows, mean_and_error, ratio_and_error, with_error
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
        f"Nats a token of held-out blocks. loss: exact, or for a model with latents the bound with fresh noise after "
        f"{about.at} inference steps; iw: importance-weighted bound, {about.importance_samples} samples; prefix: exact "
        f"loss of what follows a prefix, latents from it alone; mixture: the same, {about.mixture_samples} samples; "
        f"reinfer: exact loss of all tokens, latents from all before, anew every {about.reinfer_every} tokens, by as "
        f"many steps as in training. Differences are from {study.reference}, block by block, ± standard error over "
        f"documents ± over seeds. MFLOPs and ms (of this run, whatever else the machine did) are of training, a token "
        f"and a step."
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
        thinking = [name for name in by_model if f"bound@{about.at}" in _figures(by_model[name])]
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


def _costs(study: Study, by_model: dict[str, Seeds], names: list[str]) -> str:
    at, reference = study.scoring.at, by_model.get(study.reference)
    head = "model seeds parameters MFLOPs steps ms loss difference kl iw reinfer difference prefix difference mixture"
    rows = [head.split()]
    for name in names:
        cells, other = by_model[name], None if name == study.reference else reference
        one, known = next(iter(cells.values())), _figures(cells)
        bound, prefix = (f"bound@{at}", f"prefix@{at}") if f"bound@{at}" in known else ("exact", "prefix_exact")
        figures = {figure: with_error(estimate(cells, figure).value, None, 4) for figure in known}
        bound_above, reinfer_above, prefix_above = (
            "" if other is None or figure not in known else str(estimate(cells, figure, other, exact))
            for figure, exact in ((bound, "exact"), ("reinfer", "exact"), (prefix, "prefix_exact"))
        )
        costs = [str(len(cells)), f"{one['parameters']:,}", f"{one['flops'] / 1e6:.2f}", f"{one['steps']:,}"]
        costs.append(f"{1000 * statistics.median(cell['seconds'] for cell in cells.values()):.0f}")
        losses = [figures[bound], bound_above, figures.get(f"kl@{at}", ""), figures.get("iw", "")]
        exactly = [figures.get("reinfer", ""), reinfer_above, figures[prefix], prefix_above]
        rows.append([name, *costs, *losses, *exactly, figures.get("mixture", "")])
    return markdown_rows(rows)


def _thinking(study: Study, by_model: dict[str, Seeds], names: list[str]) -> str:
    steps = study.scoring.all_steps
    rows = [["model", "", *map(str, steps)]]
    for name in names:
        for kind in ("bound", "prefix"):
            values = [with_error(estimate(by_model[name], f"{kind}@{n}").value, None, 4) for n in steps]
            rows.append([name, kind, *values])
        if reference := by_model.get(study.reference):
            above = [str(estimate(by_model[name], f"prefix@{number}", reference, "prefix_exact")) for number in steps]
            rows.append([name, "prefix, difference", *above])
    return markdown_rows(rows)


def plot(study: Study, cells: Cells, path: Path) -> None:
    """Write a PNG: bounds and prefix losses against inference steps, a row for each setting.

    Bars are standard errors, over documents, of differences from the reference. Level lines are exact: of models
    without latents, and dotted of those that infer anew (`reinfer`). Inference without a variance ("map") has no bound
    worth drawing.
    """
    from matplotlib.figure import Figure

    settings = {setting: found for setting in study.settings if (found := _by_model(study, cells, setting))}
    figure = Figure(figsize=(13, 4.2 * len(settings)), layout="constrained")
    grid = figure.subplots(len(settings), 2, squeeze=False)
    for axes_of_row, (setting, by_model) in zip(grid, settings.items(), strict=True):
        reference = by_model.get(study.reference)
        for axes, kind, exact in zip(axes_of_row, ("bound", "prefix"), ("exact", "prefix_exact"), strict=True):
            for index, (name, found) in enumerate(by_model.items()):
                steps = [number for number in study.scoring.all_steps if f"{kind}@{number}" in _figures(found)]
                if kind == "bound" and "reinfer" in _figures(found):
                    axes.axhline(estimate(found, "reinfer").value, color=f"C{index}", ls=":", lw=1.6)
                    if study.config(setting, name).inference_optimizer == "map":
                        continue
                if not steps:
                    axes.axhline(estimate(found, exact).value, color=f"C{index}", ls="--", lw=1.2, label=name)
                    continue
                values = [estimate(found, f"{kind}@{number}") for number in steps]
                errors = [estimate(found, f"{kind}@{n}", reference, exact).over_documents for n in steps]
                axes.errorbar(
                    range(len(steps)), [value.value for value in values], errors, fmt="o-", color=f"C{index}", ms=4,
                    capsize=3, label=name,
                )  # fmt: skip
            axes.set_xticks(range(len(study.scoring.all_steps)), list(map(str, study.scoring.all_steps)))
            title = "what follows a prefix, latents from it"
            if kind == "bound":
                title = f"all tokens (dotted: latents anew every {study.scoring.reinfer_every})"
            axes.set(xlabel="inference steps at test time", ylabel="nats a token", title=f"{setting}: {title}")
        axes_of_row[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
