"""Training curves as a picture. They need matplotlib (the extra `examples`)."""

from pathlib import Path


def plot_curves(histories: dict[str, list[dict]], path: str | Path) -> None:
    """Write a PNG of runs' `trainer.state.log_history`, by name: likelihood, what latents carry, and the fast loop.

    The fast loop: one line for each evaluation that logged `eval_elbo_trace`, the later the darker.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    likelihood, latents, fast_loop = figure.subplots(1, 3)
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
        traces = [(entry["step"], entry["eval_elbo_trace"]) for entry in history if "eval_elbo_trace" in entry]
        for number, (step, trace) in enumerate(traces, start=1):
            label = f"{name}: step {step}" if number in (1, len(traces)) else None
            alpha = 1 - 0.8 * (len(traces) - number) / len(traces)
            fast_loop.plot(range(len(trace)), trace, ".-", color=f"C{index}", alpha=alpha, label=label)
    fast_loop.xaxis.get_major_locator().set_params(integer=True)
    for axes, title, unit in (
        (likelihood, "Likelihood", "step"),
        (latents, "What the latents carry", "step"),
        (fast_loop, "ELBO of the fast loop (validation)", "inference steps"),
    ):
        axes.set(xlabel=unit, ylabel="nats a token", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
