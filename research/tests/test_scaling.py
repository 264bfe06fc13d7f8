import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ltm_hf import LTMForCausalLM, preset_config
from research.benchmarks import scaling, scaling_worker

STEPS = 3
SIZES = dict(max_position_embeddings=16, num_inference_steps=STEPS)


@pytest.fixture
def benchmark(run):
    def benchmark(*arguments):
        return run("benchmarks.scaling", "--device", "cpu", *arguments)

    return benchmark


def test_benchmark(benchmark, tmp_path):
    """Launched as from a shell."""
    output = tmp_path / "scaling.json"
    small = ["--processes", 2, "--batch_size", 1, "--repeats", 2, "--warmup", 1]
    said = benchmark("--modes", "fsdp2", *small, "--config_overrides", json.dumps(SIZES), "--output", output)
    result = json.loads(output.read_text())
    auto, never = result["rows"]
    for row, way in ((auto, "auto"), (never, "never")):
        assert (row["mode"], row["processes"], row["gather_during_inference"]) == ("fsdp2", 2, way)

    for row in result["rows"]:
        low, high = row["milliseconds_range"]
        assert 0 < low == row["milliseconds"] == high  # of one round
        assert row["tokens_per_second"] == pytest.approx(1000 * row["processes"] * 16 / row["milliseconds"])

    model = LTMForCausalLM(preset_config("ltm-tiny-paper"))
    parameters = result["settings"]["parameters"]
    assert parameters == model.num_parameters()
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters()) / parameters
    # A pass gathers each of three layers forward and backward, the rest once; what comes before the first latents, once
    # for all steps of inference, the first layer and the rest; and Trainer counts its tokens. Held since the fast loop,
    # nothing is gathered for the slow step but the layers once more for its backward.
    ahead = 1 - layers + layers / 3
    for row, calls, models in ((never, 2 + 4 * 7, ahead + 4 * (1 + layers)), (auto, 4 + 3, 1 + layers)):
        assert row["all_gathers"] == calls + 1
        assert row["gathered_models"] == pytest.approx(models, rel=1e-3)
        assert row["gathered_bytes"] == pytest.approx(4 * parameters * models, rel=1e-3)

    assert "share the" in said and "zero" not in said
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2
    assert f" {auto['tokens_per_second']:,.0f} | 8 | {auto['gathered_bytes'] / 2**20:.1f} | 1." in table[2]


def test_warm_up_is_left_out_and_ways_take_turns(monkeypatch):
    """Step n takes n milliseconds, and a second passes between steps."""
    watch, seen, clock = scaling_worker.Stopwatch(("auto", "never"), warmup=2), [], [0]
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


def test_without_deepspeed_its_modes_are_left_out(benchmark, monkeypatch):
    launched, figures = [], {"milliseconds": [1.0, 3.0, 9.0], "all_gathers": 2, "gathered_bytes": 0}

    def launch(mode, processes, script, settings, output, device):
        launched.append((mode, processes))
        found = {"auto": figures | {"gathered_models": 0.0}}
        Path(output).write_text(json.dumps({"parameters": 7, "block_size": 10, "ways": found}))
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(scaling.launching, "launch", launch)
    where = dict.fromkeys(("torch", "transformers", "accelerate", "deepspeed", "date", "hardware", "cores"))
    monkeypatch.setattr(scaling, "environment", lambda device: where)
    said = benchmark("--modes", "single", "ddp", "zero2", "zero3", "--rounds", "2", "--batch_size", "3")
    assert launched == 2 * [("single", 1), ("ddp", 1), ("ddp", 2)]  # rounds, not repeats of one mode
    assert "zero2 and zero3 are left out: DeepSpeed is not installed" in said
    assert "| ddp | 2 | – | 3 (3 to 3) | 20,000 | 2 | 0.0 | 0.00 |" in said  # 2 x 3 x 10 tokens in 3 ms


def test_a_mode_that_fails_is_named(benchmark, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "the reason")
    monkeypatch.setattr(scaling.launching, "launch", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match=r"the reason\nddp failed with 2 process"):
        benchmark("--modes", "ddp", "--processes", "2")


def test_bad_input_is_named(refused):
    assert "argument --modes: invalid choice: 'zero9'" in refused("benchmarks.scaling", "--modes", "zero9")
