import pytest

from ltm_hf.training import plot_curves

axes = pytest.importorskip("matplotlib.axes")


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


@pytest.mark.parametrize(
    ("history", "panels", "label"),
    [
        ([{"step": 1, "eval_loss": 3.0, "eval_perplexity_bound": 20.0, "eval_kl": 0.1}], 2, "ltm: validation bound"),
        ([{"step": 1, "eval_loss": 3.0, "eval_perplexity": 20.0, "eval_gain": 0.1}], 2, "ltm: validation loss"),
        ([{"step": 1, "eval_loss": 3.0, "eval_perplexity": 20.0}], 1, "ltm: validation loss"),
        ([], 0, None),
    ],
)
def test_panels_and_words_are_of_what_was_logged(tmp_path, monkeypatch, history, panels, label):
    titles, labels = [], []
    draw, name = axes.Axes.plot, axes.Axes.set
    monkeypatch.setattr(axes.Axes, "plot", lambda self, *a, **k: (labels.append(k["label"]), draw(self, *a, **k))[1])
    monkeypatch.setattr(axes.Axes, "set", lambda self, **k: (titles.append(k["title"]), name(self, **k))[1])
    plot_curves({"ltm": history}, tmp_path / "curves.png")
    assert len(titles) == panels and (label is None or label in labels)
