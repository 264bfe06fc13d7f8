"""Thinking again while writing: `reinfer_every` infers the latents of all the text so far, and writes on with them."""

import pytest
import torch
from transformers import GenerationConfig

from ltm_hf.cache_ltm import kept_latents

GREEDY = dict(do_sample=False, max_new_tokens=14, min_new_tokens=14)


@pytest.fixture
def model(paper_model):
    """A memory thinks at every token."""
    return paper_model


@pytest.fixture
def prompts(make_ids):
    return make_ids(length=7)


def continuation(ids, prompt_length):
    return ids[:, prompt_length:].tolist()


def written_in_pieces(model, ids, every, mask=None, num_tokens=14, **kwargs):
    """What `reinfer_every` means: each piece is a call of its own, and the text so far its prompt."""
    mask = torch.ones_like(ids) if mask is None else mask
    for start in range(0, num_tokens, every):
        length = min(every, num_tokens - start)
        settings = dict(max_new_tokens=length, min_new_tokens=length) | kwargs
        ids = model.generate(ids, attention_mask=mask, **settings)
        mask = torch.nn.functional.pad(mask, (0, length), value=1)
    return ids


@pytest.mark.parametrize("kwargs", [{}, dict(use_cache=False), dict(cache_implementation="static")], ids=str)
@pytest.mark.parametrize("every", [1, 4])
def test_thinking_again(model, prompts, every, kwargs):
    expected = written_in_pieces(model, prompts, every, do_sample=False)
    assert torch.equal(model.generate(prompts, reinfer_every=every, **GREEDY, **kwargs), expected)
    assert not torch.equal(expected, model.generate(prompts, **GREEDY))


def test_thinking_again_with_settings_of_the_call(model, prompts):
    settings = dict(num_inference_steps=5, inference_seed=3)
    expected = written_in_pieces(model, prompts, 4, do_sample=False, **settings)
    steps = []
    ids = model.generate(
        prompts, reinfer_every=4, inference_callback=lambda step, *_: steps.append(step), **settings, **GREEDY
    )
    assert torch.equal(ids, expected)
    assert steps == 4 * list(range(5))
    config = GenerationConfig(reinfer_every=4, **settings, **GREEDY, pad_token_id=0, eos_token_id=2)
    assert torch.equal(model.generate(prompts, config), expected)


def test_thinking_again_when_sampling(model, prompts):
    ids = prompts.repeat_interleave(2, dim=0)
    torch.manual_seed(0)
    expected = written_in_pieces(model, ids, 4, do_sample=True)
    torch.manual_seed(0)
    again = model.generate(prompts, reinfer_every=4, **GREEDY | dict(do_sample=True, num_return_sequences=2))
    assert torch.equal(again, expected)


def test_thinking_again_row_by_row(model, prompts, pad_rows):
    rows = [prompts[0], prompts[1, :3]]
    batch, mask = pad_rows(rows, "left")
    together = continuation(model.generate(batch, attention_mask=mask, reinfer_every=4, **GREEDY), batch.shape[1])
    for row, text in zip(rows, together, strict=True):
        assert continuation(model.generate(row[None], reinfer_every=4, **GREEDY), len(row)) == [text]


def test_thinking_again_leaves_given_latents_and_caches(model, prompts):
    """The first tokens are written with what was given; the returned cache is that of the last thought."""
    latents = model.sample_prior(3, seed=0)
    result = model.generate(prompts, latents=latents, reinfer_every=10, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(result.sequences[:, :17], model.generate(prompts, latents=latents, max_new_tokens=10))
    last = model.infer_posterior(result.sequences[:, :17]).mean
    assert torch.equal(kept_latents(result.past_key_values)["latent_key_values"], model.project_latents(last))
    more = model.generate(result.sequences, past_key_values=result.past_key_values, **GREEDY)
    assert torch.equal(more, model.generate(result.sequences, latents=last, **GREEDY))
