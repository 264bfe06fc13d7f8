"""The harness's figures against the definitions, one request at a time."""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

from ltm_hf import elbo, infer_posterior
from ltm_hf.data import set_chat_template
from ltm_hf.evaluation import lm_eval as module
from ltm_hf.evaluation.lm_eval import HFLTM
from ltm_hf.likelihood_ltm import Text, negative_log_likelihood
from ltm_hf.memory_ltm import prior_state, state_of

LENGTH, STEPS, SEED = 16, 4, 3  # as the conftest has them
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
def test_loglikelihood_is_its_definition(model, evaluator, tokenizer, latents, batch_size, ask):
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
def test_loglikelihood_of_a_memory_is_its_definition(memory, evaluator, tokenizer, steps, batch_size, ask):
    """In any batch: each token of the continuation by what the context and those before it have left."""
    lm = evaluator(memory, num_inference_steps=steps, batch_size=batch_size, logits_cache=False)
    answers = lm.loglikelihood(ask(*PAIRS), disable_tqdm=True)
    for pair, (likelihood, is_greedy) in zip(PAIRS, answers, strict=True):
        requested = encode(tokenizer, *pair)
        expected, greedy = score_by_memory(memory, *requested, steps) if steps else score(memory, *requested, None)
        assert likelihood == pytest.approx(expected, abs=2e-4)
        assert is_greedy is greedy
    assert not steps or abs(answers[0][0] - score(memory, *encode(tokenizer, *PAIRS[0]), None)[0]) > 0.1


def test_latents_matter_here(evaluator, ask):
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
def test_inference_sees_each_context_once_and_no_continuation(evaluator, tokenizer, fits, batch_size, ask):
    evaluator(batch_size=batch_size).loglikelihood(ask(*PAIRS), disable_tqdm=True)
    expected = {tuple(encode(tokenizer, *pair)[0]) for pair in PAIRS}
    assert len(fits) == len(expected) == 6
    assert set(map(tuple, fits)) == expected


def test_choices_of_one_token_share_a_row(model, evaluator, monkeypatch, ask):
    rows = []
    forward = HFLTM._logits
    monkeypatch.setattr(HFLTM, "_logits", lambda self, texts, *z: rows.extend(texts) or forward(self, texts, *z))
    pairs = [(FOX, letter) for letter in "abcd"]
    answers = evaluator().loglikelihood(ask(*pairs), disable_tqdm=True)
    assert len(rows) == 1 and len({likelihood for likelihood, _ in answers}) == 4


def test_an_empty_context_is_begin_of_text_and_its_latents_the_priors(evaluator, tokenizer, fits, ask):
    """One token leaves nothing to explain: the prior's mean is zero, which is as no latents."""
    thinking = evaluator().loglikelihood(ask(("", "the mat")), disable_tqdm=True)
    assert fits == [[tokenizer.bos_token_id]]
    ((expected, _),) = evaluator(latents="none").loglikelihood(ask(("", "the mat")), disable_tqdm=True)
    assert thinking[0][0] == pytest.approx(expected, abs=1e-5)


def test_begin_of_text_stands_once(evaluator, tokenizer, fits, ask):
    """The tokenizer puts it before a context; a chat template that has written it is left alone."""
    set_chat_template(tokenizer)
    lm = evaluator(max_length=64)
    chat = lm.apply_chat_template([{"role": "user", "content": "the cat"}])
    assert chat.startswith("<|beginoftext|>User:")
    lm.loglikelihood(ask((chat, " sat"), ("the cat", " sat")), disable_tqdm=True)
    for context in fits:
        assert [index for index, token in enumerate(context) if token == tokenizer.bos_token_id] == [0]
    assert len(fits) == 2


def test_a_batch_size_is_searched_for_with_inference(evaluator, fits, ask):
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


def test_answers_are_cached_by_their_strings(evaluator, ask):
    """For the harness's --use_cache; windows of a rolling likelihood are only kept as a whole."""
    kept = {}
    lm = evaluator()
    lm.cache_hook = SimpleNamespace(add_partial=lambda kind, strings, answer: kept.update({(kind, strings): answer}))
    answers = lm.loglikelihood(ask(*PAIRS), disable_tqdm=True)
    assert kept == {("loglikelihood", pair): answer for pair, answer in zip(PAIRS, answers, strict=True)}
    kept.clear()
    (rolled,) = lm.loglikelihood_rolling(ask((FOX,)), disable_tqdm=True)
    assert kept == {("loglikelihood_rolling", (FOX,)): rolled}


def test_mixed_precision(evaluator, ask):
    """bfloat16 has 8 bits: near the same answers, but not the same."""
    exact, rounded = (
        [answer for answer, _ in evaluator(mixed_precision_dtype=dtype).loglikelihood(ask(*PAIRS), disable_tqdm=True)]
        for dtype in (None, "bfloat16")
    )
    assert rounded == pytest.approx(exact, rel=0.1) and rounded != pytest.approx(exact, rel=1e-4)


# ------------------------------------------------------------------ rolling log-likelihood


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("stride", [3, None])
def test_rolling_latents_come_from_before(model, evaluator, tokenizer, fits, stride, batch_size, ask):
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
def test_rolling_of_a_memory_needs_no_stride(memory, evaluator, tokenizer, batch_size, ask):
    lm = evaluator(memory, num_inference_steps=1, batch_size=batch_size, add_bos_token=False)
    answers = lm.loglikelihood_rolling(ask(*[(text,) for text in ROLLED]), disable_tqdm=True)
    for text, likelihood in zip(ROLLED, answers, strict=True):
        expected = sum(score_by_memory(memory, *window)[0] for window in windows(tokenizer, text))
        assert likelihood == pytest.approx(expected, abs=1e-3)


def test_without_latents_the_stride_changes_nothing(evaluator, ask):
    """The chain rule: the decoder reads the same tokens, so an autoregressive model's figure is comparable."""
    requests = ask(*[(text,) for text in ROLLED])
    harness = evaluator(cls=HFLM).loglikelihood_rolling(requests, disable_tqdm=True)
    for stride in (1, 5, LENGTH):  # no steps: latents stay at the prior's mean, which is zero
        lm = evaluator(rolling_stride=stride, num_inference_steps=0)
        assert lm.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(harness, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_rolling_bound(model, evaluator, tokenizer, batch_size, ask):
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


def test_the_bound_is_below_the_likelihood(model, evaluator, tokenizer, ask):
    """Of a short text, whose exact likelihood is estimated by samples of the prior."""
    (bound,) = evaluator(rolling="bound", add_bos_token=False).loglikelihood_rolling(ask(("th",)), disable_tqdm=True)
    ids = torch.tensor([tokenizer("th").input_ids])
    with torch.no_grad():
        nll = negative_log_likelihood(model, Text.of(model, ids.repeat(4096, 1)), model.sample_prior(4096, seed=0))
    exact = (-nll).logsumexp(0).item() - math.log(4096)
    assert bound < exact


def test_rolling_settings_leave_loglikelihoods_alone(evaluator, ask):
    answers = [
        evaluator(**settings).loglikelihood(ask(*PAIRS), disable_tqdm=True)
        for settings in ({}, {"rolling": "bound"}, {"rolling_stride": 1})
    ]
    assert answers[0] == answers[1] == answers[2]


def test_the_harness_scores_begin_of_text_unless_told_not_to(evaluator, model, tokenizer, ask):
    """As the class says: with a tokenizer that begins each text with it."""
    lm, without = (evaluator(latents="none", add_bos_token=add) for add in (None, False))
    rolled = [one.loglikelihood_rolling(ask(("the cat",)), disable_tqdm=True)[0] for one in (lm, without)]
    bos = [tokenizer.bos_token_id]
    tokens = tokenizer("the cat", add_special_tokens=False).input_ids
    assert rolled[0] == pytest.approx(score(model, bos, bos + tokens, None)[0], abs=1e-4)
    assert rolled[1] == pytest.approx(score(model, bos, tokens, None)[0], abs=1e-4)
