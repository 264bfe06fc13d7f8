"""examples/benchmarks/prior_directions.py: directions that are known, and a run."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("prior_directions")
    for name in ("prior_directions", "train_step"):
        sys.modules.pop(name, None)


def test_directions_of_known_gradients(benchmark):
    """Two of ten directions vary between texts, by τ of 2 and 0.5 under a Fisher information of 3 a half."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    directions = torch.linalg.qr(draw(10, 2)).Q
    truth = torch.tensor([2.0, 0.5])
    moved = 3 * (truth * draw(20_000, 2)) @ directions.T
    halves = [7.0 + moved + 3**0.5 * draw(20_000, 10) for _ in range(2)]
    basis = benchmark.shared_directions(*halves, count=3)
    assert basis.norm(dim=0)[:2].tolist() == pytest.approx(truth.tolist(), rel=0.05) and basis.norm(dim=0)[2] < 0.2
    for number in range(2):
        assert abs(basis[:, number] @ directions[:, number]) == pytest.approx(basis[:, number].norm().item(), rel=0.01)


def test_gradients_are_of_what_is_scored(benchmark, make_model, ids):
    model = make_model().eval()
    first, rest = (benchmark.gradients(model, ids, part) for part in (slice(None, 5), slice(5, None)))
    whole = benchmark.gradients(model, ids, slice(None), batch_size=2)
    assert first.norm() > 0 and rest.norm() > 0
    torch.testing.assert_close(first + rest, whole, rtol=1e-4, atol=1e-5)


def test_the_decoder_reads_the_span(benchmark, make_model, ids, make_noise):
    model = make_model().eval()
    latents = make_noise(3, *model.config.latent_shape)
    mixed = latents.flatten(1).flip(1).view_as(latents)
    with torch.no_grad():
        expected = model(ids, latents=mixed).logits
        prior = benchmark.Spanned(model)
        before = model(ids, latents=latents).logits
        prior.basis = torch.eye(latents[0].numel()).flip(0)
        torch.testing.assert_close(model(ids, latents=latents).logits, expected)
    assert not torch.allclose(before, expected)


def test_run(run, trained_natural):
    folder, _ = trained_natural
    printed = run(
        BENCHMARKS / "prior_directions.py", folder, "--training_blocks", 32, "--blocks", 4, "--directions", 2, 8,
        "--shares", 1, "--steps", 2, "--num_particles", 1,
    ).stdout  # fmt: skip
    assert "32 training blocks, 4 held out" in printed
    rows = [line.split("|")[2:-1] for line in printed.splitlines() if "directions, 1" in line or "the model's" in line]
    assert len(rows) == 3
    for at_zero, *_, sampled, kl, bound in (list(map(float, cells)) for cells in rows):
        assert at_zero > 1 and kl >= 0 and bound == pytest.approx(sampled + kl, abs=2e-4)
