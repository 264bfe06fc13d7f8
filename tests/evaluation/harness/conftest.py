"""A model that the harness asks: small, its steps and seed fixed."""

from types import SimpleNamespace

import pytest
import torch

from ltm_hf import infer_posterior
from ltm_hf.data import train_tokenizer

LENGTH = 16  # of the model's sequences, in tokens
STEPS, SEED = 4, 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 5, 270)


@pytest.fixture(scope="module")
def make(make_model, tokenizer):
    def make(**overrides):
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return make_model(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **ids | overrides)

    return make


@pytest.fixture(scope="module")
def model(make):
    return make(latent_reader="paper")


@pytest.fixture(scope="module")
def memory(make):
    return make()


@pytest.fixture(scope="module")
def plain(make):
    return make(num_latents=0)


@pytest.fixture(scope="module")
def evaluator(model, tokenizer):
    from ltm_hf.evaluation.lm_eval import HFLTM

    def evaluator(model=model, cls=HFLTM, **settings):
        if cls is HFLTM:
            settings = dict(num_inference_steps=STEPS, inference_seed=SEED) | settings
        return cls(model, tokenizer=tokenizer, **settings)

    return evaluator


@pytest.fixture(scope="session")
def ask():
    """Requests as the harness makes them."""

    def ask(*arguments):
        return [SimpleNamespace(args=args, task_name="task") for args in arguments]

    return ask


@pytest.fixture
def fits(monkeypatch):
    """The contexts that latents are inferred from, in order, as lists of token ids."""
    seen = []

    def watch(model, input_ids, attention_mask=None, labels=None, **settings):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen.extend(row[real.bool()].tolist() for row, real in zip(input_ids, mask, strict=True))
        return infer_posterior(model, input_ids, attention_mask, labels, **settings)

    monkeypatch.setattr("ltm_hf.evaluation.lm_eval.infer_posterior", watch)
    return seen
