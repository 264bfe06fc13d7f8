"""A run's folder: whose it is, what a run may go on from and what may change then, and what is left when it fails."""

import errno
import os
import shutil
import signal
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import TrainerCallback

from ltm_hf.data import train_tokenizer
from ltm_hf.training import LTMTrainer, check_run, folder
from ltm_hf.training.checkpoints import TERMINATED
from ltm_hf.training.folder import checkpoints, flaw, latest_whole_checkpoint, locked, rotate

SPEEDS = {"tokens_per_second", "inference_seconds", "runtime", "samples_per_second", "steps_per_second", "total_flos"}


def make_rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict({"input_ids": torch.randint(3, 61, (16, 8), generator=generator).tolist()})


@pytest.fixture
def make_trainer(make_arguments, make_model):
    def make(folder="run", seed=0, model=None, callbacks=None, tokenizer=None, **arguments):
        settings = dict(max_steps=4, save_strategy="steps", save_steps=1, num_inference_steps=1)
        return LTMTrainer(
            model or make_model(),
            make_arguments(folder=folder, **settings | arguments),
            train_dataset=make_rows(seed),
            eval_dataset=make_rows(9),
            callbacks=callbacks,
            processing_class=tokenizer,
        )

    return make


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def history(trainer):
    return [
        {name: value for name, value in entry.items() if not name.endswith(tuple(SPEEDS))}
        for entry in trainer.state.log_history
    ]


class At(TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, event, step, action):
        self.step, self.action = step, action
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------- rotation


def test_rotation_goes_by_step_and_by_our_names(tmp_path):
    others = ["checkpoint-1-backup", "checkpoint-mine", "checkpoint-007", "old-checkpoint-3"]
    for name in [*others, *(f"checkpoint-{step}" for step in (2, 9, 10, 11))]:
        (tmp_path / name).mkdir()
    others.append("checkpoint-1")
    (tmp_path / "checkpoint-1").touch()  # a file
    ahead = time.time() + 3600
    os.utime(tmp_path / "checkpoint-2", (ahead, ahead))
    rotate(tmp_path, 3, {"checkpoint-9"}, tmp_path / "bin")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-11"]
    rotate(tmp_path, 1, {"checkpoint-9", "checkpoint-10"}, tmp_path / "bin")  # the newest by step, but an older is new
    assert names(tmp_path) == sorted([*others, "checkpoint-10", "checkpoint-9"])
    for none in (None, 0):
        rotate(tmp_path, none, set(), tmp_path / "bin")
    assert len(checkpoints(tmp_path)) == 2


def test_the_best_and_the_last_both_stay(make_trainer, tmp_path):
    """Also when training ends, and when the folder has moved since the best was written."""
    settings = dict(learning_rate=1.0, lr_scheduler_type="constant", eval_strategy="steps", eval_steps=1)
    settings |= dict(save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="eval_nll")
    trainer = make_trainer(max_steps=3, **settings)
    assert not trainer.args.greater_is_better
    trainer.train()  # which only harms: the first is the best
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-3"]
    (tmp_path / "run").rename(tmp_path / "moved")
    trainer = make_trainer("moved", max_steps=4, **settings)
    trainer.train("last")
    assert names(tmp_path / "moved") == ["checkpoint-1", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-1")


# ---------------------------------------------------------------- one run at a time


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(make_trainer, tmp_path):
    def second():
        with pytest.raises(OSError, match="Another run is writing to .*run: take another output_dir, or wait"):
            make_trainer(save_strategy="no").train()
        with pytest.raises(OSError, match="Another run is writing to"):
            check_run(make_trainer().args)

    trainer = make_trainer(max_steps=1)
    trainer._save_scaler = lambda staged: second()  # in the middle of a checkpoint
    trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-1"] and flaw(tmp_path / "run" / "checkpoint-1") is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_lock_of_a_killed_run_is_gone_though_its_workers_live(tmp_path):
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        with locked(tmp_path):
            if not os.fork():  # as a data loader's worker
                os.write(tell, str(os.getpid()).encode())
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(ready, 20))
    try:
        with pytest.raises(OSError, match="Another run"), locked(tmp_path):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with locked(tmp_path) as alone:
            assert alone and names(tmp_path) == ["_lock"]
        assert names(tmp_path) == []
    finally:
        os.kill(worker, signal.SIGKILL)


def test_where_there_are_no_locks_runs_write_apart(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "fcntl", None)
    first = make_trainer(max_steps=1)
    first._save_scaler = lambda staged: torch.enable_grad()(make_trainer(max_steps=2, save_strategy="no").train)()
    first.train()
    assert names(tmp_path / "run") == ["checkpoint-1"] and flaw(tmp_path / "run" / "checkpoint-1") is None


# ---------------------------------------------------------------- earlier runs


def test_results_of_an_earlier_run_are_not_written_over(make_trainer, tmp_path):
    run, step = tmp_path / "run", "checkpoint-2"
    make_trainer(max_steps=2).train()
    (run / "_unfinished").mkdir()
    message = "holds checkpoint-2 of an earlier run: .* resume_from_checkpoint .* overwrite_output_dir"
    for refused in (make_trainer().train, lambda: check_run(make_trainer().args)):
        with pytest.raises(ValueError, match=message):
            refused()
    with pytest.raises(ValueError, match=message):  # of a checkpoint elsewhere
        shutil.copytree(run / step, tmp_path / "other" / step)
        make_trainer().train(str(tmp_path / "other" / step))
    assert names(run) == ["_unfinished", "checkpoint-1", step]
    killed = make_trainer(seed=1, overwrite_output_dir=True, callbacks=[At("on_step_end", 1, lambda: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        killed.train()
    assert names(run) == []  # nothing that "last" could take for this run's
    make_trainer(seed=1, max_steps=1, overwrite_output_dir=True).train("last")
    again = make_trainer(seed=1, max_steps=2, overwrite_output_dir=True)
    again.train("last")  # which comes first
    assert names(run) == ["checkpoint-1", step] and again.state.global_step == 2


def test_a_model_alone_is_not_written_over_either(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=1, save_strategy="no")
    trainer.train()
    trainer.save_model()
    for choice in (None, "last"):
        with pytest.raises(ValueError, match="holds model.safetensors of an earlier run"):
            make_trainer().train(choice)
    make_trainer(max_steps=1, overwrite_output_dir=True).train()


def test_later_checkpoints_are_of_steps_that_are_taken_anew(make_trainer, tmp_path):
    make_trainer(max_steps=3).train()
    resumed = make_trainer(max_steps=2, learning_rate=1e-3)
    resumed.train(str(tmp_path / "run" / "checkpoint-1"))
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2", "old-checkpoint-2", "old-checkpoint-3"]
    assert latest_whole_checkpoint(tmp_path / "run") == resumed._last_checkpoint


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(output_dir="{file}"), NotADirectoryError, "output_dir .* cannot be a folder: .*file is a file"),
        (dict(output_dir="{file}/run"), NotADirectoryError, "output_dir .* cannot be a folder"),
        (dict(resume_from_checkpoint="/nowhere/checkpoint-3"), ValueError, "Cannot resume from /nowhere/checkpoint-3"),
        (dict(resume_from_checkpoint="{folder}"), ValueError, "it has no trainer_state.json"),
        (dict(output_dir="{folder}/new/run"), None, ""),
        (dict(resume_from_checkpoint="last"), None, ""),
    ],
)
def test_a_run_is_checked_before_any_work(make_arguments, tmp_path, arguments, error, message):
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path}
    args = make_arguments(**{name: value.format(**places) for name, value in arguments.items()})
    with ExitStack() as stack:
        if error:
            stack.enter_context(pytest.raises(error, match=message))
        check_run(args)
    assert names(tmp_path) == ["file"]


# ---------------------------------------------------------------- the same run


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def checkpoint(saved, make_trainer):
    """Of the second step of four, of a run with a tokenizer; made once."""
    if not names(saved):
        trainer = make_trainer(tokenizer=train_tokenizer([], 258), logging_steps=4, save_steps=2)
        trainer.args.output_dir = str(saved)
        trainer.train()
    return str(saved / "checkpoint-2")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(seed=1), "train_dataset"),
        (dict(tokenizer=train_tokenizer(["abcabcabc"] * 9, 262)), "tokenizer"),
        (dict(model=dict(sliding_window=8, latent_chunk=4)), r"configuration.sliding_window \(4, now 8\)"),
        (dict(arguments=dict(seed=7)), r"data_seed \(42, now 7\), seed \(42, now 7\)"),
        (dict(arguments=dict(optim="sgd")), r"optim \(adamw_torch.*, now sgd\)"),
        (dict(given=dict(objective="elbo_trajectory")), r"objective \(Elbo, now ElboTrajectory\)"),
    ],
)
def test_nothing_goes_on_as_another_run(make_trainer, make_model, checkpoint, change, named):
    model = make_model(**change.get("model", {}))
    tokenizer = change.get("tokenizer", train_tokenizer([], 258))
    given = change.get("given", {})
    trainer = make_trainer(seed=change.get("seed", 0), model=model, tokenizer=tokenizer, **given)
    for name, value in change.get("arguments", {}).items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=f"Cannot resume from .*: it was made with another {named}. Go on"):
        trainer.train(checkpoint)


def test_what_may_change_takes_effect(make_trainer, checkpoint):
    """Against the schedule of a run that had all of it from the start."""
    changed = dict(
        learning_rate=3e-2, weight_decay=0.5, max_steps=6, logging_steps=1, save_steps=5, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, lr_scheduler_type="linear", num_inference_steps=2,
    )  # fmt: skip
    trainer = make_trainer("resumed", tokenizer=train_tokenizer([], 258), **changed)
    trainer.args.resume_from_checkpoint = checkpoint  # as `train()` takes it
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([3e-2 * (6 - step) / 6 for step in (2, 3, 4, 5)])
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.5, 0.0]
    assert [path.name for path in checkpoints(trainer.args.output_dir)] == ["checkpoint-5", "checkpoint-6"]


# ---------------------------------------------------------------- told to end


def test_sigterm_saves_although_nothing_was_to_be_saved(make_trainer, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(save_strategy="no", callbacks=[At("on_step_begin", 1, terminate)])
    with pytest.raises(SystemExit) as exit:
        trainer.train()
    assert exit.value.code == TERMINATED and names(tmp_path / "run") == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGTERM) == handler
    resumed, whole = make_trainer(save_strategy="no"), make_trainer("whole", save_strategy="no")
    resumed.train("last")
    whole.train()
    assert history(resumed) == history(whole)


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_sigterm_breaks_an_evaluation_off_and_it_is_repeated(make_trainer, make_model, tmp_path, strategy):
    settings = dict(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2, metric_for_best_model="loss")
    settings |= dict(save_strategy=strategy, save_steps=2)
    whole = make_trainer("whole", model=make_model(attention_dropout=0.1), **settings)
    whole.train()
    batches = []
    stop = At("on_prediction_step", 2, lambda: batches.append(terminate()))
    with pytest.raises(SystemExit):
        make_trainer(model=make_model(attention_dropout=0.1), callbacks=[stop], **settings).train()
    assert len(batches) == 1 and names(tmp_path / "run") == ["checkpoint-2"]
    resumed = make_trainer(model=make_model(attention_dropout=0.1), **settings)
    resumed.train("last")
    assert history(resumed) == history(whole)
    assert resumed.state.best_global_step == whole.state.best_global_step


# ---------------------------------------------------------------- what fails leaves nothing


@pytest.mark.parametrize(
    ("error", "free", "cause"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 0, "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4 vs 2"), 0, "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1 << 40, "Disk quota exceeded"),
    ],
)
def test_a_full_disk_is_told_and_what_is_torn_is_cleared(make_trainer, tmp_path, monkeypatch, error, free, cause):
    trainer = make_trainer(max_steps=3, save_total_limit=1)

    def fail(folder):
        if trainer.state.global_step == 2:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
            raise error

    trainer._save_scaler = fail  # the weights are written by then
    with pytest.raises(OSError, match=f"checkpoint-2 could not be written, .*{cause}; the last good .*checkpoint-1"):
        trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-1"] and flaw(tmp_path / "run" / "checkpoint-1") is None


def test_a_full_disk_leaves_no_torn_model(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    write = trainer.model.save_pretrained

    def fail(where, **kwargs):
        write(where, **kwargs)
        os.truncate(os.path.join(where, "model.safetensors"), 1000)
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(trainer.model, "save_pretrained", fail)
    with pytest.raises(OSError, match="The model could not be written to .*run: Error .* No space left on device"):
        trainer.save_model()
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["_save_optimizer_and_scheduler", "save_model", "_save_rng_state"])
def test_what_is_not_whole_is_never_published(make_trainer, tmp_path, method):
    trainer = make_trainer(max_steps=1)
    setattr(trainer, method, lambda staged, **kwargs: os.makedirs(staged, exist_ok=True))
    with pytest.raises(OSError, match="checkpoint-1 is not whole"):
        trainer.train()
    assert names(tmp_path / "run") == []


def test_a_model_alone_cannot_be_gone_on_from(make_trainer, tmp_path):
    make_trainer(max_steps=1, save_only_model=True).train()
    with pytest.raises(ValueError, match="Cannot resume from .*: it holds a model alone"):
        make_trainer().train("last")
    assert names(tmp_path / "run") == ["checkpoint-1"]
