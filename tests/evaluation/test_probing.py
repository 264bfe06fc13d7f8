"""What the latents know, on models whose answer is known: by construction, by a naive loop, or by hand."""

import json
import math
import string

import pytest
import torch

from ltm_hf import LTMConfig, LTMForCausalLM
from ltm_hf.data import collate_blocks
from ltm_hf.evaluation import probing, probing_plots
from ltm_hf.evaluation.probing import (
    active_units,
    cross_attention,
    cross_attention_maps,
    greedy,
    include_layers,
    interpolation,
    kl_per_latent,
    latent_usage,
    progressive_inclusion,
    reconstruction,
    token_accuracy,
)
from ltm_hf.evaluation.representations import infer_posteriors
from ltm_hf.posterior_ltm import LatentPosterior

BOS = 1
ALPHABET = "_" + string.ascii_letters + "01234567"


class Letters:
    """Token i is character i of the alphabet, and `a` begins each text: all that the studies ask of a tokenizer."""

    eos_token_id = 2

    def __call__(self, texts, truncation, max_length, **_):
        return {"input_ids": [[BOS, *map(ALPHABET.index, text)][:max_length] for text in texts]}

    def decode(self, ids):
        return "".join(ALPHABET[int(index)] for index in ids)


@pytest.fixture
def blocks(make_ids):
    """Of three lengths, so that batches are padded."""
    return [{"input_ids": [BOS, *ids[:length].tolist()]} for ids, length in zip(make_ids(), (7, 12, 4), strict=True)]


@pytest.fixture(scope="module")
def copier():
    """A decoder that repeats the token it sees, unless the second layer's latents tell it another.

    Embeddings are one-hot, self-attention and feed-forward add nothing, nor does the first layer's cross-attention; the
    second adds four times the mean of its latents to the residual stream.
    """
    size = 16
    model = LTMForCausalLM(
        LTMConfig(
            vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
            max_position_embeddings=16, sliding_window=4, num_latents=2, cross_attention_gate_init=None,
            bos_token_id=BOS, eos_token_id=2, pad_token_id=0, num_inference_steps=32,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.cross_attn.v_proj.weight.copy_(torch.eye(size))
        model.model.layers[0].cross_attn.o_proj.weight.zero_()
        model.model.layers[1].cross_attn.o_proj.weight.copy_(4 * torch.eye(size))
    return model


# ------------------------------------------------------------------ a text from its latents


def test_a_text_that_its_latents_determine(copier):
    """Blocks that say one letter: latents of layers 1–2 give all of it, of layer 1 nothing, as if there were none."""
    blocks = [{"input_ids": [BOS] + [letter] * 8} for letter in (5, 9, 13)]
    result = progressive_inclusion(copier, blocks, batch_size=2, progress=False)
    copied = 7 / 8  # what comes after the first letter; begin-of-text is copied wrongly
    for name, means in (("teacher_forced", [copied, copied, 1.0]), ("free_running", [0.0, 0.0, 1.0])):
        assert [one["value"] for one in result[name]] == pytest.approx(means)
        assert [one["error"] for one in result[name]] == [0.0] * 3
        assert [one["n"] for one in result[name]] == [3] * 3
        assert [one["value"] for one in result["gain"][name]] == pytest.approx([mean - means[0] for mean in means])
    assert result["layers"] == [0, 1, 2]

    rebuilt = reconstruction(copier, Letters(), blocks, num_examples=2, batch_size=2, progress=False)
    assert rebuilt["rebuilt_exactly"] == 3
    free = {kind: one["free_running"]["value"] for kind, one in rebuilt["figures"].items()}
    assert free == {"own latents": 1.0, "another text's latents": 0.0, "no latents": 0.0}
    assert [example["text"] for example in rebuilt["examples"]] == ["e" * 8, "i" * 8]
    example = rebuilt["examples"][1]
    assert example["own latents"] == example["text"]
    assert example["another text's latents"] == "m" * 8 and example["no latents"] == "a" * 8
    plain = math.log(math.exp(4) + 15) - 4 * copied  # the logits: 4, the root of 16, for the token seen, 0 for others
    assert rebuilt["figures"]["no latents"]["nll"]["value"] == pytest.approx(plain, abs=1e-3)
    assert rebuilt["difference"]["no latents"]["nll"]["value"] < -0.4


def test_the_last_block_reads_the_first_one_s_latents(copier):
    blocks = [{"input_ids": [BOS] + [letter] * 5} for letter in (5, 9, 13)]
    result = reconstruction(copier, Letters(), blocks, num_examples=3, batch_size=2, progress=False)
    assert [example["another text's latents"] for example in result["examples"]] == ["i" * 5, "m" * 5, "e" * 5]


@pytest.mark.parametrize("length", (1, 9))
def test_greedy_is_what_generate_writes(model, make_ids, make_noise, length):
    """Past the window of 4 tokens; on its own and whatever the checkpoint's generation config says."""
    latents, first = make_noise(3, *model.config.latent_shape), make_ids()[:, :1]
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(first)
    expected = model.generate(first, attention_mask=mask, latents=latents, do_sample=False, max_new_tokens=length)[
        :, 1:
    ]
    assert (greedy(model, first, latents, length) == expected).all()
    model.generation_config.eos_token_id = int(expected[0, 0])
    model.generation_config.update(do_sample=True, reinfer_every=2, suppress_tokens=expected[0].tolist())
    assert (greedy(model, first, latents, length) == expected).all()


def test_accuracies_against_a_loop(model, blocks, make_noise):
    """One prefix at a time, without padding; texts partly the model's own, so that some tokens are right."""
    batch = collate_blocks(blocks)
    latents, mask = make_noise(3, *model.config.latent_shape), batch["attention_mask"]
    with torch.no_grad():
        for row, length in enumerate(mask.sum(dim=1)):  # every other token is what the model would say
            for t in range(1, length, 2):
                logits = model(batch["input_ids"][row : row + 1, :t], latents=latents[row : row + 1]).logits
                batch["input_ids"][row, t] = logits[0, -1].argmax()
        expected = {"teacher_forced": [], "free_running": []}
        for row, length in enumerate(mask.sum(dim=1)):
            own, z = batch["input_ids"][row : row + 1, :length], latents[row : row + 1]
            forced = [model(own[:, :t], latents=z).logits[0, -1].argmax() == own[0, t] for t in range(1, length)]
            text = own[:, :1]
            for _ in range(1, length):
                text = torch.cat((text, model(text, latents=z).logits[:, -1:].argmax(dim=-1)), dim=1)
            expected["teacher_forced"].append(sum(forced) / (length - 1))
            expected["free_running"].append((text == own)[0, 1:].float().mean())
    found, plain = token_accuracy(model, batch["input_ids"], [latents, torch.zeros_like(latents)], mask)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.stack(values))
        assert 0 < found[name].mean() < 1
    without = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, :-1].argmax(dim=-1)
    right = (without == batch["input_ids"][:, 1:]) & mask[:, 1:].bool()
    torch.testing.assert_close(plain["teacher_forced"], right.sum(dim=1) / (mask.sum(dim=1) - 1))


def test_layers_are_included_from_the_first(make_noise):
    latents = make_noise(2, 3, 2, 4)
    assert not include_layers(latents, 0).any()
    two = include_layers(latents, 2)
    assert (two[:, :2] == latents[:, :2]).all() and not two[:, 2:].any()
    assert (include_layers(latents, 3) == latents).all()


def test_all_layers_are_the_reconstruction_and_none_no_latents(model, blocks):
    options = dict(num_inference_steps=4, seed=3, progress=False)
    included = progressive_inclusion(model, blocks, **options)
    rebuilt = reconstruction(model, Letters(), blocks, **options)["figures"]
    for name in probing.ACCURACIES:
        assert included[name][-1] == rebuilt["own latents"][name]
        assert included[name][0] == rebuilt["no latents"][name]
    assert (included["num_inference_steps"], included["seed"], included["num_blocks"]) == (4, 3, 3)


def test_nll_of_the_reconstruction_by_hand(model, blocks):
    figures = reconstruction(model, Letters(), blocks, progress=False)["figures"]
    for kind, one in figures.items():
        losses = []
        for row, block in enumerate(blocks):
            source = torch.tensor([blocks[row if kind == "own latents" else (row + 1) % 3]["input_ids"]])
            latents = None if kind == "no latents" else model.infer_posterior(source).mean
            ids = torch.tensor([block["input_ids"]])
            losses.append(model(ids, latents=latents, labels=ids).loss.double())
        losses = torch.stack(losses)
        assert one["nll"]["value"] == pytest.approx(losses.mean().item(), abs=1e-4)
        assert one["nll"]["error"] == pytest.approx(losses.std().item() / math.sqrt(3), abs=1e-4)


# ------------------------------------------------------------------ between two texts


def test_between_two_texts(model):
    """Ends are the texts' own posteriors; between, means and variances are on the line; texts as greedy writes them."""
    tokenizer, pairs = Letters(), [("spain", "hungary"), ("treaty", "gold"), ("x", "peace")]
    result = interpolation(
        model,
        tokenizer,
        pairs,
        weights=(0.0, 0.25, 1.0),
        max_new_tokens=6,
        num_examples=2,
        batch_size=2,
        progress=False,
    )
    ids = [[torch.tensor(tokenizer([text], True, 99)["input_ids"]) for text in pair] for pair in pairs]
    ends = [[model.infer_posterior(text) for text in pair] for pair in ids]
    for index, weight in enumerate((0.0, 0.25, 1.0)):
        between = [
            LatentPosterior(*((1 - weight) * a + weight * b for a, b in zip(*map(_parts, pair), strict=True)))
            for pair in ends
        ]
        kl = sum(posterior.kl_divergence().item() for posterior in between) / 3
        assert result["kl"][index]["value"] == pytest.approx(kl, abs=1e-4)
        for side, name in enumerate(("first", "second")):
            losses = [
                model(pair[side], latents=posterior.mean, labels=pair[side]).loss.item()
                for pair, posterior in zip(ids, between, strict=True)
            ]
            plain = [model(pair[side], labels=pair[side]).loss.item() for pair in ids]
            assert result["nll"][name][index]["value"] == pytest.approx(sum(losses) / 3, abs=1e-4)
            assert result["no_latents"][name]["value"] == pytest.approx(sum(plain) / 3, abs=1e-4)
            change = result["change"][name][index]["value"]
            assert change == pytest.approx((sum(losses) - sum(plain)) / 3, abs=1e-4)
        for row, example in enumerate(result["examples"]):
            tokens = greedy(model, torch.tensor([[BOS]]), between[row].mean, 6)[0].tolist()
            tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
            assert example["written"][index] == tokenizer.decode(tokens)
    first, second = (result["nll"][name] for name in ("first", "second"))
    assert result["own_end"]["first"]["value"] == pytest.approx(first[0]["value"] - first[-1]["value"])
    assert result["own_end"]["second"]["value"] == pytest.approx(second[-1]["value"] - second[0]["value"])
    assert [(example["first"], example["second"]) for example in result["examples"]] == pairs[:2]


def _parts(posterior):
    return posterior.mean, posterior.log_variance


def test_interpolation_goes_from_one_letter_to_the_other(copier):
    result = interpolation(copier, Letters(), [("eeeeeeee", "mmmmmmmm")], max_new_tokens=8, progress=False)
    (example,) = result["examples"]
    assert example["written"][0] == "e" * 8 and example["written"][-1] == "m" * 8
    assert result["own_end"]["first"]["value"] < 0 and result["own_end"]["second"]["value"] < 0


def test_text_ends_where_it_ends():
    """End-of-text (2, the letter b) and what follows are no part of what was written."""
    assert probing._up_to_end(Letters(), torch.tensor([3, 4, 2, 5])) == "cd"
    assert probing._up_to_end(Letters(), torch.tensor([3, 4])) == "cd"


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
    assert result["num_units"] == 2 * 2 * 32 and result["num_channels"] == 32


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


# ------------------------------------------------------------------ where tokens look


def test_maps_are_the_attention_of_the_formula(make_model, blocks, make_noise):
    """Rows sum to 1; the first layer's map and addition from its weights, written out for one token."""
    model = make_model()
    latents = make_noise(1, *model.config.latent_shape)
    ids = torch.tensor([blocks[1]["input_ids"]])
    recorded = model.config._attn_implementation
    maps, additions = cross_attention_maps(model, ids, latents)
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


def test_latents_of_zero_add_nothing_and_are_looked_at_alike(model, blocks):
    ids = torch.tensor([blocks[0]["input_ids"]])
    maps, additions = cross_attention_maps(model, ids, torch.zeros(1, *model.config.latent_shape))
    torch.testing.assert_close(maps, torch.full_like(maps, 0.5))
    assert not additions.any()
    result = cross_attention(model, Letters(), blocks, num_inference_steps=0, progress=False)
    assert [layer["value"] for layer in result["entropy"]] == pytest.approx([math.log(2)] * 2)
    assert result["max_entropy"] == math.log(2)
    assert [layer["value"] for layer in result["addition"]] == [0.0, 0.0]


def test_attention_study_against_the_maps_of_each_block(model, blocks):
    result = cross_attention(model, Letters(), blocks, num_tokens=5, batch_size=3, progress=False)
    entropies, additions = [], []
    for block in blocks:
        ids = torch.tensor([block["input_ids"]])
        maps, sizes = cross_attention_maps(model, ids, model.infer_posterior(ids).mean)
        entropies.append(-(maps * maps.log()).sum(dim=-1).mean(dim=(0, 2, 3)))
        additions.append(sizes.mean(dim=(0, 2)))
        if block is blocks[0]:
            torch.testing.assert_close(torch.tensor(result["weights"]), maps[0].mean(dim=1)[:, :5])
    for name, values in (("entropy", entropies), ("addition", additions)):
        means = torch.stack(values).mean(dim=0).tolist()
        assert [one["value"] for one in result[name]] == pytest.approx(means, rel=1e-4)
    assert result["tokens"] == [ALPHABET[index] for index in blocks[0]["input_ids"][:5]]


def test_only_layers_that_read_latents(make_model, blocks):
    """They keep their numbers, counted from 1."""
    model = make_model(num_hidden_layers=3, num_latents=4, cross_attention_layers=[0, 2])
    included = progressive_inclusion(model, blocks, progress=False)
    whole = reconstruction(model, Letters(), blocks, progress=False)["figures"]["own latents"]["teacher_forced"]
    assert included["layers"] == [0, 1, 3] and included["teacher_forced"][-1] == whole
    looked = cross_attention(model, Letters(), blocks, progress=False)
    used = latent_usage(model, blocks, progress=False)
    for rows in (probing.latent_usage_markdown(used), probing.cross_attention_markdown(looked)):
        assert [row.split("|")[1].strip() for row in rows.splitlines()[2:4]] == ["1", "3"]
    assert looked["layers"] == [1, 3] and len(looked["weights"]) == len(looked["addition"]) == 2


def test_nothing_is_left_behind(model, blocks):
    model.train()
    cross_attention(model, Letters(), blocks, progress=False)
    assert model.training and model.config._attn_implementation == "banded_sdpa"
    hooked = [(layer.cross_attention_gate, layer.cross_attention_layernorm) for layer in model.model.layers]
    assert not any(module._forward_hooks or module._forward_pre_hooks for pair in hooked for module in pair)
    with pytest.raises(ValueError, match="latents must have the shape"):
        cross_attention_maps(model, torch.tensor([[1, 3]]), torch.zeros(1, 1, 1, 1))
    assert model.config._attn_implementation == "banded_sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for pair in hooked for module in pair)
    assert all(parameter.grad is None for parameter in model.parameters())


# ------------------------------------------------------------------ all of them


def studies(model, blocks, **options):
    pairs = [("spain", "hungary"), ("treaty", "gold"), ("x", "peace")][: len(blocks)]
    letters = Letters()
    return {
        "progressive_inclusion": progressive_inclusion(model, blocks, **options),
        "reconstruction": reconstruction(model, letters, blocks, **options) if len(blocks) > 1 else None,
        "interpolation": interpolation(model, letters, pairs, max_new_tokens=5, **options),
        "latent_usage": latent_usage(model, blocks, **options) if len(blocks) > 1 else None,
        "cross_attention": cross_attention(model, letters, blocks, **options),
    }


def numbers(result):
    """Every leaf of a JSON value, in order."""
    if isinstance(result, dict):
        return [leaf for key in result for leaf in (key, *numbers(result[key]))]
    return [leaf for one in result for leaf in numbers(one)] if isinstance(result, list) else [result]


def test_figures_do_not_depend_on_the_batch(model, blocks):
    together, alone = (numbers(studies(model, blocks, batch_size=size, progress=False)) for size in (3, 1))
    assert len(together) == len(alone) > 400
    for one, other in zip(together, alone, strict=True):
        assert one == (pytest.approx(other, abs=1e-4) if isinstance(other, float) else other)


def test_the_seed_is_the_fit_s(model, blocks):
    first, again, other = (latent_usage(model, blocks, seed=seed, progress=False)["kl"] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("count", (1, 3))
def test_results_are_json_and_have_tables(model, blocks, count):
    """One block has a mean without an error, and JSON knows no NaN."""
    for name, result in studies(model, blocks[:count], progress=False).items():
        if result is None:
            continue
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        lines = getattr(probing, f"{name}_markdown")(result).splitlines()
        rows = [line for line in lines if line.startswith("|")]
        assert len(rows) > 3 and "nan" not in " ".join(lines)
        for row, following in zip(lines, lines[1:], strict=False):
            if row.startswith("|") and following.startswith("|"):
                assert row.count("|") - row.count("\\|") == following.count("|") - following.count("\\|")


def test_tables_do_not_make_much_of_little(copier, model, blocks):
    """No latents, no difference, in so many words; latents that say it all are said to."""
    nothing = progressive_inclusion(model, blocks, num_inference_steps=0, progress=False)
    text = probing.progressive_inclusion_markdown(nothing)
    assert text.count("no difference that these blocks can show") == 2 and "latents gain" not in text
    letters = [{"input_ids": [BOS] + [letter] * 8} for letter in (5, 9, 13)]
    everything = probing.progressive_inclusion_markdown(progressive_inclusion(copier, letters, progress=False))
    assert "Free-running: the latents gain (+100.00 ± 0.00 points)." in everything
    assert "| 1–2 | 100.00 ± 0.00 | +12.50 ± 0.00 | 100.00 ± 0.00 | +100.00 ± 0.00 |" in " ".join(everything.split())


def test_bad_input_is_refused_before_anything_is_computed(model, make_model, blocks, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("computed")

    for one in (model, plain := make_model(num_latents=0)):
        monkeypatch.setattr(one, "forward", forbidden)
    letters, short = Letters(), [*blocks, {"input_ids": [BOS]}]
    for study in (
        progressive_inclusion,
        latent_usage,
        lambda model, *rest, **options: reconstruction(model, letters, *rest, **options),
        lambda model, *rest, **options: cross_attention(model, letters, *rest, **options),
    ):
        for arguments, message in (
            (dict(blocks=[]), "no block"),
            (dict(blocks=short), "Row 3 has 1 tokens"),
            (dict(blocks=blocks, batch_size=0), "batch_size"),
            (dict(blocks=blocks, num_inference_steps=-1), "num_inference_steps"),
            (dict(blocks=[{"input_ids": [BOS, 61]}] * 2), "vocab_size"),
        ):
            rows = arguments.pop("blocks")
            with pytest.raises(ValueError, match=message):
                study(model, rows, progress=False, **arguments)
        with pytest.raises(ValueError, match="num_latents=0"):
            study(plain, blocks, progress=False)
    with pytest.raises(ValueError, match="two blocks"):
        reconstruction(model, letters, blocks[:1], progress=False)
    with pytest.raises(ValueError, match="no pair"):
        interpolation(model, letters, [], progress=False)
    with pytest.raises(ValueError, match="Row 0 has 1 tokens"):
        interpolation(model, letters, [("a", "")], progress=False)


# ------------------------------------------------------------------ pictures


def test_pictures(model, blocks, tmp_path):
    pytest.importorskip("matplotlib")
    for count in (1, 3):
        for name, result in studies(model, blocks[:count], progress=False).items():
            draw = getattr(probing_plots, f"plot_{name}", None)
            if result is None or draw is None:
                continue
            path = tmp_path / f"{name}_{count}.png"
            draw(json.loads(json.dumps(result)), path)
            assert path.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3 + 4


def test_heat_maps_show_each_latent(model, blocks, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn = []
    original = axes.Axes.imshow
    monkeypatch.setattr(axes.Axes, "imshow", lambda self, x, **k: (drawn.append((x, k)), original(self, x, **k))[1])
    usage = latent_usage(model, blocks, progress=False)
    probing_plots.plot_latent_usage(usage, tmp_path / "usage.png")
    assert drawn[0][0] == [[latent["value"] for latent in layer] for layer in usage["kl"]]
    assert drawn[1][0] == usage["active_units"] and drawn[1][1]["vmax"] == 32
    attention = cross_attention(model, Letters(), blocks, num_tokens=5, progress=False)
    probing_plots.plot_cross_attention(attention, tmp_path / "attention.png")
    for layer, (image, limits) in zip(attention["weights"], drawn[2:], strict=True):
        assert [list(column) for column in zip(*image, strict=True)] == layer and limits["vmax"] == 1


def test_accuracies_are_drawn_in_percent(model, blocks, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn = []
    original = axes.Axes.errorbar
    monkeypatch.setattr(axes.Axes, "errorbar", lambda self, *a, **k: (drawn.append(a), original(self, *a, **k))[1])
    result = progressive_inclusion(model, blocks, progress=False)
    probing_plots.plot_progressive_inclusion(result, tmp_path / "inclusion.png")
    expected = [figures for name in probing.ACCURACIES for figures in (result[name], result["gain"][name])]
    for (_, means, errors), figures in zip(drawn, expected, strict=True):
        assert means == pytest.approx([100 * one["value"] for one in figures])
        assert errors == pytest.approx([100 * one["error"] for one in figures])


def test_tokens_can_be_seen():
    assert probing_plots._visible(" a\n") == "·a↵" and probing_plots._visible("") == "∅"


def test_a_chain_ends_at_a_point_whose_kl_is_left_out(make_model, blocks):
    chain = make_model(inference_method="langevin")
    with pytest.raises(ValueError, match="end at a point, whose KL is infinite"):
        latent_usage(chain, blocks, progress=False)
    between = interpolation(chain, Letters(), [("eeee", "mmmm")], max_new_tokens=2, progress=False)
    assert {one["value"] for one in between["kl"]} == {None} and "not finite" in probing.interpolation_markdown(between)
