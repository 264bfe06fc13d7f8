"""Launch files: read by accelerate and torch as their launchers read them, with what their comments promise."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import _filter_args, prepare_multi_gpu_env
from torch.distributed.run import config_from_args, get_args_parser

from ltm_hf.costs import planner

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
YAMLS = sorted(CONFIGS.glob("*.yaml"))
SLURM = CONFIGS / "pretrain.slurm"
every_yaml = pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
every_file = pytest.mark.parametrize("path", [*YAMLS, SLURM], ids=lambda path: path.name)


def comment(path):
    """The lines that begin with #, joined where they are continued."""
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return "\n".join(lines).replace("\\\n", "")


def command(path):
    """The words of the command that the comment gives, for node 1."""
    line = re.search(r"^accelerate launch .*", comment(path), re.MULTILINE)[0]
    return shlex.split(line.replace("RANK", "1").replace("ADDRESS", "10.0.0.1"))


@every_yaml
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))
    words = command(path)
    assert CONFIGS / Path(words[words.index("--config_file") + 1]).name == path
    assert config.mixed_precision == "bf16" or "--bf16" in words
    if config.num_machines > 1:
        assert config.num_processes == 8 * config.num_machines


@every_file
def test_the_effective_batch_is_the_papers(path):
    found = re.search(r"Effective batch: (\d+) x (\d+) x (\d+) = 512 sequences", comment(path))
    per_device, accumulation, processes = map(int, found.groups())
    assert per_device * accumulation * processes == 512
    if path.suffix == ".yaml":
        words = command(path)
        for name, value in (
            ("per_device_train_batch_size", per_device),
            ("gradient_accumulation_steps", accumulation),
        ):
            assert words[words.index(f"--{name}") + 1] == str(value)
        assert load_config_from_file(str(path)).num_processes == processes


@every_file
def test_the_memory_is_the_planners(path, monkeypatch, capsys):
    promised, arguments = re.search(
        r"Memory: (.*) a GPU, by python -m ltm_hf.costs.planner (.*)", comment(path)
    ).groups()
    batch = re.search(r"Effective batch: (\d+) x (\d+) x (\d+)", comment(path)).groups()
    monkeypatch.setattr(sys, "argv", ["planner", *arguments.split()])
    planner.main()
    printed = capsys.readouterr().out
    assert re.search(r"memory +(.*?) a GPU", printed)[1] == promised
    assert tuple(re.search(r"(\d+) sequences a GPU x (\d+) accumulated x (\d+) GPU", printed).groups()) == batch


@pytest.mark.parametrize("name", ["ddp_2x8.yaml", "fsdp2_16x8.yaml"])
def test_nodes_meet(name):
    """What torch's launcher gets from accelerate's for node 1."""
    words = command(CONFIGS / name)
    words[words.index("--config_file") + 1] = str(CONFIGS / name)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    prepare_multi_gpu_env(args)
    args = _filter_args(args, get_args_parser(), [args.training_script])
    config, *_ = config_from_args(args)
    assert config.min_nodes == config.max_nodes == load_config_from_file(str(CONFIGS / name)).num_machines
    assert config.nproc_per_node == 8
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "10.0.0.1:29500")


def test_fsdp2_shards_our_layers():
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / "fsdp2_16x8.yaml"), "x.py"])
    args, _, _ = _validate_launch_command(args)
    assert args.use_fsdp and args.fsdp_version == 2 and args.fsdp_transformer_layer_cls_to_wrap == "LTMDecoderLayer"


@pytest.mark.parametrize(
    ("nodes", "settings", "accumulation"),
    [(16, {}, 1), (2, {"PER_DEVICE": "16", "CONFIG": "a.yaml"}, 2), (3, {}, None), (32, {}, None)],
)
def test_slurm(tmp_path, nodes, settings, accumulation):
    """Run with stand-ins for SLURM and accelerate: each node starts one launcher with its own rank."""
    stand_ins = {
        "scontrol": "printf 'first\\nsecond\\n'",
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'printf "%s|" "$@"; echo',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": str(nodes), "SLURM_JOB_ID": "40007"}
    environment |= {"SLURM_JOB_NODELIST": "nodes"} | settings
    done = subprocess.run(
        ["bash", SLURM, "--preset", "ltm large"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    if accumulation is None:
        assert done.returncode == 1 and "set PER_DEVICE or BATCH" in done.stderr and not done.stdout
        return
    assert done.returncode == 0, done.stderr
    for rank, line in enumerate(done.stdout.splitlines()):
        words = line.rstrip("|").split("|")
        options = dict(zip(words[1::2], words[2::2], strict=False))
        assert options["--config_file"] == settings.get("CONFIG", "examples/configs/fsdp2_16x8.yaml")
        assert (options["--num_machines"], options["--num_processes"]) == (str(nodes), str(8 * nodes))
        assert (options["--machine_rank"], options["--main_process_ip"]) == (str(rank), "first")
        assert (options["--main_process_port"], options["--rdzv_backend"]) == ("20007", "c10d")
        script = words[words.index("examples/pretrain.py") + 1 :]
        assert script == [
            "--per_device_train_batch_size", settings.get("PER_DEVICE", "4"),
            "--gradient_accumulation_steps", str(accumulation), "--preset", "ltm large",
        ]  # fmt: skip
    assert rank == 1
