import json
import multiprocessing
import runpy
from pathlib import Path

import pytest

from ltm_hf.training import LTMTrainingArguments

SCRIPT = Path(__file__).with_name("run_to_kill.py")


@pytest.fixture
def make_arguments(tmp_path):
    """Training arguments: two steps on the CPU, each logged, nothing saved or shown, unless told otherwise by name."""

    def make(arguments_class=LTMTrainingArguments, folder="", **arguments):
        defaults = dict(
            output_dir=str(tmp_path / folder),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            warmup_steps=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return arguments_class(**defaults | arguments)

    return make


@pytest.fixture(scope="session")
def start_run():
    """`run_to_kill.py` in a process of its own, forked from one that has imported what it needs."""

    def start(folder, **arguments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ltm_hf.training", "ltm_hf.data"])
        code = {"argv": [str(SCRIPT), str(folder), json.dumps(arguments)]}
        process = context.Process(target=runpy.run_path, args=(str(SCRIPT), code, "__main__"))
        process.start()
        return process

    return start
