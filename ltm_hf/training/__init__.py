"""Dual-rate learning under transformers' Trainer."""

from .arguments import DualRateArguments, LTMTrainingArguments
from .card import add_to_model_index, write_model_card
from .curves import plot_curves
from .folder import check_run
from .trainer import DualRateMixin, LTMTrainer

__all__ = [
    "DualRateArguments",
    "DualRateMixin",
    "LTMTrainer",
    "LTMTrainingArguments",
    "add_to_model_index",
    "check_run",
    "plot_curves",
    "write_model_card",
]
