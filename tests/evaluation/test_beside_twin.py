"""The table of a model beside its twin, and the place where thinking saves most."""

import pytest
import torch

from ltm_hf.evaluation import evaluate_likelihood, score_blocks
from ltm_hf.evaluation.beside_twin import beside_twin, most_helped
from ltm_hf.evaluation.continuous_cache import cache_losses, tune_cache
from ltm_hf.memory_ltm import prior_state


@pytest.fixture
def blocks(make_ids):
    return [{"input_ids": row.tolist()} for row in make_ids(6, 20) % 9]


def test_table(make_model, reader, blocks):
    model, twin = make_model(latent_reader=reader), make_model(num_latents=0)
    scores = (score_blocks(one, blocks[:4], progress=False) for one in (model, twin))
    table = beside_twin(model, twin, *scores, blocks[:4], blocks[4:], progress=False)
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in table.splitlines()[2:]}

    def value(name, column):
        (cells,) = [cells for row, cells in rows.items() if row.startswith(name)]
        return float(cells[column].split("±")[0])

    of_twin = evaluate_likelihood(twin, blocks[:4], progress=False)
    assert value("autoregressive twin", 0) == pytest.approx(of_twin["no_latents"], abs=6e-4)
    assert value("autoregressive twin", 2) == pytest.approx(of_twin["prefix_no_latents"], abs=6e-4)
    cached = cache_losses(twin, blocks[:4], tune_cache(twin, blocks[4:]))
    assert value("twin, with", 0) == pytest.approx(cached.mean().item(), abs=6e-4)
    assert value("twin, with", 2) == pytest.approx(cached[:, 9:].mean().item(), abs=6e-4)
    own = {"LTM, by the mean": "prediction", "LTM, by a sample": "prediction_sampled"}
    own = own if reader == "memory" else {"LTM, its bound": "bound"}
    figures = evaluate_likelihood(model, blocks[:4], progress=False, figures=(*own.values(), "prefix"))
    for name, figure in own.items():
        assert value(name, 0) == pytest.approx(figures[figure], abs=6e-4)
        assert value(name, 1) == pytest.approx(figures[figure] - of_twin["no_latents"], abs=6e-4)
    steps = model.config.num_inference_steps
    more = evaluate_likelihood(model, blocks[:4], num_inference_steps=steps + 1, progress=False, figures=("prefix",))
    thought = [name for name in rows if "first halves alone" in name]
    assert value(thought[0], 2) == pytest.approx(figures["prefix"], abs=6e-4)
    assert value(thought[1], 2) == pytest.approx(more["prefix"], abs=6e-4)


def test_a_posterior_by_no_steps_and_one_without_a_bound(make_model, blocks):
    twin = make_model(num_latents=0)
    for method, thought in (("amortized", 1), ("langevin", 2)):
        model = make_model(latent_reader="paper", inference_method=method)
        scores = (score_blocks(one, blocks[:4], progress=False) for one in (model, twin))
        table = beside_twin(model, twin, *scores, blocks[:4], blocks[4:], progress=False)
        assert table.count("first halves alone") == thought
        assert ("its bound" in table) == (method == "amortized") and "not finite" not in table


@torch.no_grad()
def test_where_a_memory_saves_most(make_model, blocks):
    model, best = make_model(), []
    for row in blocks:
        ids = torch.tensor([row["input_ids"]])
        given = dict(labels=ids, loss_reduction="none", use_cache=False)
        saved = model(ids, **given).loss - model(ids, **given, latent_state=prior_state(model.config, 1)).loss
        best += [(float(saved[0, t : t + 4].sum()), row["input_ids"][: t + 1]) for t in range(10, 16)]
    assert most_helped(model, blocks, length=4, batch_size=4) == max(best)[1]
