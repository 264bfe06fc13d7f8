"""Figures of written text against numbers counted by hand, closed forms and naive loops."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ltm_hf.data import train_tokenizer
from ltm_hf.evaluation import text as text_module
from ltm_hf.evaluation.figures import figure
from ltm_hf.evaluation.sampling import GREEDY, complete_texts, sample_texts
from ltm_hf.evaluation.text import (
    distinct_n,
    entropy,
    judged_losses,
    mauve,
    ngrams,
    pooled_perplexity,
    repetition,
    text_features,
    text_figures,
    text_table,
)
from ltm_hf.memory_ltm import prior_state

TEXTS = ["the cat sat on the mat", "a dog", "the log and the dog sat", "", "mat"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 5, 280)


@pytest.fixture(scope="module")
def make(make_model, tokenizer):
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return lambda reader: make_model(latent_reader=reader, vocab_size=len(tokenizer), **ids)


@pytest.fixture(scope="module")
def model(make):
    return make("paper")


@pytest.fixture(scope="module")
def memory(make):
    return make("memory")


@pytest.fixture(scope="module")
def gpt2(tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = dict(n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.5)
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=0, **shape)).eval()


@pytest.fixture
def uniform(gpt2):
    model = GPT2LMHeadModel(gpt2.config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


# ------------------------------------------------------------------ of tokens


def test_entropy():
    assert entropy("abcd") == pytest.approx(math.log(4))
    assert entropy("aabb") == pytest.approx(math.log(2))
    assert entropy("aaab") == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert entropy("aaaa") == 0
    assert math.isnan(entropy([]))


def test_ngrams_and_repetition():
    assert ngrams("abca", 2) == [("a", "b"), ("b", "c"), ("c", "a")]
    assert repetition("abcdabcd", 4) == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition("aaaaaa", 4) == pytest.approx(2 / 3)
    assert repetition("abcd", 4) == 0
    assert math.isnan(repetition("abc", 4))
    with pytest.raises(ValueError, match="1 or more"):
        ngrams("abc", 0)


def test_distinct_counts_over_all_texts():
    assert distinct_n(["aba", "bc"], 1) == {"value": 3 / 5, "error": pytest.approx(abs(2 / 3 - 1) / 2), "n": 2}
    assert distinct_n(["aba", "bc", "x"], 2)["value"] == 1  # ab ba bc
    assert distinct_n(["aba", "bc", "x"], 2)["n"] == 2  # x has no pair
    assert distinct_n(["ab", "ab"], 2)["value"] == 1 / 2  # within a text nothing is repeated
    assert distinct_n(["aa", "bc"], 1) == {"value": 3 / 4, "error": pytest.approx(1 / 4), "n": 2}
    assert distinct_n([["a", "b"]], 1) == {"value": 1, "error": None, "n": 1}
    assert distinct_n(["a", ""], 2) == {"value": None, "error": None, "n": 0}


def draw_texts(random, n):
    """Texts of 20 to 60 words, of which a few are frequent, as in a language."""
    return [list(np.minimum(random.zipf(1.3, random.integers(20, 60)), 10**6)) for _ in range(n)]


def test_error_of_distinct_is_the_jackknifes():
    texts = draw_texts(np.random.default_rng(0), 9)
    without = np.array([distinct_n(texts[:row] + texts[row + 1 :], 2)["value"] for row in range(9)])
    assert distinct_n(texts, 2)["error"] == pytest.approx(math.sqrt(8 / 9 * ((without - without.mean()) ** 2).sum()))


def test_error_of_distinct_is_the_spread_over_samples():
    random = np.random.default_rng(0)
    figures = [distinct_n(draw_texts(random, 30), 2) for _ in range(100)]
    spread = np.std([figure["value"] for figure in figures], ddof=1)
    assert np.mean([figure["error"] for figure in figures]) == pytest.approx(spread, rel=0.25)


# ------------------------------------------------------------------ of a judge


def naive_losses(judge, tokenizer, text, context=""):
    """Nats of each token of a text after begin-of-text and context, one forward a token."""
    before = [tokenizer.bos_token_id, *tokenizer(context, add_special_tokens=False)["input_ids"]]
    has_memory = getattr(judge.config, "has_memory", False)
    losses, memory = [], {"latent_state": prior_state(judge.config, 1)} if has_memory else {}
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            losses.append(-judge(torch.tensor([before]), **memory).logits[0, -1].log_softmax(-1)[token].item())
        before.append(token)
    return losses


@pytest.mark.parametrize("name", ["memory", "model", "gpt2"])
def test_judge_against_a_loop_over_tokens(name, tokenizer, request):
    judge = request.getfixturevalue(name)
    for contexts in (None, ["on the log", "", "a", "the", "the cat"]):
        expected = [naive_losses(judge, tokenizer, *row) for row in zip(TEXTS, contexts or [""] * 5, strict=True)]
        for batch_size in (1, 2, 5):
            nats, counts = judged_losses(judge, tokenizer, TEXTS, contexts, batch_size)
            assert nats.tolist() == pytest.approx([sum(losses) for losses in expected], abs=1e-4)
            assert counts.tolist() == [len(losses) for losses in expected]
        total = [loss for losses in expected for loss in losses]
        figure = pooled_perplexity(nats, counts)
        assert figure["value"] == pytest.approx(math.exp(sum(total) / len(total)), rel=1e-4)
        assert figure["n"] == 4 and figure["num_tokens"] == len(total)  # of the empty text nothing is scored


def test_a_uniform_judge_gives_the_size_of_its_vocabulary(uniform, tokenizer):
    figure = pooled_perplexity(*judged_losses(uniform, tokenizer, TEXTS))
    assert figure["value"] == pytest.approx(len(tokenizer), rel=1e-6) and figure["error"] < 1e-3


def test_pooled_perplexity_by_hand():
    figure = pooled_perplexity(torch.tensor([2.0, 4.0, 0.0]), torch.tensor([1, 3, 0]))
    # 6 nats, 4 tokens; residuals 2 - 1.5 and 4 - 4.5: the mean's error is sqrt(0.5 · 2/1) / 4
    assert figure["value"] == pytest.approx(math.exp(1.5)) and figure["error"] == pytest.approx(math.exp(1.5) / 4)
    assert (figure["n"], figure["num_tokens"]) == (2, 4)
    assert pooled_perplexity(torch.tensor([2.0]), torch.tensor([1]))["error"] is None
    assert "skipped" in pooled_perplexity(torch.zeros(2), torch.zeros(2, dtype=torch.long))


def test_error_of_the_perplexity_is_the_spread_over_samples():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 40, (200, 50), generator=generator)
    nats = 3 * counts + counts.sqrt() * torch.randn(200, 50, generator=generator) * 2
    figures = [pooled_perplexity(*of_run) for of_run in zip(nats.double(), counts, strict=True)]
    spread = np.std([figure["value"] for figure in figures], ddof=1)
    assert np.mean([figure["error"] for figure in figures]) == pytest.approx(spread, rel=0.1)


def test_without_begin_of_text_the_first_token_is_not_scored(gpt2, tokenizer):
    bare = train_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 5, 280)
    bare.bos_token = None
    assert bare(TEXTS[0], add_special_tokens=False) == tokenizer(TEXTS[0], add_special_tokens=False)
    _, counts = judged_losses(gpt2, tokenizer, TEXTS)
    _, of_bare = judged_losses(gpt2, bare, TEXTS)
    assert of_bare.tolist() == [max(0, count - 1) for count in counts.tolist()]
    _, after_context = judged_losses(gpt2, bare, TEXTS, ["the"] * len(TEXTS))
    assert after_context.tolist() == counts.tolist()


def test_what_the_judge_cannot_hold_is_not_scored(gpt2, tokenizer):
    long = "the cat sat on " * 40
    nats, counts = judged_losses(gpt2, tokenizer, [long])
    assert counts.tolist() == [63]  # 64 with begin-of-text
    ids = tokenizer(long, add_special_tokens=False)["input_ids"][:63]
    assert nats.item() == pytest.approx(sum(naive_losses(gpt2, tokenizer, tokenizer.decode(ids))), rel=1e-4)


# ------------------------------------------------------------------ of features


@pytest.mark.parametrize("name", ["model", "gpt2"])
def test_features_are_the_last_state_of_the_last_token(name, tokenizer, request):
    model = request.getfixturevalue(name)
    expected = []
    for text in filter(None, TEXTS):
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        expected.append(output.hidden_states[-1][0, -1].numpy())
    for batch_size in (1, 3):
        features = text_features(model, tokenizer, TEXTS, batch_size)
        np.testing.assert_allclose(features, np.stack(expected), atol=1e-5)
    short = text_features(model, tokenizer, [TEXTS[0]], max_length=3)
    np.testing.assert_allclose(short, text_features(model, tokenizer, ["the cat"]), atol=1e-5)
    assert not len(text_features(model, tokenizer, [""]))


def clouds(n, shift, seed):
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(6, 8)) * 3
    return (centres[random.integers(6, size=n)] + shift + random.normal(size=(n, 8))).astype(np.float32)


def test_mauve_tells_alike_from_unlike():
    pytest.importorskip("mauve")
    alike = mauve(clouds(200, 0, 1), clouds(200, 0, 2))
    unlike = mauve(clouds(200, 0, 1), clouds(250, 8, 2))
    assert alike["value"] > 0.85 and unlike["value"] < 0.1 and alike["n"] == unlike["n"] == 200
    assert 0 < alike["error"] < 0.2 and unlike["error"] < 0.1
    assert mauve(clouds(200, 0, 1), clouds(200, 0, 2)) == alike


def test_mauves_bootstrap_computes_mauve(monkeypatch):
    """Where every resample has the histograms as they are, each has mauve-text's own figure: there is no spread."""
    package = pytest.importorskip("mauve")
    written, references = clouds(200, 0, 1), clouds(200, 1, 2)
    result = package.compute_mauve(p_features=written, q_features=references, seed=0)
    seen = []

    class Still:
        def multinomial(self, n, histogram):
            return n * histogram

    monkeypatch.setattr(text_module.np.random, "default_rng", lambda seed: Still())
    monkeypatch.setattr(text_module.np, "std", lambda values, ddof: seen.extend(values) or 0.0)
    mauve(written, references, resamples=2)
    assert seen == pytest.approx([result.mauve] * 2)


def test_mauve_of_a_few_texts_is_refused():
    with pytest.raises(ValueError, match="100 texts or more on either side to say anything, got 30"):
        mauve(clouds(200, 0, 1), clouds(30, 0, 2))


def test_mauve_names_what_to_install(monkeypatch):
    monkeypatch.setattr(text_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"ltm_hf\[eval\]"):
        mauve(clouds(100, 0, 1), clouds(100, 0, 2))


# ------------------------------------------------------------------ all of them

REFERENCES = ["the cat sat on the mat and the dog sat on the log"[: 20 + 4 * index] for index in range(8)] + ["the"]
SMALL = dict(n=4, max_new_tokens=8, prompt_tokens=4, progress=False)


def test_figures_of_all_ways(model, gpt2, tokenizer):
    result = text_figures(model, tokenizer, REFERENCES, **SMALL, judge=(gpt2, tokenizer), seed=3)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    kinds, ways = ("texts", "completions"), ("references", "multinomial", "greedy")
    assert list(result["figures"]) == list(result["examples"]) == [f"{kind}: {way}" for kind in kinds for way in ways]

    written = [text.text for text in sample_texts(model, tokenizer, 4, 8, seed=3, progress=False)]
    words = [text.split() for text in written]
    figures = result["figures"]["texts: multinomial"]
    assert figures["entropy"] == figure([entropy(tokens) for tokens in words])
    assert figures["repetition_4"] == figure([repetition(tokens) for tokens in words if len(tokens) > 3])
    assert all(figures[f"distinct_{n}"] == distinct_n(words, n) for n in (1, 2, 3))
    assert figures["judge_perplexity"] == pooled_perplexity(*judged_losses(gpt2, tokenizer, written))
    assert figures["mauve"] == {"skipped": "MAUVE needs 100 texts or more on either side to say anything, got 4."}
    assert [example["text"] for example in result["examples"]["texts: multinomial"]] == written[:3]

    heads = [tokenizer(text)["input_ids"][:4] for text in REFERENCES[:4]]
    completed = complete_texts(model, tokenizer, heads, 8, GREEDY, seed=3, progress=False)
    prompts = [tokenizer.decode(head, skip_special_tokens=True) for head in heads]
    judged = judged_losses(gpt2, tokenizer, [text.text for (text,) in completed], prompts)
    assert result["figures"]["completions: greedy"]["judge_perplexity"] == pooled_perplexity(*judged)
    assert [example["prompt"] for example in result["examples"]["completions: greedy"]] == prompts[:3]


def test_references_are_cut_as_the_models_texts_are(model, tokenizer):
    result = text_figures(model, tokenizer, REFERENCES, **SMALL | {"n": 9}, num_examples=9)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in REFERENCES]
    expected = [tokenizer.decode(one[:8]) for one in ids]
    assert [example["text"] for example in result["examples"]["texts: references"]] == expected
    ended = result["figures"]["texts: references"]["ended"]
    assert ended["value"] == pytest.approx(sum(len(one) <= 8 for one in ids) / 9) and 0 < ended["value"] < 1
    # With begin-of-text the prompt has 4 tokens; "the" is too short to have one.
    expected = [tokenizer.decode(one[3:11]) for one in ids[:8]]
    assert [example["text"] for example in result["examples"]["completions: references"]] == expected
    assert result["figures"]["completions: greedy"]["tokens"]["n"] == 8


def test_figures_do_not_depend_on_the_batch(model, gpt2, tokenizer):
    one, many = (
        text_figures(model, tokenizer, REFERENCES, **SMALL, judge=(gpt2, tokenizer), batch_size=size) for size in (2, 9)
    )
    assert one["examples"] == many["examples"]
    for way, figures in one["figures"].items():
        for name, one_figure in figures.items():
            other = many["figures"][way][name]
            assert one_figure.keys() == other.keys()
            assert all(
                other[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
                for key, value in one_figure.items()
            ), (way, name)


def test_without_latents_no_greedy_texts_without_a_prompt(gpt2, memory, tokenizer):
    """Nor of a memory, which begins with nothing."""
    for model in (memory, gpt2):
        result = text_figures(model, tokenizer, REFERENCES, **SMALL)
        assert "texts: greedy" not in result["figures"] and "completions: greedy" in result["figures"]
    result = text_figures(gpt2, tokenizer, REFERENCES, **SMALL | {"prompt_tokens": None})
    assert list(result["figures"]) == ["texts: references", "texts: multinomial"]
    assert "judge_perplexity" not in result["figures"]["texts: references"]


def test_other_units_than_words(model, tokenizer):
    result = text_figures(model, tokenizer, ["aab", "cc"], **SMALL | {"prompt_tokens": None}, split=list)
    assert result["figures"]["texts: references"]["distinct_1"]["value"] == 3 / 5


def test_what_cannot_be_had_is_skipped_with_a_sentence(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "find_spec", lambda name: True)
    monkeypatch.setattr(text_module, "MAUVE_LEAST", 2)
    nowhere = str(tmp_path / "nowhere")
    result = text_figures(model, tokenizer, REFERENCES, **SMALL, judge=nowhere, features=nowhere)
    for way in ("texts: greedy", "completions: multinomial"):
        for name in ("judge_perplexity", "mauve"):
            reason = result["figures"][way][name]["skipped"]
            assert reason.startswith(f"The model {nowhere!r} cannot be loaded: ") and "\n" not in reason
    assert result["figures"]["texts: greedy"]["entropy"]["n"] == 4
    table = text_table(result)
    assert table.count("Skipped: ") == 2 and "| mauve" not in table


def test_mauve_sees_prompts_and_texts(model, gpt2, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(text_module, "find_spec", lambda name: True)
    monkeypatch.setattr(text_module, "MAUVE_LEAST", 2)
    monkeypatch.setattr(text_module, "text_features", lambda model, tokenizer, texts, **options: texts)
    monkeypatch.setattr(text_module, "mauve", lambda *sides: seen.append(sides) or figure([0.5]))
    result = text_figures(model, tokenizer, REFERENCES, **SMALL, features=(gpt2, tokenizer), seed=5, num_examples=4)
    wholes = {way: [text["prompt"] + text["text"] for text in texts] for way, texts in result["examples"].items()}
    ways = [("texts", "multinomial"), ("texts", "greedy"), ("completions", "multinomial"), ("completions", "greedy")]
    assert seen == [(wholes[f"{kind}: {way}"], wholes[f"{kind}: references"], 5) for kind, way in ways]
    assert wholes["completions: greedy"][0].startswith("the cat")
    assert "a model given; it compares with no published figure" in text_table(result)


def test_table(model, gpt2, tokenizer):
    result = text_figures(model, tokenizer, REFERENCES, **SMALL, judge=(gpt2, tokenizer))
    table, notes = text_table(result).split("\n\n")
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned
    figure = result["figures"]["texts: multinomial"]["entropy"]
    assert f"{figure['value']:.4g} ± {figure['error']:.2g}" in table
    assert "Judge: a model given." in notes and "Skipped: mauve: MAUVE needs 100 texts" in notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"references": []}, "no references"),
        ({"n": 0}, "n must be an integer of 1 or more"),
        ({"batch_size": 0}, "batch_size must be an integer of 1 or more"),
        ({"max_new_tokens": 61}, "more than the 64"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more"),
        ({"prompt_tokens": 0}, "prompt_tokens must be an integer of 1 or more"),
    ],
)
def test_bad_input_is_refused_before_any_computation(options, message, model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(model), "generate", None)
    with pytest.raises(ValueError, match=message):
        text_figures(model, tokenizer, **{"references": REFERENCES} | SMALL | options)
