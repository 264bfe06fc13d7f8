"""A run that can be killed at any moment: whole checkpoints only, with what Trainer's lack to go on as before."""

import json
import os
import shutil
import threading
import zipfile
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

logger = logging.get_logger(__name__)

UNFINISHED = "_unfinished"  # where a checkpoint is written; what begins with _ is never pushed to the Hub
FILES = "files.json"  # names and sizes of a checkpoint's files, written last
RUN_STATE = "run_state_{}.pt"  # of each process
TERMINATED = 143  # exit status after SIGTERM, as of any program that it ends (128 + 15)

TEXT = {".json", ".md", ".py", ".txt", ".jinja"}  # a person may edit these
YES, NO = {"true", "last"}, {"false", "none", ""}


def flaw(checkpoint: str | Path) -> str | None:
    """What makes a checkpoint unfit to resume from, in words; None if it is whole.

    Checkpoints of other trainers hold no list of their files: in these it is only seen that no file is cut off.
    """
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        sizes = checkpoint / FILES
        sizes = json.loads(sizes.read_text(encoding="utf-8")) if sizes.is_file() else None
    except OSError:
        return f"it has no {TRAINER_STATE_NAME}"
    except ValueError:
        return f"its {TRAINER_STATE_NAME} or {FILES} is cut off"
    for name, size in (sizes or {}).items():
        file = checkpoint / name
        if not file.is_file():
            return f"it has no {name}"
        if file.stat().st_size != size:
            return f"its {name} has {file.stat().st_size} bytes, not {size}"
    if sizes is None:
        for file in sorted(path for path in checkpoint.rglob("*") if not _opens(path)):
            return f"its {file.relative_to(checkpoint)} is cut off"
    return None


def _opens(file: Path) -> bool:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except SafetensorError:
            return False
    return file.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(file)  # as torch.save writes them


def latest_whole_checkpoint(folder: str | Path) -> str | None:
    """The latest checkpoint in a folder that can be resumed from, or None.

    Torn ones after it are renamed to torn-checkpoint-…, with a warning, so that nothing takes them for the latest.
    """
    while os.path.isdir(folder) and (path := get_last_checkpoint(folder)):
        reason = flaw(path)
        if reason is None:
            return path
        aside = Path(folder, f"torn-{Path(path).name}")
        logger.warning(f"The checkpoint {path} is torn ({reason}): skipped, and renamed to {aside.name}.")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    return None


def _publish(staged: Path, final: Path) -> None:
    """Rename a written checkpoint to its name: from then on it is there as a whole, also after a power cut."""
    sizes = {
        str(file.relative_to(staged)): file.stat().st_size
        for file in sorted(staged.rglob("*"))
        if file.is_file() and file.suffix not in TEXT
    }
    (staged / FILES).write_text(json.dumps(sizes, indent=2), encoding="utf-8")
    for path in [*staged.rglob("*"), staged]:
        _sync(path)
    if final.exists():  # of a run that was resumed from before
        final.rename(staged.parent / f"replaced-{final.name}")
    staged.rename(final)
    _sync(final.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointMixin:
    """Before any `Trainer`: a run that is killed and resumed logs what one that was left alone would have logged.

    Checkpoints are written to `output_dir/_unfinished` and renamed. Beside Trainer's files they hold each process's
    `run_state_….pt`: the sums that the next log will be the mean of, and what other mixins add by `_run_state`.
    On SIGTERM a run that saves checkpoints (`save_strategy`, or `enable_jit_checkpoint`) ends its step, saves, and
    leaves with exit status 143, on all processes at the same step.
    """

    def __init__(self, *args, **kwargs):
        self._saving = False
        self._restored = []  # the run states of the checkpoint that training resumes from
        self._last_checkpoint = None
        self._first_step = 0  # that `_total_loss_scalar` counts from
        super().__init__(*args, **kwargs)
        if self.args.enable_jit_checkpoint:  # the library's saves in the middle of a step, which cannot be repeated
            self.pop_callback(JITCheckpointCallback).on_train_end(None, None, None)
        self.add_callback(_RunCallback(self))

    # ---------------------------------------------------------------- resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """`Trainer.train`. True or "last" resume from the latest whole checkpoint, and start anew if there is none.

        Raises ValueError for the path of a checkpoint that is torn or not there.
        """
        return super().train(self._checkpoint_to_resume(resume_from_checkpoint), *args, **kwargs)

    def _checkpoint_to_resume(self, choice) -> str | None:
        choice = str(choice).lower() in YES or (None if str(choice).lower() in NO else choice)
        if choice not in (True, None) and (reason := flaw(choice)):
            raise ValueError(f"Cannot resume from {choice}: {reason}. The latest whole checkpoint: 'last'.")
        if self.is_local_process_zero():
            shutil.rmtree(Path(self.args.output_dir, UNFINISHED), ignore_errors=True)  # of a run that was killed
        found = [choice]
        if choice is True:
            if self.is_world_process_zero():
                found = [latest_whole_checkpoint(self.args.output_dir)]
            broadcast_object_list(found)
            logger.warning(f"Resuming from {found[0]}." if found[0] else "No checkpoint yet: training starts anew.")
        self._last_checkpoint = found[0]
        return found[0]

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial):
        self._restored = []
        if resume is not None:
            files = sorted(Path(resume).glob(RUN_STATE.format("*")), key=lambda file: int(file.stem.rsplit("_", 1)[1]))
            self._restored = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        return super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial)

    def _run_epoch(self, **kwargs):
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
        }

    def _begin_run(self, states: list[dict]) -> None:
        """Training begins, with the run states of all processes of the run that is resumed, or none."""
        self._first_step = states[0]["first_step"] if states else self.state.global_step
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

    # ---------------------------------------------------------------- saving

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, final = folder / UNFINISHED / name, folder / name
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        for in_turn in (self.args.should_save, self.is_local_process_zero()):  # nodes may have disks of their own
            if in_turn and staged.is_dir():
                _publish(staged, final)
            self.accelerator.wait_for_everyone()
        self._last_checkpoint = str(final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:  # only now, with the new one whole
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), self.args.save_total_limit, best, use_mtime=True)

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


class _RunCallback(JITCheckpointCallback):
    """The library's answer to SIGTERM, but after a whole step, on all processes, and by Trainer's ordinary save."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer
        self.terminating = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin_run(self.trainer._restored)
        wanted = args.enable_jit_checkpoint or args.save_strategy != "no"
        if wanted and threading.current_thread() is threading.main_thread():
            self.jit_manager = CheckpointManager(self.trainer, kill_wait=0)
            self.jit_manager.setup_signal_handler()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        pass

    def on_step_begin(self, args, state, control, **kwargs):
        pass

    def on_step_end(self, args, state, control, **kwargs):
        if self.jit_manager is not None and self.trainer._any(self.jit_manager.is_checkpoint_requested):
            self.terminating = control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        pass

    def on_save(self, args, state, control, **kwargs):
        if self.terminating:  # before Trainer takes the run for finished, and its weights for the result
            logger.warning(f"SIGTERM: saved {self.trainer._last_checkpoint} and stopping; resume from 'last'.")
            self.trainer.callback_handler.on_train_end(args, state, control)
            raise SystemExit(TERMINATED)

    def on_train_end(self, args, state, control, **kwargs):
        super().on_train_end(args, state, control, **kwargs)
        self.jit_manager = None
