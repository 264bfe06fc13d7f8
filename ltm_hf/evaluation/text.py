"""The quality of written text: length, entropy, variety, repetition, what a judge makes of it, MAUVE.

All beside the same figures of human text. Each figure is {"value", "error", "n"}: the error is a standard error over
texts (None for a single one), n the number of texts; or {"skipped": why}.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict
from importlib.util import find_spec

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data import collate_blocks, encode
from ..data.numbers import check_at_least
from ..likelihood_ltm import Text, negative_log_likelihood
from ..losses_ltm import IGNORED
from .figures import as_figure, cell, check_finite, evaluating, figure, markdown_rows, ratio_and_error
from .likelihood import no_text_yet
from .sampling import (
    GREEDY,
    MULTINOMIAL,
    WrittenText,
    check_inference,
    check_room,
    complete_texts,
    context_length,
    has_prior_thoughts,
    sample_texts,
)

DESCRIPTIONS = {
    "tokens": "length of a text, in the model's tokens",
    "ended": "share of the texts that ended before the limit",
    "entropy": "of the words within a text, nats (Dieleman et al. 2022); low: few words over and over",
    "distinct_1": "different words / words, all texts together (Li et al. 2016); falls with the amount of text",
    "distinct_2": "the same of pairs of words",
    "distinct_3": "the same of triples",
    "repetition_4": "share of a text's runs of 4 words that it has had before (seq-rep-4, Welleck et al. 2020)",
    "judge_perplexity": "exp(nats / tokens) under the judge, all texts together; low is not good by itself",
    "mauve": "closeness to the references in 0 … 1 (Pillutla et al. 2021)",
}

MAUVE_FEATURES = "gpt2-large"  # those of published figures
MAUVE_LEAST = 100  # texts: ten clusters. Published figures have thousands; of 30 texts MAUVE calls anything alike.


# ------------------------------------------------------------------ of tokens


def entropy(tokens: Sequence[Hashable]) -> float:
    """Nats: the entropy of the frequencies of the tokens of one text. NaN if it has none."""
    if not tokens:
        return math.nan
    return -sum(count / len(tokens) * math.log(count / len(tokens)) for count in Counter(tokens).values())


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple]:
    """All runs of n tokens, in order. Raises ValueError for n below 1."""
    check_at_least(1, n=n)
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float:
    """1 - different n-grams / n-grams of one text. NaN if it is shorter than n."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else math.nan


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int) -> dict:
    """Different n-grams / n-grams of all texts together, with the jackknife's standard error.

    Not the bootstrap's: a text drawn twice brings nothing new, which lowers the figure and widens its spread (on 32
    passages of books, seven times the true one).
    """
    of_texts = [grams for tokens in texts if (grams := ngrams(tokens, n))]
    if not of_texts:
        return as_figure(math.nan, math.nan, 0)
    owners = Counter(gram for grams in of_texts for gram in set(grams))  # in how many texts
    total = sum(map(len, of_texts))
    without = np.array(
        [
            (len(owners) - sum(owners[gram] == 1 for gram in set(grams))) / (total - len(grams))
            for grams in of_texts
            if total > len(grams)
        ]
    )
    count = len(of_texts)
    error = math.sqrt((count - 1) * without.var()) if count > 1 else math.nan
    return as_figure(len(owners) / total, error, count)


# ------------------------------------------------------------------ of a judge


def judged_losses(
    judge,
    tokenizer,
    texts: Sequence[str],
    contexts: Sequence[str] | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) nats of each text under a causal LM, and (n,) scored tokens, its own.

    An LTM judges without latents; one with a memory by what it has read before each token, contexts included.
    contexts: what the texts follow, tokenised apart from them and not scored.
    A text's first token is conditioned on the judge's begin-of-text token and the context; where there is neither, it
    is not scored. Nor is what lies beyond the judge's context length.

    Raises ValueError for no text, a batch size below 1, and a judge whose weights are not finite.
    """
    check_at_least(1, batch_size=batch_size, texts=len(texts))
    check_finite(judge)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = []
    for text, context in zip(texts, contexts or [""] * len(texts), strict=True):
        before, tokens = encode(tokenizer, [context, text])["input_ids"]
        before = begin + before
        ids, labels = before + tokens, [IGNORED] * len(before) + tokens
        limit = context_length(judge)
        rows.append({"input_ids": ids[:limit] or [0], "labels": labels[:limit] or [IGNORED]})
    nats, counts = [], []
    with evaluating(judge):
        for start in tqdm(range(0, len(rows), batch_size), desc="Judging", disable=not progress, leave=False):
            batch = {name: x.to(judge.device) for name, x in collate_blocks(rows[start : start + batch_size]).items()}
            read = Text.unchecked(**batch)
            memory = no_text_yet(judge, len(read.input_ids))
            nats.append(negative_log_likelihood(judge, read, **memory).double().cpu())
            counts.append(read.num_tokens.cpu())
    return torch.cat(nats), torch.cat(counts)


def pooled_perplexity(nats: torch.Tensor, counts: torch.Tensor) -> dict:
    """exp(all nats / all tokens), with the standard error of a ratio of sums over texts (delta method)."""
    n, total = int((counts > 0).sum()), counts.sum()
    if not n:
        return {"skipped": "No text has a token to score."}
    mean, error = ratio_and_error(nats.double(), counts.double(), torch.arange(len(counts)))
    perplexity = math.inf if mean >= 700 else math.exp(mean)
    return as_figure(perplexity, perplexity * error, n) | {"num_tokens": int(total)}


# ------------------------------------------------------------------ of features


def text_features(
    model, tokenizer, texts: Sequence[str], batch_size: int = 8, max_length: int = 1024, progress: bool = False
) -> np.ndarray:
    """(n, hidden) the model's last hidden state at each text's last token, as MAUVE takes it; empty texts left out.

    Not more than max_length tokens of a text, nor than the model holds. An LTM reads without latents.
    """
    length = min(max_length, context_length(model) or max_length)
    rows = [row[:length] for row in encode(tokenizer, [text for text in texts if text], begin=True)["input_ids"]]
    rows = [{"input_ids": row} for row in rows if row]
    features = []
    with evaluating(model):
        for start in tqdm(range(0, len(rows), batch_size), desc="Features", disable=not progress, leave=False):
            batch = {name: x.to(model.device) for name, x in collate_blocks(rows[start : start + batch_size]).items()}
            batch.pop("labels")
            states = model.base_model(**batch).last_hidden_state
            last = torch.tensor([len(row["input_ids"]) - 1 for row in rows[start : start + batch_size]])
            features.append(states[torch.arange(len(last)), last].float().cpu())
    return torch.cat(features).numpy() if features else np.zeros((0, 0), dtype=np.float32)


def _check_mauve(n: int) -> None:
    if n < MAUVE_LEAST:
        raise ValueError(f"MAUVE needs {MAUVE_LEAST} texts or more on either side to say anything, got {n}.")
    if not find_spec("mauve"):
        raise ImportError('MAUVE needs the package mauve-text: pip install "ltm_hf[eval]".')


def mauve(written: np.ndarray, references: np.ndarray, seed: int = 0, resamples: int = 200) -> dict:
    """MAUVE of (n, hidden) features by mauve-text, in its default settings. n is the smaller number of texts.

    The error is a bootstrap over texts that stay in the clusters they were put in; on synthetic features it came out
    half as large again as the true spread. Only figures of the same features and about the same n compare.

    Raises ImportError without mauve-text, and ValueError for fewer than 100 texts on either side.
    """
    n = min(len(written), len(references))
    _check_mauve(n)
    from mauve import compute_mauve
    from mauve.compute_mauve import get_divergence_curve_for_multinomials
    from sklearn.metrics import auc

    result = compute_mauve(p_features=written, q_features=references, seed=seed)
    random, weights = np.random.default_rng(seed), np.linspace(1e-6, 1 - 1e-6, 25)
    resampled = []
    for _ in range(resamples):
        p, q = (
            random.multinomial(len(x), histogram) / len(x)
            for x, histogram in ((written, result.p_hist), (references, result.q_hist))
        )
        x, y = get_divergence_curve_for_multinomials(p, q, weights, 5).T
        by_x, by_y = np.argsort(x), np.argsort(y)
        resampled.append((auc(x[by_x], y[by_x]) + auc(y[by_y], x[by_y])) / 2)
    return as_figure(float(result.mauve), float(np.std(resampled, ddof=1)), n)


# ------------------------------------------------------------------ all of them


def text_figures(
    model,
    tokenizer,
    references: Sequence[str],
    n: int = 128,
    max_new_tokens: int = 128,
    *,
    prompt_tokens: int | None = 32,
    decodings: dict | None = None,
    num_inference_steps: int | None = None,
    judge=None,
    features=MAUVE_FEATURES,
    split: Callable[[str], list] = str.split,
    batch_size: int = 32,
    seed: int = 0,
    num_examples: int = 3,
    progress: bool = True,
) -> dict:
    """Every figure of `DESCRIPTIONS` of n texts without a prompt and of n completions, and of human text beside them.

    references: human texts; the first n, cut to max_new_tokens, stand beside the texts without a prompt. The first n
        that have more than prompt_tokens tokens give the prompts, and their next max_new_tokens stand beside the
        completions, whose judge and MAUVE know the prompt. Greedy texts without a prompt are left out where they would
        be one and the same, without latents or with a memory.
    prompt_tokens: begin-of-text included; None leaves completions out.
    decodings: names and `Decoding`s; default multinomial and greedy.
    judge: (model, tokenizer), or a causal LM's folder or name; None leaves its figure out.
    features: for MAUVE, in the same forms; only those of gpt2-large compare with published figures.
    split: a text to what entropy, distinct and repetition count; default words, which compare across tokenizers.

    Returns a dict for JSON: `settings`; `figures`, for each way of writing, each figure; `examples`, texts of each way.
    A judge or features that cannot be had are skipped, with the reason in their place. Raises ValueError, before any
    computation, for numbers out of range, no references, and weights that are not finite.
    """
    longest = 1 if prompt_tokens is None else prompt_tokens
    check_at_least(1, n=n, max_new_tokens=max_new_tokens, batch_size=batch_size, prompt_tokens=longest)
    check_at_least(0, num_examples=num_examples)
    check_inference(model, num_inference_steps)
    check_room(model, [longest], max_new_tokens)
    decodings = {"multinomial": MULTINOMIAL, "greedy": GREEDY} if decodings is None else decodings
    if not references:
        raise ValueError("There are no references: human texts to hold what the model writes against.")
    ways, prompts = _written(
        model, tokenizer, references, n, max_new_tokens, prompt_tokens, decodings,
        num_inference_steps=num_inference_steps, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    figures = {way: _of_tokens(texts, split) for way, texts in ways.items()}
    others = {"batch_size": min(batch_size, 8), "progress": progress}
    _judge(figures, ways, prompts, judge, model.device, **others)
    _compare(figures, ways, prompts, features, model.device, seed, **others)
    settings = {
        "n": n, "max_new_tokens": max_new_tokens, "prompt_tokens": prompt_tokens,
        "decodings": {name: asdict(decoding) for name, decoding in decodings.items()},
        "num_inference_steps": num_inference_steps, "judge": _name(judge), "features": _name(features), "seed": seed,
    }  # fmt: skip
    examples = {
        way: [{"prompt": prompts[way][row], "text": text.text} for row, text in enumerate(texts[:num_examples])]
        for way, texts in ways.items()
    }
    return {"settings": settings, "figures": figures, "examples": examples}


def _written(
    model, tokenizer, references, n, max_new_tokens, prompt_tokens, decodings, *, num_inference_steps, **options
) -> tuple[dict[str, list[WrittenText]], dict[str, list[str]]]:
    """Texts by way of writing, and the prompt that each of them follows, which may be empty."""
    bodies = encode(tokenizer, references[:n])["input_ids"]
    ways = {"texts: references": [_cut(tokenizer, body, max_new_tokens) for body in bodies]}
    for name, decoding in decodings.items():
        if decoding.do_sample or has_prior_thoughts(model):
            ways[f"texts: {name}"] = sample_texts(model, tokenizer, n, max_new_tokens, decoding, **options)
    wholes = [] if prompt_tokens is None else encode(tokenizer, references, begin=True)["input_ids"]
    wholes = [ids for ids in wholes if len(ids) > prompt_tokens][:n]
    heads = [ids[:prompt_tokens] for ids in wholes]
    if wholes:
        ways["completions: references"] = [_cut(tokenizer, ids[prompt_tokens:], max_new_tokens) for ids in wholes]
        for name, decoding in decodings.items():
            completed = complete_texts(
                model, tokenizer, heads, max_new_tokens, decoding, num_inference_steps=num_inference_steps, **options
            )
            ways[f"completions: {name}"] = [text for (text,) in completed]
    shown = [_decode(tokenizer, head) for head in heads]
    return ways, {way: shown if way.startswith("completions: ") else [""] * len(texts) for way, texts in ways.items()}


def text_table(result: dict) -> str:
    """Of what `text_figures` returns: a Markdown table, a row for each figure, and the reasons of what was skipped."""
    figures, settings = result["figures"], result["settings"]
    rows = [["figure", *figures, "what it is"]]
    rows.append(["texts", *(str(of_way["tokens"]["n"]) for of_way in figures.values()), "how many"])
    reasons = {}
    for name, description in DESCRIPTIONS.items():
        of_ways = [of_way.get(name) for of_way in figures.values()]
        reasons |= {f"{name}: {figure['skipped']}": None for figure in of_ways if figure and "skipped" in figure}
        if any(figure and "value" in figure for figure in of_ways):
            rows.append([name, *map(cell, of_ways), description])
    notes = ["Value ± standard error over texts."]
    if any("judge_perplexity" in of_way for of_way in figures.values()):
        notes.append(f"Judge: {settings['judge']}.")
    if any("value" in of_way.get("mauve", {}) for of_way in figures.values()):
        own = "" if settings["features"] == MAUVE_FEATURES else "; it compares with no published figure"
        notes.append(f"MAUVE by features of {settings['features']}{own}.")
    return "\n".join([markdown_rows(rows), "", " ".join(notes), *(f"Skipped: {reason}" for reason in reasons)])


def text_examples(result: dict) -> str:
    """Of what `text_figures` returns: its example texts as quotations, the prompt in italics."""
    parts = []
    for way, examples in result["examples"].items():
        parts.append(f"{way[0].upper()}{way[1:]}:")
        for example in examples:
            prompt, text = (example[part].replace("\n", " ").strip() for part in ("prompt", "text"))
            parts.append(f"> *{prompt}*{text}" if prompt else f"> {text}")
    return "\n\n".join(parts)


def _of_tokens(texts: Sequence[WrittenText], split: Callable[[str], list]) -> dict[str, dict]:
    words = [split(text.text) for text in texts]
    return {
        "tokens": figure([len(text.tokens) for text in texts]),
        "ended": figure([text.ended for text in texts]),
        "entropy": _of_defined(entropy(tokens) for tokens in words),
        **{f"distinct_{n}": distinct_n(words, n) for n in (1, 2, 3)},
        "repetition_4": _of_defined(repetition(tokens, 4) for tokens in words),
    }


def _of_defined(values: Iterable[float]) -> dict:
    """A figure over the texts that have one."""
    return figure([value for value in values if not math.isnan(value)])


def _judge(figures, ways, prompts, judge, device, **options) -> None:
    if judge is None:
        return
    loaded = _loaded(judge, device)
    for way, texts in ways.items():
        if isinstance(loaded, str):
            figures[way]["judge_perplexity"] = {"skipped": loaded}
        else:
            losses = judged_losses(*loaded, [text.text for text in texts], prompts[way], **options)
            figures[way]["judge_perplexity"] = pooled_perplexity(*losses)


def _compare(figures, ways, prompts, features, device, seed, **options) -> None:
    """MAUVE of each way against the references of its kind, which stands before the colon."""
    loaded, read = None, {}
    for way in ways:
        reference = f"{way.split(':')[0]}: references"
        if way == reference:
            continue
        try:
            _check_mauve(min(len(ways[way]), len(ways[reference])))  # before a model is loaded for nothing
            loaded = loaded or _loaded(features, device)
            if isinstance(loaded, str):
                raise OSError(loaded)
            for one in {way, reference} - read.keys():
                wholes = [prompt + text.text for prompt, text in zip(prompts[one], ways[one], strict=True)]
                read[one] = text_features(*loaded, wholes, **options)
            figures[way]["mauve"] = mauve(read[way], read[reference], seed)
        except (ImportError, OSError, ValueError) as error:
            figures[way]["mauve"] = {"skipped": str(error)}


def _loaded(given, device):
    """(model, tokenizer), or a sentence that says why there is none."""
    if not isinstance(given, str):
        return given
    try:
        model = AutoModelForCausalLM.from_pretrained(given).to(device)
        check_finite(model)
        return model, AutoTokenizer.from_pretrained(given)
    except (OSError, ValueError) as error:
        return f"The model {given!r} cannot be loaded: {str(error).strip().splitlines()[0]}"


def _name(given) -> str | None:
    return given if given is None or isinstance(given, str) else given[0].config._name_or_path or "a model given"


def _cut(tokenizer, tokens: list[int], length: int) -> WrittenText:
    return WrittenText(_decode(tokenizer, tokens[:length]), tokens[:length], len(tokens) <= length)


def _decode(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
