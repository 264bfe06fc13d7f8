import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "train_step.py"
TINY = "--device cpu --threads 1 --batch-size 2 --sequence-length 24 --num-inference-steps 2 --repeats 2 --warmup 1"


def test_benchmark(run, tmp_path):
    output = tmp_path / "step.json"
    done = run(SCRIPT, *TINY.split(), "--output", output)
    result = json.loads(output.read_text())

    assert result["settings"]["preset"] == "ltm-tiny-natural" and result["settings"]["parameters"] == 1_062_528
    assert set(result["environment"]) == {"date", "hardware", "torch", "transformers"}
    milliseconds, flops = result["milliseconds"], result["flops_per_token"]
    for phase, (smallest, largest) in result["milliseconds_range"].items():
        assert 0 < smallest <= milliseconds[phase] <= largest
    assert milliseconds["training_step"] == pytest.approx(2 * milliseconds["fast_step"] + milliseconds["slow_step"])
    assert result["tokens_per_second"] == pytest.approx(1000 * 2 * 24 / milliseconds["training_step"])
    peaks = result["peak_memory_bytes"]
    steps = {f"{way}{step}_step" for way in ("", "published_") for step in ("fast", "slow", "training")}
    assert set(peaks) == steps | {"nothing"} and set(milliseconds) == set(flops) - {"forward"} == steps
    assert all(0.9 * peaks["nothing"] < peak < 2**33 for peak in peaks.values()) and len(set(peaks.values())) > 1
    published = 2 * milliseconds["published_fast_step"] + milliseconds["published_slow_step"]
    assert result["time_ratio"] == pytest.approx(milliseconds["training_step"] / published)
    published = max(peaks["published_fast_step"], peaks["published_slow_step"])
    assert result["memory_ratio"] == max(peaks["fast_step"], peaks["slow_step"]) / published

    assert set(result["relative_difference"]) == {"posterior", "slow_step"}
    assert all(0 < difference < 1e-3 for difference in result["relative_difference"].values())
    assert result["fast_step_forwards"] == flops["fast_step"] / flops["forward"] <= 2.1
    assert flops["published_fast_step"] == pytest.approx(3 * flops["forward"], rel=1e-3)
    head = 3 * 2 * 128 * 2_048 // 24  # of the last token, which predicts nothing
    assert flops["slow_step"] == pytest.approx(flops["published_slow_step"] - head, abs=1)

    assert "training step" in done.stdout and f"{result['time_ratio']:.2f} of the published" in done.stdout


def test_compiled_steps(tmp_path, monkeypatch, capsys):
    """Beside the others, in one graph for all fast steps and one for all slow ones."""
    output = tmp_path / "step.json"
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "peak_of_process", lambda phase, arguments: 2**30)  # a process each: seconds
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY.split(), "--compile", "aot_eager", "--output", str(output)])
    torch._dynamo.reset()
    script.counters.clear()
    script.main()
    result, printed = json.loads(output.read_text()), capsys.readouterr().out

    milliseconds, names = result["milliseconds"], {f"compiled_{step}_step" for step in ("fast", "slow", "training")}
    assert names == {name for name in milliseconds if name.startswith("compiled")} and len(milliseconds) == 9
    training_step = 2 * milliseconds["compiled_fast_step"] + milliseconds["compiled_slow_step"]
    assert milliseconds["compiled_training_step"] == pytest.approx(training_step)
    assert result["compiled_time_ratio"] == pytest.approx(training_step / milliseconds["training_step"])
    assert result["settings"]["compile"] == "aot_eager" and result["compiled_graphs"] == 2
    for phase in names - {"compiled_training_step"}:
        smallest, largest = result["milliseconds_range"][phase]
        assert 0 < smallest <= milliseconds[phase] <= largest
    assert not names & (set(result["flops_per_token"]) | set(result["peak_memory_bytes"]))
    differences = result["relative_difference"]
    assert set(differences) == {"posterior", "slow_step", "compiled_posterior", "compiled_slow_step"}
    assert all(0 < difference < 1e-3 for difference in differences.values())
    assert "compiled training step" in printed and "Compiled (aot_eager, 2 graphs)" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch-size", "0"], "argument --batch-size: must be an integer of 1 or more, got '0'"),
        (["--preset", "ltm-huge"], "argument --preset: invalid choice: 'ltm-huge'"),
        (["--compile", "gcc"], "argument --compile: invalid choice: 'gcc'"),
        (["--output", "no/such/folder/step.json"], "--output: there is no folder no/such/folder."),
    ],
)
def test_bad_input_is_named(run, arguments, sentence):
    done = run(SCRIPT, *TINY.split(), *arguments, check=False)
    assert done.returncode == 2 and sentence in done.stderr
