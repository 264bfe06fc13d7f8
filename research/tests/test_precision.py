import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "precision.py"


def test_every_precision(run, trained_natural, tmp_path):
    pytest.importorskip("torchao")
    folder, output = trained_natural[0], tmp_path / "costs.json"
    printed = run(
        SCRIPT, folder, "--steps", 1, 2, "--blocks", 4, "--num_particles", 1, "--threads", 1, "--output", output
    ).stdout
    nats = json.loads(output.read_text())["nats"][str(folder)]
    assert "4 blocks of 32 tokens, 1 particles" in printed
    exact = nats["float32"]
    assert exact["1"]["bound"] == exact["1"]["of float32"] != exact["2"]["bound"]
    assert exact["1"]["no_latents"] == exact["2"]["no_latents"]
    seen = set()
    for precision, by_steps in nats.items():
        assert f"| {precision} " in printed
        assert set(by_steps) == {"1", "2"}
        for steps, figures in by_steps.items():
            assert set(figures) == {"bound", "of float32", "prefix", "no_latents"}
            for name, values in figures.items():
                values, reference = torch.tensor(values), torch.tensor(exact[steps][name])
                assert values.shape == (4,) and (values - reference).abs().max() < 0.02 * reference.max(), name
            if precision != "float32":  # this decoder hardly reads its latents: what is rounded shows when it scores
                bound, other, reference = map(
                    torch.tensor, (figures["bound"], figures["of float32"], exact[steps]["bound"])
                )
                assert (other - reference).abs().max() < 2e-4 < (bound - reference).abs().max(), precision
            seen.add(tuple(figures["no_latents"]))
    assert len(seen) == len(nats) == 6  # each rounds in its own way
    # Other posteriors give another bound, if only just.
    assert any(nats[precision]["2"]["of float32"] != exact["2"]["bound"] for precision in nats)
