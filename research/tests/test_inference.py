import json

import pytest


def rows_of(said):
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")]
    return {(row[0], row[1]): row[2:] for row in cells}


def test_every_method(run, checkpoint, corpus, tmp_path):
    """Each column is the mean over blocks of what is written, by method and number of steps."""
    folder, output, methods = checkpoint("paper"), tmp_path / "inference.json", ["natural", "lbfgs", "langevin"]
    given = ["--files", corpus, "--blocks", 4, "--num_particles", 1, "--threads", 1, "--output", output]
    said = run("benchmarks.inference", folder, "--steps", 1, 3, "--methods", *methods, *given)
    rows, nats = rows_of(said), json.loads(output.read_text())["nats"][str(folder)]
    assert "4 blocks of 32 tokens, 1 particles; no_latents" in said and list(nats) == ["no_latents", *methods]
    for method in methods:
        assert ((method, "bound") in rows) == (method != "langevin")  # which finds a point
        for column, found in enumerate(nats[method]):
            means = {name: sum(values) / (4 * (31 if name == "bound" else 16)) for name, values in found.items()}
            means["saved on prefix"] = means.pop("prefix_no_latents") - means["prefix"]
            for name, mean in means.items():
                assert float(rows[method, name][column].split(" ±")[0]) == pytest.approx(mean, abs=6e-5)
    assert len({cell for method in methods for cell in rows[method, "prefix"]}) == 6


def test_an_encoder_has_one_column(run, checkpoint, corpus):
    folder = checkpoint("paper", inference_method="amortized")
    said = run(
        "benchmarks.inference", folder, "--files", corpus, "--blocks", 2, "--steps", 1, 2, "--methods", "natural"
    )
    rows = rows_of(said)
    assert rows["amortized", "bound"][1] == "–" != rows["natural", "bound"][1]


def test_a_memory_infers_by_its_own_method(run, checkpoint, corpus):
    said = run("benchmarks.inference", checkpoint("memory"), "--files", corpus, "--blocks", 2, "--steps", 0, 1, 2)
    rows = rows_of(said)
    assert {name for name in rows if name[0]} == {("natural", "prefix"), ("natural", "saved on prefix")}
    assert rows["natural", "saved on prefix"][0].startswith("0.0000") and "prediction" in said  # no step, no memory
    assert rows["natural", "prefix"][0] != rows["natural", "prefix"][1]


def test_no_such_method_is_named(refused, checkpoint):
    assert "invalid choice: 'sgd'" in refused("benchmarks.inference", checkpoint("paper"), "--methods", "sgd")
