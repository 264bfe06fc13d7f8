import json

import pytest
import torch

FIGURES = {"paper": {"bound", "of float32", "prefix", "no_latents"}, "memory": {"prediction", "prefix", "no_latents"}}


@pytest.mark.parametrize("reader", FIGURES)
def test_every_precision(run, checkpoint, corpus, tmp_path, reader):
    pytest.importorskip("torchao")
    folder, output = checkpoint(reader), tmp_path / "costs.json"
    given = ["--files", corpus, "--blocks", 4, "--num_particles", 1, "--threads", 1, "--output", output]
    said = run("benchmarks.precision", folder, "--steps", 1, 2, *given)
    nats = json.loads(output.read_text())["nats"][str(folder)]
    assert "4 blocks of 32 tokens, 1 particles" in said
    exact, seen = nats["float32"], set()
    assert exact["1"]["no_latents"] == exact["2"]["no_latents"] and exact["1"]["prefix"] != exact["2"]["prefix"]
    for precision, by_steps in nats.items():
        assert f"| {precision} " in said and set(by_steps) == {"1", "2"}
        for steps, figures in by_steps.items():
            assert set(figures) == FIGURES[reader]
            for name, values in figures.items():
                values, reference = torch.tensor(values), torch.tensor(exact[steps][name])
                assert values.shape == (4,) and (values - reference).abs().max() < 0.05 * reference.max(), name
            seen.add(tuple(figures["no_latents"]))
    assert len(seen) == len(nats) == 6  # each rounds in its own way
    if reader == "paper":
        assert exact["1"]["bound"] == exact["1"]["of float32"] != exact["2"]["bound"]
        low = nats["float8 products"]["2"]  # another posterior, scored in full precision
        assert low["of float32"] != exact["2"]["bound"] and low["of float32"] != low["bound"]
