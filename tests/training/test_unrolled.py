"""slow_gradient="unrolled": what is predicted from what, and that the gradient goes through inference."""

import math

import pytest
import torch
from datasets import Dataset

from ltm_hf.flops import count_flops, training_flops
from ltm_hf.posterior_ltm import infer_posterior, negative_log_likelihood
from ltm_hf.training import LTMTrainer
from ltm_hf.training.unrolled import split_labels, unrolled_posterior

IGNORED = -100


@pytest.fixture
def model(make_model):
    return make_model(latent_embedding_std=1.0, inference_learning_rate=0.05, num_inference_steps=1)


@pytest.fixture
def make_trainer(make_arguments):
    def make(model, rows, **arguments):
        rows = rows if isinstance(rows, dict) else {"input_ids": rows.tolist()}
        args = make_arguments(slow_gradient="unrolled", **arguments)
        return LTMTrainer(model, args, train_dataset=Dataset.from_dict(rows))

    return make


def test_labels_are_split_by_hand():
    ids = torch.arange(1, 8)[None].repeat(3, 1)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1] * 5 + [0] * 2])
    labels = ids.clone()
    labels[2, :3] = IGNORED
    prefix, rest = split_labels(ids, mask, labels, share=0.5)
    none = IGNORED
    assert prefix.tolist() == [
        [none, 2, 3, 4, none, none, none],
        [none] * 3 + [4, 5] + [none] * 2,
        [none] * 3 + [4] + [none] * 3,
    ]
    assert rest.tolist() == [[none] * 4 + [5, 6, 7], [none] * 5 + [6, 7], [none] * 4 + [5] + [none] * 2]


@pytest.mark.parametrize("steps", [1, 3])
def test_means_are_those_of_the_fast_loop(model, ids, steps):
    prefix, _ = split_labels(ids, share=0.6)
    found, nats, prelude = unrolled_posterior(model, steps, 0.05, ids, labels=prefix)
    settings = dict(num_inference_steps=steps, inference_learning_rate=0.05, inference_optimizer="map")
    expected = infer_posterior(model, ids, labels=prefix, **settings)
    torch.testing.assert_close(found.mean.detach(), expected.mean, rtol=1e-4, atol=1e-5)
    assert not found.log_variance.any() and found.elbo_trace.shape == (steps, len(ids))
    at_zero = negative_log_likelihood(model, ids, torch.zeros_like(found.mean), labels=prefix).sum()
    torch.testing.assert_close(nats, at_zero)
    again, anew = (negative_log_likelihood(model, ids, found.mean, prelude=begun) for begun in (prelude, None))
    torch.testing.assert_close(again, anew)


def test_loss_is_that_of_a_predictor_that_thinks_once(model, ids, make_trainer):
    """The prefix at z = 0, the rest given what was fitted to the prefix; over all scored tokens."""
    trainer = make_trainer(model, ids, max_steps=1, per_device_train_batch_size=3, learning_rate=1e-30)
    seen = {}

    def kept(*args, real=trainer._think_unrolled):
        seen["prefix"] = args[1]["labels"]
        seen["latents"], prelude = real(*args)
        return seen["latents"], prelude

    trainer._think_unrolled = kept
    trainer.train()
    batch, rest = trainer._last_batch, trainer._last_batch["labels"]
    ids, prefix, latents = batch["input_ids"], seen["prefix"], batch["latents"]
    with torch.no_grad():
        nats = negative_log_likelihood(model, ids, torch.zeros_like(latents), labels=prefix).sum()
        nats += negative_log_likelihood(model, ids, latents, labels=rest).sum()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(nats.item() / (3 * 11), abs=1e-3)
    assert logged["bound"] == logged["loss"] and logged["kl"] > 0
    scored = (prefix != IGNORED) ^ (rest != IGNORED)
    assert scored[:, 1:].all() and not scored[:, 0].any()
    assert (1 / 5 < (prefix != IGNORED).sum() / 33 < 4 / 5) and seen["latents"].requires_grad


def test_gradient_goes_through_inference(model, ids, make_trainer):
    """Against a difference quotient of the loss; a detached fit would miss it."""
    trainer = make_trainer(model, ids)
    prefix, rest = split_labels(ids)
    weight = model.model.layers[0].cross_attn.v_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    def loss(detached=False):
        trainer._last_batch = None
        latents, prelude = trainer._think_unrolled(model.train(), {"input_ids": ids, "labels": prefix})
        latents = latents.detach() if detached else latents
        inputs = {"input_ids": ids, "labels": rest, "latents": latents, "prelude": prelude}
        return trainer.compute_loss(model, inputs, num_items_in_batch=1)

    whole, without = ((torch.autograd.grad(loss(d), weight)[0] * direction).sum().item() for d in (False, True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 2e-3 * direction
        values.append(loss().item())
        with torch.no_grad():
            weight -= sign * 2e-3 * direction
    quotient = (values[0] - values[1]) / 4e-3
    assert whole == pytest.approx(quotient, rel=2e-2) and without != pytest.approx(quotient, rel=1e-1)


@pytest.mark.parametrize("after_mlp", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_cost_is_what_torch_counts(make_model, make_ids, after_mlp, steps):
    model = make_model(
        cross_attention_layers=[-1],
        cross_attention_keys="embeddings",
        cross_attention_rotary=False,
        cross_attention_after_mlp=after_mlp,
        latent_embedding_std=1.0,
        num_inference_steps=steps,
        vocab_size=400,
        hidden_size=64,
    )
    ids = make_ids(rows=8, length=49)
    model.set_attn_implementation("eager")

    def step():
        prefix, rest = split_labels(ids)
        posterior, nats, prelude = unrolled_posterior(model, steps, 0.05, ids, labels=prefix)
        given = dict(latents=posterior.mean, labels=rest, loss_reduction="mean", prelude=prelude)
        (nats + model(ids, **given).loss).backward()

    cost = training_flops(model.config, ids.shape[1])
    assert count_flops(step) / ids.numel() == pytest.approx(cost.slow_step + steps * cost.unrolled_step, rel=0.02)


def test_evaluation_is_of_a_predictor_that_thinks_once(model, ids, make_trainer):
    """After half of the tokens; exact, so that there is no kl to pay."""
    model.config.inference_optimizer = "map"
    trainer = make_trainer(model, ids)
    found = trainer.evaluate(Dataset.from_dict({"input_ids": ids.tolist()}))
    nats = 0.0
    for row in ids:
        half = 1 + (len(row) - 1) // 2
        thought = infer_posterior(model, row[None, :half]).mean
        labels = row[None].clone()
        labels[:, :half] = IGNORED
        nats += negative_log_likelihood(model, row[None, :half], torch.zeros_like(thought)).item()
        nats += negative_log_likelihood(model, row[None], thought, labels=labels).item()
    assert found["eval_loss"] == pytest.approx(nats / (3 * 11), rel=1e-5)
    assert math.log(found["eval_perplexity_bound"]) == pytest.approx(found["eval_loss"])
    assert "eval_kl" not in found and found["eval_gain"] == found["eval_no_latents"] - found["eval_loss"]


def test_batch_and_accumulation_are_the_same_training(make_model, make_ids, make_trainer):
    """Rows of several lengths, some with prompts."""
    ids = make_ids(rows=16, length=14).tolist()
    rows = {"input_ids": [row[: 8 + index % 7] for index, row in enumerate(ids)]}
    rows["labels"] = [[IGNORED] * (index % 4) + row[index % 4 :] for index, row in enumerate(rows["input_ids"])]
    figures = []
    for size, parts in ((8, 1), (2, 4)):
        model = make_model(latent_embedding_std=1.0)
        settings = dict(max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=parts)
        trainer = make_trainer(model, rows, **settings)
        trainer.train()
        logs = trainer.state.log_history[:3]
        figures.append([entry[name] for entry in logs for name in ("loss", "kl", "grad_norm")])
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, {"infer_from": "text"}, "it needs inference_method='variational', infer_from='labels'"),
        ({"inference_method": "langevin"}, {}, "it needs inference_method='variational'"),
        ({"num_inference_steps": 0}, {}, "num_inference_steps of at least 1"),
        ({}, {"num_inference_steps_min": 0}, "num_inference_steps of at least 1"),
        ({}, {"gradient_checkpointing": True}, "gradient checkpointing do not"),
        ({}, {"torch_compile": True}, "torch.compile and gradient checkpointing do not"),
    ],
)
def test_refusals(make_model, ids, make_trainer, config, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_model(**config), ids, **arguments)


def test_a_model_without_latents_trains_as_ever(make_model, ids, make_trainer, make_arguments):
    losses = []
    for slow_gradient in ("unrolled", "final"):
        trainer = make_trainer(make_model(num_latents=0), ids)
        trainer.args.slow_gradient = slow_gradient
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history[:2]])
    assert losses[0] == losses[1]
