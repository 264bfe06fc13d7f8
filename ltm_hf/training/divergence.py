"""Slow steps that are not finite: skipped, counted, and the end of the run when they come in a row."""

import math

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from .checkpoints import CheckpointMixin

logger = logging.get_logger(__name__)

IN_A_ROW = 3


class DivergenceMixin(CheckpointMixin):
    """Before any `Trainer`: a step whose loss or gradient is not finite leaves weights and optimiser as they were.

    It is skipped on all processes, with all batches that were accumulated for it, and its noise and its place in the
    schedule go by. Logs tell `skipped_steps`, of the run so far, once there are any. Three in a row raise
    FloatingPointError, which names the last checkpoint, and so do weights that are not finite when they are to be
    saved. Under float16 such steps belong to the loss scaling, which skips them by itself, and are not counted.
    DeepSpeed takes its steps before anyone can look: there, the first that it does not skip by itself ends the run.
    """

    def __init__(self, *args, **kwargs):
        self._finite = True  # the loss of this step, on this process, so far
        self._grad_norm = 0.0
        self._skipped = self._skipped_in_a_row = 0
        super().__init__(*args, **kwargs)
        self.add_callback(_SkipNonFinite(self))

    def _run_state(self):
        return super()._run_state() | {"skipped": [self._skipped, self._skipped_in_a_row]}

    def _begin_run(self, states):
        super()._begin_run(states)
        self._skipped, self._skipped_in_a_row = states[0]["skipped"] if states else (0, 0)
        self._finite = True

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self._finite = self._finite & loss.isfinite().all()
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        self._grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self._grad_norm

    def _judge_step(self) -> None:
        """After the gradient is complete, and before the optimiser takes it."""
        finite, self._finite = bool(self._finite) and math.isfinite(self._grad_norm), True
        if not self._any(not finite):
            self._skipped_in_a_row = 0
            return
        if self.accelerator.scaler is not None:
            return
        step, cause = self.state.global_step + 1, self._cause()
        if self.is_deepspeed_enabled:
            if not self.accelerator.optimizer_step_was_skipped:
                raise FloatingPointError(f"Slow step {step} was not finite{cause}; {self._way_back()}")
            return
        for parameter in self.model.parameters():
            parameter.grad = None  # which an optimiser passes over
        self._skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == IN_A_ROW:
            raise FloatingPointError(
                f"{IN_A_ROW} slow steps in a row, up to step {step}, were not finite{cause}; {self._way_back()}"
            )
        logger.warning(f"The loss or gradient of slow step {step} was not finite{cause}; skipped.")

    def _cause(self) -> str:
        """Why this step is not finite, on all processes, where it is known."""
        return ""

    @torch.no_grad()
    def _save_checkpoint(self, model, trial):
        finite = all(bool(_local(parameter).isfinite().all()) for parameter in self.model.parameters())
        if self._any(not finite):
            raise FloatingPointError(
                f"The weights after step {self.state.global_step} are not finite and are not saved; {self._way_back()}"
            )
        super()._save_checkpoint(model, trial)

    def log(self, logs, start_time=None):
        if "loss" in logs and self._skipped:
            logs["skipped_steps"] = self._skipped
        super().log(logs, start_time)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """Of a sharded parameter, what lies here."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


class _SkipNonFinite(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._judge_step()
