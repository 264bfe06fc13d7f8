"""Thinking curves: what more inference steps, or more latents, save, and what they cost."""

import csv
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..costs.flops import count_flops
from ..data.numbers import check_at_least
from ..inference_ltm import infer_posterior
from ..methods_ltm import method_of
from .figures import markdown_rows, with_error
from .likelihood import default_figures, score_blocks

LABELS = {"bound": "bound with fresh noise", "prefix": "prefix: what follows, latents from what precedes"}
_WITHOUT = {"bound": "no_latents", "prefix": "prefix_no_latents"}  # the same tokens without latents


def takes_steps(model) -> bool:
    """Whether there is a dial to turn."""
    return bool(getattr(model.config, "num_latents", 0)) and method_of(model.config).takes_steps


def thinking_curve(
    model,
    blocks,
    steps: Sequence[int] = (0, 1, 2, 4, 8, 16, 32),
    batch_size: int = 16,
    num_particles: int = 1,
    seed: int = 0,
    progress: bool = True,
    prefix_blocks=None,
) -> list[dict]:
    """Bound and prefix loss after each number of inference steps: a row for each figure and number, for a CSV or JSON.

    blocks: as for `evaluate_likelihood`. prefix_blocks: blocks for the prefix loss, default the same.

    A row holds `figure`, `num_inference_steps` and `num_latents`; `nats` a token with its `error`; `saved`, what the
    same tokens' loss without latents lies above it, block by block, with its `saved_error`; the `seconds` a block of
    inference and scoring; and `mflops`, 10⁶ FLOPs a token of inference alone, as torch counts them on the longest
    block. Of a model without a bound (`default_figures`) there is no row of one. Figures that are not finite are NaN.

    Raises ValueError as `evaluate_likelihood` does, for no steps or a number of them below 0, and for a model that
    takes none.
    """
    if not takes_steps(model):
        raise ValueError("This model takes no inference steps: there is no curve of them.")
    check_at_least(1, steps=len(steps))
    check_at_least(0, **{f"steps[{index}]": number for index, number in enumerate(steps)})
    rows = []
    for figure, on in (("bound", blocks), ("prefix", prefix_blocks or blocks)):
        if figure not in default_figures(model):
            continue
        shared = dict(batch_size=batch_size, seed=seed, progress=progress)
        plain = score_blocks(model, on, figures=[_WITHOUT[figure]], **shared)
        for number in sorted(set(steps)):
            start = time.perf_counter()
            scores = score_blocks(
                model, on, num_inference_steps=number, num_particles=num_particles, figures=[figure], **shared
            )
            seconds = (time.perf_counter() - start) / len(on)
            scores.nats |= plain.nats
            nats, error = scores.mean(figure)
            saved, saved_error = scores.mean(_WITHOUT[figure], minus=figure)
            rows.append(
                {
                    "figure": figure, "num_inference_steps": number, "num_latents": model.config.num_latents,
                    "nats": nats, "error": error, "saved": saved, "saved_error": saved_error,
                    "seconds": seconds, "mflops": _inference_flops(model, on, number) / 1e6,
                }
            )  # fmt: skip
    return rows


def _inference_flops(model, blocks, steps: int) -> float:
    """FLOPs a token of so many steps, of the longest block."""
    ids = torch.tensor([max((block["input_ids"] for block in blocks), key=len)], device=model.device)
    return count_flops(lambda: infer_posterior(model, ids, num_inference_steps=steps)) / ids.numel()


def thinking_table(curves: dict[str, list[dict]]) -> str:
    """A Markdown table of curves by model's name."""
    cells = [["model", "latents", "figure", "steps", "nats a token", "saved", "seconds a block", "MFLOPs a token"]]
    for name, rows in curves.items():
        for row in rows:
            nats, saved = with_error(row["nats"], row["error"], 4), with_error(row["saved"], row["saved_error"], 4)
            numbers = (str(row["num_latents"]), row["figure"], str(row["num_inference_steps"]))
            cells.append([name, *numbers, nats, saved, f"{row['seconds']:.3f}", f"{row['mflops']:.4g}"])
    return markdown_rows(cells)


def write_thinking_csv(curves: dict[str, list[dict]], path: str | Path) -> None:
    """Curves by model's name, a line for each point."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = None
        for name, rows in curves.items():
            for row in rows:
                writer = writer or csv.DictWriter(file, ["model", *row])
                if not file.tell():
                    writer.writeheader()
                writer.writerow({"model": name, **row})


def plot_thinking(curves: dict[str, list[dict]], path: str | Path) -> None:
    """Write a PNG of curves by model's name: the losses, what thinking saves and costs, and the number of latents.

    Bars are standard errors. The last panel, where models have different numbers of latents, shows each at its most
    inference steps.
    """
    from matplotlib.figure import Figure

    curves = {name: [_drawn(row) for row in rows] for name, rows in curves.items()}
    by_latents = len({rows[0]["num_latents"] for rows in curves.values()}) > 1
    figure = Figure(figsize=(17 if by_latents else 11.5, 4.6), layout="constrained")
    level, saved, *rest = figure.subplots(1, 3 if by_latents else 2)
    steps = sorted({row["num_inference_steps"] for rows in curves.values() for row in rows})
    lines = [
        (name, kind, points)
        for name, rows in curves.items()
        for kind in LABELS
        if (points := [row for row in rows if row["figure"] == kind])
    ]
    for index, (name, kind, points) in enumerate(lines):
        style = dict(fmt="o-" if kind == "bound" else "s--", color=f"C{index}", ms=4, capsize=3)
        label = LABELS[kind] if len(curves) == 1 else f"{name}: {kind}"
        shift = 0.24 * ((index + 0.5) / len(lines) - 0.5)  # side by side, so that bars can be read
        places = [steps.index(point["num_inference_steps"]) + shift for point in points]
        for axes, value, error in ((level, "nats", "error"), (saved, "saved", "saved_error")):
            values, errors = ([point[key] for point in points] for key in (value, error))
            axes.errorbar(places, values, errors, label=label, **style)
        level.axhline(points[0]["nats"] + points[0]["saved"], color=f"C{index}", ls=":", lw=1)
    saved.axhline(0, color="grey", lw=1)
    for axes, title in (
        (level, "Held-out loss (dotted: without latents)"),
        (saved, "Saved over no latents, block by block"),
    ):
        axes.set_xticks(range(len(steps)), [str(step) for step in steps])
        axes.set(xlabel="inference steps at test time", ylabel="nats a token, ± standard error", title=title)
    costs = {row["num_inference_steps"]: row for row in lines[0][2]}
    top = saved.secondary_xaxis("top")
    top.set_xticks(
        [steps.index(number) for number in costs],
        [f"{row['seconds']:.2g} s\n{row['mflops']:.3g} M" for row in costs.values()],
        fontsize=7,
    )
    top.set_xlabel("seconds a block, MFLOPs a token" + ("" if len(curves) == 1 else f" ({lines[0][0]})"), fontsize=8)
    for axes in rest:
        for kind in LABELS:
            ends = sorted((points[-1]["num_latents"], points[-1]["nats"], points[-1]["error"])
                          for _, line, points in lines if line == kind)  # fmt: skip
            if ends:
                style = dict(fmt="o-" if kind == "bound" else "s--", capsize=3, label=LABELS[kind])
                axes.errorbar(*zip(*ends, strict=True), **style)
        axes.set(xlabel="latents", ylabel="nats a token, ± standard error", title=f"After {steps[-1]} steps")
    level.margins(y=0.3)  # room for the legend
    for axes, place in ((level, "upper center"), (saved, "best"), *((axes, "best") for axes in rest)):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc=place)
    figure.savefig(path, dpi=120)


def _drawn(row: dict) -> dict:
    """NaN, which is not drawn, for what JSON has no number for."""
    return {name: math.nan if value is None else value for name, value in row.items()}
