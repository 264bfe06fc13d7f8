"""What a model can really do, measured so that others can trust it."""

from .likelihood import Likelihood, evaluate_likelihood, markdown_table

__all__ = ["Likelihood", "evaluate_likelihood", "markdown_table"]
