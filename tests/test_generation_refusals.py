"""What generate() refuses: by name, in one sentence, before any computation."""

import pytest
import torch
from transformers import GenerationConfig

from ltm_hf import LatentPosterior


@pytest.fixture
def prompts(make_ids):
    return make_ids(length=7)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(latents=torch.zeros(2, 2, 2, 32)), "latents for 2 sequences and prompts for 3"),
        (dict(latents=torch.zeros(3, 4, 32)), r"latents.*\(3, 4, 32\)"),
        (dict(latents=torch.full((3, 2, 2, 32), torch.nan)), "latents must be a tensor of finite numbers"),
        (dict(latents=[1]), "latents must be a tensor of finite numbers"),
        (dict(latent=torch.zeros(3, 2, 2, 32)), "latent"),
        (dict(posterior=torch.zeros(3, 2, 2, 32)), "posterior must be a LatentPosterior, got Tensor"),
        (dict(posterior=LatentPosterior(*torch.full((2, 3, 2, 2, 32), torch.nan))), "posterior holds numbers.*finite"),
        (dict(posterior=LatentPosterior(*torch.zeros(2, 2, 2, 2, 32))), "latents for 2 sequences and prompts for 3"),
        (dict(latents=torch.zeros(3, 2, 2, 32), num_latent_samples=2), "latents are given"),
        (dict(num_latent_samples=0), "num_latent_samples must be an integer of 1 or more"),
        (dict(num_latent_samples=2.0), "num_latent_samples must be an integer of 1 or more, got 2.0"),
        (dict(num_inference_steps=-1), "num_inference_steps.*-1"),
        (dict(num_inference_step=3), "num_inference_step"),
        (dict(inference_learning_rate=0.0), "inference_learning_rate.*positive"),
        (dict(inference_learning_rate=float("nan")), "inference_learning_rate.*finite"),
        (dict(inference_method="sgd"), "inference_method.*sgd"),
        (dict(inference_lr_schedule="linear"), "inference_lr_schedule.*linear"),
        (dict(inference_noise="none"), "inference_noise.*none"),
        (dict(inference_tolerance=float("nan")), "inference_tolerance must be None or finite"),
        (dict(inference_seed="x"), "inference_seed must be an integer, got 'x'"),
        (dict(sample_latents="no"), "sample_latents must be True, False or None, got 'no'"),
        (dict(reinfer_every=0), "reinfer_every must be an integer of 1 or more, got 0"),
        (dict(reinfer_every=1.5), "reinfer_every must be an integer of 1 or more, got 1.5"),
        (dict(reinfer_every=2, num_beams=2), "greedy search and sampling"),
        (dict(reinfer_every=2, prompt_lookup_num_tokens=2), "greedy search and sampling"),
        (dict(attention_mask=torch.ones(3, 6)), r"attention_mask.*\(3, 7\).*\(3, 6\)"),
        (dict(generation_config={"max_new_tokens": 2}), "generation_config must be a GenerationConfig, got dict"),
    ],
)
def test_bad_arguments(paper_model, prompts, kwargs, words):
    with pytest.raises(ValueError, match=words):
        paper_model.generate(prompts, **dict(max_new_tokens=2) | kwargs)


@pytest.mark.parametrize("kwargs", [dict(num_inference_steps=-1), dict(inference_method="sgd")], ids=str)
def test_bad_settings_are_refused_with_given_latents_too(model, prompts, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        model.generate(prompts, latents=model.sample_prior(3, seed=0), max_new_tokens=2, **kwargs)


@pytest.mark.parametrize("num_latents", [0, 4])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids + 58, r"below vocab_size \(61\)"),
        (lambda ids: ids - 61, "at least 0"),
        (lambda ids: ids.float(), "int64 or int32"),
        (lambda ids: ids[0], r"\(batch, tokens\)"),
        (lambda ids: ids[:, :0], "A prompt must have a token"),
        (lambda ids: ids[:0], "A prompt must have a token"),
        (lambda ids: ids.tolist(), "input_ids must be a tensor"),
        (lambda ids: "hello", "input_ids must be a tensor"),
    ],
    ids=["too large", "negative", "float", "one row", "no token", "no prompt", "lists", "a text"],
)
def test_bad_tokens(make_model, prompts, num_latents, change, words):
    with pytest.raises(ValueError, match=words):
        make_model(num_latents=num_latents).generate(change(prompts), max_new_tokens=2)


def test_embeddings_alone_have_no_tokens_to_infer_from(paper_model, prompts):
    embeds = paper_model.get_input_embeddings()(prompts)
    for kwargs in ({}, dict(posterior=paper_model.infer_posterior(prompts), num_latent_samples=2)):
        with pytest.raises(ValueError, match="input_ids"):
            paper_model.generate(inputs_embeds=embeds, max_new_tokens=2, **kwargs)


def test_embeddings_with_given_latents(paper_model, prompts):
    model, settings = paper_model, dict(do_sample=False, max_new_tokens=8, min_new_tokens=8)
    embeds, posterior = model.get_input_embeddings()(prompts), model.infer_posterior(prompts)
    expected = model.generate(prompts, **settings)
    for given in (dict(posterior=posterior), dict(latents=posterior.mean)):
        assert torch.equal(model.generate(inputs_embeds=embeds, **given, **settings), expected[:, 7:])
    with pytest.raises(ValueError, match="latents for 2 sequences and prompts for 3"):
        model.generate(inputs_embeds=embeds, posterior=posterior[:2], **settings)


def test_the_twin_takes_no_latents(make_model, model, prompts):
    with pytest.raises(ValueError, match="num_latents=0"):
        make_model(num_latents=0).generate(prompts, latents=model.sample_prior(3, seed=0), max_new_tokens=2)


def test_no_thoughts_are_drawn(model):
    with pytest.raises(ValueError, match="batch_size must be an integer of 1 or more, got 0"):
        model.sample_prior(0)


# ------------------------------------------------------------------ continuous batching


@pytest.mark.parametrize(
    "enter",
    [
        lambda model, config: model.generate_batch([[3, 4, 5]], config),
        lambda model, config: model.init_continuous_batching(generation_config=config),  # transformers serve's
        lambda model, config: model.continuous_batching_context_manager(generation_config=config).__enter__(),
        lambda model, config: model.generate(torch.tensor([[3, 4, 5]]), config, cache_implementation="paged"),
    ],
    ids=["generate_batch", "init", "context manager", "paged"],
)
def test_continuous_batching_is_refused(model, enter):
    """It packs requests into one row, where each would read another's latents, or none."""
    with pytest.raises(NotImplementedError, match="latents"):
        enter(model, GenerationConfig(max_new_tokens=2))


def test_the_twin_is_batched_continuously(make_model, make_ids):
    model, config = make_model(num_latents=0), GenerationConfig(max_new_tokens=9, eos_token_id=2, pad_token_id=0)
    prompts = [make_ids(1, length, seed=length) for length in (7, 2)]
    texts = model.generate_batch([prompt[0].tolist() for prompt in prompts], config, warmup=False).values()
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.generated_tokens == model.generate(prompt, config)[0, prompt.shape[1] :].tolist()
