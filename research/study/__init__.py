"""Comparisons of models trained on the same tokens: a grid of settings, models and seeds, and what it says."""

from .cell import Lever
from .grid import Model, Scoring, Setting, Study
from .results import Estimate, estimate
from .run import run_study

__all__ = ["Estimate", "Lever", "Model", "Scoring", "Setting", "Study", "estimate", "run_study"]
