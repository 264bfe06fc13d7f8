"""Thinking curves show what was measured: levels, and differences block by block."""

import copy
import csv

import pytest
import torch

from ltm_hf.costs.flops import training_flops
from ltm_hf.evaluation import plot_thinking, score_blocks, thinking_curve, thinking_table, write_thinking_csv


@pytest.fixture(scope="module")
def blocks(make_ids):
    return [{"input_ids": row} for row in make_ids(rows=5).tolist()]


def test_curve_against_scores(model, blocks):
    """Of a memory what follows a prefix alone: it has no bound."""
    rows = thinking_curve(model, blocks, steps=(3, 0), batch_size=2, progress=False)
    figures = ["prefix"] if model.config.has_memory else ["bound", "prefix"]
    assert [(row["figure"], row["num_inference_steps"]) for row in rows] == [(f, n) for f in figures for n in (0, 3)]
    for row in rows:
        names = ["bound", "no_latents"] if row["figure"] == "bound" else ["prefix", "prefix_no_latents"]
        scores = score_blocks(
            model, blocks, figures=names, num_inference_steps=row["num_inference_steps"], progress=False
        )
        assert (row["nats"], row["error"]) == pytest.approx(scores.mean(names[0]), abs=1e-5)
        assert (row["saved"], row["saved_error"]) == pytest.approx(scores.mean(names[1], minus=names[0]), abs=1e-5)
        assert row["seconds"] > 0 and row["num_latents"] == model.config.num_latents
        assert (row["mflops"] > 0) == (row["num_inference_steps"] > 0)


def test_flops_are_those_of_the_closed_form(paper_model, blocks):
    paper_model.set_attn_implementation("eager")  # the closed form counts all scores
    for row in thinking_curve(paper_model, blocks, steps=(0, 1, 3), progress=False):
        config = copy.deepcopy(paper_model.config)
        config.num_inference_steps = row["num_inference_steps"]
        cost = training_flops(config, len(blocks[0]["input_ids"]))  # what is computed once is counted once
        assert row["mflops"] * 1e6 == pytest.approx(cost.num_inference_steps * cost.fast_step)


def test_without_a_step_the_prefix_says_nothing(model, blocks):
    """Neither the mean of the prior nor an unread prefix is a thought: the curve begins at exactly nothing saved."""
    *_, row = thinking_curve(model, blocks, steps=(0,), progress=False)
    assert row["saved"] == pytest.approx(0.0, abs=1e-6) and row["saved_error"] == pytest.approx(0.0, abs=1e-6)


def test_a_chain_has_no_bound_and_its_curve_is_drawn(make_model, blocks, tmp_path):
    chain = make_model(latent_reader="paper", inference_method="langevin")
    rows = thinking_curve(chain, blocks, steps=(0, 2), progress=False)
    assert [row["figure"] for row in rows] == ["prefix", "prefix"]
    pytest.importorskip("matplotlib")
    plot_thinking({"chain": rows}, tmp_path / "thinking.png")
    assert "bound" not in thinking_table({"chain": rows})


def test_no_curve_without_steps(make_model, blocks):
    for overrides in (dict(num_latents=0), dict(latent_reader="paper", inference_method="amortized")):
        with pytest.raises(ValueError, match="takes no inference steps"):
            thinking_curve(make_model(**overrides), blocks, steps=(0,))


def test_models_with_a_bound_and_without_in_one_picture(tmp_path):
    pytest.importorskip("matplotlib")
    without = [row for row in curve(8) if row["figure"] == "prefix"]
    for curves in ({"memory": without}, {"memory": without, "other": curve()}, {"one": without, "two": without[:2]}):
        plot_thinking(curves, tmp_path / "thinking.png")


def curve(latents=4):
    return [
        {
            "figure": figure, "num_inference_steps": steps, "num_latents": latents, "nats": 3.0 - saved - latents,
            "error": 0.5, "saved": saved, "saved_error": 0.01, "seconds": 0.25, "mflops": 1.5 * steps,
        }
        for figure in ("bound", "prefix") for steps, saved in ((0, 0.0), (2, 0.125))
    ]  # fmt: skip


def test_table_and_csv(tmp_path):
    line = thinking_table({"mine": curve()}).splitlines()[3]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "mine", "4", "bound", "2", "-1.1250 ± 0.5000", "0.1250 ± 0.0100", "0.250", "3",
    ]  # fmt: skip
    write_thinking_csv({"mine": curve(), "other": curve(8)}, tmp_path / "thinking.csv")
    with open(tmp_path / "thinking.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and rows[5]["model"] == "other" and float(rows[5]["saved"]) == 0.125


@pytest.mark.parametrize("models", [{"mine": 4}, {"mine": 4, "more": 8}])
def test_picture(tmp_path, monkeypatch, models):
    axes = pytest.importorskip("matplotlib.axes")
    drawn, original = [], axes.Axes.errorbar
    monkeypatch.setattr(
        axes.Axes, "errorbar", lambda self, *a, **k: (drawn.append((k["label"], *a)), original(self, *a, **k))[1]
    )
    plot_thinking({name: curve(latents) for name, latents in models.items()}, tmp_path / "thinking.png")
    assert (tmp_path / "thinking.png").read_bytes().startswith(b"\x89PNG")
    assert drawn[0][2:] == ([-1.0, -1.125], [0.5, 0.5]) and drawn[1][2:] == ([0.0, 0.125], [0.01, 0.01])
    by_latents = drawn[4 * len(models) :]
    assert len(by_latents) == (0 if len(models) == 1 else 2)
    if by_latents:
        assert [list(x) for x in by_latents[0][1:]] == [[4, 8], [-1.125, -5.125], [0.5, 0.5]]


def test_generator_state_is_left_alone(model, blocks):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    thinking_curve(model, blocks, steps=(1,), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
