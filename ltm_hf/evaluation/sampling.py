"""Many texts by one model, without prompts or after them: an LTM or any other causal LM of transformers.

A text depends on the seed, its prompt and its own number, not on its batch: latents and tokens are drawn with keyed
noise, and torch's generators are left alone. What transformers does not promise: the logits of a row differ by rounding
between batches of other shapes, so that of two tokens that are level to rounding now one is taken, now the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..configuration_ltm import InferenceSettings
from ..data import encode
from ..data.numbers import check_at_least
from ..inference_ltm import infer_posterior
from ..posterior_ltm import LatentPosterior, keyed_normal, sequence_keys
from .figures import check_finite, evaluating

_TOKEN = 4  # a use of noise beside those of posterior_ltm


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: drawn after temperature, top_k and top_p, or the likeliest each time.

    Raises ValueError for what transformers' own warpers refuse.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        self.warpers()

    def warpers(self) -> list[LogitsProcessor]:
        """transformers', in its order."""
        warpers = [TemperatureLogitsWarper(float(self.temperature))]
        warpers += [] if self.top_k is None else [TopKLogitsWarper(self.top_k)]
        return warpers + ([] if self.top_p is None else [TopPLogitsWarper(float(self.top_p))])


MULTINOMIAL, GREEDY = Decoding(), Decoding(do_sample=False)


class WrittenText(NamedTuple):
    """What a model wrote, without the prompt."""

    text: str
    tokens: list[int]  # without end-of-text
    ended: bool  # by itself, with end-of-text or a stop string


def sample_texts(
    model,
    tokenizer,
    n: int,
    max_new_tokens: int,
    decoding: Decoding = MULTINOMIAL,
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> list[WrittenText]:
    """n texts from begin-of-text; of an LTM with latents from the prior: text i reads `sample_prior(n, seed)[i]`.

    A memory begins with nothing, the prior's mean, and learns as it writes. Then, and without latents, greedy search
    writes the same text n times. Raises ValueError for a number below 1, a tokenizer without a begin-of-text token,
    more tokens than the model's context holds, and weights that are not finite.
    """
    check_at_least(1, n=n, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_inference(model)
    if tokenizer.bos_token_id is None:
        raise ValueError("Texts without a prompt need a tokenizer with a begin-of-text token (bos_token).")
    check_room(model, [1], max_new_tokens)

    def thoughts_of(prompts, keys):
        if not has_prior_thoughts(model):
            return {}
        origin = torch.zeros((len(prompts), *model.config.latent_shape), device=keys.device)
        return {"latents": LatentPosterior(origin, origin, keys=keys).sample(seed)}

    prompts = [[tokenizer.bos_token_id]] * n
    return _write(
        model, tokenizer, prompts, range(n), thoughts_of, max_new_tokens, decoding, None, batch_size, seed, progress
    )


def has_prior_thoughts(model) -> bool:
    """Whether each text without a prompt reads latents of its own, from the prior."""
    return bool(getattr(model.config, "num_latents", 0)) and not model.config.has_memory


def complete_texts(
    model,
    tokenizer,
    prompts: Sequence[str | list[int]],
    max_new_tokens: int,
    decoding: Decoding = MULTINOMIAL,
    *,
    num_samples: int = 1,
    num_inference_steps: int | None = None,
    stop_strings: list[str] | None = None,
    keys: Sequence[int] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> list[list[WrittenText]]:
    """`num_samples` continuations of each prompt. An LTM infers its latents from the prompt alone; a memory goes on.

    prompts: texts, encoded with what the tokenizer puts before one, or token ids as they are.
    decoding: when drawing, each continuation reads its own sample of the posterior; greedy search, and a memory, reads
        the mean.
    num_inference_steps: default as in `generate`, the generation config's or the model's.
    stop_strings: a text ends with the first of them that it writes.
    keys: numbers below 2³² that name the prompts to the noise; default 0, 1, … Continuation j depends on its prompt,
        the prompt's key and j: a part of a job and a longer one write the same texts.
    batch_size: continuations written together.

    Raises ValueError for a number below 1, an empty prompt, one that leaves no room for `max_new_tokens`, and weights
    that are not finite.
    """
    check_at_least(1, max_new_tokens=max_new_tokens, num_samples=num_samples, batch_size=batch_size)
    check_inference(model, num_inference_steps)
    keys = range(len(prompts)) if keys is None else keys
    if len(keys) != len(prompts):
        raise ValueError(f"There are {len(prompts)} prompts and {len(keys)} keys.")
    prompts = [_tokens(tokenizer, prompt) for prompt in prompts]
    check_room(model, [len(prompt) for prompt in prompts], max_new_tokens)

    def thoughts_of(prompts, keys):
        return _thoughts(model, prompts, keys, num_inference_steps, decoding, seed)

    pairs = list(product(range(len(prompts)), range(num_samples)))
    written = _write(
        model, tokenizer, [prompts[prompt] for prompt, _ in pairs],
        [keys[prompt] + (sample << 32) for prompt, sample in pairs], thoughts_of, max_new_tokens, decoding,
        stop_strings, batch_size, seed, progress,
    )  # fmt: skip
    return [written[start : start + num_samples] for start in range(0, len(written), num_samples)]


def _thoughts(model, prompts, keys, num_inference_steps, decoding: Decoding, seed: int) -> dict:
    """What generate() is told of latents, to continue prompts; none is inferred twice."""
    if not getattr(model.config, "num_latents", 0):
        return {}
    if model.config.has_memory:  # which reads a prompt as generate() does
        return {"num_inference_steps": num_inference_steps}
    different = list(dict.fromkeys(map(tuple, prompts)))
    asked = {"num_inference_steps": num_inference_steps, "do_sample": decoding.do_sample}
    settings = model._pop_inference_settings(None, asked)
    posterior = infer_posterior(model, *_left_padded(different, model.device), **settings.inference)
    posterior = posterior[[different.index(tuple(prompt)) for prompt in prompts]]
    posterior.keys = posterior.keys + keys
    return {"latents": posterior.sample(seed) if settings.sample_latents else posterior.mean}


def _tokens(tokenizer, prompt: str | list[int]) -> list[int]:
    return encode(tokenizer, [prompt], begin=True)["input_ids"][0] if isinstance(prompt, str) else list(prompt)


def check_inference(model, num_inference_steps: int | None = None) -> None:
    """Raise a ValueError for weights that are not finite, for so many steps if the model can think at all, and for a
    memory that is to draw its thoughts, which would not be keyed."""
    if getattr(model.config, "num_latents", 0):
        InferenceSettings.of(model.config, num_inference_steps=num_inference_steps)
        if model.config.has_memory and getattr(model.generation_config, "sample_latents", None):
            raise ValueError(
                "The generation config says sample_latents=True: a memory draws at each token from torch's generator, "
                "and here a text depends on its seed alone."
            )
    check_finite(model)


def context_length(model) -> int | None:
    """Tokens that the model can hold; None if its configuration names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_room(model, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raise a ValueError unless all prompts have tokens, and leave room for so many more."""
    if not lengths:
        return
    if min(lengths) < 1:
        raise ValueError(f"Prompt {list(lengths).index(0)} is empty: it has no token to continue.")
    limit, longest = context_length(model), max(lengths)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones are more than the {limit} the model holds."
        )


class _KeyedSampling(LogitsProcessor):
    """Draws from softmax(scores) by the maximum of scores + Gumbel noise, which greedy search then takes.

    The noise is a function of the seed, a row's key and the number of its token. A Gumbel variable is
    -log(-log Φ(x)) of a standard normal x; the logarithm of Φ keeps the upper tail, which decides, exact in float32.
    """

    def __init__(self, keys: torch.Tensor, seed: int, prompt_length: int):
        self.keys, self.seed, self.prompt_length = keys, seed, prompt_length

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        normal = keyed_normal(self.keys, scores.shape[1:], self.seed, _TOKEN, step)
        return scores - (-torch.special.log_ndtr(normal)).log()


def _write(
    model,
    tokenizer,
    prompts: list[list[int]],
    keys: Sequence[int],
    thoughts_of: Callable[[list[list[int]], torch.Tensor], dict],
    max_new_tokens: int,
    decoding: Decoding,
    stop_strings: list[str] | None,
    batch_size: int,
    seed: int,
    progress: bool,
) -> list[WrittenText]:
    """A text for each prompt, prompts of like length together. thoughts_of: what generate() is told of latents."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    # Rows that are done are filled up with end-of-text, by which they are cut; the mask of a prompt is given.
    options = {"eos_token_id": eos, "pad_token_id": eos[0]} if eos else {"pad_token_id": tokenizer.pad_token_id or 0}
    if stop_strings:
        options |= {"stop_strings": stop_strings, "tokenizer": tokenizer}

    written = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with evaluating(model), tqdm(total=len(prompts), desc="Writing", unit="text", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [prompts[row] for row in rows]
            row_keys = torch.tensor([keys[row] for row in rows], device=model.device)
            input_ids, attention_mask = _left_padded(batch, model.device)
            width = input_ids.shape[1]
            thoughts, processors = thoughts_of(batch, row_keys), []
            if decoding.do_sample:
                row_keys = row_keys + sequence_keys(input_ids, attention_mask)
                processors = [*decoding.warpers(), _KeyedSampling(row_keys, seed, width)]
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=False,
                logits_processor=LogitsProcessorList(processors),
                **options,
                **thoughts,
            )
            for row, tokens in zip(rows, output[:, width:].tolist(), strict=True):
                end = next((place for place, token in enumerate(tokens) if token in eos), None)
                text = tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
                stopped = any(stop in text for stop in stop_strings or ())
                written[row] = WrittenText(text, tokens[:end], end is not None or stopped)
            bar.update(len(rows))
    return written


def _left_padded(rows: Sequence[Sequence[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) token ids and mask. What padding holds is masked and matters to nobody."""
    options = {"batch_first": True, "padding_side": "left"}
    input_ids = pad_sequence([torch.tensor(row) for row in rows], **options)
    attention_mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], **options)
    return input_ids.to(device), attention_mask.to(device)
