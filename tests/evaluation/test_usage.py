"""What each latent carries and which tokens read it, against closed forms and each token by itself."""

import json
import math

import pytest
import torch

from ltm_hf import LTMForCausalLM
from ltm_hf.evaluation import latent_plots, usage
from ltm_hf.evaluation.representations import infer_posteriors
from ltm_hf.evaluation.usage import active_units, kl_per_latent, latent_reading, latent_usage, reading_maps

BOS = 1

# ------------------------------------------------------------------ how much each latent carries


def test_kl_map_sums_to_the_divergence(model, blocks):
    posterior = infer_posteriors(model, blocks, progress=False)
    kl = kl_per_latent(posterior)
    torch.testing.assert_close(kl.sum(dim=(1, 2)), posterior.kl_divergence())
    mean, deviation = posterior.mean[1, 0, 1], (0.5 * posterior.log_variance[1, 0, 1]).exp()
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, deviation), prior).sum()
    torch.testing.assert_close(kl[1, 0, 1], expected, rtol=1e-4, atol=1e-5)
    result = latent_usage(model, blocks, progress=False)
    cells = [[latent["value"] for latent in layer] for layer in result["kl"]]
    torch.testing.assert_close(torch.tensor(cells), kl.mean(dim=0))
    assert [layer["value"] for layer in result["kl_by_layer"]] == pytest.approx([sum(layer) for layer in cells])
    assert result["kl_total"]["value"] == pytest.approx(posterior.kl_divergence().mean().item())
    per_token = (posterior.kl_divergence() / torch.tensor([7, 12, 4])).mean().item()
    assert result["kl_per_token"]["value"] == pytest.approx(per_token)


def test_the_prior_has_no_kl_and_no_active_unit(model, blocks):
    result = latent_usage(model, blocks, num_inference_steps=0, progress=False)
    assert result["kl_total"]["value"] == result["num_active"] == 0
    assert not any(latent["value"] for layer in result["kl"] for latent in layer)
    assert result["num_units"] == 4 * 32 and result["num_channels"] == 32


def test_active_units_of_means_made_by_hand():
    """Two sequences at ±a have variance 2a²: just below 0.01, just above it; a constant has none, however large."""
    mean = torch.zeros(2, 2, 2, 3)
    mean[0, 0, 1, 0], mean[1, 0, 1, 0] = 0.072, -0.072  # 0.0104
    mean[0, 0, 1, 1], mean[1, 0, 1, 1] = 0.070, -0.070  # 0.0098
    mean[0, 1, 0], mean[1, 1, 0] = 1.0, -1.0
    mean[:, 1, 1] = 5.0
    assert active_units(mean).tolist() == [[0, 1], [3, 0]]
    assert active_units(mean, threshold=1.0).tolist() == [[0, 0], [3, 0]]
    with pytest.raises(ValueError, match="two sequences"):
        active_units(mean[:1])


def test_a_chain_ends_at_a_point_whose_kl_is_left_out(make_model, blocks):
    with pytest.raises(ValueError, match="'langevin' ends at a point, whose KL is infinite"):
        latent_usage(make_model(latent_reader="paper", inference_method="langevin"), blocks, progress=False)


def test_the_seed_is_the_fit_s(paper_model, blocks):
    first, again, other = (latent_usage(paper_model, blocks, seed=seed, progress=False)["kl"] for seed in (0, 0, 1))
    assert first == again != other


def test_what_inference_makes_of_the_kl_is_said(memory_model, paper_model, blocks):
    cold, whole = (
        usage.latent_usage_markdown(latent_usage(m, blocks, progress=False)) for m in (memory_model, paper_model)
    )
    assert "nats a token, which inference counts 0.01 times." in cold and "which inference" not in whole
    assert "| memory " in cold and "| layer 2 " in whole


# ------------------------------------------------------------------ which tokens read which latents


def test_maps_are_the_attention_of_the_formula(make_model, blocks, make_noise):
    """Rows sum to 1; the first layer's map and addition from its weights, written out for one token."""
    model = make_model(latent_reader="paper")
    latents = make_noise(1, *model.config.latent_shape)
    ids = torch.tensor([blocks[1]["input_ids"]])
    recorded = model.config._attn_implementation
    maps, additions = reading_maps(model, ids, latents)
    assert maps.shape == (1, 2, 4, 13, 2) and additions.shape == (1, 2, 13)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(1, 2, 4, 13))
    assert model.config._attn_implementation == recorded == "banded_sdpa"

    layer = model.model.layers[0]
    with torch.no_grad():
        states = model.model.embed_tokens(ids)
        tables = model.model.rotary_emb(states, position_ids=torch.arange(13)[None])
        states = (
            states + layer.self_attn(layer.input_layernorm(states[:, :1]), tuple(t[:, :1] for t in tables), None)[0]
        )
        query = layer.cross_attn.q_proj(layer.cross_attention_layernorm(states[0, 0])).view(
            4, 8
        )  # position 0: as it is
        keys, values = model.project_latents(latents)[0, 0].repeat_interleave(2, dim=1)  # two query heads a key head
        weights = ((query[:, None] * keys).sum(dim=-1) / math.sqrt(8)).softmax(dim=-1)
        output = (weights[..., None] * values).sum(dim=1).flatten()
        added = layer.cross_attention_gate.weight * layer.cross_attn.o_proj(output)
    torch.testing.assert_close(maps[0, 0, :, 0], weights)
    torch.testing.assert_close(additions[0, 0, 0], added.norm() / states[0, 0].norm())


def test_maps_of_a_memory_are_those_of_the_formula(memory_model, blocks, make_noise):
    """Each token's softmax over addresses, a head each, and what the mean of what it finds adds to its state."""
    model, reader = memory_model, memory_model.model.reader
    latents, ids = make_noise(1, *model.config.latent_shape), torch.tensor([blocks[1]["input_ids"]])
    maps, additions = reading_maps(model, ids, latents)
    assert maps.shape == (1, 1, 4, 13, 4) and additions.shape == (1, 1, 13)
    with torch.no_grad():
        stream = model.model(ids, normed=False).last_hidden_state[0]
        for token in (0, 7, 12):
            queries = reader.q_proj(reader.norm(stream[token])).view(4, 1, 8)
            weights = ((queries * reader.addresses.weight).sum(dim=-1) / math.sqrt(8)).softmax(dim=-1)
            torch.testing.assert_close(maps[0, 0, :, token], weights)
            read = (weights[..., None] * latents[0, 0].view(4, 4, 8).transpose(0, 1)).sum(dim=1)
            strength = reader.scales.log_read.exp()[:, None]
            added = reader.gate.weight * reader.map((strength * read).flatten())
            torch.testing.assert_close(additions[0, 0, token], added.norm() / stream[token].norm())


def test_latents_of_zero_add_nothing_and_are_looked_at_alike(paper_model, blocks, letters):
    ids = torch.tensor([blocks[0]["input_ids"]])
    maps, additions = reading_maps(paper_model, ids, torch.zeros(1, *paper_model.config.latent_shape))
    torch.testing.assert_close(maps, torch.full_like(maps, 0.5))
    assert not additions.any()
    result = latent_reading(paper_model, letters, blocks, num_inference_steps=0, progress=False)
    assert [layer["value"] for layer in result["entropy"]] == pytest.approx([math.log(2)] * 2)
    assert result["max_entropy"] == math.log(2)
    assert [layer["value"] for layer in result["addition"]] == [0.0, 0.0]


def test_reading_against_the_maps_of_each_block(model, blocks, letters):
    result = latent_reading(model, letters, blocks, num_tokens=5, batch_size=3, progress=False)
    entropies, additions = [], []
    for block in blocks:
        ids = torch.tensor([block["input_ids"]])
        maps, sizes = reading_maps(model, ids, model.infer_posterior(ids).mean)
        entropies.append(-(maps * maps.log()).sum(dim=-1).mean(dim=(0, 2, 3)))
        additions.append(sizes.mean(dim=(0, 2)))
        if block is blocks[0]:
            torch.testing.assert_close(torch.tensor(result["weights"]), maps[0].mean(dim=1)[:, :5])
    for name, values in (("entropy", entropies), ("addition", additions)):
        means = torch.stack(values).mean(dim=0).tolist()
        assert [one["value"] for one in result[name]] == pytest.approx(means, rel=1e-4)
    assert result["tokens"] == [letters.decode([index]) for index in blocks[0]["input_ids"][:5]]


def test_only_layers_that_read_latents(make_model, blocks, letters):
    """They keep their numbers, counted from 1."""
    model = make_model(latent_reader="paper", num_hidden_layers=3, num_latents=4, latent_layers=[0, 2])
    looked = latent_reading(model, letters, blocks, progress=False)
    used = latent_usage(model, blocks, progress=False)
    for rows in (usage.latent_usage_markdown(used), usage.latent_reading_markdown(looked)):
        assert [row.split("|")[1].strip() for row in rows.splitlines()[2:4]] == ["layer 1", "layer 3"]
    assert looked["readers"] == ["layer 1", "layer 3"] and len(looked["weights"]) == len(looked["addition"]) == 2


def test_nothing_is_left_behind(paper_model, blocks, letters):
    model = paper_model.train()
    latent_reading(model, letters, blocks, progress=False)
    assert model.training and model.config._attn_implementation == "banded_sdpa"
    hooked = [(layer.cross_attention_gate, layer.cross_attention_layernorm) for layer in model.model.layers]
    assert not any(module._forward_hooks or module._forward_pre_hooks for pair in hooked for module in pair)
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------ both


def studies(model, letters, blocks, **options):
    found = {"latent_reading": latent_reading(model, letters, blocks, **options)}
    return found | ({"latent_usage": latent_usage(model, blocks, **options)} if len(blocks) > 1 else {})


def test_figures_do_not_depend_on_the_batch(model, blocks, letters, same_numbers):
    together, alone = (studies(model, letters, blocks, batch_size=size, progress=False) for size in (3, 1))
    assert same_numbers(together, alone)


@pytest.mark.parametrize("count", (1, 3))
def test_results_are_json_and_have_tables_and_pictures(model, blocks, letters, is_table, tmp_path, count):
    """One block has a mean without an error, and JSON knows no NaN."""
    pytest.importorskip("matplotlib")
    for name, result in studies(model, letters, blocks[:count], progress=False).items():
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert is_table(getattr(usage, f"{name}_markdown")(result))
        getattr(latent_plots, f"plot_{name}")(result, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_heat_maps_show_each_latent(paper_model, blocks, letters, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn = []
    original = axes.Axes.imshow
    monkeypatch.setattr(axes.Axes, "imshow", lambda self, x, **k: (drawn.append((x, k)), original(self, x, **k))[1])
    used = latent_usage(paper_model, blocks, progress=False)
    latent_plots.plot_latent_usage(used, tmp_path / "usage.png")
    assert drawn[0][0] == [[latent["value"] for latent in layer] for layer in used["kl"]]
    assert drawn[1][0] == used["active_units"] and drawn[1][1]["vmax"] == 32
    attention = latent_reading(paper_model, letters, blocks, num_tokens=5, progress=False)
    latent_plots.plot_latent_reading(attention, tmp_path / "attention.png")
    for layer, (image, limits) in zip(attention["weights"], drawn[2:], strict=True):
        assert [list(column) for column in zip(*image, strict=True)] == layer and limits["vmax"] == 1


def test_tokens_can_be_seen():
    assert latent_plots._visible(" a\n") == "·a↵" and latent_plots._visible("") == "∅"


def test_bad_input_is_refused_before_anything_is_computed(make_model, blocks, letters, monkeypatch):
    paper, memory, plain = make_model(latent_reader="paper"), make_model(), make_model(num_latents=0)
    monkeypatch.setattr(LTMForCausalLM, "forward", None)
    for study in (latent_usage, lambda model, *rest, **options: latent_reading(model, letters, *rest, **options)):
        for rows, message in (([], "no block"), ([*blocks, {"input_ids": [BOS]}], "Row 3 has 1 tokens")):
            with pytest.raises(ValueError, match=message):
                study(paper, rows, progress=False)
        with pytest.raises(ValueError, match="num_latents=0"):
            study(plain, blocks, progress=False)
    for model in (memory, paper):
        with pytest.raises(ValueError, match="latents must have the shape"):
            reading_maps(model, torch.tensor([[1, 3]]), torch.zeros(1, 1, 1, 1))
