"""Every way of decoding that transformers has, with latents: they hold the text that plain forwards would write."""

import copy
from threading import Thread

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ltm_hf import LTMForCausalLM
from ltm_hf.memory_ltm import prior_state

# Three windows and more, and no early end.
GREEDY = dict(do_sample=False, max_new_tokens=14, min_new_tokens=14)
SAMPLING = GREEDY | dict(do_sample=True, top_k=0)  # transformers' own default is top_k=50
WARPERS = dict(
    temperature=TemperatureLogitsWarper, top_k=TopKLogitsWarper, top_p=TopPLogitsWarper, min_p=MinPLogitsWarper
)
SAMPLERS = [
    dict(temperature=0.5),
    dict(top_k=5),
    dict(top_p=0.6),
    dict(min_p=0.2),
    dict(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05),
]


@pytest.fixture
def prompts(make_ids):
    return make_ids(length=7)


class OddOnly(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 0, -torch.inf)


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


# ------------------------------------------------------------------ sampling


def reading(model, ids, latents):
    """What a plain forward is given beside the text: its latents, or where its memory starts."""
    return {"latent_state": prior_state(model.config, len(ids))} if model.config.has_memory else {"latents": latents}


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@torch.no_grad()
def test_samplers_draw_as_a_loop_of_plain_forwards(model, prompts, sampler):
    torch.manual_seed(0)
    ids, latents = prompts, None if model.config.has_memory else model.infer_posterior(prompts).sample()
    warpers = LogitsProcessorList(WARPERS[name](value) for name, value in sampler.items())
    for _ in range(14):
        logits = model(ids, **reading(model, ids, latents)).logits[:, -1].clone()
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, warpers(ids, logits).softmax(dim=-1).multinomial(1)), dim=1)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompts, **SAMPLING | sampler), ids)


@pytest.mark.parametrize("limit", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0), dict(temperature=1e-6)], ids=str)
def test_samplers_reach_greedy_in_the_limit(model, prompts, limit):
    expected = model.generate(prompts, **GREEDY)
    assert torch.equal(model.generate(prompts, sample_latents=False, **SAMPLING | limit), expected)


@pytest.mark.parametrize("sampler", SAMPLERS[-1:], ids=str)
def test_padded_rows_are_sampled_from_the_distributions_they_have_alone(model, prompts, pad_rows, sampler):
    rows = [prompts[0], prompts[1, :3], prompts[2, :1]]
    batch, mask = pad_rows(rows, "left")
    settings = SAMPLING | sampler | dict(sample_latents=False, return_dict_in_generate=True, output_scores=True)
    together = model.generate(batch, attention_mask=mask, **settings).scores[0]
    for row, scores in zip(rows, together, strict=True):
        alone = model.generate(row[None], **settings).scores[0][0]
        torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-4)


def test_beam_sampling(model, prompts):
    settings = SAMPLING | dict(num_beams=3, num_return_sequences=3, top_k=8)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(model.generate(prompts, use_cache=use_cache, **settings))
    assert torch.equal(*texts)
    assert torch.equal(texts[0][:, :7], prompts.repeat_interleave(3, dim=0))
    assert len({tuple(text) for text in texts[0][:3].tolist()}) == 3
    assert not torch.equal(model.generate(prompts, **settings), texts[0])


# ------------------------------------------------------------------ one row, in a batch, padded


@pytest.mark.parametrize(
    "mode",
    [
        dict(num_beams=4, num_return_sequences=3, length_penalty=0.5),
        dict(num_beams=3, early_stopping=True, min_new_tokens=1),
        dict(repetition_penalty=1.6),
        dict(no_repeat_ngram_size=2),
        dict(bad_words_ids=[[7], [20, 30]], sequence_bias={(9,): 3.0}),
        dict(prefill_chunk_size=3, num_beams=2),
        dict(num_inference_steps=7, num_beams=2),
    ],
    ids=str,
)
def test_a_row_reads_the_same_alone_in_a_batch_and_padded(model, prompts, pad_rows, mode):
    settings = GREEDY | dict(suppress_tokens=[model.config.pad_token_id]) | mode  # a pad is a repetition in some rows
    several = mode.get("num_return_sequences", 1)
    alone = [model.generate(row[None], **settings)[:, 7:] for row in prompts]
    for row, text in zip(model.generate(prompts, **settings)[:, 7:].split(several), alone, strict=True):
        assert torch.equal(row[:, : text.shape[1]], text) and (row[:, text.shape[1] :] == 0).all()

    rows = [prompts[0], prompts[1, :3], prompts[2, :1]]
    batch, mask = pad_rows(rows, "left")
    padded = model.generate(batch, attention_mask=mask, **settings)[:, batch.shape[1] :].split(several)
    for row, text in zip(rows, padded, strict=True):
        alone = model.generate(row[None], **settings)[:, len(row) :]
        assert torch.equal(text[:, : alone.shape[1]], alone) and (text[:, alone.shape[1] :] == 0).all()


def test_forbidden_tokens_do_not_appear(model, prompts):
    first = model.generate(prompts, **GREEDY)[0, 7].item()
    banned = model.generate(prompts, bad_words_ids=[[first]], **GREEDY)[:, 7:]
    assert first not in banned
    assert (model.generate(prompts, logits_processor=LogitsProcessorList([OddOnly()]), **GREEDY)[:, 7:] % 2 == 1).all()


# ------------------------------------------------------------------ drafts


@pytest.mark.parametrize("steps", [0, 16])
def test_a_draft_that_thinks_for_another_number_of_steps(make_model, prompts, steps, monkeypatch):
    """The text is that of the model's own thought; the draft only proposes from its."""
    model = make_model(latent_reader="paper", sliding_window=64)  # 5.17 cannot take tokens out of a full window
    draft = copy.deepcopy(model)
    draft.generation_config.num_inference_steps = steps
    thought, expected = draft.generate(prompts[:1], **GREEDY), model.generate(prompts[:1], **GREEDY)
    assert not torch.equal(thought, expected)
    read, project = [], draft.project_latents
    monkeypatch.setattr(draft, "project_latents", lambda latents: read.append(latents) or project(latents))
    assert torch.equal(model.generate(prompts[:1], assistant_model=draft, **GREEDY), expected)
    assert torch.equal(read[0], draft.infer_posterior(prompts[:1], num_inference_steps=steps).mean)


# ------------------------------------------------------------------ when it stops


def test_stopping_criteria(model, prompts):
    whole = model.generate(prompts, **GREEDY)
    token = whole[0, 11].item()
    end = whole[0, 7:].tolist().index(token) + 8
    criteria = StoppingCriteriaList([StopAt(token)])
    stopped = model.generate(prompts[:1], stopping_criteria=criteria, **GREEDY)
    assert torch.equal(stopped, whole[:1, :end])


def test_no_time_left(model, prompts):
    assert model.generate(prompts, max_time=0.0, **GREEDY).shape == (3, 8)


def test_stop_strings_and_a_streamer_in_a_thread(chat_folder):
    model, tokenizer = LTMForCausalLM.from_pretrained(chat_folder), AutoTokenizer.from_pretrained(chat_folder)
    inputs = tokenizer("The people of Spain", return_tensors="pt")
    settings = GREEDY | dict(num_inference_steps=4, max_new_tokens=30)
    whole = tokenizer.decode(model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :])
    stop = whole[8:10]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    settings |= dict(streamer=streamer, stop_strings=[stop], tokenizer=tokenizer)
    thread = Thread(target=model.generate, kwargs={**inputs, **settings})
    thread.start()
    pieces = list(streamer)
    thread.join()
    text = "".join(pieces)
    assert whole.startswith(text) and stop in text and len(text) < len(whole)


# ------------------------------------------------------------------ what it returns


@torch.no_grad()
def test_outputs_of_each_step(model, prompts):
    """Logits, hidden states and attentions are those of one forward over the finished text."""
    model.set_attn_implementation("eager")  # sdpa returns no attentions
    kinds = ("scores", "logits", "hidden_states", "attentions")
    result = model.generate(
        prompts, return_dict_in_generate=True, **{f"output_{kind}": True for kind in kinds}, **GREEDY
    )
    latents = None if model.config.has_memory else result.posterior.mean
    given = reading(model, result.sequences, latents)
    whole = model(result.sequences, **given, output_hidden_states=True, output_attentions=True)
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(result.logits, dim=1), whole.logits[:, 6:-1], **close)
    assert torch.equal(torch.stack(result.scores, dim=1).argmax(dim=-1), result.sequences[:, 7:])
    for layer, expected in enumerate(whole.hidden_states):
        states = torch.cat([step[layer] for step in result.hidden_states], dim=1)
        torch.testing.assert_close(states, expected[:, :-1], **close)
    assert [len(result.attentions), len(result.attentions[0])] == [14, 2]
    torch.testing.assert_close(result.attentions[0][1], whole.attentions[1][:, :, :7, :7], **close)
    torch.testing.assert_close(result.attentions[-1][1][:, :, 0], whole.attentions[1][:, :, -2, -5:-1], **close)


@torch.no_grad()
def test_cross_attentions(paper_model, prompts):
    """generate() keeps no cross-attentions of a decoder: one forward over the text gives what each token read."""
    model = paper_model
    model.set_attn_implementation("eager")
    result = model.generate(prompts, return_dict_in_generate=True, output_attentions=True, **GREEDY)
    assert "cross_attentions" not in result
    seen = model(result.sequences, latents=result.posterior.mean, output_attentions=True).cross_attentions
    assert [tuple(layer.shape) for layer in seen] == [(3, 4, 21, 2)] * 2
    torch.testing.assert_close(seen[0].sum(dim=-1), torch.ones(3, 4, 21))


def test_scores_of_beams(model, prompts):
    result = model.generate(
        prompts, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, output_scores=True, **GREEDY
    )
    scores = model.compute_transition_scores(result.sequences, result.scores, result.beam_indices)
    assert scores.shape == (6, 14)
    torch.testing.assert_close(scores.mean(dim=1), result.sequences_scores)


# ------------------------------------------------------------------ caches


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("name", ["dynamic", "hybrid", "quantized", "offloaded", "offloaded_static"])
def test_caches_by_name(make_model, reader, prompts, pad_rows, name, window, beams):
    model = make_model(latent_reader=reader, sliding_window=window)
    settings = GREEDY | dict(num_beams=beams)
    if name == "quantized":
        pytest.importorskip("optimum.quanto")
        if window is not None:
            pytest.skip("transformers quantizes the cache of full attention only")
    if name.startswith("offloaded"):
        if not torch.cuda.is_available():
            pytest.skip("transformers offloads from a GPU only")
        model, prompts = model.cuda(), prompts.cuda()
    batch, mask = (x.to(model.device) for x in pad_rows([prompts[0].cpu(), prompts[1, :3].cpu()], "left"))
    expected = model.generate(batch, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(model.generate(batch, attention_mask=mask, cache_implementation=name, **settings), expected)


@pytest.mark.parametrize(
    "make_cache",
    [
        lambda config: DynamicCache(),  # keeps all tokens; the window is the mask's
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config=config, max_cache_len=40),
    ],
    ids=["dynamic", "windowed", "static"],
)
def test_caches_that_the_caller_brings(model, prompts, make_cache):
    expected = model.generate(prompts, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(prompts, past_key_values=make_cache(model.config), **GREEDY), expected)
