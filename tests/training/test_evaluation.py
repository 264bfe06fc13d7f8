"""Predictions and metrics of one's own, and what an evaluation of nothing says."""

import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from ltm_hf import infer_posterior
from ltm_hf.likelihood_ltm import Text, negative_log_likelihood
from ltm_hf.training import LTMTrainer


def make_rows(count=5, seed=1):
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
def make_trainer(make_model, make_arguments):
    def make(config=None, rows=None, compute_metrics=None, preprocess_logits_for_metrics=None, **arguments):
        return LTMTrainer(
            make_model(**config or {}),
            make_arguments(per_device_eval_batch_size=2, **arguments),
            train_dataset=make_rows(8, seed=0),
            eval_dataset=make_rows() if rows is None else rows,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    return make


def nats(predictions, labels):
    """A token, as anyone would compute them from logits and labels."""
    logits, targets = torch.as_tensor(predictions)[:, :-1], torch.as_tensor(labels)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).item()


# ---------------------------------------------------------------- predictions


EXACT = {  # where eval_loss is that of the logits
    "no latents": dict(num_latents=0),
    "memory": dict(reader="memory"),
}


@pytest.mark.parametrize("kind", EXACT)
def test_logits_are_those_that_are_scored(make_trainer, kind):
    found = make_trainer(EXACT[kind]).predict(make_rows())
    assert found.predictions.shape == (5, 13, 61) and (found.label_ids[:, :3] == -100).all()
    assert nats(found.predictions, found.label_ids) == pytest.approx(found.metrics["test_loss"], rel=1e-5)
    assert found.metrics.get("test_no_latents", 0) != pytest.approx(found.metrics["test_loss"], rel=1e-4)


def test_logits_of_a_bound_are_those_at_the_mean(make_trainer):
    trainer = make_trainer()
    found, total, tokens = trainer.predict(make_rows()), 0, 0
    for row in make_rows():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        mean = infer_posterior(trainer.model, ids, labels=labels, seed=trainer._seed(0)).mean
        with torch.no_grad():
            text = Text.of(trainer.model, ids, labels=labels)
            total += negative_log_likelihood(trainer.model, text, mean).item()
        tokens += sum(label != -100 for label in row["labels"])
    assert nats(found.predictions, found.label_ids) == pytest.approx(total / tokens, rel=1e-5)


def test_metrics_of_ones_own(make_trainer):
    """And Trainer's options for them; beside the figures that are always there."""
    seen = {}

    def compute_metrics(prediction, compute_result=True):
        seen["shapes"] = [prediction.predictions.shape, getattr(prediction.inputs, "shape", None)]
        right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(right.sum() / (prediction.label_ids[:, 1:] != -100).sum())}

    settings = dict(
        compute_metrics=compute_metrics, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
        include_for_metrics=["inputs"],
    )  # fmt: skip
    found = make_trainer(**settings).evaluate()
    assert seen["shapes"] == [(5, 13), (5, 13)]
    assert 0 < found["eval_accuracy"] < 1 and found["eval_loss"] == make_trainer().evaluate()["eval_loss"]
    assert make_trainer(eval_accumulation_steps=1, **settings).evaluate()["eval_accuracy"] == found["eval_accuracy"]
    make_trainer(batch_eval_metrics=True, **settings).evaluate()
    assert seen["shapes"][0][0] == 1  # of the last batch alone


# ---------------------------------------------------------------- of nothing


@pytest.mark.parametrize("nothing", ["no rows", "no labels"])
def test_nothing_to_score_is_not_a_perfect_score(make_trainer, caplog, nothing):
    masked = Dataset.from_list([{"input_ids": list(range(3, 12)), "labels": [-100] * 9}] * 3)
    rows = masked.select([]) if nothing == "no rows" else masked
    found = make_trainer(rows=rows).evaluate()
    names = ("loss", "perplexity_bound", "nll", "kl", "gain", "no_latents", "gain_if_wider")
    assert all(math.isnan(found[f"eval_{name}"]) for name in names)
    assert "eval: no token is scored" in caplog.text
    cause = "eval_dataset is empty" if nothing == "no rows" else "eval_dataset has no token to score: all labels are"
    with pytest.raises(ValueError, match=cause):
        make_trainer(rows=rows, eval_strategy="steps", eval_steps=1).train()
    with pytest.raises(ValueError, match="other has no token to score" if len(rows) else "other is empty"):
        make_trainer(rows={"eval": make_rows(), "other": rows}, eval_strategy="steps", eval_steps=1).train()


def test_a_stream_of_nothing_is_never_the_best(make_trainer):
    masked = [{"input_ids": list(range(3, 12)), "labels": [-100] * 9}] * 3
    stream = Dataset.from_list(masked).to_iterable_dataset()
    settings = dict(eval_strategy="steps", eval_steps=1, save_strategy="best", metric_for_best_model="loss")
    trainer = make_trainer(rows=stream, **settings)
    trainer.train()
    assert trainer.state.best_global_step is None and math.isnan(trainer.state.log_history[1]["eval_loss"])


def test_steps_without_a_token_are_skipped_and_their_cause_is_told(make_trainer, caplog):
    """Rows of which a part has nothing to score, in a stream: two steps go by, a third in a row ends the run."""
    rows = make_rows(20).to_list()
    for index in (*range(4, 12), *range(16, 20)):
        rows[index]["labels"] = [-100] * len(rows[index]["labels"])
    trainer = make_trainer(max_steps=4)
    trainer.train_dataset = Dataset.from_list(rows[:16]).to_iterable_dataset()
    trainer.train()
    assert "slow step 2 was not finite: none of its tokens is scored, all labels are -100; skipped" in caplog.text
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [math.isnan(loss) for loss in logged] == [False, True, True, False]
    trainer = make_trainer(folder="again", max_steps=3)
    trainer.train_dataset = Dataset.from_list(rows[4:12] + rows[16:]).to_iterable_dataset()
    with pytest.raises(FloatingPointError, match="3 slow steps in a row.* none of its tokens is scored"):
        trainer.train()
