"""Training curves as a picture. They need matplotlib (the extra `examples`)."""

from pathlib import Path

# Panels: what is drawn of a log, by the name of the figure, and how.
_PANELS = {
    "Likelihood": {"loss": ("training loss", "-"), "eval_loss": ("validation loss", "o-")},
    "What the latents carry": {
        "eval_kl": ("KL (validation)", "o-"),
        "eval_gain": ("gain over no latents (validation)", "s-"),
        "kl": ("KL (training)", "-"),
    },
}
_FAST_LOOP = "ELBO of the fast loop (validation)"
_OF_A_BOUND = {"loss": "training loss given latents", "eval_loss": "validation bound"}  # where a KL is paid


def plot_curves(histories: dict[str, list[dict]], path: str | Path) -> None:
    """Write a PNG of runs' `trainer.state.log_history`, by name: likelihood, what latents carry, and the fast loop.

    What no run has logged has no panel. The fast loop: one line for each evaluation that logged `eval_elbo_trace`, the
    later the darker.
    """
    from matplotlib.figure import Figure

    logged = {name for history in histories.values() for entry in history for name in entry}
    panels = {title: drawn for title, drawn in _PANELS.items() if logged & drawn.keys()}
    titles = [*panels, *([_FAST_LOOP] if "eval_elbo_trace" in logged else [])]
    figure = Figure(figsize=(5 * max(1, len(titles)), 4.2), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0] if titles else (), titles, strict=True):
        for index, (name, history) in enumerate(histories.items()):
            if title == _FAST_LOOP:
                _draw_fast_loop(axes, name, history, f"C{index}")
            else:
                _draw(axes, panels[title], name, history, f"C{index}" if title == "Likelihood" else None)
        axes.set(xlabel="inference steps" if title == _FAST_LOOP else "step", ylabel="nats a token", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _draw(axes, drawn: dict, name: str, history: list[dict], color: str | None) -> None:
    is_bound = any("eval_perplexity_bound" in entry for entry in history)
    for key, (label, style) in drawn.items():
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            label = _OF_A_BOUND.get(key, label) if is_bound else label
            alpha = 1.0 if key.startswith("eval") else 0.45
            axes.plot(*zip(*points, strict=True), style, color=color, alpha=alpha, ms=4, label=f"{name}: {label}")


def _draw_fast_loop(axes, name: str, history: list[dict], color: str) -> None:
    traces = [(entry["step"], entry["eval_elbo_trace"]) for entry in history if "eval_elbo_trace" in entry]
    for number, (step, trace) in enumerate(traces, start=1):
        label = f"{name}: step {step}" if number in (1, len(traces)) else None
        alpha = 1 - 0.8 * (len(traces) - number) / len(traces)
        axes.plot(range(len(trace)), trace, ".-", color=color, alpha=alpha, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
