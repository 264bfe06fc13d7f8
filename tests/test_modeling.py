"""What only a Latent Thought Model does. What transformers asks of every model is in `test_modeling_common.py`."""

import pytest
import torch

from ltm_hf.likelihood_ltm import Text, before_latents, negative_log_likelihood, read

SHAPES = {"memory": (1, 4, 32), "paper": (2, 2, 32)}  # layers, latents a layer, hidden


@pytest.fixture
def latents(model):
    return model.sample_prior(3, seed=0)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ latents


@torch.no_grad()
def test_no_latents_are_latents_of_zero(model, ids, latents):
    plain = model(ids).logits
    close(model(ids, latents=torch.zeros_like(latents)).logits, plain)
    assert (model(ids, latents=latents).logits - plain).abs().max() > 0.1


@torch.no_grad()
def test_every_latent_is_read_and_told_apart(model, reader, ids, latents):
    """By the layer that it is of, and by its rotary position or its address."""
    assert latents.shape == (3, *SHAPES[reader])
    logits = model(ids, latents=latents).logits
    for layer in range(latents.shape[1]):
        for latent in range(latents.shape[2]):
            changed = latents.clone()
            changed[:, layer, latent] += 1
            assert (model(ids, latents=changed).logits - logits).abs().max() > 1e-3
    for axis in (1, 2) if reader == "paper" else (2,):
        assert not torch.allclose(model(ids, latents=latents.flip(axis)).logits, logits, atol=1e-3)


@torch.no_grad()
def test_projected_latents_replace_latents(paper_model, make_model, ids):
    model, latents = paper_model, paper_model.sample_prior(3, seed=0)
    projected = model.project_latents(latents)
    assert projected.shape == (3, 2, 2, 2, 2, 8)  # batch, layers, keys and values, heads, latents a layer, head
    close(model(ids, latent_key_values=projected).logits, model(ids, latents=latents).logits)
    with pytest.raises(ValueError, match="latents and latent_key_values"):
        model(ids, latents=latents, latent_key_values=projected)
    with pytest.raises(ValueError, match=r"latent_key_values.*\(3, 2, 2\).*\(1, 2, 2, 2, 2, 8\)"):
        model(ids, latent_key_values=projected[:1])
    with pytest.raises(ValueError, match="num_latents=0"):
        make_model(num_latents=0)(ids, latent_key_values=projected)


def test_latents_of_a_wrong_shape(model, reader, ids):
    layers, latents, hidden = SHAPES[reader]
    for shape in ((3, 4, 32), (3, layers, latents, 16), (3, layers, latents + 1, hidden), (2, layers, latents, hidden)):
        with pytest.raises(ValueError, match=rf"latents must have the shape \(3, {layers}, {latents}, 32\)"):
            model(ids, latents=torch.zeros(shape))


def test_latents_are_returned(model, ids, latents):
    returned = model(ids, latents=latents.requires_grad_()).latents
    assert torch.equal(returned, latents) and not returned.requires_grad
    assert model(ids).latents is None


@torch.no_grad()
def test_the_twin_has_no_reader(make_model, model, ids, latents):
    twin = make_model(num_latents=0)
    names = set(twin.state_dict())
    assert names == {name for name in model.state_dict() if "cross_att" not in name and "reader" not in name}
    twin.load_state_dict({name: model.state_dict()[name] for name in names})
    close(twin(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="num_latents=0"):
        twin(ids, latents=latents)


# ------------------------------------------------------------------ attention


@torch.no_grad()
def test_grouped_heads_are_repeated_heads(make_model, ids):
    grouped, full = (make_model(latent_reader="paper", num_key_value_heads=heads) for heads in (2, 4))
    latents, weights = full.sample_prior(3, seed=0), grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    close(grouped(ids, latents=latents).logits, full(ids, latents=latents).logits)


@torch.no_grad()
@pytest.mark.parametrize("window", [3, 4, None])
def test_window_limits_what_a_token_reaches(make_model, reader, make_ids, latents, window):
    model, ids = make_model(latent_reader=reader, sliding_window=window), make_ids(length=16)
    changed = ids.clone()
    changed[:, 2] = (ids[:, 2] - 3 + 7) % 58 + 3
    reach = 16 if window is None else 2 + 2 * (window - 1) + 1  # two layers, each window - 1 tokens on
    for kwargs in ({}, {"latents": latents}):
        moved = (model(changed, **kwargs).logits - model(ids, **kwargs).logits).abs().amax(dim=(0, 2))
        assert (moved[:2] == 0).all()
        assert (moved[2:reach] > 1e-4).all()
        assert (moved[reach:] == 0).all()


# ------------------------------------------------------------------ gate


@torch.no_grad()
def test_no_gate_is_a_gate_of_one(make_model, ids):
    gated, plain = (make_model(latent_reader="paper", latent_gate_init=start) for start in (1.0, None))
    latents = plain.sample_prior(3, seed=0)
    assert not any("gate.weight" in name for name in plain.state_dict())
    plain.load_state_dict({name: tensor for name, tensor in gated.state_dict().items() if "gate.weight" not in name})
    close(gated(ids, latents=latents).logits, plain(ids, latents=latents).logits)


@torch.no_grad()
def test_closed_gate_shuts_the_latents_out(make_model, reader, ids, latents):
    model = make_model(latent_reader=reader, latent_gate_init=0.0)
    close(model(ids, latents=latents).logits, model(ids).logits)


# ------------------------------------------------------------------ which layers read latents, and the two stages


@torch.no_grad()
def test_layers_without_cross_attention(make_model, paper_model, ids):
    """They are the decoder's whose other layers read latents of zero."""
    last = make_model(latent_reader="paper", num_latents=2, latent_layers=[1], latent_position_stride=16)
    every, alone = paper_model, paper_model.sample_prior(3, seed=0)[:, 1:]
    missing, unexpected = last.load_state_dict(every.state_dict(), strict=False)
    assert not missing and unexpected and all(name.startswith("model.layers.0.cross_att") for name in unexpected)
    assert last.config.latent_shape == alone.shape[1:] == (1, 2, 32)
    expected = every(ids, latents=torch.cat((torch.zeros_like(alone), alone), dim=1)).logits
    close(last(ids, latents=alone).logits, expected)
    close(last(ids, latent_key_values=last.project_latents(alone)).logits, expected)


@pytest.mark.parametrize(
    "overrides",
    [dict(latent_reader="memory"), dict(latent_reader="paper"), dict(latent_reader="paper", latent_layers=[1])],
    ids=["memory", "paper", "paper, last layer"],
)
def test_the_two_stages_are_the_model(make_model, ids, overrides):
    """What no latent changes, computed once, and what is read, for several latents; with padding and labels."""
    model, mask, labels = make_model(**overrides), torch.ones_like(ids), ids.clone()
    mask[0, :4], labels[1, 6:] = 0, -100
    text = Text.of(model, ids, mask, labels)
    state = before_latents(model, text)
    for scale in (0.5, 2.0):
        latents = (scale * model.sample_prior(3, seed=0)).requires_grad_()
        nats = [read(model, state, text, latents), negative_log_likelihood(model, text, latents)]
        gradients = [torch.autograd.grad(x.sum(), latents, retain_graph=True)[0] for x in nats]
        close(*nats)
        close(*gradients)
        assert gradients[0].abs().max() > 0.1
