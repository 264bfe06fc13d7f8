"""generate() infers prompts of different lengths in buckets: the posterior of one padded batch, with less padding."""

import importlib
import itertools
import random

import pytest
import torch

from ltm_hf.generation_ltm import buckets, infer_in_buckets

generation = importlib.import_module("ltm_hf.generation_ltm")
DEFAULT = generation._BUCKET
GREEDY = dict(do_sample=False, max_new_tokens=4, min_new_tokens=4)
TWICE = dict(num_inference_steps=2)  # a memory infers before it writes where it takes more than one step


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the batches that were inferred. A bucket costs 4 tokens, so that short prompts make several."""
    shapes, infer = [], generation.infer_posterior
    monkeypatch.setattr(generation, "_BUCKET", 4)
    monkeypatch.setattr(
        generation,
        "infer_posterior",
        lambda model, ids, *args, **kwargs: shapes.append(tuple(ids.shape)) or infer(model, ids, *args, **kwargs),
    )
    return shapes


@pytest.fixture
def rows(make_ids):
    """Prompts of 12, 3, 20, 0, 4, 11, 1 and 19 tokens."""
    return [make_ids(1, length, seed=length)[0] for length in (12, 3, 20, 0, 4, 11, 1, 19)]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same_posterior(actual, expected):
    for name in ("mean", "log_variance"):
        close(getattr(actual, name), getattr(expected, name))
    close(actual.elbo_trace, expected.elbo_trace, 1e-4)
    assert torch.equal(actual.keys, expected.keys)


# ------------------------------------------------------------------ which prompts go together


def test_buckets_by_hand():
    """Two short and two long prompts, 400 tokens apart; then 127, too few to pay for a second bucket, and 129."""
    assert buckets([500, 100, 490, 90]) == [[3, 1], [2, 0]]
    assert buckets([129, 2, 129, 2]) == [[1, 3, 0, 2]]
    assert buckets([131, 2, 131, 2]) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("lengths", [[], [7], [7] * 5, [0, 0], [0, 255]], ids=str)
def test_few_or_equal_lengths_are_one_bucket(lengths):
    assert buckets(lengths) == [list(range(len(lengths)))][: len(lengths)]


def test_no_partition_has_less_padding():
    generator = random.Random(0)
    for _ in range(20):
        lengths = [generator.randint(0, 1024) for _ in range(8)]

        def cost(parts):
            return sum(len(part) * max(part) + 256 for part in parts)

        places = itertools.chain.from_iterable(itertools.combinations(range(1, 8), n) for n in range(8))
        ordered = sorted(lengths)
        least = min(cost([ordered[a:b] for a, b in itertools.pairwise((0, *cuts, 8))]) for cuts in places)
        parts = buckets(lengths)
        assert cost([[lengths[index] for index in part] for part in parts]) == least
        assert sorted(sum(parts, [])) == list(range(8))


# ------------------------------------------------------------------ the posterior


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("method", ["memory", "natural", "adamw"])
def test_the_posterior_of_the_padded_batch_and_of_each_alone(make_model, rows, pad_rows, calls, side, method):
    model = make_model(latent_reader="memory" if method == "memory" else "paper")
    if side == "both":
        left, right = (pad_rows(rows, one, fill=9) for one in ("left", "right"))
        batch, mask = (
            torch.stack(pair)[torch.arange(8) % 2, torch.arange(8)] for pair in zip(left, right, strict=True)
        )
    else:
        batch, mask = pad_rows(rows, side, fill=9)
    settings = dict(num_inference_steps=3, seed=1, inference_method=None if method == "memory" else method)
    posterior = infer_in_buckets(model, batch, mask, **settings)
    padded = model.infer_posterior(batch, mask, **settings)
    for name in ("mean", "log_variance"):
        close(getattr(posterior, name), getattr(padded, name), 1e-4)
    assert torch.equal(posterior.keys, padded.keys)
    for index, row in enumerate(rows):
        if len(row):
            alone = model.infer_posterior(row[None], **settings)
            close(posterior.mean[index], alone.mean[0], 1e-4)
            close(posterior.log_variance[index], alone.log_variance[0], 1e-4)
        if len(row) > 1:
            close(posterior.elbo_trace[:, index], alone.elbo_trace[:, 0], 1e-4)
        else:
            assert not posterior.mean[index].any() and not posterior.log_variance[index].any()
    if side != "both":
        assert sorted(calls) == [(2, 1), (2, 4), (2, 12), (2, 20)]  # no column that is padding in all rows


def test_a_gap_in_a_prompt_is_kept(model, make_ids, calls):
    """What a mask leaves out between two tokens still parts them."""
    batch, mask = make_ids(3, 14), torch.ones(3, 14, dtype=torch.long)
    mask[0, :8] = mask[1, 9] = mask[2, 2:] = 0
    mask[1, -1] = mask[0, 10] = 0
    same_posterior(infer_in_buckets(model, batch, mask), model.infer_posterior(batch, mask))
    assert len(calls) > 1


def test_prompts_of_one_length_are_inferred_at_once(model, make_ids, pad_rows, calls):
    ids = make_ids(3, 7)
    expected = model.infer_posterior(ids)
    for side in ("left", "right"):
        posterior = infer_in_buckets(model, *pad_rows(list(ids), side, extra=5))
        same_posterior(posterior, expected)
    same_posterior(infer_in_buckets(model, ids), expected)
    assert calls == 3 * [(3, 7)]


def test_by_default_a_bucket_must_save_256_tokens(paper_model, make_ids, pad_rows, calls, monkeypatch):
    monkeypatch.setattr(generation, "_BUCKET", DEFAULT)
    for short, expected in ((4, [(5, 60)]), (5, [(5, 2), (1, 60)])):
        calls.clear()
        lengths = [60, *[2] * short]
        batch, mask = pad_rows([make_ids(1, length)[0] for length in lengths], "left", extra=0)
        infer_in_buckets(paper_model, batch, mask, num_inference_steps=1)
        assert calls == expected


def test_buckets_stop_by_themselves(paper_model, rows, pad_rows, calls):
    """Each row's posterior is its own whatever its bucket; a trace that ended early repeats its last value, or 0."""
    model = paper_model
    batch, mask = pad_rows(rows, "left")
    settings = dict(num_inference_steps=24, inference_tolerance=0.1)
    posterior = infer_in_buckets(model, batch, mask, **settings)
    padded = model.infer_posterior(batch, mask, **settings)
    close(posterior.mean, padded.mean, 1e-4)
    close(posterior.log_variance, padded.log_variance, 1e-4)
    assert len(calls) == 4 and posterior.elbo_trace.shape == padded.elbo_trace.shape
    (nothing,) = (model.infer_posterior(row[None], **settings) for row in rows if len(row) == 1)
    assert len(nothing.elbo_trace) == 0 and not posterior.elbo_trace[:, [3, 6]].any()
    pair = model.infer_posterior(*pad_rows([rows[1], rows[4]], "left"), **settings).elbo_trace
    assert 0 < len(pair) < len(posterior.elbo_trace)
    close(posterior.elbo_trace[: len(pair), [1, 4]], pair, 1e-4)
    close(posterior.elbo_trace[len(pair) :, [1, 4]], pair[-1:].expand(len(posterior.elbo_trace) - len(pair), 2), 1e-4)


def test_failures_of_all_buckets_are_counted(make_model, reader, rows, pad_rows, calls):
    model = make_model(latent_reader=reader, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = float("nan")
    rows = [row.clamp(max=59) for row in rows]
    for index in (1, 2, 7):
        rows[index][0] = 60
    posterior = infer_in_buckets(model, *pad_rows(rows, "left"))
    assert len(calls) == 4 and posterior.num_non_finite == 3
    assert posterior.mean.isfinite().all() and not posterior.mean[[1, 2, 7]].any() and posterior.mean[[0, 4, 5]].any()


def test_where_processes_go_together_each_infers_once(model, rows, pad_rows, calls, tmp_path):
    """Or their forwards, in which sharded weights are gathered, would not meet."""
    batch, mask = pad_rows(rows, "left")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        infer_in_buckets(model, batch, mask, num_inference_steps=1)
        assert len(calls) == 4
        calls.clear()
        infer_in_buckets(model.train(), batch, mask, num_inference_steps=1)
        assert calls == [(8, 20)]
        model.eval().model.layers[0].unshard = None  # as FSDP2 marks a module
        infer_in_buckets(model, batch, mask, num_inference_steps=1)
        assert calls == 2 * [(8, 20)]
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------ generate()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_generate(model, rows, pad_rows, calls, context):
    rows = [row for row in rows if len(row)]
    batch, mask = pad_rows(rows, "left")
    with context():
        result = model.generate(batch + 0, attention_mask=mask + 0, return_dict_in_generate=True, **TWICE, **GREEDY)
    assert len(calls) == 3
    close(result.posterior.mean, model.infer_posterior(batch, mask, **TWICE).mean, 1e-4)
    assert not result.posterior.mean.is_inference()
    for row, text in zip(rows, result.sequences[:, -4:], strict=True):
        alone = model.generate(row[None], **TWICE, **GREEDY)
        assert torch.equal(alone[0, len(row) :], text)


def test_a_callback_sees_the_whole_batch(model, rows, pad_rows, calls):
    seen = []
    batch, mask = pad_rows(rows, "left")

    def callback(step, latents, elbo):
        seen.append((step, len(latents), len(elbo)))

    model.generate(batch, attention_mask=mask, num_inference_steps=2, inference_callback=callback, **GREEDY)
    assert seen == [(0, 8, 8), (1, 8, 8)] and calls == [(8, 20)]


def test_thinking_again_in_buckets(paper_model, make_ids, pad_rows, calls):
    """All the text so far is inferred from: prompts of 12 and 3 tokens, then 14 and 5."""
    rows = [make_ids(1, 12)[0], make_ids(1, 3)[0]]
    batch, mask = pad_rows(rows, "left", extra=0)
    model = paper_model
    texts = model.generate(batch, attention_mask=mask, reinfer_every=2, **GREEDY)
    assert calls == [(1, 3), (1, 12), (1, 5), (1, 14)]
    for row, text in zip(rows, texts[:, -4:], strict=True):
        assert torch.equal(model.generate(row[None], reinfer_every=2, **GREEDY)[0, len(row) :], text)
