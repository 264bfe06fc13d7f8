import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ltm_hf import LTMForCausalLM, preset_config

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "scaling.py"
STEPS = 3


@pytest.fixture(scope="module")
def scaling():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
        spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(scaling, monkeypatch, capsys):
    """What a command line prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scaling.py", "--device", "cpu", *map(str, arguments)])
        scaling.main()
        return capsys.readouterr().out

    return run


@pytest.mark.distributed
def test_benchmark(run, tmp_path):
    """Launched as from a shell."""
    output = tmp_path / "scaling.json"
    small = f"--processes 2 --batch-size 1 --block-size 16 --num-inference-steps {STEPS} --repeats 2 --warmup 1"
    printed = run("--modes", "single", "fsdp2", *small.split(), "--output", output)
    result = json.loads(output.read_text())
    single, auto, never = result["rows"]
    assert (single["mode"], single["processes"], single["gather_during_inference"]) == ("single", 1, None)
    for row, way in ((auto, "auto"), (never, "never")):
        assert (row["mode"], row["processes"], row["gather_during_inference"]) == ("fsdp2", 2, way)

    for row in result["rows"]:
        low, high = row["milliseconds_range"]
        assert 0 < low == row["milliseconds"] == high  # of one round
        assert row["tokens_per_second"] == pytest.approx(1000 * row["processes"] * 16 / row["milliseconds"])

    model = LTMForCausalLM(preset_config("ltm-tiny-natural"))
    parameters = result["settings"]["parameters"]
    assert parameters == model.num_parameters()
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters()) / parameters
    # A pass gathers each of three layers forward and backward, the rest once; and Trainer counts its tokens. Held
    # since the fast loop, nothing is gathered for the slow step but the layers once more for its backward.
    for row, calls, models in ((single, -1, 0), (never, 4 * 7, 4 * (1 + layers)), (auto, 4 + 3, 1 + layers)):
        assert row["all_gathers"] == calls + 1
        assert row["gathered_models"] == pytest.approx(models, rel=1e-3)
        assert row["gathered_bytes"] == pytest.approx(4 * parameters * models, rel=1e-3)

    assert "share the" in printed and "zero" not in printed
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert f" {auto['tokens_per_second']:,.0f} | 8 | {auto['gathered_bytes'] / 2**20:.1f} | 1." in table[3]


def test_warm_up_is_left_out_and_ways_take_turns(scaling, monkeypatch):
    """Step n takes n milliseconds, and a second passes between steps."""
    watch, seen, clock = scaling.Stopwatch(("auto", "never"), warmup=2), [], [0]
    args, state = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace()
    monkeypatch.setattr(watch, "_now", lambda args: clock[0])
    for state.global_step in range(2 * (2 + 3)):
        watch.on_step_begin(args, state, None)
        seen.append(args.gather_during_inference)
        clock[0] += state.global_step
        watch.on_step_end(args, state, None)
        clock[0] += 1000
    assert seen == 5 * ["auto", "never"]
    assert watch.milliseconds == {"auto": [4, 6, 8], "never": [5, 7, 9]}


def test_without_deepspeed_its_modes_are_left_out(scaling, run, monkeypatch):
    launched, figures = [], {"milliseconds": [1.0, 3.0, 9.0], "all_gathers": 2, "gathered_bytes": 0}

    def launch(mode, processes, script, *arguments, device):
        launched.append((mode, processes))
        found = {"auto": figures | {"gathered_models": 0.0}}
        Path(arguments[-1]).write_text(json.dumps({"parameters": 7, "block_size": 10, "ways": found}))
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(scaling, "launch", launch)
    where = dict.fromkeys(("torch", "transformers", "accelerate", "deepspeed", "date", "hardware", "cores"))
    monkeypatch.setattr(scaling, "environment", lambda device: where)
    printed = run("--modes", "single", "ddp", "zero2", "zero3", "--rounds", "2", "--batch-size", "3")
    assert launched == 2 * [("single", 1), ("ddp", 1), ("ddp", 2)]  # rounds, not repeats of one mode
    assert "zero2 and zero3 are left out: DeepSpeed is not installed" in printed
    assert "| ddp | 2 | – | 3 (3 to 3) | 20,000 | 2 | 0.0 | 0.00 |" in printed  # 2 x 3 x 10 tokens in 3 ms


def test_a_mode_that_fails_is_named(scaling, run, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "the reason")
    monkeypatch.setattr(scaling, "launch", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match=r"the reason\nddp failed with 2 process"):
        run("--modes", "ddp", "--processes", "2")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--processes", "0"], "argument --processes: must be an integer of 1 or more, got '0'"),
        (["--modes", "zero9"], "argument --modes: invalid choice: 'zero9'"),
        (["--output", "no/such/folder/scaling.json"], "--output: there is no folder no/such/folder."),
        (["--device", "cuda", "--processes", "1000"], "GPUs for 1000 processes."),
    ],
)
def test_bad_input_is_named(run, capsys, arguments, sentence):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    assert sentence in capsys.readouterr().err
