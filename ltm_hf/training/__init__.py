"""Dual-rate learning under transformers' Trainer."""

from .arguments import LTMTrainingArguments
from .card import write_model_card
from .curves import plot_curves
from .trainer import LTMTrainer

__all__ = ["LTMTrainer", "LTMTrainingArguments", "plot_curves", "write_model_card"]
