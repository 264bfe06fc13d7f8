"""Trainer's own options under LTMTrainer, on rows of several lengths of which only a part is scored."""

import pytest
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback

from ltm_hf import elbo, infer_posterior
from ltm_hf.data import collate_blocks
from ltm_hf.posterior_ltm import negative_log_likelihood
from ltm_hf.training import DualRateMixin, LTMTrainer, LTMTrainingArguments
from ltm_hf.training.trainer import prompts


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
def make_trainer(make_arguments, make_model):
    def make(trainer_class=LTMTrainer, model=None, callbacks=None, rows=None, folder="run", **arguments):
        return trainer_class(
            model or make_model(),
            make_arguments(folder=folder, **arguments),
            train_dataset=make_rows(16) if rows is None else rows,
            eval_dataset=make_rows(5, seed=1),
            callbacks=callbacks,
            **({} if issubclass(trainer_class, LTMTrainer) else {"data_collator": collate_blocks}),
        )

    return make


def weights(trainer):
    return torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]).detach()


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---------------------------------------------------------------- what is scored, and what latents are inferred from


@pytest.mark.parametrize("infer_from", ["labels", "text", "prompt"])
def test_infer_from_against_the_definition(make_trainer, make_model, infer_from):
    """A step and an evaluation, row by row and without padding."""
    model = make_model()
    trainer = make_trainer(model=model, rows=make_rows(4), infer_from=infer_from, optim="sgd")
    seed, loss, kl, total = trainer._seed(1), 0, 0, 0
    for row in trainer.train_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        prompt = int((labels == -100).sum())
        posterior = {
            "labels": lambda: infer_posterior(model, ids, labels=labels, seed=seed),  # noqa: B023
            "text": lambda: infer_posterior(model, ids, seed=seed),  # noqa: B023
            "prompt": lambda: infer_posterior(model, ids[:, :prompt], seed=seed),  # noqa: B023
        }[infer_from]()
        loss = loss + negative_log_likelihood(model, ids, posterior.sample(seed), labels=labels).sum()
        kl = kl + posterior.kl_divergence().sum().item()
        total += ids.shape[1] - prompt
    (loss / total).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    batch = collate_blocks(list(trainer.train_dataset))
    trainer.training_step(model, batch, num_items_in_batch=torch.tensor(total))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)
    trainer.state.global_step = 1
    figures = trainer._figures(loss.item() / total)
    assert figures["kl"] == pytest.approx(kl / total, rel=1e-4)
    assert figures["bound"] == pytest.approx((loss.item() + kl * (infer_from != "prompt")) / total, rel=1e-4)


def test_evaluation_scores_labels_only(make_trainer, make_model):
    model = make_model()
    metrics = {
        infer_from: make_trainer(model=model, infer_from=infer_from, per_device_eval_batch_size=2).evaluate()
        for infer_from in ("labels", "prompt")
    }
    seed = 42 * 2**32
    nll = kl = from_prompt = plain = total = 0
    for row in make_rows(5, seed=1):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        prompt = int((labels == -100).sum())
        posterior = infer_posterior(model, ids, labels=labels, seed=seed)
        mean = infer_posterior(model, ids[:, :prompt], seed=seed).mean
        with torch.no_grad():
            estimate = elbo(model, ids, posterior, labels=labels, seed=seed)
            nll, kl = nll + estimate.nll.item(), kl + estimate.kl.item()
            from_prompt += negative_log_likelihood(model, ids, mean, labels=labels).item()
            plain += negative_log_likelihood(model, ids, labels=labels).item()
        total += ids.shape[1] - prompt
    labels, prompt = metrics["labels"], metrics["prompt"]
    assert labels["eval_loss"] == pytest.approx((nll + kl) / total, rel=1e-4)
    assert labels["eval_no_latents"] == pytest.approx(plain / total, rel=1e-4)
    assert labels["eval_from_prompt"] == pytest.approx(from_prompt / total, rel=1e-4)
    assert prompt["eval_from_prompt"] == pytest.approx(from_prompt / total, rel=1e-4)
    assert prompt["eval_loss"] == prompt["eval_nll"] != labels["eval_nll"]


def test_what_map_finds_in_a_prompt_is_read_without_noise(make_trainer, make_model):
    trainer = make_trainer(
        model=make_model(inference_optimizer="map"), infer_from="prompt", max_steps=1, learning_rate=1e-30
    )
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(found["eval_from_prompt"], rel=1e-6)
    trainer.train()
    batch = trainer._last_batch
    read = infer_posterior(trainer.model, **prompts(*(batch.get(n) for n in ("input_ids", "attention_mask", "labels"))))
    torch.testing.assert_close(batch["latents"], read.mean)
    assert batch["latents"].abs().max() > 1e-3


def test_rows_without_a_prompt_are_refused_for_inference_from_it(make_trainer):
    rows = make_rows(8).remove_columns("labels")
    with pytest.raises(ValueError, match="infer_from='prompt' needs rows with a prompt"):
        make_trainer(rows=rows, infer_from="prompt").train()
    trainer = make_trainer(rows=rows)
    trainer.eval_dataset = rows
    assert "eval_from_prompt" not in trainer.evaluate()


def test_rows_that_hold_several_texts_are_refused(make_trainer):
    trainer = make_trainer()
    batch = collate_blocks(list(make_rows(2)))
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None].expand_as(batch["input_ids"])
    with pytest.raises(ValueError, match="hold several texts"):
        trainer.training_step(trainer.model, batch)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"infer_from": "completion"}, "infer_from must be one of labels, text, prompt"),
        ({"gather_during_inference": "once"}, "gather_during_inference must be one of auto, always, never"),
        ({"num_inference_steps": -1}, "num_inference_steps must be 0 or more"),
        ({"inference_learning_rate_end": 0.0}, "inference_learning_rate_end must be above 0 and finite, got 0.0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        LTMTrainingArguments(output_dir=str(tmp_path), **arguments)


def test_other_arguments_and_other_models_are_refused(make_trainer, make_model, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    with pytest.raises(TypeError, match="needs arguments with the fields of DualRateArguments"):
        LTMTrainer(make_model(), TrainingArguments(output_dir=str(tmp_path)))
    sizes = dict(vocab_size=61, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="A 'llama' model is no Latent Thought Model"):
        make_trainer(model=LlamaForCausalLM(LlamaConfig(**sizes)))


def test_mixin_sits_before_any_trainer(make_trainer):
    """A trainer with a loss of its own sees the latents among its inputs."""
    from transformers import Trainer

    seen = []

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(inputs["latents"].shape)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    class OwnLTM(DualRateMixin, Own):
        pass

    trainer = make_trainer(OwnLTM, max_steps=1)
    trainer.train()
    assert seen == [(4, 2, 2, 32)] and logged(trainer, "kl")


# ---------------------------------------------------------------- batches


def test_batch_and_accumulation_are_the_same_training(make_trainer):
    """(8, 1) = (4, 2) = (2, 4), though micro-batches hold different numbers of scored tokens and of padding."""
    runs = []
    for batch_size, accumulation in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, optim="sgd"
        )
        trainer.train()
        runs.append((weights(trainer), logged(trainer, "bound")))
    for trained, bounds in runs[1:]:
        torch.testing.assert_close(trained, runs[0][0], rtol=0, atol=1e-6)
        assert bounds == pytest.approx(runs[0][1], abs=1e-5)


def test_auto_find_batch_size_after_running_out_of_memory(make_trainer, monkeypatch):
    """What was half done leaves no trace: weights and figures are those of the smaller batch from the start."""
    from transformers import Trainer

    step, too_large = Trainer.training_step, []

    def short_of_memory(self, model, inputs, num_items_in_batch=None):
        too_large.append(len(inputs["input_ids"]) > 4)
        if too_large[-2:] == [True, True]:  # in the second half of a step
            too_large.clear()
            raise RuntimeError("CUDA out of memory.")
        return step(self, model, inputs, num_items_in_batch)

    settings = dict(gradient_accumulation_steps=2, train_sampling_strategy="sequential")
    expected = make_trainer(per_device_train_batch_size=4, **settings)
    expected.train()
    monkeypatch.setattr(Trainer, "training_step", short_of_memory)
    found = make_trainer(per_device_train_batch_size=5, auto_find_batch_size=True, **settings)
    found.train()
    assert found._train_batch_size == 4
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    assert torch.equal(weights(found), weights(expected))
    assert logged(found, "kl") == logged(expected, "kl")


def test_rows_grouped_by_length(make_trainer):
    shapes = []

    class Watched(LTMTrainer):
        def _think(self, decoder, inputs):
            shapes.append(inputs["attention_mask"].sum(dim=1) if "attention_mask" in inputs else None)
            return super()._think(decoder, inputs)

    trainer = make_trainer(
        Watched, rows=make_rows(64), train_sampling_strategy="group_by_length", max_steps=16, num_inference_steps=1
    )
    trainer.train()
    spread = [0 if lengths is None else int(lengths.max() - lengths.min()) for lengths in shapes]
    assert sum(spread) / len(spread) < 3  # of lengths from 5 to 15
    assert any(lengths is not None for lengths in shapes)  # and what differs is padded


# ---------------------------------------------------------------- checkpoints


def test_resumed_training_is_the_unbroken_one(make_trainer, tmp_path):
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, slow_gradient="trajectory")
    whole = make_trainer(folder="whole", **settings)
    whole.train()
    resumed = make_trainer(folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(resumed), weights(whole))
    assert logged(resumed, "bound") == logged(whole, "bound")


def test_stops_early_and_keeps_the_best_bound(make_trainer):
    """At a learning rate that only harms, training ends after two evaluations without gain, at the first weights."""
    trainer = make_trainer(
        max_steps=10, learning_rate=1.0, lr_scheduler_type="constant", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    bounds = logged(trainer, "eval_loss")
    best = bounds.index(min(bounds))
    assert trainer.state.global_step == len(bounds) == best + 3 < 10
    assert trainer.state.best_metric == min(bounds)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(bounds), rel=1e-6)
