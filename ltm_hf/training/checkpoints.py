"""A run that can be killed at any moment: whole checkpoints only, with what Trainer's lack to go on as before."""

import json
import os
import secrets
import shutil
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils import logging

from .fingerprint import FINGERPRINT, check_same_run, fingerprint, hyperparameters, set_hyperparameters
from .folder import (
    UNFINISHED,
    check_free,
    check_whole,
    checkpoints,
    delete,
    flaw,
    latest_whole_checkpoint,
    locked,
    missing,
    opens,
    publish,
    resume_choice,
    rotate,
    set_aside,
)

__all__ = ["TERMINATED", "CheckpointMixin", "flaw", "latest_whole_checkpoint"]

logger = logging.get_logger(__name__)

RUN_STATE = "run_state_{}.pt"  # of each process
TERMINATED = 143  # exit status after SIGTERM, as of any program that it ends (128 + 15)
FULL = 1 << 20  # bytes: a disk with fewer free ones is full


class CheckpointMixin:
    """Before any `Trainer`: a run that is killed and resumed logs what one that was left alone would have logged.

    Checkpoints are written to a folder of the run's own in `output_dir` and renamed when they are whole. Beside
    Trainer's files they hold the run's `fingerprint`, checksums, and each process's `run_state_….pt`: the sums that the
    next log will be the mean of, and what other mixins add by `_run_state`. While a run trains it has the folder for
    itself. `save_total_limit` goes by steps, and deletes neither the checkpoint just written nor the best.
    On SIGTERM a run ends its step, or breaks off its evaluation (to repeat it when resumed), saves, and leaves with
    exit status 143, on all processes at the same step.
    """

    def __init__(self, *args, **kwargs):
        self._saving = False
        self._staging = UNFINISHED
        self._fingerprint = None
        self._restored = []  # the run states of the checkpoint that training resumes from
        self._last_checkpoint = None
        self._first_step = 0  # that `_total_loss_scalar` counts from
        self._evaluation_due = False  # of the step that was resumed from
        super().__init__(*args, **kwargs)
        if self.args.enable_jit_checkpoint:  # the library's saves in the middle of a step, which cannot be repeated
            self.pop_callback(JITCheckpointCallback).on_train_end(None, None, None)
        self._signals = _RunCallback(self)
        self.add_callback(self._signals)

    # ---------------------------------------------------------------- resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """`Trainer.train`. True or "last" resume from the latest whole checkpoint, and start anew if there is none.

        None: what the training arguments say. Raises ValueError for a checkpoint that is torn, not there or of another
        run (see `fingerprint`), and for an `output_dir` that holds a model or checkpoints unless it is resumed from or
        `overwrite_output_dir` is set; OSError if another run is writing there.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        with ExitStack() as stack:
            resumed, self._staging, self._fingerprint = self._on_main_process(
                lambda: self._enter_folder(resume_from_checkpoint, stack)
            )
            stack.callback(self._signals.stop_listening)
            self._last_checkpoint = resumed
            return super().train(resumed, *args, **kwargs)

    def _enter_folder(self, resume_from_checkpoint, stack: ExitStack) -> tuple[str | None, str, dict]:
        """The checkpoint to resume from, where to write new ones, and the fingerprint; the folder is ready for them."""
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        alone = stack.enter_context(locked(folder))
        choice = resume_choice(resume_from_checkpoint)
        if choice is True:
            choice = latest_whole_checkpoint(folder)
            logger.warning(f"Resuming from {choice}." if choice else "No checkpoint yet: training starts anew.")
        elif choice is not None:
            check_whole(choice)
        check_free(folder, choice, self.args.overwrite_output_dir)
        mine = fingerprint(self)
        staging = f"{UNFINISHED}-{secrets.token_hex(4)}"
        if choice is not None:
            check_same_run(choice, mine)
        self._clear(folder, choice, folder / staging)
        for left in folder.glob(f"{UNFINISHED}*") if alone else ():  # by runs that were killed
            shutil.rmtree(left, ignore_errors=True)
        return None if choice is None else str(choice), staging, mine

    def _clear(self, folder: Path, resumed: str | Path | None, bin: Path) -> None:
        """Of checkpoints that are not this run's, so that neither "last" nor rotation takes them for its own."""
        if resumed is not None and Path(resumed).resolve().parent == folder.resolve():
            step = json.loads(Path(resumed, TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
            for later in checkpoints(folder):
                if int(later.name.rsplit("-", 1)[1]) >= step and not later.samefile(resumed):
                    logger.warning(f"{later} is of steps that are taken anew: renamed to {set_aside(later, 'old')}.")
        elif self.args.overwrite_output_dir:
            for checkpoint in checkpoints(folder):
                delete(checkpoint, bin)

    def _on_main_process(self, work):
        """What the main process's work gives, on all of them; or its error."""
        outcome = [None, None]
        if self.is_world_process_zero():
            try:
                outcome[0] = work()
            except (OSError, ValueError) as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial):
        self._restored = []
        if resume is not None:
            files = sorted(Path(resume).glob(RUN_STATE.format("*")), key=lambda file: int(file.stem.rsplit("_", 1)[1]))
            self._restored = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        found = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)
        self.state.compute_steps(self.args, max_steps)  # to log, evaluate and save at: as now, not as in the checkpoint
        return found

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._hyperparameters = hyperparameters(self.optimizer if optimizer is None else optimizer)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            set_hyperparameters(self.optimizer, self.lr_scheduler, self._hyperparameters)

    def _run_epoch(self, **kwargs):
        if self._evaluation_due:
            self._evaluation_due = False
            metrics = self._evaluate(kwargs["trial"], kwargs["ignore_keys_for_eval"])
            self._determine_best_metric(metrics=metrics, trial=kwargs["trial"])
            if self.control.should_training_stop:
                return
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(**kwargs)
        self.control.should_training_stop = True  # killed after the last step: Trainer would take one more

    def _run_state(self) -> dict:
        """What this process has to remember: tensors, numbers, strings, and lists and dicts of them."""
        return {
            "loss": self._tr_loss.double().item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "first_step": self._first_step,
            "evaluation_due": self._evaluation_due,
        }

    def _begin_run(self, states: list[dict]) -> None:
        """Training begins, with the run states of all processes of the run that is resumed, or none."""
        self._first_step = states[0]["first_step"] if states else self.state.global_step
        self._evaluation_due = bool(states) and states[0]["evaluation_due"]
        if not states:
            return
        losses = [state["loss"] for state in states]
        same = len(states) == self.args.world_size
        self._tr_loss += losses[self.args.process_index] if same else sum(losses) / len(losses)
        self._total_loss_scalar = states[0]["total_loss"]
        self._globalstep_last_logged = states[0]["last_logged"]

    def log(self, logs, start_time=None):
        if "train_loss" in logs:  # of the whole run, where Trainer's is of the part since it was resumed
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step - self._first_step)
        super().log(logs, start_time)

    def _finalize_training(self, *args, **kwargs):
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # Trainer would delete the last checkpoint, for the best to be the only one
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    # ---------------------------------------------------------------- saving

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, self._staging) if self._saving else folder

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, final = folder / self._staging / name, folder / name
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._complete(staged, final)
            self.accelerator.wait_for_everyone()
            for in_turn in (self.args.should_save, self.is_local_process_zero()):  # nodes may have disks of their own
                if in_turn and staged.is_dir():
                    publish(staged, final)
                self.accelerator.wait_for_everyone()
        except BaseException as error:
            full = _is_full(folder)
            shutil.rmtree(staged.parent, ignore_errors=True)
            _tell(error, f"{final} could not be written, and nothing of it is left", f"; {self._way_back()}", full)
            raise
        finally:
            self._saving = False
        self._last_checkpoint = str(final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:  # only now, with the new one whole
            keep = {name, Path(self.state.best_model_checkpoint or final).name}
            rotate(folder, self.args.save_total_limit, keep, folder / self._staging)

    def _complete(self, staged: Path, final: Path) -> None:
        """What Trainer does not write, or writes by the name of the folder that it wrote to."""
        best = final.with_name(f"checkpoint-{self.state.best_global_step}")
        if best == final or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        if not self.args.should_save:
            return
        self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        (staged / FINGERPRINT).write_text(json.dumps(self._fingerprint, indent=2), encoding="utf-8")
        if reason := missing(staged, state=not self.args.save_only_model):
            raise OSError(f"{final.name} is not whole ({reason}).")

    def _save(self, output_dir=None, state_dict=None):
        try:
            super()._save(output_dir, state_dict)
        except BaseException as error:
            if not self._saving:  # a checkpoint is cleared as a whole
                folder = Path(output_dir or self.args.output_dir)
                full = _is_full(folder)
                for file in folder.glob("*.safetensors"):
                    if not opens(file):
                        file.unlink()
                _tell(error, f"The model could not be written to {folder}", ".", full)
            raise

    def _way_back(self) -> str:
        if self._last_checkpoint is None:
            return "no checkpoint has been saved."
        return f"the last good checkpoint is {self._last_checkpoint}."

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        torch.save(self._run_state(), os.path.join(output_dir, RUN_STATE.format(self.args.process_index)))

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _any(self, flag: bool) -> bool:
        """Whether it is true on any process."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.args.device), "sum") > 0)


def _is_full(folder: Path) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free < FULL


def _tell(error: BaseException, what: str, end: str, full: bool) -> None:
    """Raise an OSError in one sentence if it is the disk that failed; torch says so in words of its own."""
    if isinstance(error, (OSError, SafetensorError)) or "inline_container" in str(error):
        cause = "the disk is full" if full else str(error).partition("\n")[0]
        raise OSError(f"{what}: {cause}{end}") from error


class _RunCallback(TrainerCallback):
    """SIGTERM is answered after a whole step, or between two batches of an evaluation, by Trainer's ordinary save."""

    def __init__(self, trainer):
        self.trainer = trainer
        self._asked = self._listens = False
        self._handler = None  # that was there before
        self._start = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = state.global_step
        self.trainer._begin_run(self.trainer._restored)
        if not self._listens and threading.current_thread() is threading.main_thread():
            self._handler, self._listens = signal.signal(signal.SIGTERM, self._ask), True

    def _ask(self, *_) -> None:
        self._asked = True

    def stop_listening(self) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._handler or signal.SIG_DFL)
        self._asked = self._listens = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer._any(self._asked):
            control.should_save = True

    def on_prediction_step(self, args, state, control, **kwargs):
        if self._listens and self.trainer._any(self._asked):
            if state.global_step > self._start:
                self.trainer._evaluation_due = True
                self.trainer._save_checkpoint(self.trainer.model_wrapped, trial=getattr(self.trainer, "_trial", None))
            self._leave(args, state, control)

    def on_save(self, args, state, control, **kwargs):
        if self.trainer._any(self._asked):
            self._leave(args, state, control)

    def _leave(self, args, state, control) -> None:
        """Before Trainer takes the run for finished, and its weights for the result."""
        logger.warning(
            f"SIGTERM: stopping; the last checkpoint is {self.trainer._last_checkpoint}, resume from 'last'."
        )
        self.trainer.callback_handler.on_train_end(args, state, control)
        raise SystemExit(TERMINATED)
