"""What is given to a trainer takes effect, or is refused by name before any work; and secrets stay where they are."""

import copy
import math
import pickle

import pytest
import torch
from datasets import Dataset
from transformers.trainer_utils import SchedulerType

from ltm_hf.data import collate_blocks
from ltm_hf.training import LTMTrainer, LTMTrainingArguments, objectives

MEMORY, ENCODER = dict(reader="memory"), dict(inference_method="amortized")


@pytest.fixture
def make_trainer(make_model, make_arguments, make_ids):
    def make(config=None, rows=None, given=None, **arguments):
        rows = Dataset.from_dict({"input_ids": make_ids(rows=8).tolist()}) if rows is None else rows
        model = make_model(**config or {})
        return LTMTrainer(model, make_arguments(**arguments), train_dataset=rows, eval_dataset=rows, **given or {})

    return make


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (2, 2), (2, 20)])
def test_every_schedule_works(make_trainer, name, warmup, steps):
    settings = dict(eval_strategy="steps", eval_steps=1, warmup_steps=warmup, max_steps=steps)
    trainer = make_trainer(lr_scheduler_type=name, **settings)
    trainer.create_optimizer_and_scheduler(steps)
    rates = []
    for _ in range(steps):
        rates.append(trainer._get_learning_rate())
        trainer.optimizer.step()
        trainer.lr_scheduler.step(*([1.0] if name in ("reduce_lr_on_plateau", "greedy") else []))
    assert all(0 <= rate <= 1e-2 for rate in rates) and (steps < 20 or max(rates) == pytest.approx(1e-2))
    if name in ("cosine_with_min_lr", "warmup_stable_decay") and steps == 20:
        assert trainer._get_learning_rate() == pytest.approx(1e-3)  # a tenth


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lr_scheduler_type="linear", lr_scheduler_kwargs={"min_lr_rate": 0.1}), "lr_scheduler_kwargs=.*'linear'"),
        (dict(lr_scheduler_type="constant", lr_scheduler_kwargs={"min_lr": 1.0}), "this schedule takes none"),
        (dict(lr_scheduler_kwargs="{min_lr"), "lr_scheduler_kwargs must be JSON"),
        (dict(lr_scheduler_type="warmup_stable_decay", max_steps=-1), "num_decay_steps"),
        (dict(learning_rate=math.nan), "learning_rate must be 0 or more, got nan"),
        (dict(per_device_train_batch_size=0), "per_device_train_batch_size must be 1 or more, got 0"),
        (dict(gradient_accumulation_steps=-1), "gradient_accumulation_steps must be 1 or more, got -1"),
        (dict(max_steps=0), "max_steps must be 1 or more, or -1"),
        (dict(seed=-1), "seed must be .*, got -1"),
        (dict(label_names=["targets"]), r"label_names must be \['labels'\]"),
    ],
)
def test_arguments_are_refused_by_name(make_arguments, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_arguments(**arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(given=dict(compute_metrics=print), prediction_loss_only=True), "compute_metrics takes predictions"),
        (dict(given=dict(optimizer_cls_and_kwargs=(torch.optim.SGD, {})), slow_optimizer="muon"), "exclude each other"),
        (dict(config=MEMORY, neftune_noise_alpha=5.0), "neftune_noise_alpha does not go with a memory"),
        (dict(config=MEMORY, objective="elbo"), "objective='elbo' fits latents to a whole text"),
        (dict(config=MEMORY, inference_learning_rate=0.5), "inference_learning_rate is of inference before"),
        (dict(config=MEMORY, num_inference_steps=2), "num_inference_steps must be 1 or None"),
        (dict(objective="prediction"), "objective='prediction' .* needs a model with latent_reader='memory'"),
        (dict(config=ENCODER, num_inference_steps=2), "num_inference_steps is of inference"),
        (dict(config=ENCODER, objective="elbo_trajectory"), "'elbo_trajectory' is of inference"),
    ],
)
def test_options_that_would_do_nothing_are_refused(make_trainer, settings, message):
    if settings.get("slow_optimizer") and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


# ---------------------------------------------------------------- rows


def padded(rows, side, labels=False):
    """With padding that looks like text, and labels that do not tell it."""
    padding = [[7] * (4 + index % 3) for index in range(len(rows))]
    join = (lambda row, more: row + more) if side == "right" else (lambda row, more: more + row)
    columns = {"input_ids": [join(row, more) for row, more in zip(rows, padding, strict=True)]}
    zeros = [[0] * len(more) for more in padding]
    columns["attention_mask"] = [join([1] * len(row), more) for row, more in zip(rows, zeros, strict=True)]
    return Dataset.from_dict(columns | ({"labels": columns["input_ids"]} if labels else {}))


@pytest.mark.parametrize("labels", [False, True], ids=["", "with labels"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_rows_is_neither_scored_nor_explained(make_trainer, make_ids, reader, side, labels):
    rows, config = make_ids(rows=8).tolist(), dict(reader=reader)
    plain, found = make_trainer(config), make_trainer(config, rows=padded(rows, side, labels), folder="padded")
    assert found.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    logs = []
    for trainer in (plain, found):
        trainer.train()
        logs.append([(entry["loss"], entry["gain"]) for entry in trainer.state.log_history if "gain" in entry])
    assert torch.tensor(logs[0]).allclose(torch.tensor(logs[1]), rtol=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dict(input_ids=[]), "A row of the batch has no tokens"),
        (dict(input_ids=[4, 5], attention_mask=[0, 0]), "A row of the batch has no tokens"),
        (dict(input_ids=[4, 5], labels=[4]), "A row has 2 input_ids, 1 labels"),
        (dict(input_ids=[4, 5], attention_mask=[1]), "2 input_ids, 2 labels and an attention_mask of 1"),
        (dict(input_ids=[4, 5, 6], attention_mask=[1, 0, 1]), "0 for padding, at its ends alone"),
        (dict(input_ids=[4, 5], attention_mask=[2, 1]), "must be 1 for its tokens and 0 for padding"),
    ],
)
def test_rows_that_cannot_be_read(row, message):
    for rows in ([row, {"input_ids": [6, 7, 8]}], [{"input_ids": [6, 7, 8]}, row]):
        with pytest.raises(ValueError, match=message):
            collate_blocks(rows)


def test_columns_that_would_be_left_out(make_trainer):
    ids, masks = [[4, 5, 6]] * 4, [[0, 0, 1]] * 4
    for name in ("completion_mask", "assistant_masks", "position_ids", "label_ids"):
        for rows in (Dataset.from_dict({"input_ids": ids, name: masks}), [{"input_ids": ids[0], name: masks[0]}] * 4):
            with pytest.raises(ValueError, match=f"column '{name}', which would be left out"):
                make_trainer(rows=rows).train()
    harmless = Dataset.from_dict({"input_ids": ids, "special_tokens_mask": masks, "text": ["a"] * 4, "url": ["b"] * 4})
    make_trainer(rows=harmless).train()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "train_dataset is empty"),
        ([{"input_ids": [4, 5], "labels": [-100, -100]}, {"input_ids": [4]}], "train_dataset has no token to score"),
    ],
)
def test_a_training_set_with_nothing_to_learn(make_trainer, rows, message):
    for kind in (rows, Dataset.from_list(rows)) if rows else (rows,):
        with pytest.raises(ValueError, match=message):
            make_trainer(rows=kind).train()


# ---------------------------------------------------------------- noise on embeddings


@pytest.mark.parametrize("config", [{}, dict(inference_method="amortized")], ids=["steps", "encoder"])
def test_noise_on_embeddings_is_for_the_slow_step_alone(make_trainer, monkeypatch, config):
    """Weights stay as they are: posteriors, gain and evaluation are those without it, and the loss is not."""
    found = []
    for alpha in (None, 50.0):
        means, trainer = [], make_trainer(config, folder=str(alpha), learning_rate=0.0, neftune_noise_alpha=alpha)

        def watched(real, means):
            def infer(*args, **kwargs):
                posterior = real(*args, **kwargs)
                means.append(posterior.mean.detach())
                return posterior

            return infer

        for name in ("infer_posterior", "amortized_posterior"):
            monkeypatch.setattr(objectives, name, watched(getattr(objectives, name), means))
        trainer.train()
        monkeypatch.undo()
        logs = [entry for entry in trainer.state.log_history if "gain" in entry]
        found.append((torch.stack(means), [entry["gain"] for entry in logs], trainer.evaluate()["eval_loss"]))
        found[-1] += ([entry["loss"] for entry in logs],)
    (means, gains, evaluated, losses), (noisy_means, noisy_gains, noisy_evaluated, noisy_losses) = found
    assert torch.equal(means, noisy_means) and gains == noisy_gains and evaluated == noisy_evaluated
    assert all(abs(noisy - loss) > 1e-3 for noisy, loss in zip(noisy_losses, losses, strict=True))


# ---------------------------------------------------------------- secrets


def test_secrets_are_not_pickled(tmp_path, make_trainer, make_model):
    arguments = LTMTrainingArguments(
        str(tmp_path / "run"), hub_token="hf_SECRET", deepspeed=None, use_cpu=True, report_to="none"
    )
    arguments.more = {"comet": {"api_key": "SECRET", "project": "mine"}}
    loaded = pickle.loads(pickle.dumps(arguments))
    assert loaded.hub_token is None and loaded.more == {"comet": {"api_key": None, "project": "mine"}}
    assert loaded.learning_rate == arguments.learning_rate and loaded.output_dir == arguments.output_dir
    for kept in (arguments, copy.copy(arguments), copy.deepcopy(arguments)):
        assert kept.hub_token == "hf_SECRET" and kept.more["comet"]["api_key"] == "SECRET"
    LTMTrainer(make_model(), arguments).save_model()
    assert b"SECRET" not in (tmp_path / "run" / "training_args.bin").read_bytes()
