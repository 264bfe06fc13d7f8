"""Pictures of `rebuilding`, `usage` and `representations`, as PNGs. They need matplotlib (the extra `examples`)."""

import math
from pathlib import Path

from .figures import number, written


def plot_progressive_inclusion(result: dict, path: str | Path) -> None:
    """Token accuracy against the layers whose latents are read; right, the same blocks' gain over none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    level, gain = figure.subplots(1, 2)
    layers = result["layers"]
    labels = {
        "teacher_forced": "teacher-forced: true tokens in the window, and z",
        "free_running": "free-running: greedy from the first token, z alone",
    }
    for index, (name, label) in enumerate(labels.items()):
        for axes, figures in ((level, result[name]), (gain, result["gain"][name])):
            places = [layer + 0.05 * (2 * index - 1) for layer in layers]  # side by side, so that bars can be read
            _errorbar(axes, places, figures, factor=100, fmt="o-", color=f"C{index}", label=label)
    level.set_ylim(bottom=0)
    gain.axhline(0, color="grey", lw=1)
    for axes, title in (
        (level, f"Text rebuilt from its latents, {result['num_blocks']} blocks"),
        (gain, "Gain over no latents, block by block"),
    ):
        axes.set_xticks(layers, ["none", *(f"1–{layer}" if layer > 1 else "1" for layer in layers[1:])])
        axes.set(xlabel="layers whose latents are read", title=f"{title}, ± standard error")
        axes.grid(alpha=0.3)
    level.set_ylabel("tokens right, %")
    gain.set_ylabel("percentage points")
    figure.legend(*level.get_legend_handles_labels(), fontsize=9, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=120)


def plot_interpolation(result: dict, path: str | Path) -> None:
    """What each text gains from the thoughts between the two, against no latents."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    weights = result["weights"]
    for index, name in enumerate(("first", "second")):
        label = f"{name} text (without latents {written({**result['no_latents'][name], 'error': None})})"
        _errorbar(axes, weights, result["change"][name], fmt="o-", color=f"C{index}", label=label)
    axes.axhline(0, color="grey", lw=1)
    axes.set_xticks(weights, [f"{weight:g}" for weight in weights])
    axes.set(
        xlabel="weight: 0 is the first text's posterior, 1 the second's",
        ylabel="nll less that without latents, nats a token",
        title=f"Between two texts' thoughts, {result['num_pairs']} pairs, ± standard error",
    )
    axes.grid(alpha=0.3)
    axes.margins(y=0.25)
    axes.legend(fontsize=8, loc="upper center", ncols=2)
    figure.savefig(path, dpi=120)


def plot_latent_usage(result: dict, path: str | Path) -> None:
    """Heat maps, a row for each layer and a column for each latent: KL, and the share of units that are active."""
    from matplotlib.figure import Figure

    kl = [[number(latent) for latent in layer] for layer in result["kl"]]
    channels = result["num_channels"]
    height = max(3.0, 0.45 * len(kl) + 1.6)
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    total, token = result["kl_total"], result["kl_per_token"]
    _heat_map(left, kl, result["readers"], "{:.2f}", "nats a block")
    left.set_title(f"KL from the prior: {written(total, 2)} nats a block,\n{written(token, 4)} a token", fontsize=10)
    _heat_map(right, result["active_units"], result["readers"], "{:d}", "units", highest=channels)
    right.set_title(
        f"Active units of {channels} a latent: {result['num_active']} of {result['num_units']} "
        f"({100 * result['num_active'] / result['num_units']:.1f} %)\n"
        f"variance of the mean over {result['num_blocks']} blocks > {result['threshold']:g}; the prior's is 1",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)


def plot_latent_reading(result: dict, path: str | Path) -> None:
    """Which latents the first block's tokens read, a panel for each layer."""
    from matplotlib.figure import Figure

    layers, tokens = result["weights"], result["tokens"]
    latents = len(layers[0][0])
    figure = Figure(figsize=(max(6, 0.24 * len(tokens) + 2), len(layers) * (0.7 + 0.16 * latents) + 1.9), dpi=120)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for index, (axes, weights) in enumerate(zip(panels, layers, strict=True)):
        image = axes.imshow(list(zip(*weights, strict=True)), aspect="auto", vmin=0, vmax=1, cmap="viridis")
        reader, entropy, addition = (result[name][index] for name in ("readers", "entropy", "addition"))
        axes.set_title(
            f"{reader}: entropy {number(entropy):.3f} of at most {result['max_entropy']:.3f} nats; "
            f"adds {100 * number(addition):.1f} % to the residual stream",
            fontsize=9,
        )
        axes.set_yticks(range(latents), range(1, latents + 1))
        axes.set_ylabel("latent")
    panels[-1].set_xticks(range(len(tokens)), [_visible(token) for token in tokens], rotation=90, fontsize=7)
    for label in panels[-1].get_xticklabels():
        label.set_parse_math(False)  # a text's dollars are dollars
    figure.suptitle("What one block's tokens read of each latent, mean over heads", fontsize=11)
    figure.colorbar(image, ax=list(panels), label="share", shrink=0.8)
    figure.savefig(path)


def plot_topic_probe(result: dict, path: str | Path) -> None:
    """Accuracy of the linear probe, and how many nearest neighbours share the class, by representation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, figures, title, unit in (
        (figure.add_subplot(121), result["accuracy"], "Class read by a linear probe", "right, %"),
        (
            figure.add_subplot(122),
            result["same_class"],
            f"Class of the {result['num_neighbours']} nearest training texts",
            "the same as the test text's, %",
        ),
    ):
        values = [100 * number(one) for one in figures.values()]
        errors = [100 * (one["error"] or 0.0) for one in figures.values()]
        bars = axes.barh(list(figures), values, xerr=errors, capsize=3, color=[f"C{i}" for i in range(len(values))])
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=8)
        axes.set(xlabel=unit, xlim=(0, 108), title=title)
        axes.invert_yaxis()
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    chance = 100 * result["same_class_by_chance"]
    axes.axvline(chance, color="grey", ls="--", lw=1, label=f"by chance {chance:.1f}")
    axes.legend(fontsize=8, loc="lower right")
    thinking = f"inference steps: {result['num_inference_steps']}"
    figure.suptitle(f"{result['num_test']} test texts, {thinking}; bars are standard errors over texts", fontsize=10)
    figure.savefig(path, dpi=120)


def _errorbar(axes, places, figures, factor=1.0, **style) -> None:
    """Figures at places; one whose error nobody knows has no bar."""
    means = [factor * number(one) for one in figures]
    errors = [factor * (one["error"] or 0.0) for one in figures]
    axes.errorbar(places, means, errors, ms=4, capsize=3, **style)


def _heat_map(axes, rows, readers, form: str, unit: str, highest: float | None = None) -> None:
    """A layer's row of numbers, from 0, each written into its cell where they are few."""
    highest = highest or max((value for row in rows for value in row if math.isfinite(value)), default=0) or 1
    image = axes.imshow(rows, aspect="auto", vmin=0, vmax=highest, cmap="viridis")
    if len(rows[0]) <= 12:
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                dark = value < 0.6 * image.norm.vmax
                axes.text(x, y, form.format(value), ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(rows[0])), range(1, len(rows[0]) + 1))
    axes.set_yticks(range(len(rows)), readers)
    axes.set(xlabel="latent")
    axes.figure.colorbar(image, ax=axes, label=unit)


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "→").replace(" ", "·") or "∅"
