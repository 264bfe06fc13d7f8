"""What a model can really do, measured so that others can trust it."""

from .likelihood import Likelihood, block_losses, evaluate_likelihood, markdown_table, mean_and_error

__all__ = ["Likelihood", "block_losses", "evaluate_likelihood", "markdown_table", "mean_and_error"]
