"""Comparisons of models trained on the same tokens: a grid of settings, models and seeds, and what it says."""

from .grid import Model, Scoring, Setting, Study
from .results import Estimate, estimate
from .run import run_study

__all__ = ["Estimate", "Model", "Scoring", "Setting", "Study", "estimate", "run_study"]
