"""Dual-rate learning under transformers' Trainer."""

from .arguments import DualRateArguments, LTMTrainingArguments
from .card import add_to_model_index, write_model_card
from .curves import plot_curves
from .trainer import DualRateMixin, LTMTrainer

__all__ = [
    "DualRateArguments",
    "DualRateMixin",
    "LTMTrainer",
    "LTMTrainingArguments",
    "add_to_model_index",
    "plot_curves",
    "write_model_card",
]
