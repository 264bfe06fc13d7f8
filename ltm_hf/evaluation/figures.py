"""Figures and their standard errors, as JSON and in words: what every study is made of."""

import math
from collections.abc import Sequence
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(*models):
    """Models in eval mode and no gradients inside; training mode is restored after."""
    modes = [(model, model.training) for model in models]
    try:
        with torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        for model, was_training in modes:
            model.train(was_training)


def check_finite(model) -> None:
    """Raise a ValueError for a model that has a weight which is no finite number, by name: what it says is nothing."""
    for name, parameter in model.named_parameters():
        whole = type(parameter.data) is torch.Tensor and parameter.is_floating_point() and not parameter.is_meta
        if whole and not parameter.isfinite().all():
            raise ValueError(f"The model's weights are not finite ({name}): there is nothing to measure.")


# ------------------------------------------------------------------ means and their errors


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean and its standard error, NaN for a single value. Raises ValueError for no value."""
    if not len(values):
        raise ValueError("There is nothing to take the mean of.")
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else values.new_tensor(math.nan)
    return values.mean().item(), error.item()


def ratio_and_error(sums: torch.Tensor, counts: torch.Tensor, groups: torch.Tensor) -> tuple[float, float]:
    """Σ sums / Σ counts and its standard error over groups, NaN for a single one.

    That of a ratio of sums, by its linearisation (Cochran 1977, section 6.4). sums, counts, groups: (rows,) each;
    groups without counts tell nothing. Raises ValueError where nothing is counted.
    """
    if not counts.any():
        raise ValueError("There is nothing to take the mean of: no token is counted.")
    _, groups = groups.unique(return_inverse=True)
    size = int(groups.max()) + 1
    sums, counts = (torch.zeros(size, dtype=x.dtype).index_add(0, groups, x) for x in (sums, counts))
    sums, counts = sums[counts > 0], counts[counts > 0]
    ratio = sums.sum() / counts.sum()
    residuals = (sums - ratio * counts) / counts.mean()
    return ratio.item(), mean_and_error(residuals)[1]


def as_figure(value: float, error: float, n: int) -> dict:
    """`value`, its standard `error` and what they are over, `n`, for JSON: None where one is not finite."""
    value, error = (x if math.isfinite(x) else None for x in (value, error))
    return {"value": value, "error": error, "n": n}


def figure(values: torch.Tensor | Sequence[float]) -> dict:
    """The mean of (n,) values, as a figure; n is 0 where there are none."""
    values = torch.as_tensor(values).double()
    return as_figure(*mean_and_error(values), len(values)) if len(values) else as_figure(math.nan, math.nan, 0)


def beyond_noise(difference: dict) -> bool:
    """Whether a figure lies more than two standard errors from zero; never, where nobody knows the error."""
    return difference["error"] is not None and abs(difference["value"]) > 2 * difference["error"]


# ------------------------------------------------------------------ in words

NOT_FINITE = "not finite"


def with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    """`value ± error`, without an error that is not known. None is what JSON makes of NaN and infinity."""
    if value is None or math.isnan(value):
        return NOT_FINITE
    known = error is not None and math.isfinite(error)
    return f"{value:,.{digits}f}" + (f" ± {error:,.{digits}f}" if known else "")


def written(figure: dict, digits: int = 3, factor: float = 1.0, sign: bool = False) -> str:
    """A figure as `value ± error` in so many digits, times a factor: 100 for percent; a dash where nothing has one."""
    if figure["value"] is None:
        return _without(figure)
    value = f"{factor * figure['value']:{'+' if sign else ''}.{digits}f}"
    return value if figure["error"] is None else f"{value} ± {factor * figure['error']:.{digits}f}"


def cell(figure: dict | None) -> str:
    """A figure in a table of figures of all sizes: four digits that count; a dash where there is none."""
    if not figure or "value" not in figure:
        return "–"
    if figure["value"] is None:
        return _without(figure)
    error = "" if figure["error"] is None else f" ± {figure['error']:.2g}"
    return f"{figure['value']:.4g}{error}"


def _without(figure: dict) -> str:
    return NOT_FINITE if figure.get("n") else "–"


def number(figure: dict) -> float:
    """A figure's value to draw: NaN, which is not drawn, where there is none."""
    return math.nan if figure["value"] is None else figure["value"]


def errors_over(count: int, what: str) -> str:
    return f"± standard error over {count} {what}s" if count > 1 else f"a single {what}, without an error"


def over_blocks(result: dict) -> str:
    """What the figures of a study of posterior means are over, as a sentence."""
    return (
        f"{errors_over(result['num_blocks'], 'block').capitalize()}; inference steps: {result['num_inference_steps']}; "
        "latents at their posterior mean."
    )


def shortened(text: str, length: int = 100) -> str:
    """The first words of a text, on one line, in so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …"


def markdown_rows(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the heading, as a Markdown table. What would end a cell is escaped."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    # Long texts are not worth lining up for.
    widths = [max(len(cell) if len(cell) < 120 else 0 for cell in column) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
