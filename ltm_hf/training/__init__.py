"""Dual-rate learning under transformers' Trainer."""

from .arguments import DualRateArguments, LTMTrainingArguments
from .card import write_model_card
from .curves import plot_curves
from .trainer import DualRateMixin, LTMTrainer

__all__ = [
    "DualRateArguments",
    "DualRateMixin",
    "LTMTrainer",
    "LTMTrainingArguments",
    "plot_curves",
    "write_model_card",
]
