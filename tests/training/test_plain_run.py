"""What saves time or memory leaves a run as it was: checkpoints and compilation exactly, bfloat16 nearly."""

import pytest
import torch
from datasets import Dataset
from torch._dynamo.utils import counters

from ltm_hf.training import LTMTrainer, LTMTrainingArguments, objectives

BFLOAT16 = dict(bf16=True)
CHECKPOINTS = dict(gradient_checkpointing=True)
COMPILED = dict(torch_compile=True, torch_compile_backend="eager")


@pytest.fixture
def run(make_arguments, make_model, make_ids, monkeypatch):
    """Train for three steps, and evaluate unless that too were to be compiled; the figures, and what was seen."""

    def train(layers=2, evaluate=True, **arguments):
        torch._dynamo.reset()
        counters.clear()
        model = make_model(num_hidden_layers=layers, num_latents=2 * layers)
        seen = {"posteriors": [], "states": set(), "layer_calls": 0, "losses": []}

        def watch(layer, inputs):
            seen["layer_calls"] += 1
            seen["states"].add(inputs[0].dtype)

        def infer_posterior(*args, **kwargs):
            seen["posteriors"].append(inferred(*args, **kwargs))
            return seen["posteriors"][-1]

        class Watched(LTMTrainer):
            def training_step(self, *args, **kwargs):
                seen["losses"].append(super().training_step(*args, **kwargs))
                return seen["losses"][-1]

        if not arguments.get("torch_compile"):  # a hook is one more graph
            model.model.layers[0].mlp.down_proj.register_forward_pre_hook(watch)
        inferred = objectives.infer_posterior
        train, test = (Dataset.from_dict({"input_ids": make_ids(rows=16, seed=seed).tolist()}) for seed in (0, 1))
        defaults = dict(max_steps=3, optim="sgd")  # Adam makes a whole step of a rounding error
        trainer = Watched(
            model, make_arguments(**defaults | arguments), train_dataset=train, eval_dataset=test.select(range(6))
        )
        with monkeypatch.context() as patch:
            patch.setattr(objectives, "infer_posterior", infer_posterior)
            trainer.train()
            figures = [[entry[name] for name in ("loss", "kl", "grad_norm")] for entry in trainer.state.log_history[:3]]
            if evaluate:
                evaluated = trainer.evaluate()
                figures += [[evaluated[name] for name in ("eval_loss", "eval_kl", "eval_no_latents")]]
        seen["figures"] = torch.tensor(figures, dtype=torch.float64)
        seen["weights"] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        return seen

    return train


def assert_float32(seen):
    """Latents, their KL, the likelihood and the weights."""
    for posterior in seen["posteriors"]:
        for tensor in (posterior.mean, posterior.log_variance, posterior.elbo_trace, posterior.kl_divergence()):
            assert tensor.dtype == torch.float32 and tensor.isfinite().all()
        likelihood = posterior.elbo_trace[0]  # at the prior, where the KL is 0
        assert not torch.equal(likelihood, likelihood.bfloat16().float())
    assert {loss.dtype for loss in seen["losses"]} == {torch.float32} == {seen["weights"].dtype}


def assert_same(seen, expected):
    torch.testing.assert_close(seen["figures"], expected["figures"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(seen["weights"], expected["weights"], rtol=0, atol=1e-6)


def test_gradient_checkpointing(run):
    plain, seen = run(), run(**CHECKPOINTS)
    assert_same(seen, plain)
    # A forward pass again for each backward pass: training steps have 2 fast ones and the slow one.
    assert seen["layer_calls"] == plain["layer_calls"] + 3 * 3


def test_bfloat16(run):
    plain, seen = run(), run(**BFLOAT16)
    assert plain["states"] == {torch.float32} and seen["states"] == {torch.bfloat16}
    assert_float32(seen)
    error = (seen["figures"] - plain["figures"]).abs() / plain["figures"]
    assert error[:, 0].max() < 0.02  # loss
    assert error.max() < 0.1  # kl and gradient norm, after steps that a sharp little model amplifies
    assert error.max() > 1e-4  # it is bfloat16


def test_all_at_once(run):
    """Checkpoints and compilation change nothing in bfloat16 either, and do not break each other's graph."""
    small = dict(layers=1, evaluate=False)
    seen = run(**BFLOAT16, **CHECKPOINTS, **COMPILED, **small)
    # Inference before latents and after, learning, and the gain with and without latents.
    assert counters["stats"]["unique_graphs"] == 5 and not counters["graph_break"]
    assert_float32(seen)
    assert_same(seen, run(**BFLOAT16, **small))


def test_muon_in_bfloat16_with_checkpoints(run):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    settings = dict(optim="adamw_torch", slow_optimizer="muon", learning_rate=1e-3)
    seen = run(**BFLOAT16, **CHECKPOINTS, **settings)
    assert_float32(seen)
    assert_same(seen, run(**BFLOAT16, **settings))


def test_reentrant_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        LTMTrainingArguments(str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": True}, **CHECKPOINTS)
