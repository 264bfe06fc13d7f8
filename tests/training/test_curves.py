"""The thinking curve shows what was measured: levels, and differences block by block."""

import math

import pytest
import torch

from ltm_hf.evaluation import block_losses
from ltm_hf.training import plot_curves, plot_thinking

axes = pytest.importorskip("matplotlib.axes")


def test_thinking_curve(tmp_path, monkeypatch):
    """Blocks of very different loss of which each gains 0.1: a wide error on the level, none on what is saved."""
    plain = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    losses = {
        steps: {"no_latents": plain, "prefix_no_latents": plain + 1, "bound": plain - saved, "prefix": plain + 1}
        for steps, saved in ((2, 0.1), (0, 0.0))
    }
    drawn = []
    original = axes.Axes.errorbar
    monkeypatch.setattr(
        axes.Axes, "errorbar", lambda self, *a, **k: (drawn.append((k["label"], *a)), original(self, *a, **k))[1]
    )
    plot_thinking(losses, tmp_path / "thinking.png")
    assert (tmp_path / "thinking.png").read_bytes().startswith(b"\x89PNG")
    level, saved, prefix_level, prefix_saved = drawn
    error = plain.std().item() / math.sqrt(3)
    assert "bound" in level[0] and level[2:] == (pytest.approx([3.0, 2.9]), pytest.approx([error] * 2))
    assert saved[2:] == (pytest.approx([0.0, 0.1]), pytest.approx([0, 0], abs=1e-12))
    assert "prefix" in prefix_level[0] and prefix_level[2] == pytest.approx([4.0, 4.0])
    assert prefix_saved[2] == pytest.approx([0.0, 0.0])


def test_without_a_step_the_prefix_says_nothing(make_model, make_ids):
    """The mean of the prior is no thought: the curve begins at exactly nothing saved."""
    blocks = [{"input_ids": row} for row in make_ids().tolist()]
    losses = block_losses(make_model(), blocks, num_inference_steps=0, progress=False)
    torch.testing.assert_close(losses["prefix"], losses["prefix_no_latents"])
    assert losses["bound"].shape == (3,)


def test_each_evaluation_is_a_line_of_the_fast_loop(tmp_path, monkeypatch):
    traces = [[-4.0, -3.5, -3.4], [-3.0, -2.8, -2.7], [-2.5, -2.4, -2.4]]
    history = [{"step": step, "loss": 3.0} for step in (1, 2)]
    history += [{"step": 10 * n, "eval_loss": 3.0, "eval_elbo_trace": trace} for n, trace in enumerate(traces, start=1)]
    drawn = []
    original = axes.Axes.plot
    monkeypatch.setattr(axes.Axes, "plot", lambda self, *a, **k: (drawn.append((a, k)), original(self, *a, **k))[1])
    plot_curves({"ltm": history, "twin": history[:2]}, tmp_path / "curves.png")
    lines = [(list(x), y, k["label"], k["alpha"]) for (x, y, *_), k in drawn if y in traces]
    assert [line[:2] for line in lines] == [([0, 1, 2], trace) for trace in traces]
    assert [line[2] for line in lines] == ["ltm: step 10", None, "ltm: step 30"]  # first and last
    assert lines[0][3] < lines[1][3] < lines[2][3] == 1.0
