"""A text from its latents, on decoders whose answer is known: by construction, or by a naive loop."""

import json
import math

import pytest
import torch

from ltm_hf import LTMConfig, LTMForCausalLM
from ltm_hf.data import collate_blocks
from ltm_hf.evaluation import latent_plots, rebuilding
from ltm_hf.evaluation.rebuilding import (
    greedy,
    include_layers,
    interpolation,
    progressive_inclusion,
    reconstruction,
    token_accuracy,
)
from ltm_hf.likelihood_ltm import Text
from ltm_hf.posterior_ltm import LatentPosterior

BOS = 1


def make_copier(reader):
    """A decoder that repeats the token it sees, unless latents tell it another.

    Embeddings are one-hot, self-attention and feed-forward add nothing. A memory's one head adds the mean of its
    latents to the residual stream; of the paper's cross-attentions the second layer's alone adds, four times that.
    """
    size = 16
    of_reader = dict(latent_gate_init=None, num_inference_steps=32, latent_reader="paper")
    if reader == "memory":
        of_reader = dict(latent_gate_init=1.0, latent_chunk=2)
    model = LTMForCausalLM(
        LTMConfig(
            vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
            max_position_embeddings=16, sliding_window=4, num_latents=2, bos_token_id=BOS, eos_token_id=2,
            pad_token_id=0, **of_reader,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        if reader == "memory":
            model.model.reader.q_proj.weight.zero_()
            model.model.reader.scales.log_read.zero_()
            return model
        for layer, strength in zip(model.model.layers, (0, 4), strict=True):
            layer.cross_attn.v_proj.weight.copy_(torch.eye(size))
            layer.cross_attn.o_proj.weight.copy_(strength * torch.eye(size))
    return model


@pytest.fixture
def copier(reader):
    return make_copier(reader)


@pytest.fixture(scope="module")
def paper_copier():
    return make_copier("paper")


# ------------------------------------------------------------------ a text from its latents


def test_a_text_that_its_latents_determine(copier, letters):
    """Blocks that say one letter: their latents give all of it, others another, none a copy of the token before."""
    blocks = [{"input_ids": [BOS] + [letter] * 8} for letter in (5, 9, 13)]
    rebuilt = reconstruction(copier, letters, blocks, num_examples=3, batch_size=2, progress=False)
    assert rebuilt["rebuilt_exactly"] == 3
    free = {kind: one["free_running"]["value"] for kind, one in rebuilt["figures"].items()}
    assert free == {"own latents": 1.0, "another text's latents": 0.0, "no latents": 0.0}
    for kind, written in (
        ("text", "eim"),
        ("own latents", "eim"),
        ("another text's latents", "ime"),
        ("no latents", "aaa"),
    ):
        assert [example[kind] for example in rebuilt["examples"]] == [letter * 8 for letter in written], kind
    copied = 7 / 8  # what comes after the first letter; begin-of-text is copied wrongly
    plain = math.log(math.exp(4) + 15) - 4 * copied  # the logits: 4, the root of 16, for the token seen, 0 for others
    assert rebuilt["figures"]["no latents"]["nll"]["value"] == pytest.approx(plain, abs=1e-3)
    assert rebuilt["difference"]["no latents"]["nll"]["value"] < -0.4


def test_layers_are_included_one_by_one(paper_copier):
    """Latents of layers 1–2 give all of the text, of layer 1 nothing, as if there were none."""
    blocks = [{"input_ids": [BOS] + [letter] * 8} for letter in (5, 9, 13)]
    result = progressive_inclusion(paper_copier, blocks, batch_size=2, progress=False)
    for name, means in (("teacher_forced", [7 / 8, 7 / 8, 1.0]), ("free_running", [0.0, 0.0, 1.0])):
        assert [one["value"] for one in result[name]] == pytest.approx(means)
        assert [one["error"] for one in result[name]] == [0.0] * 3
        assert [one["n"] for one in result[name]] == [3] * 3
        assert [one["value"] for one in result["gain"][name]] == pytest.approx([mean - means[0] for mean in means])
    assert result["layers"] == [0, 1, 2]
    everything = " ".join(rebuilding.progressive_inclusion_markdown(result).split())
    assert "Free-running: the latents gain (+100.00 ± 0.00 points)." in everything
    assert "| 1–2 | 100.00 ± 0.00 | +12.50 ± 0.00 | 100.00 ± 0.00 | +100.00 ± 0.00 |" in everything


@pytest.mark.parametrize("length", (1, 9))
def test_greedy_is_what_generate_writes(paper_model, make_ids, make_noise, length):
    """Past the window of 4 tokens; on its own and whatever the checkpoint's generation config says."""
    latents, first = make_noise(3, *paper_model.config.latent_shape), make_ids()[:, :1]
    paper_model.generation_config.eos_token_id = None
    mask = torch.ones_like(first)
    expected = paper_model.generate(
        first, attention_mask=mask, latents=latents, do_sample=False, max_new_tokens=length
    )[:, 1:]
    assert (greedy(paper_model, first, latents, length) == expected).all()
    paper_model.generation_config.eos_token_id = int(expected[0, 0])
    paper_model.generation_config.update(do_sample=True, reinfer_every=2, suppress_tokens=expected[0].tolist())
    assert (greedy(paper_model, first, latents, length) == expected).all()


def test_greedy_of_a_memory_that_learns_nothing_more(memory_model, make_ids, make_noise):
    """Each token by a forward pass over all before it, given the same latents."""
    latents, ids = make_noise(3, *memory_model.config.latent_shape), make_ids()[:, :1]
    written = greedy(memory_model, ids, latents, 9)
    for _ in range(9):
        ids = torch.cat((ids, memory_model(ids, latents=latents).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(written, ids[:, 1:])


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
    text = Text.of(model, batch["input_ids"], mask)
    found, plain = token_accuracy(model, text, [latents, torch.zeros_like(latents)])
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


def test_all_layers_are_the_reconstruction_and_none_no_latents(paper_model, blocks, letters):
    options = dict(num_inference_steps=4, seed=3, progress=False)
    included = progressive_inclusion(paper_model, blocks, **options)
    rebuilt = reconstruction(paper_model, letters, blocks, **options)["figures"]
    for name in rebuilding.ACCURACIES:
        assert included[name][-1] == rebuilt["own latents"][name]
        assert included[name][0] == rebuilt["no latents"][name]
    assert (included["num_inference_steps"], included["seed"], included["num_blocks"]) == (4, 3, 3)


def test_nll_of_the_reconstruction_by_hand(model, blocks, letters):
    figures = reconstruction(model, letters, blocks, progress=False)["figures"]
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


def test_layers_that_read_no_latents_keep_their_numbers(make_model, blocks, letters):
    model = make_model(latent_reader="paper", num_hidden_layers=3, num_latents=4, latent_layers=[0, 2])
    included = progressive_inclusion(model, blocks, progress=False)
    whole = reconstruction(model, letters, blocks, progress=False)["figures"]["own latents"]["teacher_forced"]
    assert included["layers"] == [0, 1, 3] and included["teacher_forced"][-1] == whole


def test_tables_do_not_make_much_of_little(paper_model, blocks):
    """No latents, no difference, in so many words."""
    nothing = progressive_inclusion(paper_model, blocks, num_inference_steps=0, progress=False)
    text = rebuilding.progressive_inclusion_markdown(nothing)
    assert text.count("no difference that these blocks can show") == 2 and "latents gain" not in text


# ------------------------------------------------------------------ between two texts


def test_between_two_texts(model, letters):
    """Ends are the texts' own posteriors; between, means and variances are on the line; texts as greedy writes them."""
    tokenizer, pairs = letters, [("spain", "hungary"), ("treaty", "gold"), ("x", "peace")]
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


def test_interpolation_goes_from_one_letter_to_the_other(copier, letters):
    result = interpolation(copier, letters, [("eeeeeeee", "mmmmmmmm")], max_new_tokens=8, progress=False)
    (example,) = result["examples"]
    assert example["written"][0] == "e" * 8 and example["written"][-1] == "m" * 8
    assert result["own_end"]["first"]["value"] < 0 and result["own_end"]["second"]["value"] < 0


def test_text_ends_where_it_ends(letters):
    """End-of-text (2, the letter b) and what follows are no part of what was written."""
    assert rebuilding._up_to_end(letters, torch.tensor([3, 4, 2, 5])) == "cd"
    assert rebuilding._up_to_end(letters, torch.tensor([3, 4])) == "cd"


def test_between_points_there_is_no_kl(make_model, letters):
    chain = make_model(latent_reader="paper", inference_method="langevin")
    between = interpolation(chain, letters, [("eeee", "mmmm")], max_new_tokens=2, progress=False)
    assert {one["value"] for one in between["kl"]} == {None}
    assert "not finite" in rebuilding.interpolation_markdown(between)


# ------------------------------------------------------------------ all of them


def studies(model, letters, blocks, **options):
    pairs = [("spain", "hungary"), ("treaty", "gold"), ("x", "peace")][: len(blocks)]
    found = {"interpolation": interpolation(model, letters, pairs, max_new_tokens=5, **options)}
    if len(blocks) > 1:
        found["reconstruction"] = reconstruction(model, letters, blocks, **options)
    if not model.config.has_memory:
        found["progressive_inclusion"] = progressive_inclusion(model, blocks, **options)
    return found


def test_figures_do_not_depend_on_the_batch(model, blocks, letters, same_numbers):
    together, alone = (studies(model, letters, blocks, batch_size=size, progress=False) for size in (3, 1))
    assert same_numbers(together, alone)


@pytest.mark.parametrize("count", (1, 3))
def test_results_are_json_and_have_tables_and_pictures(model, blocks, letters, is_table, tmp_path, count):
    """One block has a mean without an error, and JSON knows no NaN."""
    pytest.importorskip("matplotlib")
    for name, result in studies(model, letters, blocks[:count], progress=False).items():
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert is_table(getattr(rebuilding, f"{name}_markdown")(result))
        if name != "reconstruction":
            getattr(latent_plots, f"plot_{name}")(result, tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_accuracies_are_drawn_in_percent(paper_model, blocks, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn = []
    original = axes.Axes.errorbar
    monkeypatch.setattr(axes.Axes, "errorbar", lambda self, *a, **k: (drawn.append(a), original(self, *a, **k))[1])
    result = progressive_inclusion(paper_model, blocks, progress=False)
    latent_plots.plot_progressive_inclusion(result, tmp_path / "inclusion.png")
    expected = [figures for name in rebuilding.ACCURACIES for figures in (result[name], result["gain"][name])]
    for (_, means, errors), figures in zip(drawn, expected, strict=True):
        assert means == pytest.approx([100 * one["value"] for one in figures])
        assert errors == pytest.approx([100 * one["error"] for one in figures])


def test_bad_input_is_refused_before_anything_is_computed(make_model, blocks, letters, monkeypatch):
    paper, memory, plain = make_model(latent_reader="paper"), make_model(), make_model(num_latents=0)
    monkeypatch.setattr(LTMForCausalLM, "forward", None)
    short = [*blocks, {"input_ids": [BOS]}]
    for study in (
        progressive_inclusion,
        lambda model, *rest, **options: reconstruction(model, letters, *rest, **options),
    ):
        for arguments, message in (
            (dict(blocks=[]), "no block"),
            (dict(blocks=short), "Row 3 has 1 tokens"),
            (dict(blocks=blocks, batch_size=0), "batch_size"),
            (dict(blocks=blocks, num_inference_steps=-1), "num_inference_steps"),
            (dict(blocks=[{"input_ids": [BOS, 61]}] * 2), "vocab_size"),
        ):
            with pytest.raises(ValueError, match=message):
                study(paper, progress=False, **arguments)
        with pytest.raises(ValueError, match="num_latents=0"):
            study(plain, blocks, progress=False)
    with pytest.raises(ValueError, match="progressive_inclusion goes from layer to layer, and no layer reads a memory"):
        progressive_inclusion(memory, blocks)
    with pytest.raises(ValueError, match="two blocks"):
        reconstruction(paper, letters, blocks[:1], progress=False)
    with pytest.raises(ValueError, match="no pair"):
        interpolation(paper, letters, [], progress=False)
    with pytest.raises(ValueError, match="Row 0 has 1 tokens"):
        interpolation(paper, letters, [("a", "")], progress=False)
