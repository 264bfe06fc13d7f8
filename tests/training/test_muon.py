"""Muon beside AdamW: who gets what, the steps of both, schedules, checkpoints, and what is refused."""

from unittest.mock import MagicMock

import pytest
import torch
from datasets import Dataset

from ltm_hf.training import LTMTrainer
from ltm_hf.training.card import _recipe

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")


@pytest.fixture
def make_trainer(make_arguments, make_model, make_ids):
    def make(model=None, folder="run", **arguments):
        defaults = dict(slow_optimizer="muon", max_steps=4, learning_rate=1e-3)
        blocks = Dataset.from_dict({"input_ids": make_ids(16).tolist()})
        args = make_arguments(folder=folder, **defaults | arguments)
        return LTMTrainer(model or make_model(), args, train_dataset=blocks)

    return make


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_matrices_and_no_others(make_trainer, make_model, tied):
    model = make_model(tie_word_embeddings=tied)
    optimizer = make_trainer(model, weight_decay=0.1, muon_learning_rate=5e-3).create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names.pop(id(parameter))] = (group["muon"], group["lr"], group["weight_decay"])
    assert not names  # every parameter once
    for name, setting in found.items():
        if "proj" in name:
            assert setting == (True, 5e-3, 0.1), name
        else:
            assert setting == (False, 1e-3, 0.1 if "embed" in name or "lm_head" in name else 0.0), name
    assert ("lm_head.weight" in found) == (not tied)


def test_steps_are_those_of_torch(make_trainer, make_model, make_ids):
    """Against two optimisers of torch's on a copy, with weight decay and a learning rate that changes."""
    models, ids = (make_model(), make_model()), make_ids()
    ours = make_trainer(models[0], weight_decay=0.1, muon_learning_rate=1e-3).create_optimizer()
    parameters = dict(models[1].named_parameters())
    hidden = [name for name in parameters if "proj" in name]
    rest = [name for name in parameters if "proj" not in name]
    theirs = [
        torch.optim.Muon([parameters[n] for n in hidden], lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [parameters[n] for n in rest if parameters[n].ndim == 2], "weight_decay": 0.1},
                {"params": [parameters[n] for n in rest if parameters[n].ndim == 1], "weight_decay": 0.0},
            ],
            lr=1e-3,
            betas=(0.9, 0.95),
            fused=True,  # Trainer's default; Muon, in bfloat16, amplifies the last bit of a difference
        ),
    ]
    start = weights(models[0])
    for scale in (1.0, 0.5, 0.25):
        for optimizers, model in (([ours], models[0]), (theirs, models[1])):
            model(ids, labels=ids).loss.backward()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * scale
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=0, atol=0)
    assert (weights(models[0]) - start).abs().max() > 1e-3


def test_the_schedule_moves_both(make_trainer):
    trainer = make_trainer(muon_learning_rate=4e-3)
    assert make_trainer().args.muon_learning_rate == 2e-3  # twice AdamW's, where nothing is said
    trainer.train()
    rates = {group["muon"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates[True] == pytest.approx(4 * rates[False]) == pytest.approx(4e-4)  # cosine to a tenth
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(1e-3)


def test_resumed_training_is_the_unbroken_one(make_trainer, tmp_path):
    settings = dict(save_strategy="steps", save_steps=2)
    whole = make_trainer(folder="whole", **settings)
    whole.train()
    resumed = make_trainer(folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole.model))
    other = make_trainer(folder="other", slow_optimizer="adamw")
    other.train()
    assert not torch.allclose(weights(other.model), weights(whole.model), atol=1e-3)


def test_what_cannot_work_is_refused(make_trainer, make_arguments, monkeypatch):
    with pytest.raises(ValueError, match="slow_optimizer must be one of adamw, muon"):
        make_trainer(slow_optimizer="sgd")
    with pytest.raises(ValueError, match="optim must be adamw_torch or adamw_torch_fused, got 'sgd'"):
        make_trainer(optim="sgd")
    with pytest.raises(ValueError, match="muon_learning_rate is for slow_optimizer='muon'"):
        make_trainer(slow_optimizer="adamw", muon_learning_rate=1e-3)
    with monkeypatch.context() as launched:  # as by accelerate, before there is a model
        launched.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        launched.setattr("accelerate.utils.DeepSpeedPlugin", MagicMock())
        with pytest.raises(ValueError, match="needs whole matrices, and DeepSpeed's ZeRO flattens them: take 'adamw'"):
            make_arguments(slow_optimizer="muon")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="needs torch 2.9 or later"):
        make_trainer()


def test_the_card_names_both(make_trainer):
    trainer = make_trainer(muon_learning_rate=4e-3)
    facts = _recipe(trainer.model.config, trainer.args)
    assert facts["optimiser"].startswith("Muon for the layers' matrices, adamw_torch_fused for the rest, betas")
    assert facts["learning rate"].startswith("0.001 (Muon 0.004), cosine")
