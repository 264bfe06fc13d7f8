import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.posterior_ltm import NaturalInference, step_size

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def optimizers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("inference_optimizers")
    del sys.modules["inference_optimizers"]


def test_a_variant_with_nothing_changed_is_the_library_s(optimizers, make_model, make_noise):
    settings = InferenceSettings.of(make_model().config)
    library, variant = (
        make(torch.zeros(3, 2, 2, 32), torch.zeros(3, 2, 2, 32), settings)
        for make in (NaturalInference, optimizers.NaturalVariant)
    )
    for step in range(4):
        gradient, epsilon = 3 * make_noise(3, 2, 2, 32, seed=step), make_noise(3, 2, 2, 32, seed=10 + step)
        for optimizer in (library, variant):
            optimizer.update(gradient, epsilon, step_size(settings, step))
    torch.testing.assert_close(variant.mean, library.mean)
    torch.testing.assert_close(variant.log_variance, library.log_variance)


def test_every_candidate(run, trained_natural, tmp_path):
    folder, _ = trained_natural
    output = tmp_path / "steps.json"
    printed = run(
        BENCHMARKS / "inference_steps.py", folder, "--steps", 0, 1, 2, 4, "--blocks", 4, "--training_blocks", 64,
        "--num_particles", 1, "--threads", 1, "--prefix", "--output", output,
    ).stdout  # fmt: skip
    assert all(f"| {name} " in printed for name in ("prefix loss", "natural", "lbfgs", "adamw"))
    nats = json.loads(output.read_text())["nats"][str(folder)]
    assert "4 blocks of 32 tokens, 1 particles" in printed and "fitted: ρ = " in printed
    losses = torch.tensor(nats.pop("no latents")["0"])
    assert losses.shape == (4,) and (losses > 31).all()  # more than a nat a token, of a model that hardly learned
    for name, scores in nats.items():
        assert f"| {name} " in printed
        assert set(scores) >= {"0", "2", "4"}, name
        if "AdamW" not in name:  # which starts far away
            for bounds in scores.values():
                assert (torch.tensor(bounds) - losses).abs().max() < 0.1 * losses.max(), name
    assert nats["natural (default)"]["0"] == nats["L-BFGS"]["0"] != nats["natural (default)"]["2"]
    assert nats["natural from a read-out"]["0"] == nats["L-BFGS from a read-out"]["0"] != nats["L-BFGS"]["0"]
    assert nats["natural from a read-out"]["1"] != nats["L-BFGS from a read-out"]["1"] != nats["L-BFGS"]["1"]


def test_no_such_candidate_is_named(run, trained_natural):
    done = run(BENCHMARKS / "inference_steps.py", trained_natural[0], "--only", "sgd", check=False)
    assert done.returncode == 2 and "--only: there is no such candidate; there are natural (default)" in done.stderr


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_mixed_corpus(run, tmp_path):
    path = tmp_path / "mixed.jsonl"
    printed = run(BENCHMARKS / "mixed_corpus.py", SHARED, path).stdout
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = {row["kind"] for row in rows}
    assert kinds == {"plays", "problems", "news", "abstracts", "prose"} and all(kind in printed for kind in kinds)
    for kind in kinds:
        lengths = [len(row["text"]) for row in rows if row["kind"] == kind]
        assert 1_000_000 <= sum(lengths) <= 1_002_000 and max(lengths) <= 2000 and min(lengths) >= 1000
    assert len({row["kind"] for row in rows[:40]}) == 5


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
def test_technical_prose_in_whole_passages(run, tmp_path):
    printed = run(BENCHMARKS / "mixed_corpus.py", SHARED, tmp_path / "prose.jsonl", "--prose").stdout
    rows = [json.loads(line) for line in (tmp_path / "prose.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"prose"} and f"prose: {len(rows):,} documents" in printed
    assert sum(len(row["text"]) for row in rows) > 40_000_000 and max(len(row["text"]) for row in rows) <= 6000
