"""slow_gradient="online": every token against the fast loop on the text before it."""

import math

import pytest
import torch
from datasets import Dataset

from ltm_hf.flops import count_flops, training_flops
from ltm_hf.posterior_ltm import infer_posterior, negative_log_likelihood
from ltm_hf.training import LTMTrainer
from ltm_hf.training.online import no_latents, online_thoughts, reading

IGNORED = -100
MEMORY = dict(
    cross_attention_layers=[-1],
    cross_attention_keys="embeddings",
    cross_attention_query_std=0.5,
    cross_attention_rotary=False,
    cross_attention_value_projection=False,
    latent_embedding_std=1.0,
    num_key_value_heads=None,
    inference_optimizer="map",
    inference_learning_rate=0.7,
    num_inference_steps=1,
    initial_mean_std=0.0,
)


@pytest.fixture
def model(make_model):
    return make_model(**MEMORY)


@pytest.fixture
def make_trainer(make_arguments):
    def make(model, rows, **arguments):
        rows = rows if isinstance(rows, dict) else {"input_ids": rows.tolist()}
        args = make_arguments(slow_gradient="online", **arguments)
        return LTMTrainer(model, args, train_dataset=Dataset.from_dict(rows))

    return make


def by_the_fast_loop(model, ids, token):
    """Logits at one token, with latents inferred from scratch; ids (1, S) without padding."""
    known = ids[:, : token + 1]
    return model(known, latents=infer_posterior(model, known).mean if token else None).logits[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_reads_what_the_fast_loop_finds(model, ids, side):
    pad = torch.zeros(1, 2, dtype=torch.long)
    tokens, known = ids[:1], torch.ones_like(ids[:1])
    pieces = [(tokens, known), (pad, pad)]
    rows, mask = (torch.cat(part, dim=1) for part in zip(*(pieces if side == "right" else pieces[::-1]), strict=True))
    thoughts, _ = online_thoughts(model, 0.7, rows, mask)
    with reading(model, thoughts):
        logits = model(rows, mask, latents=no_latents(model, rows)).logits[mask.bool()]
    for token in range(tokens.shape[1]):
        torch.testing.assert_close(logits[token], by_the_fast_loop(model, tokens, token), rtol=1e-4, atol=1e-5)
    assert (logits - model(tokens).logits[0]).abs().max() > 0.01
    assert not thoughts[:, :1].any()


def test_only_scored_tokens_are_learned_from(model, ids):
    labels = ids.clone()
    labels[:, :5] = IGNORED
    with torch.no_grad():
        thoughts, _ = online_thoughts(model, 0.7, ids, labels=labels)
        expected = infer_posterior(model, ids[:, :9], labels=labels[:, :9]).mean
        with reading(model, thoughts):
            found = model(ids, latents=no_latents(model, ids)).logits[:, 8]
        torch.testing.assert_close(found, model(ids[:, :9], latents=expected).logits[:, -1], rtol=1e-4, atol=1e-5)
    assert not thoughts[:, :5].any() and thoughts[:, 5].any()


def test_gradient_goes_through_the_step(model, ids):
    """Of all that tokens look up and learn by, against a difference quotient of the loss."""

    def loss():
        thoughts, prelude = online_thoughts(model, 0.7, ids)
        with reading(model, thoughts):
            latents = no_latents(model, ids)
            return negative_log_likelihood(model, ids, latents, prelude=prelude).sum()

    layer = model.model.layers[-1]
    read = (layer.cross_attn.q_proj, layer.cross_attn.k_proj, layer.cross_attn.latent_embeddings)
    for module in (*read, layer.mlp.down_proj, model.model.embed_tokens, model.model.layers[0].self_attn.v_proj):
        weight, generator = module.weight, torch.Generator().manual_seed(0)
        direction = torch.randn(weight.shape, generator=generator)
        direction /= direction.norm()
        found = (torch.autograd.grad(loss(), weight)[0] * direction).sum().item()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 5e-2 * direction
                values.append(loss().item())
                weight -= sign * 5e-2 * direction
        assert found == pytest.approx((values[0] - values[1]) / 1e-1, rel=3e-2, abs=2e-3)


def test_loss_is_that_of_a_predictor_that_thinks_at_every_token(model, ids, make_trainer):
    trainer = make_trainer(model, ids, max_steps=1, per_device_train_batch_size=3, learning_rate=1e-30)
    trainer.train()
    logged = trainer.state.log_history[0]
    nats = plain = 0.0
    with torch.no_grad():
        for row in ids:
            for token in range(len(row) - 1):
                logits = by_the_fast_loop(model, row[None], token)
                nats -= logits.log_softmax(dim=-1)[row[token + 1]].item()
            plain += negative_log_likelihood(model, row[None]).item()
    assert logged["loss"] == logged["bound"] == pytest.approx(nats / 33, abs=1e-4)
    assert logged["gain"] == pytest.approx((plain - nats) / 33, abs=1e-4) and "kl" not in logged
    found = trainer.evaluate(Dataset.from_dict({"input_ids": ids.tolist()}))
    assert found["eval_loss"] == pytest.approx(nats / 33, abs=1e-5)
    assert found["eval_no_latents"] == pytest.approx(plain / 33, abs=1e-5)
    assert math.log(found["eval_perplexity_bound"]) == pytest.approx(found["eval_loss"]) and "eval_kl" not in found


def test_batch_and_accumulation_are_the_same_training(make_model, make_ids, make_trainer):
    """Rows of several lengths, some with prompts."""
    ids = make_ids(rows=16, length=14).tolist()
    rows = {"input_ids": [row[: 8 + index % 7] for index, row in enumerate(ids)]}
    rows["labels"] = [[IGNORED] * (index % 4) + row[index % 4 :] for index, row in enumerate(rows["input_ids"])]
    figures = []
    for size, parts in ((8, 1), (2, 4)):
        trainer = make_trainer(
            make_model(**MEMORY), rows, max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=parts
        )
        trainer.train()
        logs = trainer.state.log_history[:3]
        figures.append([entry[name] for entry in logs for name in ("loss", "grad_norm")])
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


@pytest.mark.parametrize(
    "shape", [dict(), dict(num_hidden_layers=3, num_latents=9, hidden_size=32), dict(cross_attention_after_mlp=True)]
)
def test_cost_is_what_torch_counts(make_model, make_ids, shape):
    model, ids = make_model(**MEMORY | shape), make_ids(rows=8, length=24)
    model.set_attn_implementation("eager")

    def step():
        thoughts, prelude = online_thoughts(model, 0.7, ids)
        with reading(model, thoughts):
            model(ids, latents=no_latents(model, ids), labels=ids, prelude=prelude).loss.backward()

    cost = training_flops(model.config, ids.shape[1])
    assert count_flops(step) / ids.numel() == pytest.approx(cost.slow_step + cost.online_step, rel=0.02)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (dict(cross_attention_layers=None, num_latents=6), {}, "last layer alone"),
        (dict(cross_attention_layers=[0]), {}, "last layer alone"),
        (dict(cross_attention_keys="latents"), {}, "cross_attention_keys='embeddings'"),
        (dict(cross_attention_rotary=True), {}, "cross_attention_rotary=False"),
        (dict(cross_attention_value_projection=True), {}, "cross_attention_value_projection=False"),
        ({}, {"infer_from": "text"}, "'online' fits latents .* it needs inference_method='variational'"),
        ({}, {"gradient_checkpointing": True}, "gradient checkpointing do not"),
    ],
)
def test_refusals(make_model, ids, make_trainer, config, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_model(**MEMORY | config), ids, **arguments)
