import json
from types import SimpleNamespace

import pytest
import torch

from research.benchmarks import train_step

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_latents=4, vocab_size=200)
TINY = "--device cpu --threads 1 --batch_size 2 --sequence_length 24 --repeats 2 --warmup 1".split()
PRESETS = {"memory": ("ltm-tiny", {}), "paper": ("ltm-tiny-paper", {"num_inference_steps": 2})}


def arguments(reader, *more):
    preset, overrides = PRESETS[reader]
    return [*TINY, "--preset", preset, "--config_overrides", json.dumps(SIZES | overrides), *more]


@pytest.fixture
def benchmark(run, tmp_path):
    """What is printed, and what is written."""

    def benchmark(reader, *more):
        output = tmp_path / "step.json"
        said = run("benchmarks.train_step", *arguments(reader, *more), "--output", output)
        return said, json.loads(output.read_text())

    return benchmark


@pytest.mark.parametrize("reader", PRESETS)
def test_benchmark(benchmark, reader):
    said, result = benchmark(reader)
    times, flops, steps = result["milliseconds"], result["flops_per_token"], result["settings"]["num_inference_steps"]
    assert set(result["environment"]) == {"date", "hardware", "torch", "transformers"}
    for phase, (smallest, largest) in result["milliseconds_range"].items():
        assert 0 < smallest <= times[phase] <= largest
    assert times["training_step"] == pytest.approx(steps * times.get("fast_step", 0) + times["slow_step"])
    assert result["tokens_per_second"] == pytest.approx(1000 * 2 * 24 / times["training_step"])
    ours = {"slow_step", "twin_step", "training_step"}
    if reader == "memory":  # which infers within the slow step
        assert steps == 0 and set(times) == ours and set(result["relative_difference"]) == {"slow_step"}
        assert flops["twin_step"] < flops["training_step"] == flops["slow_step"] and "published" not in said
    else:
        published = {f"published_{step}_step" for step in ("fast", "slow", "training")}
        assert steps == 2 and set(times) == ours | published | {"fast_step"} == set(flops) - {"forward"}
        assert flops["fast_step"] < 2.1 * flops["forward"] < flops["published_fast_step"] == 3 * flops["forward"]
        ratio = times["training_step"] / times["published_training_step"]
        assert f"{ratio:.2f} of the published way's time" in said
        assert set(result["relative_difference"]) == {"posterior", "slow_step"}
    assert all(0 < difference < 1e-4 for difference in result["relative_difference"].values())
    assert f"{times['slow_step'] / times['twin_step']:.2f}" in said


def test_compiled_steps(benchmark):
    """Beside the others: a graph for what comes before the latents, one for fast steps and one for slow ones."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    said, result = benchmark("paper", "--compile", "eager")
    times, names = result["milliseconds"], {f"compiled_{step}_step" for step in ("fast", "slow", "training")}
    assert names == {name for name in times if name.startswith("compiled")} and result["compiled_graphs"] == 3
    assert times["compiled_training_step"] == pytest.approx(
        2 * times["compiled_fast_step"] + times["compiled_slow_step"]
    )
    differences = result["relative_difference"]
    assert set(differences) == {"posterior", "slow_step", "compiled_posterior", "compiled_slow_step"}
    assert all(0 < difference < 1e-3 for difference in differences.values())
    assert "compiled training step" in said and "Compiled (eager, 3 graphs)" in said
    torch._dynamo.reset()


def test_peak_memory(benchmark, run, monkeypatch):
    """Of a process for each phase; a training step's is the larger of its two."""
    alone = []

    def process(command, cwd, **options):
        assert command[1:3] == ["-m", "research.benchmarks.train_step"] and (cwd / "research").is_dir()
        assert command[3 : 3 + len(TINY)] == TINY and command[-2] == "--only"
        alone.append(command[-1])
        return SimpleNamespace(stdout=f"said before\n{len(alone) * 2**20}\n")

    monkeypatch.setattr(train_step.subprocess, "run", process)
    said, result = benchmark("paper", "--memory")
    peaks = result["peak_memory_bytes"]
    assert set(alone) == set(result["milliseconds_range"]) | {"nothing"}
    assert peaks["training_step"] == max(peaks["fast_step"], peaks["slow_step"])
    assert f"{peaks['nothing'] // 2**20} MiB" in said
    assert 2**27 < int(run("benchmarks.train_step", *arguments("paper", "--only", "fast_step"))) < 2**33


def test_different_results_are_an_error(benchmark, monkeypatch):
    monkeypatch.setattr(train_step, "_noise", lambda start, step: torch.full_like(start.mean, 1.0 + step))
    naive = train_step.infer_posterior_unfrozen
    monkeypatch.setattr(train_step, "infer_posterior_unfrozen", lambda *given: naive(*given).lerp(naive(*given), 0))
    benchmark("paper")  # the same noise for both: no difference
    monkeypatch.setattr(train_step, "infer_posterior_unfrozen", lambda model, ids: model.infer_posterior(ids, seed=1))
    with pytest.raises(SystemExit, match="The two ways differ in the posterior"):
        benchmark("paper")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--batch_size", "0"], "argument --batch_size: must be an integer of 1 or more, below 2**31, got '0'"),
        (["--preset", "ltm-huge"], "argument --preset: invalid choice: 'ltm-huge'"),
        (["--compile", "gcc"], "argument --compile: invalid choice: 'gcc'"),
        (["--config_overrides", "[1]"], "must be a JSON object of fields, got '[1]'"),
        (["--config_overrides", '{"hiden_size": 3}'], "did you mean 'hidden_size'?"),
        (["--only", "sleep"], "--only must be one of nothing, slow_step, twin_step; got 'sleep'"),
        (["--output", "/dev/null/x.json"], "'/dev/null' is not a folder"),
    ],
)
def test_bad_input_is_named(refused, more, sentence):
    assert sentence in refused("benchmarks.train_step", *arguments("memory", *more))
