"""What a model can really do, measured so that others can trust it."""

from .figures import mean_and_error, ratio_and_error
from .likelihood import (
    BlockScores,
    Likelihood,
    evaluate_documents,
    evaluate_likelihood,
    importance_weighted_bound,
    markdown_table,
    score_blocks,
)
from .thinking import plot_thinking, thinking_curve, thinking_table, write_thinking_csv

__all__ = [
    "BlockScores",
    "Likelihood",
    "evaluate_documents",
    "evaluate_likelihood",
    "importance_weighted_bound",
    "markdown_table",
    "mean_and_error",
    "plot_thinking",
    "ratio_and_error",
    "score_blocks",
    "thinking_curve",
    "thinking_table",
    "write_thinking_csv",
]
