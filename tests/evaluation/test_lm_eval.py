"""The harness's figures against the definitions, one request at a time; and its own command line, on tasks of ours."""

import importlib
import json
import math
import runpy
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

pytest.importorskip("lm_eval")

import datasets
import lm_eval.tasks
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ltm_hf import elbo, infer_posterior
from ltm_hf.data import set_chat_template, train_tokenizer
from ltm_hf.evaluation import lm_eval as module
from ltm_hf.evaluation.lm_eval import HFLTM
from ltm_hf.likelihood_ltm import Text, negative_log_likelihood
from ltm_hf.memory_ltm import prior_state, state_of

LENGTH = 16  # of the model's sequences, in tokens
STEPS, SEED = 4, 3
FOX = "the quick brown fox"

# Contexts and continuations: several lengths; shared contexts; continuations of one token and of several; one text cut
# in two ways, whose latents differ; no context; a context that ends in a space; and contexts longer than the model's.
PAIRS = [
    ("the cat", " sat on the mat"),
    ("the cat", " sat"),
    ("the cat", " sang"),
    ("the cat sat", " on the mat"),
    ("the dog sat on", " a"),
    ("the dog sat on", " b"),
    ("the dog sat on ", "the log"),
    ("", "the mat"),
    ("the cat sat on the mat and the dog sat on the log and the cat sat on the mat", " and the dog"),
    ("the cat sat on the mat and the dog sat on the log and the cat sat on the mat", " z y x w v"),
]
ROLLED = ["the cat sat on the mat", f"the cat sat on the log {FOX} jumped", "a", "the dog"]


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
    def evaluator(model=model, cls=HFLTM, **settings):
        if cls is HFLTM:
            settings = dict(num_inference_steps=STEPS, inference_seed=SEED) | settings
        return cls(model, tokenizer=tokenizer, **settings)

    return evaluator


def ask(*arguments):
    return [SimpleNamespace(args=args, task_name="task") for args in arguments]


@pytest.fixture
def fits(monkeypatch):
    """The contexts that latents are inferred from, in order, as lists of token ids."""
    seen = []

    def watch(model, input_ids, attention_mask=None, labels=None, **settings):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen.extend(row[real.bool()].tolist() for row, real in zip(input_ids, mask, strict=True))
        return infer_posterior(model, input_ids, attention_mask, labels, **settings)

    monkeypatch.setattr(module, "infer_posterior", watch)
    return seen


def latents_of(model, context, how="mean"):
    if how == "none":
        return None
    posterior = infer_posterior(model, torch.tensor([context]), num_inference_steps=STEPS, seed=SEED)
    return posterior.mean if how == "mean" else posterior.sample(seed=SEED)


@torch.no_grad()
def score(model, context, continuation, latents):
    """log p(continuation | context, latents), and whether greedy decoding writes it, by definition."""
    ids = torch.tensor([[*context, *continuation]])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(context), -100)
    likelihood = -negative_log_likelihood(model, Text.of(model, ids, labels=labels), latents).item()
    likeliest = [
        model(ids[:, :end], latents=latents).logits[0, -1].argmax().item() for end in range(len(context), ids.shape[1])
    ]
    return likelihood, likeliest == list(continuation)


@torch.no_grad()
def score_by_memory(model, context, continuation, steps=1):
    """The same by a memory: each token by a forward pass of its own over all before it."""
    ids, given = torch.tensor([[*context, *continuation]]), {"latent_state": prior_state(model.config, 1)}
    if steps > 1:  # it holds the context already, and learns from the rest
        posterior = infer_posterior(model, torch.tensor([context]), num_inference_steps=steps)
        given["latent_state"] = state_of(posterior, model.config.num_attention_heads)
        given["latent_writes"] = torch.arange(ids.shape[1])[None] >= len(context)
    likelihood, is_greedy = 0.0, True
    for end in range(len(context), ids.shape[1]):
        so_far = {name: x[:, :end] if name == "latent_writes" else x for name, x in given.items()}
        log_probs = model(ids[:, :end], **so_far).logits[0, -1].log_softmax(dim=-1)
        likelihood += log_probs[ids[0, end]].item()
        is_greedy &= log_probs.argmax().item() == ids[0, end].item()
    return likelihood, is_greedy


def encode(tokenizer, context, continuation):
    """The tokens of a pair, cut on the left to what the model can read before it predicts the last."""
    context, continuation = context.rstrip(), " " * (len(context) - len(context.rstrip())) + continuation
    before = tokenizer(context).input_ids if context else [tokenizer.bos_token_id]
    after = tokenizer(context + continuation).input_ids[len(before) :]
    return (before + after)[-LENGTH - 1 :][: -len(after)], after


def windows(tokenizer, text):
    """The harness's windows, counted by hand: begin-of-text, then LENGTH tokens each; the last reads more before it."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    texts = [tokenizer.bos_token_id, *tokens]
    for start in range(0, len(tokens), LENGTH):
        end = min(start + LENGTH, len(tokens))
        yield texts[max(0, end - LENGTH) : start + 1], tokens[start:end]


# ------------------------------------------------------------------ log-likelihood


@pytest.mark.parametrize("latents", ["mean", "sample", "none"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihood_is_its_definition(model, evaluator, tokenizer, latents, batch_size):
    """In any batch: the continuation given latents of the context alone."""
    # HFLM's cache, on which "none" would rely, takes the wrong positions of a text that is cut in two ways.
    lm = evaluator(latents=latents, batch_size=batch_size, logits_cache=False)
    answers = lm.loglikelihood(ask(*PAIRS), disable_tqdm=True)
    for pair, (likelihood, is_greedy) in zip(PAIRS, answers, strict=True):
        context, continuation = encode(tokenizer, *pair)
        expected, greedy = score(model, context, continuation, latents_of(model, context, latents))
        assert likelihood == pytest.approx(expected, abs=1e-4)
        assert is_greedy is greedy


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihood_of_a_memory_is_its_definition(memory, evaluator, tokenizer, steps, batch_size):
    """In any batch: each token of the continuation by what the context and those before it have left."""
    lm = evaluator(memory, num_inference_steps=steps, batch_size=batch_size, logits_cache=False)
    answers = lm.loglikelihood(ask(*PAIRS), disable_tqdm=True)
    for pair, (likelihood, is_greedy) in zip(PAIRS, answers, strict=True):
        requested = encode(tokenizer, *pair)
        expected, greedy = score_by_memory(memory, *requested, steps) if steps else score(memory, *requested, None)
        assert likelihood == pytest.approx(expected, abs=2e-4)
        assert is_greedy is greedy
    assert not steps or abs(answers[0][0] - score(memory, *encode(tokenizer, *PAIRS[0]), None)[0]) > 0.1


def test_latents_matter_here(evaluator):
    """Else the tests above would show nothing."""
    answers = {how: evaluator(latents=how).loglikelihood(ask(*PAIRS), disable_tqdm=True) for how in module.LATENTS}
    for one, other in (("mean", "none"), ("mean", "sample")):
        differences = [abs(a[0] - b[0]) for a, b in zip(answers[one], answers[other], strict=True)]
        assert sum(difference > 0.1 for difference in differences) >= 7


@pytest.mark.parametrize("steps", [1, 3])
def test_what_generate_writes_with_a_memory_is_greedy(memory, evaluator, tokenizer, steps):
    context = tokenizer("the cat", return_tensors="pt").input_ids
    output = memory.generate(context, num_inference_steps=steps, do_sample=False, max_new_tokens=6)
    written = output[0, context.shape[1] :].tolist()
    requests = [(("the cat", "?"), context[0].tolist(), written[:end]) for end in (1, 4, 6)]
    answers = evaluator(memory, num_inference_steps=steps)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True] * 3


def test_what_generate_writes_is_greedy(model, evaluator, tokenizer):
    context = tokenizer("the cat", return_tensors="pt").input_ids
    output = model.generate(context, num_inference_steps=STEPS, inference_seed=SEED, do_sample=False, max_new_tokens=3)
    written = output[0, context.shape[1] :].tolist()
    assert len(written) == 3
    others = [[*written[:place], 100, *written[place + 1 :]] for place in range(3)]
    with torch.no_grad():  # greedy but for its first token
        begun = torch.cat([context, torch.tensor([[100]])], dim=1)
        last = model(begun, latents=latents_of(model, context[0].tolist())).logits[0, -1].argmax().item()
    others.append([100, last])
    requests = [(("the cat", "?"), context[0].tolist(), tokens) for tokens in (written, *others)]
    answers = evaluator()._loglikelihood_tokens(requests, disable_tqdm=True)
    assert 100 not in written and [greedy for _, greedy in answers] == [True, False, False, False, False]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_inference_sees_each_context_once_and_no_continuation(evaluator, tokenizer, fits, batch_size):
    evaluator(batch_size=batch_size).loglikelihood(ask(*PAIRS), disable_tqdm=True)
    expected = {tuple(encode(tokenizer, *pair)[0]) for pair in PAIRS}
    assert len(fits) == len(expected) == 6
    assert set(map(tuple, fits)) == expected


def test_choices_of_one_token_share_a_row(model, evaluator, monkeypatch):
    rows = []
    forward = HFLTM._logits
    monkeypatch.setattr(HFLTM, "_logits", lambda self, texts, *z: rows.extend(texts) or forward(self, texts, *z))
    pairs = [(FOX, letter) for letter in "abcd"]
    answers = evaluator().loglikelihood(ask(*pairs), disable_tqdm=True)
    assert len(rows) == 1 and len({likelihood for likelihood, _ in answers}) == 4


def test_an_empty_context_is_begin_of_text_and_its_latents_the_priors(evaluator, tokenizer, fits):
    """One token leaves nothing to explain: the prior's mean is zero, which is as no latents."""
    thinking = evaluator().loglikelihood(ask(("", "the mat")), disable_tqdm=True)
    assert fits == [[tokenizer.bos_token_id]]
    ((expected, _),) = evaluator(latents="none").loglikelihood(ask(("", "the mat")), disable_tqdm=True)
    assert thinking[0][0] == pytest.approx(expected, abs=1e-5)


def test_begin_of_text_stands_once(evaluator, tokenizer, fits):
    """The tokenizer puts it before a context; a chat template that has written it is left alone."""
    set_chat_template(tokenizer)
    lm = evaluator(max_length=64)
    chat = lm.apply_chat_template([{"role": "user", "content": "the cat"}])
    assert chat.startswith("<|beginoftext|>User:")
    lm.loglikelihood(ask((chat, " sat"), ("the cat", " sat")), disable_tqdm=True)
    for context in fits:
        assert [index for index, token in enumerate(context) if token == tokenizer.bos_token_id] == [0]
    assert len(fits) == 2


def test_a_batch_size_is_searched_for_with_inference(evaluator, fits):
    """Inference needs more memory than a forward pass: a size that it does not fit must not be chosen."""
    reference = evaluator().loglikelihood(ask(*PAIRS), disable_tqdm=True)
    fits.clear()
    lm = evaluator(batch_size="auto", max_batch_size=4)
    answers = lm.loglikelihood(ask(*PAIRS), disable_tqdm=True)
    assert fits[0] == [1] * LENGTH and lm.batch_sizes == {0: 4}
    for (likelihood, greedy), (expected, is_greedy) in zip(answers, reference, strict=True):
        assert (likelihood, greedy) == (pytest.approx(expected, abs=1e-4), is_greedy)

    def out_of_memory(model, input_ids, *args, **settings):
        if len(input_ids) > 2:
            raise RuntimeError("CUDA out of memory.")
        return infer_posterior(model, input_ids, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "infer_posterior", out_of_memory)
        lm.loglikelihood(ask(*PAIRS), disable_tqdm=True)
    assert lm.batch_sizes == {0: 2}


def test_answers_are_cached_by_their_strings(evaluator):
    """For the harness's --use_cache; windows of a rolling likelihood are only kept as a whole."""
    kept = {}
    lm = evaluator()
    lm.cache_hook = SimpleNamespace(add_partial=lambda kind, strings, answer: kept.update({(kind, strings): answer}))
    answers = lm.loglikelihood(ask(*PAIRS), disable_tqdm=True)
    assert kept == {("loglikelihood", pair): answer for pair, answer in zip(PAIRS, answers, strict=True)}
    kept.clear()
    (rolled,) = lm.loglikelihood_rolling(ask((FOX,)), disable_tqdm=True)
    assert kept == {("loglikelihood_rolling", (FOX,)): rolled}


def test_mixed_precision(evaluator):
    """bfloat16 has 8 bits: near the same answers, but not the same."""
    exact, rounded = (
        [answer for answer, _ in evaluator(mixed_precision_dtype=dtype).loglikelihood(ask(*PAIRS), disable_tqdm=True)]
        for dtype in (None, "bfloat16")
    )
    assert rounded == pytest.approx(exact, rel=0.1) and rounded != pytest.approx(exact, rel=1e-4)


# ------------------------------------------------------------------ rolling log-likelihood


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("stride", [3, None])
def test_rolling_latents_come_from_before(model, evaluator, tokenizer, fits, stride, batch_size):
    lm = evaluator(rolling_stride=stride, batch_size=batch_size, add_bos_token=False)
    answers = lm.loglikelihood_rolling(ask(*[(text,) for text in ROLLED]), disable_tqdm=True)
    step, contexts = stride or LENGTH // 2, []
    for text, likelihood in zip(ROLLED, answers, strict=True):
        expected = 0
        for context, scored in windows(tokenizer, text):
            for start in range(0, len(scored), step):
                contexts.append([*context, *scored[:start]])
                latents = latents_of(model, contexts[-1])
                expected += score(model, contexts[-1], scored[start : start + step], latents)[0]
        assert likelihood == pytest.approx(expected, abs=1e-3)
    assert set(map(tuple, fits)) == set(map(tuple, contexts))
    assert max(len(list(windows(tokenizer, text))) for text in ROLLED) > 1  # or truncation was never at stake


@pytest.mark.parametrize("batch_size", [1, 5])
def test_rolling_of_a_memory_needs_no_stride(memory, evaluator, tokenizer, batch_size):
    lm = evaluator(memory, num_inference_steps=1, batch_size=batch_size, add_bos_token=False)
    answers = lm.loglikelihood_rolling(ask(*[(text,) for text in ROLLED]), disable_tqdm=True)
    for text, likelihood in zip(ROLLED, answers, strict=True):
        expected = sum(score_by_memory(memory, *window)[0] for window in windows(tokenizer, text))
        assert likelihood == pytest.approx(expected, abs=1e-3)


def test_without_latents_the_stride_changes_nothing(evaluator):
    """The chain rule: the decoder reads the same tokens, so an autoregressive model's figure is comparable."""
    requests = ask(*[(text,) for text in ROLLED])
    harness = evaluator(cls=HFLM).loglikelihood_rolling(requests, disable_tqdm=True)
    for stride in (1, 5, LENGTH):  # no steps: latents stay at the prior's mean, which is zero
        lm = evaluator(rolling_stride=stride, num_inference_steps=0)
        assert lm.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(harness, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_rolling_bound(model, evaluator, tokenizer, batch_size):
    """-(NLL + KL) of each window with fresh noise, its first token given."""
    lm = evaluator(rolling="bound", batch_size=batch_size, add_bos_token=False)
    answers = lm.loglikelihood_rolling(ask(*[(text,) for text in ROLLED]), disable_tqdm=True)
    for text, bound in zip(ROLLED, answers, strict=True):
        expected = 0
        for context, scored in windows(tokenizer, text):
            ids = torch.tensor([[*context, *scored]])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(context), -100)
            posterior = infer_posterior(model, ids, labels=labels, num_inference_steps=STEPS, seed=SEED)
            with torch.no_grad():
                expected += elbo(model, ids, posterior, labels=labels, seed=SEED).elbo.item()
        assert bound == pytest.approx(expected, abs=1e-3)


def test_the_bound_is_below_the_likelihood(model, evaluator, tokenizer):
    """Of a short text, whose exact likelihood is estimated by samples of the prior."""
    (bound,) = evaluator(rolling="bound", add_bos_token=False).loglikelihood_rolling(ask(("th",)), disable_tqdm=True)
    ids = torch.tensor([tokenizer("th").input_ids])
    with torch.no_grad():
        nll = negative_log_likelihood(model, Text.of(model, ids.repeat(4096, 1)), model.sample_prior(4096, seed=0))
    exact = (-nll).logsumexp(0).item() - math.log(4096)
    assert bound < exact


def test_rolling_settings_leave_loglikelihoods_alone(evaluator):
    answers = [
        evaluator(**settings).loglikelihood(ask(*PAIRS), disable_tqdm=True)
        for settings in ({}, {"rolling": "bound"}, {"rolling_stride": 1})
    ]
    assert answers[0] == answers[1] == answers[2]


def test_the_harness_scores_begin_of_text_unless_told_not_to(evaluator, model, tokenizer):
    """As the class says: with a tokenizer that begins each text with it."""
    lm, without = (evaluator(latents="none", add_bos_token=add) for add in (None, False))
    rolled = [one.loglikelihood_rolling(ask(("the cat",)), disable_tqdm=True)[0] for one in (lm, without)]
    bos = [tokenizer.bos_token_id]
    tokens = tokenizer("the cat", add_special_tokens=False).input_ids
    assert rolled[0] == pytest.approx(score(model, bos, bos + tokens, None)[0], abs=1e-4)
    assert rolled[1] == pytest.approx(score(model, bos, tokens, None)[0], abs=1e-4)


# ------------------------------------------------------------------ generation

PROMPTS = ["the cat", FOX, "the dog sat on the", "a"]


def generated(lm, **settings):
    settings = dict(until=[], max_gen_toks=6, do_sample=False) | settings
    return lm.generate_until(ask(*[(prompt, dict(settings)) for prompt in PROMPTS]), disable_tqdm=True)


@pytest.mark.parametrize("kind", ["memory", "model"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_generate_until_is_generate(kind, evaluator, tokenizer, batch_size, request):
    model = request.getfixturevalue(kind)
    texts = generated(evaluator(model, batch_size=batch_size))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, -(LENGTH - 6) :]
        output = model.generate(ids, num_inference_steps=STEPS, inference_seed=SEED, do_sample=False, max_new_tokens=6)
        written = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == written
    assert generated(evaluator(model, latents="none")) != texts  # latents matter here


def test_stop_strings(evaluator):
    whole = generated(evaluator(batch_size=2))
    stop = next(letter for text in whole for letter in text[1:-1] if letter.isascii() and letter.isalnum())
    texts = generated(evaluator(batch_size=2), until=[stop])
    assert texts == [text.split(stop)[0] for text in whole] != whole


def test_a_sample_of_latents_is_the_same_in_any_batch(evaluator):
    texts = []
    for size in (1, 4):
        torch.manual_seed(size)  # is no matter
        texts.append(generated(evaluator(latents="sample", batch_size=size)))
    assert texts[0] == texts[1] != generated(evaluator(latents="mean"))
    assert generated(evaluator(latents="sample", inference_seed=SEED + 1)) != texts[0]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    generated(evaluator(latents="sample"))
    assert torch.rand(1) == expected  # torch's generator is left alone


def test_sampled_texts_follow_torchs_generator(evaluator):
    lm = evaluator(latents="sample")
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generated(lm, do_sample=True, temperature=1.0))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("kind", ["memory", "model"])
def test_no_latents_are_the_decoder_alone(kind, evaluator, tokenizer, request):
    model = request.getfixturevalue(kind)
    texts = generated(evaluator(model, latents="none", batch_size=4))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, -(LENGTH - 6) :]
        written = []
        with torch.no_grad():
            while len(written) < 6 and tokenizer.eos_token_id not in written:
                written.append(model(ids).logits[0, -1].argmax().item())
                ids = torch.cat([ids, torch.tensor([written[-1:]])], dim=1)
        assert text == tokenizer.decode(written, skip_special_tokens=True)


def test_gen_kwargs_go_before_the_models_settings(evaluator, fits):
    steps = generated(evaluator(num_inference_steps=0), num_inference_steps=STEPS)
    assert steps == generated(evaluator()) != generated(evaluator(num_inference_steps=0))


# ------------------------------------------------------------------ as HFLM


def test_a_model_without_latents_is_hflm(evaluator, plain):
    pair = [evaluator(plain, cls=cls, batch_size=3) for cls in (HFLTM, HFLM)]
    requests, rolled = ask(*PAIRS), ask(*[(text,) for text in ROLLED])
    ours, theirs = (
        (
            lm.loglikelihood(requests, disable_tqdm=True),
            lm.loglikelihood_rolling(rolled, disable_tqdm=True),
            generated(lm),
            lm.get_model_info(),
        )
        for lm in pair
    )
    assert ours == theirs


def test_what_was_measured_is_in_the_results(evaluator, make):
    lm = evaluator(num_inference_steps=None, model=make(latent_reader="paper", num_inference_steps=7))
    expected = dict(latents="mean", num_inference_steps=7, inference_seed=SEED, rolling="prefix", rolling_stride=8)
    assert expected.items() <= lm.get_model_info().items()
    info = evaluator(num_inference_steps=None, model=make(num_inference_steps=7)).get_model_info()
    assert dict(latents="mean", num_inference_steps=7).items() <= info.items() and "rolling_stride" not in info


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"latents": "median"}, "^latents must be one of mean, sample, none; got 'median'.$"),
        ({"rolling": "loose"}, "^rolling must be one of prefix, bound; got 'loose'.$"),
        ({"rolling": "bound", "latents": "none"}, "leaves nothing to bound"),
        ({"inference_seed": "x"}, "^inference_seed must be an integer, got 'x'.$"),
        ({"rolling_stride": 0}, "^rolling_stride must be None or an integer of 1 or more, got 0.$"),
        ({"num_inference_steps": -1}, "^num_inference_steps must be an integer of 0 or more, got -1.$"),
    ],
)
def test_settings_that_cannot_work(evaluator, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluator(**settings)


@pytest.mark.parametrize(
    "overrides, settings, sentence",
    [
        ({}, {"latents": "sample"}, "^latents must be mean or none for a memory"),
        ({}, {"rolling_stride": 4}, "^rolling_stride is of latents that are inferred anew: a memory infers at each"),
        ({}, {"rolling": "bound"}, "^rolling='bound' is of latents fitted with a variance to the whole text"),
        ({"latent_reader": "paper", "inference_method": "langevin"}, {"rolling": "bound"}, "^rolling='bound' is of"),
    ],
)
def test_settings_that_a_model_cannot_have(evaluator, make, overrides, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluator(make(**overrides), **settings)


def test_another_model_is_refused_before_it_is_loaded(tmp_path):
    GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(ValueError, match="^This is a 'gpt2' model, not an LTM: evaluate it with --model hf.$"):
        HFLTM(str(tmp_path))


def test_requests_that_do_not_fit(evaluator):
    with pytest.raises(ValueError, match="1 to 16 tokens .max_length.; got 1 and 17"):
        evaluator()._loglikelihood_tokens([(("", ""), [1], [3] * 17)])
    with pytest.raises(ValueError, match="got 0 and 1"):
        evaluator()._loglikelihood_tokens([(("", ""), [], [3])])
    assert evaluator()._loglikelihood_tokens([]) == []


def test_the_harness_is_optional(monkeypatch):
    monkeypatch.delitem(sys.modules, "ltm_hf.evaluation.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r'^ltm_hf.evaluation.lm_eval needs .*: pip install "ltm_hf\[eval\]"$'):
        importlib.import_module("ltm_hf.evaluation.lm_eval")


# ------------------------------------------------------------------ the command line

TASKS = {
    "ltm_choice": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        target_delimiter: ""
        doc_to_target: "{{answer}}"
        metric_list: [{metric: acc}]
    """,
    "ltm_rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}}"
        metric_list: [{metric: bits_per_byte}]
    """,
    "ltm_writing": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{written}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
}


def test_the_harness_own_command_line(tmp_path, monkeypatch, model, tokenizer, evaluator, capsys):
    """A multiple choice, a perplexity and a text, from a saved folder, as `python -m ltm_hf.evaluation.lm_eval`."""
    questions = ["the cat sat on", "the dog sat on the mat and the cat sat on the log and on the", FOX]
    choices = [" the mat", " a log", " dogs"]
    written = evaluator().generate_until(
        ask(*[(question, dict(until=["\n"], max_gen_toks=6, do_sample=False)) for question in questions])
    )
    scores = []
    for question in questions:
        pairs = [encode(tokenizer, question, choice) for choice in choices]
        scores.append([score(model, *pair, latents_of(model, pair[0]))[0] for pair in pairs])
    answers = [max(range(3), key=row.__getitem__) for row in scores]
    answers[2] = (answers[2] + 1) % 3  # two of three right
    written[0] = "something else"  # two of three right

    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        dict(question=question, choices=choices, answer=answer, written=text)
        for question, answer, text in zip(questions, answers, written, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, lines in TASKS.items():
        data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(head + "\n".join(line.strip() for line in lines.splitlines()))

    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the command sets it: put back after
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False)
    )  # thousands of files
    monkeypatch.delitem(model_registry._objs, "ltm")  # the module runs once more, as a program
    monkeypatch.delitem(sys.modules, "ltm_hf.evaluation.lm_eval")
    arguments = {
        "--model": "ltm",
        "--model_args": f"pretrained={folder},num_inference_steps={STEPS},inference_seed={SEED},rolling_stride=4",
        "--tasks": ",".join(TASKS),
        "--include_path": str(tmp_path),
        "--batch_size": "2",
        "--output_path": str(tmp_path / "results.json"),
    }
    monkeypatch.setattr(sys, "argv", ["lm_eval", *(word for pair in arguments.items() for word in pair)])
    runpy.run_module("ltm_hf.evaluation.lm_eval", run_name="__main__")

    (path,) = tmp_path.glob("results*.json")
    results = json.loads(path.read_text())
    assert "|ltm_choice" in capsys.readouterr().out
    assert results["config"]["rolling_stride"] == 4
    figures = {name: results["results"][name] for name in TASKS}
    assert figures["ltm_choice"]["acc,none"] == pytest.approx(2 / 3)
    assert figures["ltm_writing"]["exact_match,none"] == pytest.approx(2 / 3)
    rolled = evaluator(rolling_stride=4).loglikelihood_rolling(ask(*[(question,) for question in questions]))
    expected = -sum(rolled) / sum(map(len, questions)) / math.log(2)
    assert figures["ltm_rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
