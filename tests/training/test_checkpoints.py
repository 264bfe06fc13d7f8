"""Runs that are killed, told to end, or find their last checkpoint torn, and go on as if nothing had happened."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from ltm_hf.training import LTMTrainer, LTMTrainingArguments
from ltm_hf.training.checkpoints import TERMINATED, flaw, latest_whole_checkpoint

TIMES = {"tokens_per_second", "inference_seconds", "train_runtime", "train_tokens_per_second"}
STEPS = 32


def finish(process):
    process.join(120)
    assert process.exitcode == 0


def steps_saved(folder):
    return max((int(path.name.rsplit("-", 1)[1]) for path in folder.glob("checkpoint-*")), default=0)


def history(folder, step=STEPS):
    """Every figure that a run logged, but for times."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    entries = [{name: entry[name] for name in entry.keys() - TIMES} for entry in state["log_history"]]
    return [entry for entry in entries if "loss" in entry], state["num_input_tokens_seen"], state["epoch"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start_run):
    """Of runs that were left alone, by their arguments: the history, and the seconds of a step."""
    runs = {}

    def get(**arguments):
        key = json.dumps(arguments)
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole")
            finish(start_run(folder, max_steps=STEPS, **arguments))
            last, before = (folder / f"checkpoint-{step}" / "trainer_state.json" for step in (STEPS, STEPS - 1))
            runs[key] = history(folder), last.stat().st_mtime - before.stat().st_mtime
        return runs[key]

    return get


@pytest.mark.distributed
@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_killed_ten_times_and_the_same(whole, start_run, tmp_path, streaming):
    """SIGKILL at ten moments: wherever the run is by then, in a step, a save or the deletion of an old checkpoint."""
    expected, a_step = whole(streaming=streaming)
    chance = random.Random(0)
    for after in [0, *sorted(chance.sample(range(STEPS - 4), 9))]:  # once before the first step is saved
        process = start_run(tmp_path, max_steps=STEPS, streaming=streaming)
        while steps_saved(tmp_path) < after:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(chance.random() * a_step)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(start_run(tmp_path, max_steps=STEPS, streaming=streaming))
    assert history(tmp_path) == expected
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]  # nothing unfinished, and none was ever torn


@pytest.mark.distributed
def test_sigterm_saves_and_leaves(whole, start_run, tmp_path):
    """It goes on to the end of the step, saves although no checkpoint was due, and takes itself for no finished run."""
    expected, a_step = whole(streaming=False)
    arguments = {"max_steps": STEPS, "save_steps": 20, "save_total_limit": 1}
    process = start_run(tmp_path, **arguments)
    while steps_saved(tmp_path) < 20:
        assert process.is_alive()
        time.sleep(0.001)
    time.sleep(a_step)  # the save of step 20 is over by then
    process.terminate()
    process.join(60)
    assert process.exitcode == TERMINATED
    assert 20 < steps_saved(tmp_path) < STEPS
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{steps_saved(tmp_path)}"]
    finish(start_run(tmp_path, **arguments))
    assert history(tmp_path) == expected


# ---------------------------------------------------------------- in one process


def make_trainer(folder, make_model, rows=None, **arguments):
    defaults = dict(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=2, learning_rate=1e-2, warmup_steps=2,
        logging_steps=5, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    if rows is None:
        rows = Dataset.from_dict({"input_ids": [list(range(3 + i, 13 + i)) for i in range(9)]})
    torch.manual_seed(0)
    return LTMTrainer(
        make_model(attention_dropout=0.1),
        LTMTrainingArguments(**defaults | arguments),
        train_dataset=rows,
        eval_dataset=Dataset.from_dict({"input_ids": [list(range(3, 13))] * 2}),
    )


def figures(trainer):
    entries = [{name: entry[name] for name in entry.keys() - TIMES} for entry in trainer.state.log_history]
    speeds = {"train_samples_per_second", "train_steps_per_second", "total_flos"}
    return [{name: entry[name] for name in entry.keys() - speeds} for entry in entries]


def stream(buffer_size=None):
    rows = Dataset.from_dict({"input_ids": [list(range(3 + i, 13 + i)) for i in range(9)]})
    rows = rows.to_iterable_dataset(num_shards=3)
    return rows if buffer_size is None else rows.shuffle(seed=0, buffer_size=buffer_size)


KINDS = {
    "rows": (lambda: None, {}),
    "epochs": (lambda: None, {"max_steps": -1, "num_train_epochs": 3}),
    "accumulated": (lambda: None, {"gradient_accumulation_steps": 2}),
    "trajectory": (lambda: None, {"objective": "elbo_trajectory"}),
    "stream": (stream, {}),
    "stream read by workers": (stream, {"dataloader_num_workers": 2}),
    "stream shuffled in a buffer": (lambda: stream(4), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_from_any_step(tmp_path, make_model, kind):
    """Within a logging interval and at its end, within a pass over the data and at its end, after the last step."""
    rows, arguments = KINDS[kind]
    whole = make_trainer(tmp_path, make_model, rows(), **arguments)
    whole.train()
    last = whole.state.global_step
    for step in (1, 5, 9, last) if kind != "stream read by workers" else (7,):
        resumed = make_trainer(tmp_path / f"from-{step}", make_model, rows(), save_strategy="no", **arguments)
        resumed.train(f"{tmp_path}/checkpoint-{step}")
        assert figures(resumed) == figures(whole), step
        for mine, its in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=0)


@pytest.mark.parametrize("choice", [True, "last", "True"])
def test_last_starts_anew_where_there_is_none(tmp_path, make_model, choice):
    trainer = make_trainer(tmp_path, make_model, max_steps=1)
    trainer.train(resume_from_checkpoint=choice)
    assert trainer.state.global_step == 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def garble(path):
    """Some bytes in the middle, at the same size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


TEARS = {
    "no trainer_state.json": lambda folder: (folder / "trainer_state.json").unlink(),
    "cut trainer_state.json": lambda folder: cut(folder / "trainer_state.json"),
    "cut weights": lambda folder: cut(folder / "model.safetensors"),
    "cut optimizer": lambda folder: cut(folder / "optimizer.pt"),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no checksums": lambda folder: (folder / "files.json").unlink(missing_ok=True),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut configuration": lambda folder: cut(folder / "config.json"),
    "garbled configuration": lambda folder: garble(folder / "config.json"),
    "garbled weights": lambda folder: garble(folder / "model.safetensors"),
    "garbled optimizer": lambda folder: garble(folder / "optimizer.pt"),
    "garbled trainer_state.json": lambda folder: garble(folder / "trainer_state.json"),
}
UNSEEN = {"no checksums", "garbled configuration", "garbled weights", "garbled optimizer", "garbled trainer_state.json"}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, make_model):
    folder = tmp_path_factory.mktemp("two")
    make_trainer(folder, make_model, max_steps=2).train()
    return folder


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "of plain Trainer"])
@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_skipped(tmp_path, make_model, two_checkpoints, tear, listed):
    if tear in UNSEEN and not listed:
        pytest.skip("without a checksum, nobody can know")
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    if not listed:
        for folder in tmp_path.glob("checkpoint-*"):
            (folder / "files.json").unlink()
            (folder / "fingerprint.json").unlink()
    TEARS[tear](tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="Cannot resume from .*checkpoint-2: it"):
        make_trainer(tmp_path, make_model).train(str(tmp_path / "checkpoint-2"))
    assert latest_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "torn-checkpoint-2"]


def test_an_edited_card_tears_nothing(tmp_path, two_checkpoints):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-1" / "README.md").write_text("mine")
    assert flaw(tmp_path / "checkpoint-1") is None
    assert "no trainer_state.json" in flaw(tmp_path / "checkpoint-7")


def test_the_only_good_checkpoint_stays(tmp_path, make_model):
    """Limited to one: a new checkpoint that cannot be finished leaves the one before; torn ones count for none."""
    make_trainer(tmp_path, make_model, max_steps=3, save_total_limit=1).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    trainer = make_trainer(tmp_path, make_model, max_steps=5, save_total_limit=1)
    trainer._save_scaler = lambda folder: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train("last")
    assert latest_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")

    torn = tmp_path / "checkpoint-40"
    torn.mkdir()
    make_trainer(tmp_path, make_model, max_steps=4, save_total_limit=1).train("last")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "torn-checkpoint-40"]


def test_the_best_checkpoint_is_known_by_its_final_name(tmp_path, make_model):
    settings = dict(max_steps=3, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    trainer = make_trainer(tmp_path, make_model, metric_for_best_model="loss", **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and flaw(best) is None
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
