"""What the examples' tests share: scripts in a process of their own, and one small run."""

import multiprocessing
import os
import subprocess
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
AS_A_SCRIPT = """
import os, runpy, sys
for number, path in enumerate(said, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
os.environ.clear()
os.environ.update(environment)
os.chdir(place)
sys.argv, sys.path[:0] = words, [os.path.dirname(words[0])]
runpy.run_path(words[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever a command that runs in this process asks for."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start a script with arguments in a process of its own: the process, and the files of what it says.

    The processes are forks of one that has imported what takes seconds, and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ltm_hf.training", "ltm_hf.evaluation", "matplotlib.pyplot"])

    def start(*arguments):
        folder = tmp_path_factory.mktemp("said")
        words, said = list(map(str, arguments)), [folder / "stdout", folder / "stderr"]
        environment = dict(os.environ)
        environment.pop("OMP_NUM_THREADS", None)  # of 1, pretrain.py takes more, as accelerate gives it one
        names = {"words": words, "said": said, "environment": environment, "place": os.getcwd()}
        process = context.Process(target=exec, args=(AS_A_SCRIPT, names))
        process.start()
        return process, said

    return start


@pytest.fixture(scope="session")
def run(start):
    """The same, to its end; unless it may fail, what it said is shown if it does."""

    def run(*arguments, check=True):
        process, said = start(*arguments)
        process.join()
        result = subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in said))
        assert not check or result.returncode == 0, result.stderr[-3000:]
        return result

    return run


@pytest.fixture(scope="session", params=["ltm-tiny", "ltm-tiny-paper"])
def trained(request, run, tmp_path_factory):
    """A small model of a preset by examples/pretrain.py, with its twin and checkpoints: the preset, the folder, and
    what was printed.
    """
    folder = tmp_path_factory.mktemp("outputs") / request.param
    sizes = '{"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32, "vocab_size": 300}'
    result = run(
        EXAMPLES / "pretrain.py", "--preset", request.param, "--config_overrides", sizes, "--max_steps", 4,
        "--warmup_steps", 1, "--eval_steps", 2, "--logging_steps", 1, "--eval_blocks", 8, "--use_cpu",
        "--output_dir", folder, "--save_strategy", "steps", "--save_steps", 2, "--run_name", "mine",
    )  # fmt: skip
    return request.param, folder, result.stdout
