"""The slow step makes no logits of the whole batch, unless someone reads them; with them it learns the same."""

import pytest
import torch
from datasets import Dataset

from ltm_hf import losses_ltm
from ltm_hf.training import LTMTrainer

VOCABULARY, HEAD = 61, "lm_head.weight"


@pytest.fixture
def rows(make_ids):
    ids = make_ids(8).tolist()
    return Dataset.from_dict(
        {"input_ids": ids, "labels": [[-100] * (i % 4) + row[i % 4 :] for i, row in enumerate(ids)]}
    )


@pytest.fixture
def seen(monkeypatch):
    """Where the head learns, the most tokens whose gradients were taken in chunks, and that went to it at once."""
    monkeypatch.setattr(losses_ltm, "CHUNK_BYTES", 10 * 4 * VOCABULARY)
    seen, learning, forward = (
        {"in chunks": 0, "at once": 0},
        losses_ltm._LearningHeadLoss.forward,
        torch.nn.Linear.forward,
    )

    def chunked(ctx, states, *others):
        seen["in chunks"] = max(seen["in chunks"], len(states))
        return learning(ctx, states, *others)

    def linear(module, states):
        if module.out_features == VOCABULARY and torch.is_grad_enabled() and module.weight.requires_grad:
            seen["at once"] = max(seen["at once"], states.shape[:-1].numel())
        return forward(module, states)

    monkeypatch.setattr(losses_ltm._LearningHeadLoss, "forward", staticmethod(chunked))
    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    return seen


@pytest.fixture
def train(make_arguments, make_model, rows):
    """The weights, and the logged figures of two steps."""

    def train(trainer_class=LTMTrainer, model=None, given=None, **arguments):
        model = model or make_model()
        trainer = trainer_class(model, make_arguments(**arguments), train_dataset=rows, **given or {})
        trainer.train()
        figures = [[entry[name] for name in ("loss", "gain", "grad_norm")] for entry in trainer.state.log_history[:-1]]
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]), torch.tensor(figures)

    return train


class WithLogits(LTMTrainer):
    """Asks for what the model puts out."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)
        assert outputs.logits.shape[-1] == VOCABULARY
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(gradient_accumulation_steps=2, per_device_train_batch_size=2),
        dict(gradient_checkpointing=True),
        dict(bf16=True),
        dict(objective="elbo_trajectory"),
        dict(average_tokens_across_devices=False),
    ],
    ids=str,
)
def test_logits_change_nothing(train, seen, arguments):
    """What is learned is that of all logits, with rows of which not all tokens are scored."""
    weights, figures = train(**arguments)
    rows = arguments.get("per_device_train_batch_size", 4)
    assert 0 < seen["in chunks"] <= rows * 11 and not seen["at once"]
    seen["in chunks"] = 0
    expected_weights, expected_figures = train(WithLogits, **arguments)
    assert seen == {"in chunks": 0, "at once": rows * 12}
    tolerance = 1e-2 if "bf16" in arguments else 1e-4
    torch.testing.assert_close(figures, expected_figures, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights, expected_weights, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("arguments", [dict(), dict(gradient_checkpointing=True), dict(bf16=True)], ids=str)
def test_logits_change_nothing_of_a_memory(train, make_model, seen, arguments):
    """Whose loss and errors are of the same logits, a chunk of the text after the other."""
    weights, figures = train(model=make_model("memory"), **arguments)
    assert seen == {"in chunks": 0, "at once": 0}
    expected_weights, expected_figures = train(WithLogits, model=make_model("memory"), **arguments)
    assert seen == {"in chunks": 0, "at once": 4 * 12}
    tolerance = 1e-2 if "bf16" in arguments else 1e-4
    torch.testing.assert_close(figures, expected_figures, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights, expected_weights, rtol=tolerance, atol=10 * tolerance)


def test_a_loss_function_reads_logits(train, seen):
    shapes = []

    def loss(outputs, labels, num_items_in_batch=None):
        shapes.append(outputs.logits.shape)
        return outputs.logits.square().mean()

    train(given=dict(compute_loss_func=loss))
    assert shapes == [(4, 12, VOCABULARY)] * 2 and not seen["in chunks"]


def test_plain_decoder(train, make_model, make_arguments, rows, seen):
    LTMTrainer(make_model(num_latents=0), make_arguments(), train_dataset=rows).train()
    assert seen["in chunks"] and not seen["at once"]


@pytest.mark.parametrize("on", ["layers", "head", "head whole"])
def test_adapters(train, make_model, seen, on):
    """Of the layers: the head is frozen, and has no gradient to take. Of the head, or a copy of it: all tokens."""
    peft = pytest.importorskip("peft")
    given = {"layers": dict(), "head": dict(), "head whole": dict(modules_to_save=["lm_head"])}[on]
    targets = {"layers": ["q_proj"], "head": ["lm_head"], "head whole": ["q_proj"]}[on]

    def adapted():
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **given)
        return peft.get_peft_model(make_model(tie_word_embeddings=False), config)

    weights, figures = train(model=adapted())
    expected_weights, expected_figures = train(WithLogits, model=adapted())
    assert not seen["in chunks"]
    torch.testing.assert_close(figures[:, :2], expected_figures[:, :2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-3)
