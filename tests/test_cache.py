"""A cache by both its names, and the latents in it: they follow its rows, and are read by whoever continues it."""

import copy
import pickle
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.utils import logging

from ltm_hf import LatentPosterior
from ltm_hf.cache_ltm import CACHE, kept_latents
from ltm_hf.memory_ltm import state_of

NAMES = ["cache", "past_key_values"]
GREEDY = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8)


@pytest.fixture
def model(make_model, reader):
    """Attention is full, so that all of a broken cache would be missed."""
    return make_model(latent_reader=reader, sliding_window=None)


@pytest.fixture
def paper(make_model):
    return make_model(latent_reader="paper", sliding_window=None)


@pytest.fixture
def begun(model, ids):
    """A text, half of it written, with its cache."""
    return model.generate(ids, return_dict_in_generate=True, **GREEDY)


# ------------------------------------------------------------------ both names


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_greedy_text_depends_on_a_context_that_a_cache_holds(make_model, ids, sliding_window):
    model = make_model(latent_reader="paper", sliding_window=sliding_window)
    texts = model.generate(ids, **GREEDY)
    assert torch.equal(texts, model.generate(ids, use_cache=False, **GREEDY))
    latents = model.infer_posterior(ids).mean
    for _ in range(8):  # as a model reads whose cache is dropped
        ids = torch.cat((ids, model(ids[:, -1:], latents=latents).logits[:, -1:].argmax(dim=-1)), dim=1)
    assert not torch.equal(texts, ids)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_both_names_mean_the_cache(model, ids, name, caplog):
    latents = model.sample_prior(3, seed=0)
    expected = model(ids, latents=latents).logits[:, 8:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logging.enable_propagation()
        for decoder in (model, model.model):
            begun = decoder(ids[:, :8], latents=latents, use_cache=True)
            rest = decoder(ids[:, 8:], **{name: begun[name]})
            assert getattr(begun, name) is begun[name] is begun.get(name) is rest[CACHE] and name in begun
            assert CACHE in begun.keys() and len(begun.keys() & set(NAMES)) == 1
        again = model(ids[:, 8:], **{name: model(ids[:, :8], latents=latents, use_cache=True)[name]})
        torch.testing.assert_close(again.logits, expected, atol=1e-4, rtol=1e-4)
        setattr(again, name, None)
        assert again.cache is again.past_key_values is None

        written = model.generate(ids, return_dict_in_generate=True, **GREEDY)
        text = written.sequences
        assert isinstance(getattr(written, name), DynamicCache) and written[name] is written[CACHE]
        mine = DynamicCache(config=model.config)
        assert torch.equal(model.generate(ids, **{name: mine}, **GREEDY), text) and mine.get_seq_length() == 19
        beams = model.generate(ids, num_beams=2, return_dict_in_generate=True, **GREEDY)
        assert isinstance(getattr(beams, name), DynamicCache)
        logging.disable_propagation()
    assert not caplog.records


def test_two_caches_are_one_too_many(model, ids):
    both = {name: DynamicCache(config=model.config) for name in NAMES}
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="cache and past_key_values are two names"):
            call(ids, **both)


def test_arguments_that_nobody_reads_are_refused_by_name(model, ids):
    for name in ("past_key_value", "encoder_hidden_states", "token_type_ids", "is_causal", "cache_params"):
        for decoder in (model, model.model):
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                decoder(ids, **{name: None})
    with pytest.raises(TypeError, match="'labels'"):
        model.model(ids, labels=ids)


def test_arguments_of_attention_and_loss_pass(model, ids):
    output = model(ids, output_hidden_states=True, output_cross_attentions=True, latents=model.sample_prior(3, seed=0))
    assert len(output.hidden_states) == 3
    tokens = torch.tensor(ids[:, 1:].numel())
    loss = model(ids, labels=ids, num_items_in_batch=tokens, cu_seq_lens_q=None).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    for reduction in (None, "mean", "none"):  # those that are shifted already go first
        given = model(ids, labels=ids * 0 + 3, shift_labels=shifted, loss_reduction=reduction).loss
        torch.testing.assert_close(given if reduction != "none" else given[:, :11].mean(), loss)


# ------------------------------------------------------------------ latents in it

ROWS = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "by its layers": (lambda cache: [x.batch_select_indices(torch.tensor([2, 1])) for x in cache.layers], [2, 1]),
}


@pytest.mark.parametrize(("change", "rows"), ROWS.values(), ids=ROWS)
def test_latents_follow_the_rows(model, begun, change, rows):
    text, cache = begun.sequences, begun[CACHE]
    expected = model.generate(text, **{CACHE: copy.deepcopy(cache)}, **GREEDY)
    change(cache)
    assert torch.equal(model.generate(text[rows], **{CACHE: cache}, **GREEDY), expected[rows])


def test_copies_of_a_cache_have_its_latents(model, begun):
    expected, layer = (
        model.generate(begun.sequences, **{CACHE: copy.deepcopy(begun[CACHE])}, **GREEDY),
        begun[CACHE].layers[0],
    )
    for other in (copy.deepcopy(begun[CACHE]), pickle.loads(pickle.dumps(begun[CACHE]))):
        assert type(other.layers[0]) is type(layer) and isinstance(layer, type(layer).__mro__[1])
        assert torch.equal(model.generate(begun.sequences, **{CACHE: other}, **GREEDY), expected)


@torch.no_grad()
def test_forward_reads_the_latents_of_its_cache(paper, ids):
    model, begun = paper, paper.generate(ids, return_dict_in_generate=True, **GREEDY)
    last, cache = begun.sequences[:, -1:], begun[CACHE]
    read = model(last, latents=begun.posterior.mean, **{CACHE: copy.deepcopy(cache)}).logits
    torch.testing.assert_close(model(last, **{CACHE: copy.deepcopy(cache)}).logits, read)
    none = model(last, latents=torch.zeros_like(begun.posterior.mean), **{CACHE: cache}).logits
    assert (none - read).abs().max() > 0.1


def test_a_prefix_read_by_forward(model, ids):
    """With latents or a memory, they are the ones of the text; without, nothing that reads some can follow."""
    latents = model.sample_prior(3, seed=0)
    given = {"latents": latents}
    if model.config.has_memory:
        given = {"latent_state": state_of(LatentPosterior(latents, torch.zeros_like(latents)), 4)}
    with torch.no_grad():
        cache = model(ids[:, :8], **given, use_cache=True)[CACHE]
    assert torch.equal(model.generate(ids, **{CACHE: cache}, **GREEDY), model.generate(ids, latents=latents, **GREEDY))
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True)[CACHE]
    for call in (model.generate, lambda ids, **given: model(ids, latents=latents, **given)):
        with pytest.raises(ValueError, match="filled without latents"):
            call(ids, **{CACHE: cache})
    plain = model(ids[:, 8:], **{CACHE: cache}).logits
    torch.testing.assert_close(plain, model(ids).logits[:, 8:], atol=1e-4, rtol=1e-4)


def test_other_thoughts_than_those_in_the_cache_are_refused(paper, ids):
    begun = paper.generate(ids, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ValueError, match="num_latent_samples"):
        paper.generate(begun.sequences, num_latent_samples=2, **{CACHE: begun[CACHE]})


def test_a_static_cache_used_again(model, ids, make_ids):
    cache = StaticCache(model.config, max_cache_len=32)
    model.generate(ids, **{CACHE: cache}, **GREEDY)
    assert kept_latents(cache)
    cache.reset()
    assert not kept_latents(cache)
    others = make_ids(seed=1)
    assert torch.equal(model.generate(others, **{CACHE: cache}, **GREEDY), model.generate(others, **GREEDY))


# ------------------------------------------------------------------ every per-prompt input


@pytest.mark.parametrize("name", ["position_ids", "inputs_embeds"])
def test_latent_samples_repeat_every_input(model, ids, name):
    given = {"position_ids": torch.arange(12).expand(3, -1), "inputs_embeds": model.get_input_embeddings()(ids)}[name]
    if name == "inputs_embeds" and model.config.has_memory:
        with pytest.raises(ValueError, match="and no inputs_embeds"):
            model.generate(ids, inputs_embeds=given, max_new_tokens=2)
        return
    torch.manual_seed(0)
    texts = model.generate(ids, num_latent_samples=2, **{name: given.detach()}, **GREEDY)
    torch.manual_seed(0)
    assert torch.equal(texts, model.generate(ids, num_latent_samples=2, **GREEDY))
