import json
import multiprocessing
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_to_kill.py")


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
