"""Training curves as a picture."""

from pathlib import Path


def plot_curves(histories: dict[str, list[dict]], path: str | Path) -> None:
    """Write a PNG of runs' `trainer.state.log_history`, by name: likelihood, and what latents carry.

    Needs matplotlib (the extra `examples`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    likelihood, latents = figure.subplots(1, 2)
    for index, (name, history) in enumerate(histories.items()):
        for axes, key, label, style in (
            (likelihood, "loss", "training loss given latents" if index == 0 else "training loss", "-"),
            (likelihood, "eval_loss", "validation bound" if index == 0 else "validation loss", "o-"),
            (latents, "eval_kl", "KL (validation)", "o-"),
            (latents, "eval_gain", "gain over no latents (validation)", "s-"),
            (latents, "kl", "KL (training)", "-"),
        ):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                color = None if axes is latents else f"C{index}"
                alpha = 1.0 if key.startswith("eval") else 0.45
                axes.plot(*zip(*points, strict=True), style, color=color, alpha=alpha, ms=4, label=f"{name}: {label}")
    for axes, title in ((likelihood, "Likelihood"), (latents, "What the latents carry")):
        axes.set(xlabel="step", ylabel="nats a token", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
