"""Attention in blocks of queries that read their window's keys alone, against SDPA under the whole mask."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ltm_hf import LTMForCausalLM, attention_ltm
from ltm_hf.attention_ltm import band_block

close = torch.testing.assert_close
LENGTH = 29


@pytest.fixture
def block(monkeypatch):
    """Sets the queries of a block, whatever is fast."""

    def set_block(size):
        monkeypatch.setattr(attention_ltm, "band_block", lambda window, length: size)

    set_block(5)
    return set_block


@pytest.fixture
def calls(monkeypatch):
    """(queries, keys) of each call of SDPA."""
    shapes, sdpa = [], attention_ltm.sdpa_attention_forward

    def attend(module, query, key, *others, **kwargs):
        shapes.append((query.shape[2], key.shape[2]))
        return sdpa(module, query, key, *others, **kwargs)

    monkeypatch.setattr(attention_ltm, "sdpa_attention_forward", attend)
    return shapes


@pytest.fixture
def pair(make_model):
    """The default, and the reference."""

    def make(reader="paper", **overrides):
        banded, whole = (make_model(latent_reader=reader, **overrides) for _ in range(2))
        whole.set_attn_implementation("sdpa")
        assert banded.config._attn_implementation == "banded_sdpa"
        return banded, whole

    return make


def padded(ids, side):
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :11] = mask[1, :3] = 0
    elif side == "right":
        mask[0, -11:] = mask[1, -3:] = 0
    return mask


@pytest.mark.parametrize("size", [1, 3, 5, 28])
@pytest.mark.parametrize("window", [2, 4, 6, 28])
def test_windows_and_blocks(pair, make_ids, block, calls, size, window):
    """Every alignment of windows to blocks, one of which is ragged; no block reads more than its window needs."""
    banded, whole = pair(sliding_window=window)
    block(size)
    ids = make_ids(2, LENGTH)
    close(banded(ids).logits, whole(ids).logits, rtol=1e-4, atol=3e-5)
    blocks = [(q, k) for q, k in calls if k <= LENGTH and q <= size]
    assert len(blocks) == 2 * -(-LENGTH // size) and max(k for _, k in blocks) <= min(LENGTH, window + 2 * size - 2)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("overrides", [{}, dict(self_attention="qwen2"), dict(self_attention="qwen3")], ids=str)
def test_gradients_and_padding(pair, make_ids, make_noise, block, calls, side, overrides):
    """Of weights and latents, with fewer keys than queries; padded queries get nothing and give nothing."""
    ids, results = make_ids(3, LENGTH), []
    mask = padded(ids, side)
    for model in pair(**overrides):
        latents = make_noise(3, 2, 2, 32).requires_grad_()
        logits = model(ids, attention_mask=mask, latents=latents).logits[mask.bool()]
        learned = [latents, *model.parameters()]
        results.append([logits, *torch.autograd.grad(logits.square().mean(), learned)])
        assert (5, 8) in calls or (5, 10) in calls
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, rtol=1e-4, atol=1e-5)


def test_inference(pair, reader, make_ids, block):
    ids = make_ids(3, LENGTH)
    mask = padded(ids, "left")
    actual, expected = (model.infer_posterior(ids, mask, num_inference_steps=3) for model in pair(reader))
    close(actual.mean, expected.mean, rtol=1e-4, atol=1e-4)
    close(actual.elbo_trace, expected.elbo_trace, rtol=1e-5, atol=1e-3)


def test_autocast(pair, make_ids, block):
    banded, whole = pair()
    ids = make_ids(2, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        close(banded(ids).logits, whole(ids).logits, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("why", ["mask of the caller's", "full attention", "short", "cache", "cross-attention"])
def test_the_whole_mask_where_it_must_be(pair, make_ids, block, calls, why, monkeypatch):
    ids = make_ids(2, LENGTH)
    given, overrides = dict(use_cache=False), {}
    if why == "mask of the caller's":  # it lets all tokens see all others
        given["attention_mask"] = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    elif why == "full attention":
        overrides = dict(sliding_window=None)
    elif why == "short":
        monkeypatch.setattr(attention_ltm, "band_block", band_block)
    banded, whole = pair(**overrides)
    if why == "cache":
        expected = whole(ids).logits[:, 20:]
        cache = banded(ids[:, :20], use_cache=True).past_key_values
        calls.clear()
        actual = banded(ids[:, 20:], past_key_values=cache).logits
    elif why == "cross-attention":
        given["latents"] = torch.ones(2, 2, 2, 32)
        expected, actual = whole(ids, **given).logits, banded(ids, **given).logits
        assert calls.count((LENGTH, 2)) == 2  # all queries, the layer's latents
        calls[:] = [call for call in calls if call == (LENGTH, 2)]
    else:
        expected, actual = whole(ids, **given).logits, banded(ids, **given).logits
    close(actual, expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 and min(queries for queries, _ in calls) > 5


def test_decoding(pair, reader, make_ids, block):
    banded, whole = pair(reader)
    ids, greedy = make_ids(2, LENGTH), dict(do_sample=False, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(banded.generate(ids, **greedy), whole.generate(ids, **greedy))


@pytest.mark.parametrize(
    ("window", "length", "block"),
    [(16, 511, 0), (16, 512, 32), (256, 575, 0), (256, 576, 128), (256, 1024, 128), (64, 1024, 32)],
)
def test_where_blocks_pay(window, length, block):
    assert band_block(window, length) == block


def test_a_checkpoint_does_not_name_it(memory_model, tmp_path):
    """Neither a default nor a choice is saved, so that other code can load it; a choice is taken."""
    memory_model.save_pretrained(tmp_path)
    assert "banded" not in (tmp_path / "config.json").read_text()
    for given, expected in ((None, "banded_sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=given)
        assert loaded.config._attn_implementation == loaded.model.config._attn_implementation == expected
    assert LTMForCausalLM(memory_model.config).config._attn_implementation == "banded_sdpa"
