"""Dual-rate learning under transformers' Trainer."""

from .arguments import LTMTrainingArguments
from .curves import plot_curves
from .trainer import LTMTrainer

__all__ = ["LTMTrainer", "LTMTrainingArguments", "plot_curves"]
