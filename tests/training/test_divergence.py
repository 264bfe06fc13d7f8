"""Losses and gradients that are not finite: what they leave untouched, what is logged, and when a run ends."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from ltm_hf import inference_ltm
from ltm_hf.likelihood_ltm import Text
from ltm_hf.training import LTMTrainer, LTMTrainingArguments


class Poisoned(LTMTrainer):
    """The loss or the gradient of one micro-batch of some steps is not finite."""

    steps, kind = (), "loss"

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        self.batches[step] = self.batches.get(step, 0) + 1
        if step not in self.steps or self.batches[step] != 1:
            return loss
        if self.kind == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.nan)
            return loss
        return loss + torch.inf  # whose gradient is finite


class Witness(TrainerCallback):
    """Weights and optimiser before and after each step."""

    def __init__(self):
        self.before, self.after = {}, {}

    @staticmethod
    def copy(model, optimizer):
        return copy.deepcopy([[parameter.data for parameter in model.parameters()], optimizer.state_dict()["state"]])

    def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
        self.before[state.global_step + 1] = self.copy(model, optimizer)

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        self.after[state.global_step] = self.copy(model, optimizer)


def make_trainer(folder, model, steps=(), kind="loss", callbacks=None, **arguments):
    defaults = dict(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2, warmup_steps=0,
        logging_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [list(range(3 + i, 13 + i)) for i in range(9)]})
    trainer = Poisoned(model, LTMTrainingArguments(**defaults | arguments), train_dataset=rows, callbacks=callbacks)
    trainer.steps, trainer.kind, trainer.batches = steps, kind, {}
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, make_model, kind, accumulation):
    witness = Witness()
    trainer = make_trainer(tmp_path, make_model(), (3, 4, 6), kind, [witness], gradient_accumulation_steps=accumulation)
    trainer.train()
    for step in range(1, 9):
        (weights, state), (later, later_state) = witness.before[step], witness.after[step]
        same = all(torch.equal(a, b) for a, b in zip(weights, later, strict=True))
        assert same == (step in (3, 4, 6)), step
        if same:
            torch.testing.assert_close(state, later_state, rtol=0, atol=0)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_steps") for entry in entries] == [None, None, 1, 2, 2, 3, 3, 3]
    assert all(math.isfinite(entry["loss"]) for entry in entries)


def test_three_in_a_row_end_the_run_and_name_the_checkpoint(tmp_path, make_model):
    trainer = make_trainer(tmp_path, make_model(), (2, 3, 5, 6, 7))
    with pytest.raises(FloatingPointError, match=f"3 slow steps in a row, up to step 7, .*{tmp_path}/checkpoint-6.$"):
        trainer.train()
    weights = [load_file(path) for path in tmp_path.glob("checkpoint-*/model.safetensors")]
    assert len(weights) == 6
    assert all(tensor.isfinite().all() for tensors in weights for tensor in tensors.values())


def test_the_row_of_bad_steps_is_remembered(tmp_path, make_model):
    make_trainer(tmp_path, make_model(), (3, 4), max_steps=4).train()
    with pytest.raises(FloatingPointError, match="up to step 5"):
        make_trainer(tmp_path, make_model(), (5,)).train("last")


def test_weights_that_are_not_finite_are_not_saved(tmp_path, make_model):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                next(model.parameters()).data[0] = torch.nan

    trainer = make_trainer(tmp_path, make_model(), callbacks=[Spoil()])
    with pytest.raises(FloatingPointError, match="weights after step 2 .*checkpoint-1.$"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_row_whose_fast_loop_diverges_leaves_the_others_alone(tmp_path, make_model, monkeypatch):
    bad, inputs = 60, torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    inputs[1, 5] = bad
    text = Text.unchecked(inputs)

    def latents_of(trainer):
        (given,) = trainer._think(make_model(), text).passes
        return given["latents"]

    expected = latents_of(make_trainer(tmp_path, make_model()))
    plain, calls = inference_ltm.read, []

    def diverging(model, state, text, latents):
        calls.append(0)
        nll = plain(model, state, text, latents)
        return nll * torch.where((text.input_ids == bad).any(dim=1) & (len(calls) > 1), torch.nan, 1.0)

    monkeypatch.setattr(inference_ltm, "read", diverging)
    trainer = make_trainer(tmp_path, make_model())
    latents = latents_of(trainer)
    others = [0, 2, 3]
    torch.testing.assert_close(latents[others], expected[others], rtol=0, atol=0)
    assert latents[1].isfinite().all() and not torch.equal(latents[1], expected[1])
    assert trainer._sums["non_finite_rows"] == 1
