"""What only a Latent Thought Model does. What transformers asks of every model is in `test_modeling_common.py`."""

import pytest
import torch

from ltm_hf.posterior_ltm import Prelude, negative_log_likelihood


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
def test_every_layer_reads_its_own_latents(model, ids, latents):
    logits = model(ids, latents=latents).logits
    for layer in range(2):
        for latent in range(2):
            changed = latents.clone()
            changed[:, layer, latent] += 1
            assert (model(ids, latents=changed).logits - logits).abs().max() > 1e-3
    assert not torch.allclose(model(ids, latents=latents.flip(1)).logits, logits, atol=1e-3)
    # Rotary positions tell the latents of a layer apart.
    assert not torch.allclose(model(ids, latents=latents.flip(2)).logits, logits, atol=1e-3)


@torch.no_grad()
def test_projected_latents_replace_latents(model, make_model, ids, latents):
    projected = model.project_latents(latents)
    assert projected.shape == (3, 2, 2, 2, 2, 8)  # batch, layers, keys and values, heads, latents a layer, head
    close(model(ids, latent_key_values=projected).logits, model(ids, latents=latents).logits)
    with pytest.raises(ValueError, match="latents and latent_key_values"):
        model(ids, latents=latents, latent_key_values=projected)
    with pytest.raises(ValueError, match=r"latent_key_values.*\(3, 2, 2\).*\(1, 2, 2, 2, 2, 8\)"):
        model(ids, latent_key_values=projected[:1])
    with pytest.raises(ValueError, match="num_latents=0"):
        make_model(num_latents=0)(ids, latent_key_values=projected)


@pytest.mark.parametrize("shape", [(3, 4, 32), (3, 2, 2, 16), (3, 2, 3, 32), (2, 2, 2, 32), (1, 2, 2, 32)])
def test_latents_of_a_wrong_shape(model, ids, shape):
    with pytest.raises(ValueError, match=r"latents must have the shape \(3, 2, 2, 32\)"):
        model(ids, latents=torch.zeros(shape))


def test_latents_are_returned(model, ids, latents):
    returned = model(ids, latents=latents.requires_grad_()).latents
    assert torch.equal(returned, latents) and not returned.requires_grad
    assert model(ids).latents is None


@torch.no_grad()
def test_baseline_has_no_cross_attention(make_model, ids, latents):
    baseline, model = make_model(num_latents=0), make_model()
    names = set(baseline.state_dict())
    assert names == {name for name in model.state_dict() if "cross" not in name}
    baseline.load_state_dict({name: model.state_dict()[name] for name in names})
    close(baseline(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="num_latents=0"):
        baseline(ids, latents=latents)


# ------------------------------------------------------------------ attention


@torch.no_grad()
def test_grouped_heads_are_repeated_heads(make_model, ids, latents):
    grouped, full = make_model(num_key_value_heads=2), make_model(num_key_value_heads=4)
    weights = grouped.state_dict()
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = weights[name].view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    close(grouped(ids, latents=latents).logits, full(ids, latents=latents).logits)


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 4, None])
def test_window_limits_what_a_token_reaches(make_model, make_ids, latents, window):
    model, ids = make_model(sliding_window=window), make_ids(length=16)
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
def test_no_gate_is_a_gate_of_one(make_model, ids, latents):
    gated, plain = make_model(cross_attention_gate_init=1.0), make_model(cross_attention_gate_init=None)
    assert not any("gate.weight" in name for name in plain.state_dict())
    plain.load_state_dict({name: tensor for name, tensor in gated.state_dict().items() if "gate.weight" not in name})
    close(gated(ids, latents=latents).logits, plain(ids, latents=latents).logits)


# ------------------------------------------------------------------ latent embeddings


@torch.no_grad()
def test_embeddings_are_added_to_latents(make_model, ids, latents):
    embedded, plain = make_model(latent_embedding_std=2.0), make_model()
    missing, unexpected = plain.load_state_dict(embedded.state_dict(), strict=False)
    assert not missing and len(unexpected) == 2
    added = torch.stack([layer.cross_attn.latent_embeddings.weight for layer in embedded.model.layers])
    assert added.shape == (2, 2, 32) and 1.5 < added.std() < 2.5
    close(embedded(ids, latents=latents).logits, plain(ids, latents=latents + added).logits)
    close(embedded.project_latents(latents), plain.project_latents(latents + added))
    close(embedded(ids).logits, plain(ids).logits)  # nothing is read


@torch.no_grad()
def test_closed_gate_shuts_the_latents_out(make_model, ids, latents):
    model = make_model(cross_attention_gate_init=0.0)
    close(model(ids, latents=latents).logits, model(ids).logits)


# ------------------------------------------------------------------ which layers read latents, and how they find them


@torch.no_grad()
def test_layers_without_cross_attention(make_model, ids, latents):
    """They are the decoder's whose other layers read latents of zero."""
    last, every = make_model(num_latents=2, cross_attention_layers=[1], latent_position_stride=16), make_model()
    missing, unexpected = last.load_state_dict(every.state_dict(), strict=False)
    assert not missing and unexpected and all(name.startswith("model.layers.0.cross_att") for name in unexpected)
    alone = latents[:, 1:]
    assert last.config.latent_shape == alone.shape[1:] == (1, 2, 32)
    expected = every(ids, latents=torch.cat((torch.zeros_like(alone), alone), dim=1)).logits
    close(last(ids, latents=alone).logits, expected)
    close(last(ids, latent_key_values=last.project_latents(alone)).logits, expected)
    with pytest.raises(ValueError, match=r"latents must have the shape \(3, 1, 2, 32\)"):
        last(ids, latents=latents)


@torch.no_grad()
@pytest.mark.parametrize("rotary", [True, False])
def test_without_rotation_latents_are_found_by_what_a_token_says(make_model, rotary):
    """The same token in windows of the same tokens, at another position."""
    model = make_model(cross_attention_rotary=rotary, num_latents=32, sliding_window=2)
    ids, latents = torch.full((1, 16), 7), torch.randn(1, *model.config.latent_shape)
    logits = model(ids, latents=latents).logits[0]
    moved = (logits[4] - logits[15]).abs().max()
    assert moved < 1e-5 if not rotary else moved > 1e-2


def test_queries_and_latent_keys_start_as_wide_as_asked(make_model):
    weights = make_model(cross_attention_query_std=0.7, latent_embedding_std=None).state_dict()
    for name, wide in (("q_proj", 0.7), ("k_proj", 0.7), ("v_proj", 0.3)):
        assert abs(weights[f"model.layers.0.cross_attn.{name}.weight"].std() / wide - 1) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("projected", [True, False])
def test_latents_found_by_their_embeddings(make_model, ids, latents, projected):
    """What they hold moves no key: what is read is linear in them, and nothing at zero."""
    model = make_model(
        cross_attention_keys="embeddings",
        latent_embedding_std=1.0,
        cross_attention_value_projection=projected,
        num_key_value_heads=4,
    )
    assert torch.equal(model(ids, latents=torch.zeros_like(latents)).logits, model(ids).logits)
    one, other = (model.project_latents(factor * latents).unbind(dim=2) for factor in (1.0, 3.0))
    assert torch.equal(one[0], other[0]) and one[0].std() > 0.1
    close(3 * one[1], other[1])
    named = make_model(**model.config.to_diff_dict() | {"cross_attention_keys": "latents"})
    named.load_state_dict(model.state_dict())
    close(named.project_latents(torch.zeros_like(latents))[:, :, 0], one[0])


@pytest.mark.parametrize("layers", [None, [0], [-1]])
def test_cross_attention_after_the_mlp(make_model, ids, layers):
    """By hand; and the fast loop, which computes what comes before once, against one that computes all anew."""
    model = make_model(cross_attention_after_mlp=True, cross_attention_layers=layers, num_hidden_layers=2)
    latents = torch.randn(len(ids), *model.config.latent_shape, generator=torch.Generator().manual_seed(0))
    positions = model.model.rotary_emb(model.model.norm.weight, torch.arange(ids.shape[1])[None])
    tables, reads = model.model.latent_position_embeddings(model.model.norm.weight), model.config.reading_layers
    states = model.model.embed_tokens(ids)
    mask = model.model._layer_inputs(None, states, None, None, None, False, True)[2]["attention_mask"]
    for number, layer in enumerate(model.model.layers):
        normed = layer.input_layernorm(states)
        states = states + layer.self_attn(normed, attention_mask=mask, position_embeddings=positions)[0]
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        if number in reads:
            projected = layer.cross_attn.project_latents(latents[:, reads.index(number)], tables)
            thought, _ = layer.cross_attn(layer.cross_attention_layernorm(states), projected, positions)
            states = states + layer.cross_attention_gate(thought)
    close(model(ids, latents=latents).logits, model.lm_head(model.model.norm(states)))

    shared, anew = Prelude(), []
    for scale in (0.5, 2.0):
        z = (scale * latents).requires_grad_()
        for prelude in (shared, None):
            nats = negative_log_likelihood(model, ids, z, prelude=prelude)
            anew.append(torch.cat((nats, torch.autograd.grad(nats.sum(), z)[0].flatten())))
    close(anew[0], anew[1])
    close(anew[2], anew[3])


@torch.no_grad()
@pytest.mark.parametrize("gate", [None, 0.5])
def test_values_as_they_are(make_model, ids, latents, gate):
    """The layer whose projections of values and output are identities."""
    options = dict(num_key_value_heads=4, cross_attention_gate_init=gate, latent_embedding_std=1.0)
    plain, projected = make_model(cross_attention_value_projection=False, **options), make_model(**options)
    missing, unexpected = projected.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and len(missing) == 4
    for layer in projected.model.layers:
        for projection in (layer.cross_attn.v_proj, layer.cross_attn.o_proj):
            projection.weight.copy_(torch.eye(32))
    close(plain(ids, latents=latents).logits, projected(ids, latents=latents).logits)
    close(plain.project_latents(latents), projected.project_latents(latents))
