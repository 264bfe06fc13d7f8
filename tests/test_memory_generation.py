"""A memory that thinks while it writes: what generate() carries along is what reading all the text anew would find."""

import copy
import pickle

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from ltm_hf.cache_ltm import CACHE, kept_latents
from ltm_hf.memory_ltm import prior_state, state_of

LENGTH, NEW = 7, 24  # chunks of 3, windows of 4
GREEDY = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
SAMPLING = GREEDY | dict(do_sample=True)


def close(actual, expected, tolerance=1e-3):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def model(memory_model):
    return memory_model


@pytest.fixture
def prompts(make_ids):
    return make_ids(length=LENGTH)


def anew(model, ids, start=None, **inputs):
    """Logits of the next token, by a memory that reads all the text so far once more."""
    start = prior_state(model.config, len(ids)) if start is None else start
    return model(ids, latent_state=start, use_cache=False, **inputs).logits[:, -1].detach()


def written(model, ids, num_tokens=NEW, choose=lambda logits: logits.argmax(dim=-1, keepdim=True), **given):
    """One token after the other, each by a memory that reads all the text anew; given(ids) of inputs that grow."""
    steps = []
    for _ in range(num_tokens):
        logits = anew(model, ids, **{name: x(ids) if callable(x) else x for name, x in given.items()})
        steps.append(logits.clone())
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, choose(logits)), dim=1)
    return ids, torch.stack(steps, dim=1)


# ------------------------------------------------------------------ token by token


@pytest.mark.parametrize(
    "overrides", [{}, dict(latent_chunk=1), dict(sliding_window=None), dict(sliding_window=2, latent_chunk=2)], ids=str
)
def test_greedy_text_and_logits_are_those_of_reading_anew(make_model, prompts, overrides):
    model = make_model(**overrides)
    ids, logits = written(model, prompts)
    output = model.generate(prompts, return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert torch.equal(output.sequences, ids)
    close(torch.stack(output.logits, dim=1), logits)
    assert torch.equal(model.generate(prompts, use_cache=False, **GREEDY), ids)
    assert not torch.equal(model.generate(prompts, num_inference_steps=0, **GREEDY), ids)


def test_sampled_text_is_that_of_reading_anew(model, prompts):
    torch.manual_seed(0)
    ids, _ = written(model, prompts, choose=lambda logits: logits.softmax(dim=-1).multinomial(1))
    for kwargs in ({}, dict(use_cache=False)):
        torch.manual_seed(0)
        assert torch.equal(model.generate(prompts, top_k=0, **SAMPLING, **kwargs), ids)


@pytest.mark.parametrize("side", ["left", "batch"])
@pytest.mark.parametrize(
    "kwargs", [{}, dict(num_beams=3), dict(num_inference_steps=3), dict(prefill_chunk_size=2)], ids=str
)
def test_rows_alone_in_a_batch_and_padded(model, prompts, pad_rows, side, kwargs):
    rows = [prompts[0], prompts[1, :3], prompts[2, :1]] if side == "left" else list(prompts)
    batch, mask = pad_rows(rows, "left", extra=0 if side == "batch" else 2)
    together = model.generate(batch, attention_mask=mask, **GREEDY, **kwargs)[:, batch.shape[1] :]
    for row, text in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row[None], **GREEDY, **kwargs)[0, len(row) :], text)


def test_padded_prompts_in_bfloat16(model, prompts, pad_rows):
    """The padded prompt is begun where another row writes already."""
    model.to(torch.bfloat16)
    batch, mask = pad_rows([prompts[0], prompts[2, :1]], "left", extra=2)
    settings = dict(prefill_chunk_size=2, num_inference_steps=2, **GREEDY)
    text = model.generate(batch, attention_mask=mask, **settings)[0, batch.shape[1] :]
    assert torch.equal(model.generate(prompts[:1], **settings)[0, len(prompts[0]) :], text)


def test_text_of_any_length_in_constant_memory(make_model, prompts):
    """Beyond the window many times over, and beyond all positions."""
    model = make_model(max_position_embeddings=16)
    settings = dict(do_sample=False, max_new_tokens=80, min_new_tokens=80)
    sizes = []

    def measure(length):
        cache = DynamicCache(config=model.config)
        model.generate(prompts, **{CACHE: cache}, **settings | dict(max_new_tokens=length, min_new_tokens=length))
        tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        sizes.append(sum(x.numel() for x in (*tensors, *vars(kept_latents(cache)["memory"]).values())))

    for length in (10, 40, 80):
        measure(length)
    assert len(set(sizes)) == 1
    ids = model.generate(prompts, **settings)
    close(anew(model, ids[:, :-1])[0].argmax(), ids[0, -1], 0)
    assert torch.equal(model.generate(prompts, use_cache=False, **settings), ids)


@pytest.mark.parametrize("beams", [1, 3])
def test_caches_change_nothing(model, prompts, pad_rows, beams):
    settings = GREEDY | dict(num_beams=beams)
    batch, mask = pad_rows([prompts[0], prompts[1, :3]], "left")
    expected = model.generate(batch, attention_mask=mask, use_cache=False, **settings)
    for cache in (
        dict(cache_implementation="static"),
        dict(cache_implementation="dynamic"),
        dict(prefill_chunk_size=4),
    ):
        assert torch.equal(model.generate(batch, attention_mask=mask, **settings, **cache), expected)


# ------------------------------------------------------------------ how much it thinks


@torch.no_grad()
def test_no_steps_are_the_plain_decoder(model, prompts):
    ids = prompts
    for _ in range(NEW):
        logits = model(ids).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(prompts, num_inference_steps=0, **GREEDY), ids)


def test_more_steps_refine_the_prompt_s_posterior_and_go_on_from_there(model, prompts):
    """The prompt's tokens do not write again; each that follows does."""
    posterior = model.infer_posterior(prompts, num_inference_steps=4)
    start = state_of(posterior, 4)
    expected, _ = written(
        model, prompts, start=start, latent_writes=lambda ids: torch.arange(ids.shape[1]).expand(3, -1) >= LENGTH
    )
    output = model.generate(prompts, num_inference_steps=4, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(output.sequences, expected) and output.posterior == posterior
    for kwargs in (dict(use_cache=False), dict(prefill_chunk_size=3)):
        assert torch.equal(model.generate(prompts, num_inference_steps=4, **kwargs, **GREEDY), expected)
    assert torch.equal(model.generate(prompts, posterior=posterior, **GREEDY), expected)
    assert not torch.equal(model.generate(prompts, **GREEDY), expected)


def test_once_is_what_reading_the_prompt_gives(model, prompts):
    """Nothing is inferred before writing; the text's posterior is what the memory holds, and goes on to write with."""
    output = model.generate(prompts, return_dict_in_generate=True, **GREEDY)
    assert output.posterior is None
    held = kept_latents(output[CACHE])["memory"].posterior()
    found = model.infer_posterior(output.sequences[:, :-1])  # the last token is not read yet
    close(held.mean, found.mean)
    close(held.log_variance, found.log_variance)


# ------------------------------------------------------------------ given thoughts, and none


def test_given_latents_are_where_the_memory_starts(model, prompts):
    latents = model.sample_prior(3, seed=1)
    start = torch.cat((latents.view(3, 4, 4, 8).transpose(1, 2), torch.ones(3, 4, 4, 1)), dim=-1)
    expected, _ = written(model, prompts, start=start)
    assert torch.equal(model.generate(prompts, latents=latents, **GREEDY), expected)
    unprompted, _ = written(model, torch.ones(3, 1, dtype=torch.long), start=start)
    assert torch.equal(model.generate(latents=latents, **GREEDY), unprompted)
    assert len({tuple(text) for text in unprompted.tolist()}) > 1


def test_thoughts_of_a_prompt(model, prompts):
    """Samples of its posterior, by prompt, then by thought; each goes on with the posterior's precision."""
    torch.manual_seed(0)
    ids = model.generate(prompts, num_latent_samples=2, **GREEDY)
    torch.manual_seed(0)
    posterior = model.infer_posterior(prompts)
    precision = state_of(posterior, 4)[..., -1:]
    silent = dict(latent_writes=lambda ids: torch.arange(ids.shape[1]).expand(3, -1) >= LENGTH)
    for thought in range(2):
        mean = posterior.sample().view(3, 4, 4, 8).transpose(1, 2)
        expected, _ = written(model, prompts, start=torch.cat((mean, precision), dim=-1), **silent)
        assert torch.equal(ids[thought::2], expected)
    several = model.generate(prompts, num_latent_samples=2, num_return_sequences=2, num_beams=2, **GREEDY)
    assert several.shape == (12, LENGTH + NEW) and len({tuple(row) for row in several[:4].tolist()}) == 4


def test_a_sample_for_each_token_where_it_is_asked_for(model, prompts):
    """Noise follows torch's generator; the mean is read by default, when sampling too."""
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(prompts, sample_latents=True, **GREEDY))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    before = torch.get_rng_state()
    model.generate(prompts, **GREEDY)
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------ a memory in a cache


@pytest.fixture
def begun(model, prompts):
    """A text, half of it written, with its cache."""
    return model.generate(prompts, return_dict_in_generate=True, do_sample=False, max_new_tokens=8, min_new_tokens=8)


def test_a_cache_is_continued_with_its_memory(model, prompts, begun):
    expected = model.generate(prompts, **GREEDY | dict(max_new_tokens=8 + NEW, min_new_tokens=8 + NEW))
    for cache in (copy.deepcopy(begun[CACHE]), pickle.loads(pickle.dumps(begun[CACHE])), begun[CACHE]):
        assert torch.equal(model.generate(begun.sequences, **{CACHE: cache}, **GREEDY), expected)


@pytest.mark.parametrize("given", ["latents", "posterior", "num_latent_samples"])
def test_other_thoughts_than_the_cache_s_are_refused(model, begun, given):
    posterior = model.infer_posterior(begun.sequences)
    value = {"latents": posterior.mean, "posterior": posterior, "num_latent_samples": 2}[given]
    with pytest.raises(ValueError, match="The cache holds a memory of its text"):
        model.generate(begun.sequences, **{CACHE: begun[CACHE], given: value}, **GREEDY)


def test_a_static_cache_used_again(model, prompts, make_ids):
    cache = StaticCache(model.config, max_cache_len=40)
    model.generate(prompts, **{CACHE: cache}, **GREEDY)
    cache.reset()
    assert not kept_latents(cache)
    others = make_ids(length=LENGTH, seed=1)
    assert torch.equal(model.generate(others, **{CACHE: cache}, **GREEDY), model.generate(others, **GREEDY))


def test_thinking_again_is_for_latents_of_a_prompt(model, prompts):
    with pytest.raises(ValueError, match="reinfer_every is for latents of a prompt"):
        model.generate(prompts, reinfer_every=4, **GREEDY)


def test_embeddings_alone_have_nothing_to_learn_from(model, prompts):
    with pytest.raises(ValueError, match="learns from token ids"):
        model.generate(inputs_embeds=model.get_input_embeddings()(prompts), max_new_tokens=2)


# ------------------------------------------------------------------ taken back


@pytest.fixture
def recorded(make_model, make_ids):
    """A cache that has read 5, 1 and 9 tokens and can be cropped, and the text."""
    # Before, transformers' windows record but one call (Mistral's, too).
    model = make_model(sliding_window=4 if Version(transformers.__version__) >= Version("5.23") else 64)
    ids, cache = make_ids(1, 20), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :2], latent_state=prior_state(model.config, 1), **{CACHE: cache})
        cache.activate_past_recording()
        for first, last in ((2, 5), (5, 6), (6, 15)):
            model(ids[:, first:last], **{CACHE: cache})
    return model, ids, cache


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 1, 4, 9, 10, 12, 13])
def test_a_cropped_cache_has_forgotten(recorded, tokens):
    """Within the last call, just before it, and further back; then other tokens follow."""
    model, ids, cache = recorded
    kept = 15 - tokens
    cache.crop(-tokens)
    text = torch.cat((ids[:, :kept], ids[:, 15:]), dim=1)
    expected = model(text, latent_state=prior_state(model.config, 1)).logits[:, kept:]
    close(model(ids[:, 15:], **{CACHE: cache}).logits, expected)
    cache.crop(-2)  # from here on
    whole = model(torch.cat((text[:, :-2], ids[:, :3]), dim=1), latent_state=prior_state(model.config, 1)).logits[
        :, -3:
    ]
    close(model(ids[:, :3], **{CACHE: cache}).logits, whole)


@torch.no_grad()
def test_what_was_not_recorded_cannot_be_taken_back(recorded):
    model, ids, cache = recorded
    with pytest.raises(ValueError, match="A memory can forget .* 13 tokens, not 14"):
        cache.crop(-14)
    assert cache.get_seq_length() == 15
    cache.batch_select_indices(torch.tensor([0]))  # rows have moved
    with pytest.raises(ValueError, match="0 tokens, not 1"):
        cache.crop(-1)
    pickle.dumps(cache)


@pytest.mark.parametrize("window", [64, None])
@pytest.mark.parametrize(
    "draft",
    [{}, dict(num_latents=6, num_hidden_layers=1, latent_chunk=2), dict(latent_reader="paper"), dict(num_latents=0)],
    ids=["the same", "another memory", "paper", "no latents"],
)
def test_drafts_only_propose(make_model, make_ids, window, draft):
    """Rejected tokens leave nothing in the memory. (The oldest transformers fails with drafts in a full window.)"""
    model, assistant = make_model(sliding_window=window), make_model(sliding_window=window, **draft)
    prompt, calls = make_ids(1, LENGTH), []
    expected = model.generate(prompt, **GREEDY)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(prompt, assistant_model=assistant, **GREEDY), expected)
    handle.remove()
    assert len(calls) < NEW / 2 or draft  # the draft's own memory was taken back too, or it would propose others


@pytest.mark.parametrize("window", [4, None])
def test_prompt_lookup(make_model, make_ids, window):
    model, prompt = make_model(sliding_window=window), make_ids(1, LENGTH).repeat(1, 3)
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), expected)
