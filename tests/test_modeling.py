import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ltm_hf import LTMForCausalLM, LTMModel


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
    with pytest.raises(ValueError, match=r"latent_key_values.*\(3, 2, 2, 2\).*\(1, 2, 2, 2, 2, 8\)"):
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


def test_exactly_one_input(model, ids):
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


@torch.no_grad()
def test_embeddings_replace_ids(model, ids, latents):
    embeds = model.get_input_embeddings()(ids)
    close(model(inputs_embeds=embeds, latents=latents).logits, model(ids, latents=latents).logits)


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


def test_eager_is_sdpa(make_model, ids, latents, pad_rows):
    sdpa, eager = make_model(), make_model()
    sdpa.set_attn_implementation("sdpa")
    eager.set_attn_implementation("eager")
    batch, mask = pad_rows([ids[0], ids[1, :5], ids[2, :9]], "left")
    with torch.no_grad():
        ours, theirs = (model(batch, attention_mask=mask, latents=latents).logits for model in (sdpa, eager))
    close(ours[mask.bool()], theirs[mask.bool()])
    ours, theirs = (model.infer_posterior(batch, mask, num_inference_steps=4) for model in (sdpa, eager))
    close(ours.mean, theirs.mean, 1e-4)
    close(ours.log_variance, theirs.log_variance, 1e-4)


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


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, ids, latents, pad_rows, side):
    rows = [ids[0], ids[1, :5], ids[2, :1]]
    batch, mask = pad_rows(rows, side, fill=7)
    logits = model(batch, attention_mask=mask, latents=latents).logits
    for index, row in enumerate(rows):
        alone = model(row[None], latents=latents[index : index + 1]).logits[0]
        close(logits[index, mask[index].bool()], alone)


@torch.no_grad()
def test_hidden_states_and_attentions(model, ids, latents):
    model.set_attn_implementation("eager")
    output = model(ids, latents=latents, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 12, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 12, 12)] * 2
    assert [tuple(weights.shape) for weights in output.cross_attentions] == [(3, 4, 12, 2)] * 2
    for weights in (*output.attentions, *output.cross_attentions):
        close(weights.sum(-1), torch.ones(3, 4, 12))
    close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(ids, latents=latents).hidden_states is None


@torch.no_grad()
def test_output_as_tuple(model, ids, latents):
    logits = model(ids, latents=latents).logits
    loss, as_tuple = model(ids, latents=latents, labels=ids, return_dict=False)[:2]
    assert loss.ndim == 0
    close(as_tuple, logits)


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 3])
def test_logits_to_keep(model, ids, kept):
    close(model(ids, logits_to_keep=kept).logits, model(ids).logits[:, -kept:])


# ------------------------------------------------------------------ gate and initialisation


@torch.no_grad()
def test_no_gate_is_a_gate_of_one(make_model, ids, latents):
    gated, plain = make_model(cross_attention_gate_init=1.0), make_model(cross_attention_gate_init=None)
    assert not any("gate.weight" in name for name in plain.state_dict())
    plain.load_state_dict({name: tensor for name, tensor in gated.state_dict().items() if "gate.weight" not in name})
    close(gated(ids, latents=latents).logits, plain(ids, latents=latents).logits)


def test_gate_starts_where_the_configuration_says(make_model):
    model = make_model(cross_attention_gate_init=0.25)
    for layer in model.model.layers:
        assert torch.equal(layer.cross_attention_gate.weight, torch.full((32,), 0.25))
        assert layer.cross_attention_gate.weight.requires_grad


@torch.no_grad()
def test_closed_gate_shuts_the_latents_out(make_model, ids, latents):
    model = make_model(cross_attention_gate_init=0.0)
    close(model(ids, latents=latents).logits, model(ids).logits)


def test_initialisation(make_model):
    model = make_model(hidden_size=128, num_hidden_layers=3, num_latents=3, initializer_range=0.02)
    for name, tensor in model.named_parameters():
        if "o_proj" in name:
            assert tensor.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.03), name
        elif name.endswith("_proj.weight") or "embed" in name:
            assert tensor.std().item() == pytest.approx(0.02, rel=0.03), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
    assert not any(name.endswith("bias") for name in model.state_dict())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings(make_model, tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = LTMForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


@torch.no_grad()
def test_resize_token_embeddings(model, ids, latents):
    before = model(ids, latents=latents).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    after = model(ids, latents=latents, labels=ids)
    assert after.logits.shape == (3, 12, 70) and after.loss.isfinite()
    close(after.logits[..., :61], before)
    ids[0, 0] = 69
    assert model.infer_posterior(ids).mean.isfinite().all()


# ------------------------------------------------------------------ loss


@torch.no_grad()
def test_loss(model, ids, latents):
    labels = ids.clone()
    labels[0, :4] = -100
    output = model(ids, latents=latents, labels=labels)
    logits = output.logits[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    close(output.loss, total / (labels[:, 1:] != -100).sum())
    close(model(ids, latents=latents, labels=labels, num_items_in_batch=torch.tensor(7)).loss, total / 7)


@pytest.mark.parametrize("optimizer", ["natural", "adamw"])
def test_gradient_checkpointing_changes_nothing(make_model, ids, latents, optimizer):
    results = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        posterior = model.infer_posterior(ids, inference_optimizer=optimizer)
        loss = model(ids, latents=latents, labels=ids).loss
        loss.backward()
        results.append((posterior, loss, {name: p.grad for name, p in model.named_parameters()}))
    (plain, plain_loss, plain_grads), (saving, saving_loss, saving_grads) = results
    close(plain_loss, saving_loss)
    close(plain.mean, saving.mean)
    close(plain.log_variance, saving.log_variance)
    for name, gradient in plain_grads.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        close(saving_grads[name], gradient)


# ------------------------------------------------------------------ saving


@torch.no_grad()
def test_round_trip(make_model, ids, latents, tmp_path):
    model = make_model(inference_optimizer="adamw", num_inference_steps=3, inference_learning_rate=0.2)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for auto in (LTMForCausalLM, AutoModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is LTMForCausalLM and not loaded.training
        assert torch.equal(loaded(ids, latents=latents).logits, model(ids, latents=latents).logits)
        assert torch.equal(loaded.infer_posterior(ids).mean, model.infer_posterior(ids).mean)


@torch.no_grad()
def test_base_model(make_model, ids, latents, tmp_path):
    model = make_model()
    hidden = model.model(ids, latents=latents).last_hidden_state
    close(model.lm_head(hidden), model(ids, latents=latents).logits)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LTMModel
    assert torch.equal(base(ids, latents=latents).last_hidden_state, hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(model, ids, latents, dtype):
    logits = model.to(dtype)(ids, latents=latents).logits
    assert logits.dtype == dtype and logits.isfinite().all()


def test_checkpoint_of_another_architecture(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama"):
        LTMForCausalLM.from_pretrained(tmp_path)
