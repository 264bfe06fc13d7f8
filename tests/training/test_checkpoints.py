"""Runs that are killed, told to end, or find their last checkpoint torn, and go on as if nothing had happened."""

import json
import multiprocessing
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from ltm_hf.training import LTMTrainer, LTMTrainingArguments
from ltm_hf.training.checkpoints import TERMINATED, flaw, latest_whole_checkpoint

SCRIPT = Path(__file__).with_name("run_to_kill.py")
TIMES = {"tokens_per_second", "inference_seconds", "train_runtime", "train_tokens_per_second"}
STEPS = 32


def start(folder, **arguments):
    """A run in a process of its own, forked from one that has imported what it needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ltm_hf.training", "ltm_hf.data"])
    code = {"argv": [str(SCRIPT), str(folder), json.dumps({"max_steps": STEPS} | arguments)]}
    process = context.Process(target=runpy.run_path, args=(str(SCRIPT), code, "__main__"))
    process.start()
    return process


def finish(folder, **arguments):
    process = start(folder, **arguments)
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
def whole(tmp_path_factory):
    """Histories of runs that were left alone, by their arguments."""
    runs = {}

    def get(**arguments):
        key = json.dumps(arguments)
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole")
            finish(folder, **arguments)
            runs[key] = history(folder)
        return runs[key]

    return get


@pytest.mark.distributed
@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_killed_ten_times_and_the_same(whole, tmp_path, streaming):
    """SIGKILL at ten moments: wherever the run is by then, in a step, a save or the deletion of an old checkpoint."""
    chance = random.Random(0)
    begin = time.perf_counter()
    expected = whole(streaming=streaming)
    a_step = (time.perf_counter() - begin) / STEPS
    last = sorted(chance.sample(range(STEPS - 2), 9))
    for after in [0, *last]:  # once before the first step is saved
        process = start(tmp_path, streaming=streaming)
        while steps_saved(tmp_path) < after:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(chance.random() * 2 * a_step)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    finish(tmp_path, streaming=streaming)
    assert history(tmp_path) == expected
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
