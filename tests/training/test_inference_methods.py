"""Training by the ablations: an encoder that learns with the decoder; a decoder that learns at the end of chains."""

import math

import pytest
import torch
from datasets import Dataset

from ltm_hf import elbo
from ltm_hf.data import collate_blocks
from ltm_hf.inference_ltm import amortized_posterior, infer_posterior
from ltm_hf.likelihood_ltm import Text, negative_log_likelihood
from ltm_hf.training import LTMTrainer, LTMTrainingArguments
from ltm_hf.training.card import write_model_card
from ltm_hf.training.objectives import Now

CHAIN = dict(inference_method="langevin", num_inference_steps=3, inference_learning_rate=0.05)


def make_rows(count, seed=0):
    """Prompts of 3 to 6 tokens and completions of 2 to 9."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"input_ids": [], "labels": []}
    for _ in range(count):
        prompt, completion = (int(torch.randint(*span, (), generator=generator)) for span in ((3, 7), (2, 10)))
        ids = torch.randint(3, 61, (prompt + completion,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * prompt + ids[prompt:])
    return Dataset.from_dict(rows)


@pytest.fixture
def make_amortized(make_model):
    """An encoder whose head has left zero, so that its posteriors differ from the prior."""

    def make(**overrides):
        model = make_model(inference_method="amortized", **overrides)
        with torch.no_grad():
            weight = model.encoder.head.weight
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        return model

    return make


@pytest.fixture
def make_trainer(tmp_path):
    def make(model, rows=None, trainer_class=LTMTrainer, **arguments):
        defaults = dict(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            warmup_steps=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return trainer_class(
            model,
            LTMTrainingArguments(**defaults | arguments),
            train_dataset=make_rows(16) if rows is None else rows,
            eval_dataset=make_rows(5, seed=1),
        )

    return make


def gradients(model):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


# ---------------------------------------------------------------- an amortised encoder


@pytest.mark.parametrize(
    ("step", "settings", "weight"),
    [
        (0, {}, 1.0),
        (0, dict(kl_annealing_steps=4), 0.0),
        (1, dict(kl_annealing_steps=4), 0.25),
        (3, dict(kl_annealing_steps=4), 0.75),
        (9, dict(kl_annealing_steps=4), 1.0),
        (9, dict(kl_annealing_steps=4, infer_from="text"), 1.0),
        (9, dict(infer_from="prompt"), 0.0),  # a predictor pays no KL
    ],
    ids=str,
)
@pytest.mark.parametrize("counted", [True, False])
def test_amortised_step_against_the_definition(make_trainer, make_amortized, step, settings, weight, counted):
    """(NLL + weight·KL) / tokens at a sample, row by row, without padding; the loss that is told is the NLL alone."""
    model = make_amortized()
    trainer = make_trainer(model, make_rows(4), **settings)
    trainer.state.global_step = step
    nll = kl = tokens = 0
    for row in trainer.train_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        prompt = int((labels == -100).sum())
        posterior = {
            "labels": lambda: amortized_posterior(model, Text.of(model, ids, labels=labels)),  # noqa: B023
            "text": lambda: amortized_posterior(model, Text.of(model, ids)),  # noqa: B023
            "prompt": lambda: amortized_posterior(model, Text.of(model, ids[:, :prompt])),  # noqa: B023
        }[trainer.objective.infer_from]()
        nll = (
            nll
            + negative_log_likelihood(
                model, Text.of(model, ids, labels=labels), posterior.sample(trainer._seed(step + 1))
            ).sum()
        )
        kl, tokens = kl + posterior.kl_divergence().sum(), tokens + ids.shape[1] - prompt
    assert kl.item() > 1
    ((nll + weight * kl) / tokens).backward()
    expected = gradients(model)
    if weight:
        assert expected["encoder.head.weight"].abs().max() > 1e-2 < expected["model.embed_tokens.weight"].abs().max()

    model.zero_grad()
    batch = collate_blocks(list(trainer.train_dataset))
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    loss = trainer.training_step(model, batch, **(dict(num_items_in_batch=torch.tensor(tokens)) if counted else {}))
    assert_close(gradients(model), expected)
    assert loss.item() == pytest.approx(nll.item() / tokens, rel=1e-5)
    trainer.state.global_step = step + 1
    figures = trainer._figures(loss.item())
    assert figures["kl"] == pytest.approx(kl.item() / tokens, rel=1e-4)  # without its weight
    pays = trainer.objective.infer_from != "prompt"
    assert figures["bound"] == pytest.approx((nll.item() + kl.item() * pays) / tokens, rel=1e-4)


def test_weight_of_the_kl(make_trainer, make_model):
    for settings, weights in (({}, [1, 1, 1, 1, 1, 1]), (dict(kl_annealing_steps=4), [0, 0.25, 0.5, 0.75, 1, 1])):
        trainer = make_trainer(make_model(inference_method="amortized"), **settings)
        assert [trainer.objective._kl_weight(Now(step, 6)) for step in range(6)] == weights


def test_batch_and_accumulation_are_the_same_training(make_trainer, make_amortized):
    results = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            make_amortized(), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            optim="sgd", kl_annealing_steps=3,
        )  # fmt: skip
        trainer.train()
        weights = torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]).detach()
        results.append((weights, [entry["bound"] for entry in trainer.state.log_history if "bound" in entry]))
    for weights, bounds in results[1:]:
        torch.testing.assert_close(weights, results[0][0], rtol=0, atol=1e-5)
        assert bounds == pytest.approx(results[0][1], abs=1e-4)
    assert len(results[0][1]) == 2


def test_an_encoder_learns_and_is_read(make_trainer, make_model):
    """Two texts of which the window shows the same: one bit of latents tells every third token."""
    texts = [[5, 5, *[token, 5, 5] * 4, token] for token in (10, 20)]
    model = make_model(
        inference_method="amortized", num_hidden_layers=1, num_latents=1, sliding_window=2, initializer_range=0.1
    )
    rows = Dataset.from_dict({"input_ids": texts * 4})
    make_trainer(model, rows, max_steps=60, per_device_train_batch_size=8, logging_steps=20).train()
    ids = torch.tensor(texts)
    posterior = model.eval().infer_posterior(ids)
    with torch.no_grad():
        own, swapped, none = (
            negative_log_likelihood(model, Text.of(model, ids), z)
            for z in (posterior.mean, posterior.mean.flip(0), None)
        )
    kl = posterior.kl_divergence()
    assert (swapped > own + 5).all() and (none.mean() > (own + kl).mean() + 1).all()
    assert 0.4 < kl.mean() < 2.0  # nats; a bit has 0.69


def test_evaluation_of_an_encoder_is_its_bound(make_trainer, make_amortized):
    model = make_amortized()
    trainer = make_trainer(model, per_device_eval_batch_size=2)
    metrics = trainer.evaluate()
    nll = kl = from_prompt = tokens = 0
    with torch.no_grad():
        for row in trainer.eval_dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            prompt = ids[:, : int((labels == -100).sum())]
            posterior = infer_posterior(model, ids, labels=labels)
            estimate = elbo(model, ids, posterior, labels=labels, seed=trainer._seed(0))
            nll, kl = nll + estimate.nll.item(), kl + estimate.kl.item()
            latents = infer_posterior(model, prompt).mean
            from_prompt += negative_log_likelihood(model, Text.of(model, ids, labels=labels), latents).item()
            tokens += estimate.num_tokens.item()
    assert metrics["eval_loss"] == pytest.approx((nll + kl) / tokens, rel=1e-4)
    assert metrics["eval_kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert metrics["eval_from_prompt"] == pytest.approx(from_prompt / tokens, rel=1e-4)
    assert not {"eval_elbo_trace", "eval_elbo_last_gain"} & set(trainer.state.log_history[-1])  # there are no steps


# ---------------------------------------------------------------- chains


@pytest.mark.parametrize("objective", ["elbo", "elbo_trajectory"])
def test_a_decoder_learns_at_the_end_of_a_chain(make_trainer, make_model, objective):
    model = make_model(**CHAIN)
    trainer = make_trainer(model, make_rows(4), objective=objective)
    batch = collate_blocks(list(trainer.train_dataset))
    seed, states = trainer._seed(1), []
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    posterior = infer_posterior(model, ids, mask, labels, seed=seed, callback=lambda step, z, value: states.append(z))
    states = states * (objective == "elbo_trajectory") + [posterior.mean]
    tokens = (labels != -100).sum()
    loss = (
        torch.stack([negative_log_likelihood(model, Text.of(model, ids, mask, labels), z).sum() for z in states]).mean()
        / tokens
    )
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    found = trainer.training_step(model, batch, num_items_in_batch=tokens)
    assert len(states) == (4 if objective == "elbo_trajectory" else 1)
    assert_close(gradients(model), expected)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)


def test_what_chains_log(make_trainer, make_model):
    """Nothing that would need a KL; eval_loss is the loss at the chain's end, and prompts are inferred from alone."""
    model = make_model(**CHAIN)
    trainer = make_trainer(model, per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=1)
    trainer.train()
    for entry in trainer.state.log_history:
        assert not any(part in name for name in entry for part in ("kl", "bound", "elbo", "wider", "narrower")), entry
        assert all(math.isfinite(value) for value in entry.values())
    assert {"loss", "gain", "inference_seconds"} <= set(trainer.state.log_history[0])

    metrics, (nll, from_prompt, tokens) = trainer.evaluate(), (0, 0, 0)
    model.eval()
    with torch.no_grad():
        for row in trainer.eval_dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            prompt = ids[:, : int((labels == -100).sum())]
            settings = dict(seed=trainer._seed(0))
            latents = [
                infer_posterior(model, ids, labels=labels, **settings),
                infer_posterior(model, prompt, **settings),
            ]
            losses = [
                negative_log_likelihood(model, Text.of(model, ids, labels=labels), q.mean).item() for q in latents
            ]
            nll, from_prompt = nll + losses[0], from_prompt + losses[1]
            tokens += int((labels != -100).sum())
    assert metrics["eval_loss"] == metrics["eval_nll"] == pytest.approx(nll / tokens, rel=1e-4)
    assert metrics["eval_from_prompt"] == pytest.approx(from_prompt / tokens, rel=1e-4)
    assert nll != pytest.approx(from_prompt, rel=1e-3)


def test_the_step_of_a_chain_does_not_grow_as_the_papers_learning_rate_does(make_trainer, make_model):
    model = make_model(**CHAIN)
    args = make_trainer(model).args
    assert args.inference_rates(model.config) == (0.05, 0.05)
    args.inference_learning_rate_end = 0.01
    assert args.inference_rates(model.config) == (0.05, 0.01)


# ---------------------------------------------------------------- refusals, twins and cards


class Sharded(LTMTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True


def test_refusals(make_trainer, make_model):
    with pytest.raises(ValueError, match="kl_annealing_steps must be 0 or more, got -1"):
        make_trainer(None, kl_annealing_steps=-1)
    for method in ("natural", "langevin"):
        with pytest.raises(ValueError, match="kl_annealing_steps is for inference_method='amortized'"):
            make_trainer(make_model(inference_method=method), kl_annealing_steps=5)
    with pytest.raises(ValueError, match="encoder outside the forward pass.*DDP"):
        make_trainer(make_model(inference_method="amortized"), trainer_class=Sharded)


@pytest.mark.parametrize("method", ["langevin", "amortized"])
def test_the_autoregressive_twin_takes_the_same_arguments(make_trainer, make_model, method):
    settings = dict(kl_annealing_steps=5) if method == "amortized" else {}
    logs = []
    for overrides in (dict(inference_method=method), {}):
        trainer = make_trainer(make_model(num_latents=0, **overrides), **settings)
        trainer.train()
        logs.append([entry["perplexity"] for entry in trainer.state.log_history if "loss" in entry])
        assert "eval_perplexity" in trainer.evaluate()
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("overrides", "facts", "absent"),
    [
        (CHAIN, ["`inference_method` | langevin |", "`num_inference_steps` | 3 |", "inference step size | 0.05 |"],
         ["inference_noise", "| bound"]),
        (dict(inference_method="amortized"), ["`inference_method` | amortized |", "over 7 steps", "| bound "],
         ["inference_noise", "num_inference_steps` |", "in the paper's account"]),
    ],
    ids=["langevin", "amortized"],
)  # fmt: skip
def test_cards(make_trainer, make_model, tmp_path, overrides, facts, absent):
    settings = dict(kl_annealing_steps=7) if overrides != CHAIN else {}
    trainer = make_trainer(make_model(**overrides), **settings)
    trainer.evaluate()
    likelihood = trainer._evaluated(trainer.state.log_history[-1])
    write_model_card(
        tmp_path,
        trainer.model,
        name="it",
        training_arguments=trainer.args,
        likelihood=likelihood,
        num_training_tokens=9,
    )
    text = (tmp_path / "README.md").read_text().partition("## Architecture")[2].partition("## Which")[0]
    for fact in facts:
        assert fact in text, fact
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    for fact in absent:
        assert fact not in tables, fact
