"""Generation: infer the posterior of the prompt once, then let transformers write.

The latents become keys and values before anything expands for beams or `num_return_sequences`, and travel as one
tensor among the model's keyword arguments, so that every decoding method and cache of `GenerationMixin` works.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import GenerationConfig
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from .cache_ltm import CACHE, CacheByBothNames, check_filled_with_latents, keep_latents, kept_latents, the_cache
from .configuration_ltm import InferenceSettings, whole_number
from .inference_ltm import infer_posterior, processes_go_together
from .likelihood_ltm import check_sequences
from .memory_ltm import prior_state, state_of
from .methods_ltm import method_of
from .posterior_ltm import LatentPosterior, check_posterior

# What generate() takes, and generation_config.json keeps, beside transformers' own. None: as in the model's config.
_SETTINGS = (*(field.name for field in fields(InferenceSettings)), "inference_seed", "sample_latents", "reinfer_every")


# ------------------------------------------------------------------ prompts of different lengths

# What another bucket costs, in tokens of padding: a fast step takes as long for nothing as for 60 (ltm-small) to 110
# tokens (ltm-tiny) on one CPU core, and more where kernels wait to be launched. Of 50 to 500, 256 is at most 7 % off.
_BUCKET = 256


def buckets(lengths: list[int]) -> list[list[int]]:
    """The indices of each bucket: of all partitions in order of length, one with the least padding + _BUCKET each."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best = [(0, 0)]  # of the shortest `end`: tokens with padding, and where the last bucket starts
    for end, index in enumerate(order, start=1):
        best.append(min((best[start][0] + (end - start) * lengths[index] + _BUCKET, start) for start in range(end)))
    parts, end = [], len(order)
    while end:
        start = best[end][1]
        parts, end = [order[start:end], *parts], start
    return parts


def _trimmed(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the columns on either side that are padding in all rows."""
    used = attention_mask.bool().any(dim=0).int()
    columns = slice(int(used.argmax()), used.numel() - int(used.flip(0).argmax()))
    return input_ids[:, columns], attention_mask[:, columns]


@torch.inference_mode(False)
def infer_in_buckets(model, input_ids, attention_mask=None, callback=None, **settings) -> LatentPosterior:
    """`infer_posterior` of sequences (B, S) in buckets of similar length, so that little padding is computed.

    Noise belongs to a sequence's tokens: the posterior is that of the padded batch. Its ELBO trace is too, but where
    a bucket takes fewer steps (by its tolerance, or since it has nothing to explain) and repeats its last, or 0.
    One bucket if there is a callback, which gets the whole batch, or if other processes must take as many steps.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    lengths = mask.bool().sum(dim=1).tolist()
    together = callback is not None or processes_go_together(model)
    parts = [list(range(len(lengths)))] if together else buckets(lengths)
    posteriors = [
        infer_posterior(model, *_trimmed(input_ids[rows], mask[rows]), callback=callback, **settings) for rows in parts
    ]
    steps = max(len(posterior.elbo_trace) for posterior in posteriors)
    joined = LatentPosterior(
        torch.cat([posterior.mean for posterior in posteriors]),
        torch.cat([posterior.log_variance for posterior in posteriors]),
        torch.cat([_lengthened(posterior.elbo_trace, steps) for posterior in posteriors], dim=1),
        torch.cat([posterior.keys for posterior in posteriors]),
    )[torch.tensor(sum(parts, [])).argsort()]
    joined.num_non_finite = sum(posterior.num_non_finite for posterior in posteriors)
    return joined


def _lengthened(trace: torch.Tensor, steps: int) -> torch.Tensor:
    last = trace[-1:] if len(trace) else trace.new_zeros(1, trace.shape[1])
    return torch.cat((trace, last.expand(steps - len(trace), -1)))


# ------------------------------------------------------------------ generate()

_OF_LATENTS = ("latent_key_values", "latent_state", "latent_noise", "latent_writes")


class _Asked(NamedTuple):
    """How to think, for one call."""

    settings: dict  # of `InferenceSettings`, None where the configuration's hold
    seed: int | None
    sample_latents: bool
    reinfer_every: int | None

    @property
    def inference(self) -> dict:
        """Arguments of `infer_posterior`."""
        return self.settings | {"seed": self.seed}


@dataclass
class _Thoughts:
    """What one call is given of latents, and what it infers."""

    latents: torch.Tensor | None
    posterior: LatentPosterior | None
    num_samples: int | None
    callback: Callable | None
    settings: _Asked

    @property
    def given(self):
        return self.latents if self.posterior is None else self.posterior

    def samples(self) -> torch.Tensor:
        """(B · num_samples, L, N, D), grouped by prompt."""
        drawn = [self.posterior.sample() for _ in range(self.num_samples)]
        return torch.stack(drawn, dim=1).flatten(0, 1)


@dataclass
class _Reinference:
    """Thinking again while writing, with what the steps of one call of generate() share."""

    every: int  # tokens
    prompt_length: int
    think: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]  # tokens and mask to latent_key_values
    new_cache: Callable[[torch.Tensor], object] | None = None  # None: the call uses no cache
    latent_key_values: torch.Tensor | None = None  # the latest

    def is_due(self, input_ids: torch.Tensor) -> bool:
        written = input_ids.shape[1] - self.prompt_length
        return written > 0 and written % self.every == 0


@dataclass
class LTMGenerateOutput(CacheByBothNames, GenerateDecoderOnlyOutput):
    """transformers' output of greedy search and sampling, and the `posterior` of the prompts if one was inferred."""

    posterior: LatentPosterior | None = None


@dataclass
class LTMGenerateBeamOutput(CacheByBothNames, GenerateBeamDecoderOnlyOutput):
    """transformers' output of beam search, and the `posterior` of the prompts if one was inferred."""

    posterior: LatentPosterior | None = None


class LTMGenerationMixin(GenerationMixin):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # At each token, transformers reads the signature of a `forward` that is not its own.
        cls.forward.__signature__ = inspect.signature(cls.forward)

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        generation_config=None,
        *args,
        latents=None,
        posterior=None,
        num_latent_samples=None,
        inference_callback=None,
        cache=None,
        past_key_values=None,
        **kwargs,
    ):
        """Infer latents from the prompt, then generate as any causal LM of transformers.

        A memory thinks while it reads and writes: every token updates it, at no cost. The paper's reader fits latents
        to the prompt, once.

        latents: (B, L, N, D), to skip inference: `generate(latents=model.sample_prior(n))` writes n texts without a
            prompt, from the begin-of-text token. A memory starts with them, and goes on from there.
        posterior: of the prompts, to skip inference: infer once, write many times.
        num_latent_samples: thoughts for each prompt, sampled from its posterior; each writes `num_return_sequences`
            texts. Rows of the result are grouped by prompt, then by thought.
        inference_callback: called after each inference step, as `infer_posterior`'s `callback`. Prompts of different
            lengths are then inferred in one padded batch, else in buckets, with the same posterior.
        cache, past_key_values: two names of one argument. A cache holds the latents, or the memory, that it was filled
            with: a call that continues it reads those, unless the paper's reader is given `latents` or a `posterior`.
        inference_method, num_inference_steps, inference_learning_rate, …: as in `LTMConfig`, for this call. As
            everything that `GenerationConfig` holds, they can be set there and are saved with it.
        reinfer_every: infer again after every so many tokens, from all the text so far, and write on with its latents
            as if that text were the prompt (greedy search and sampling only). Default: think once. Not for a memory.
        inference_seed: keys the noise of inference, default 0: two calls infer the same posterior.
        sample_latents: read a sample of the posterior (True) or its mean (False, the better predictor). Default: False
            for a memory, which would draw one at each token, else `do_sample`, so that greedy and beam search are
            deterministic, and a prompt with nothing to infer from gets a sample of the prior when sampling. The sample
            follows torch's global generator; prompts of the same tokens share it.

        With `return_dict_in_generate`, the result has the `posterior` of the prompts where one was inferred before
        writing. Raises ValueError for bad input before any computation, for `inputs_embeds` alone, which has no token
        ids to infer latents from, and for a cache that was filled without latents.
        """
        settings = self._pop_inference_settings(generation_config, kwargs)
        input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
        cache = the_cache(cache, past_key_values)
        if cache is not None:
            kwargs[CACHE] = cache
        if not self.config.num_latents:
            if any(x is not None for x in (latents, posterior, num_latent_samples)):
                raise ValueError("This model was built with num_latents=0 and takes no latents.")
            if input_ids is not None:
                self._check_prompts(input_ids)
            return self._output(super().generate(input_ids, generation_config, *args, **kwargs))

        if settings.reinfer_every is not None:
            self._check_reinference(generation_config, kwargs)
        num_latent_samples = self._check_given(latents, posterior, num_latent_samples)
        check_filled_with_latents(cache)
        input_ids = self._prompts(input_ids, latents, posterior, generation_config, kwargs)
        thoughts = _Thoughts(latents, posterior, num_latent_samples, inference_callback, settings)
        think = self._start_memory if self.config.has_memory else self._fit_latents
        input_ids, kwargs = think(thoughts, input_ids, cache, kwargs)
        return self._output(super().generate(input_ids, generation_config, *args, **kwargs), thoughts.posterior)

    def _prompts(self, input_ids, latents, posterior, generation_config, kwargs) -> torch.Tensor | None:
        """Token ids of the prompts, checked, and their mask among kwargs; None where embeddings are all there is."""
        given, embeds = latents if posterior is None else posterior, kwargs.get("inputs_embeds")
        if input_ids is None and embeds is None:
            input_ids = self._begin_of_text(latents if posterior is None else posterior.mean, generation_config, kwargs)
        if input_ids is not None:
            self._check_prompts(input_ids, kwargs.get("attention_mask"))
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = self._padding_mask(input_ids, generation_config, kwargs)
        prompts = embeds if input_ids is None else input_ids
        if given is not None and len(given) != len(prompts):
            raise ValueError(f"There are latents for {len(given)} sequences and prompts for {len(prompts)}.")
        return input_ids

    # ---------------------------------------------------------------- the paper's reader: latents of the prompt

    def _fit_latents(self, thoughts: "_Thoughts", input_ids, cache, kwargs) -> tuple[torch.Tensor | None, dict]:
        """Keys and values of the prompts' latents among kwargs, which every decoding method of transformers takes."""
        every, kept = thoughts.settings.reinfer_every, kept_latents(cache)
        if thoughts.given is None and kept:
            if thoughts.num_samples is not None:
                raise ValueError("num_latent_samples draws other latents than those that the cache was filled with.")
            if "latents" in kept:
                kept = {"latent_key_values": self.project_latents(kept["latents"])}
            kwargs.setdefault("latent_key_values", kept["latent_key_values"])
        known = "latent_key_values" in kwargs
        if input_ids is None and (not (known or thoughts.given is not None) or thoughts.num_samples or every):
            raise ValueError("Latents are inferred from token ids: pass input_ids (inputs_embeds alone has none).")

        def think(input_ids, attention_mask):
            return infer_in_buckets(self, input_ids, attention_mask, thoughts.callback, **thoughts.settings.inference)

        def read(posterior):
            return posterior.sample() if thoughts.settings.sample_latents else posterior.mean

        if not known:
            latents = thoughts.latents
            if thoughts.given is None:
                thoughts.posterior = think(input_ids, kwargs["attention_mask"])
            if thoughts.num_samples is not None:
                latents = thoughts.samples()
                input_ids, kwargs = self._expand_inputs_for_generation(
                    thoughts.num_samples, input_ids=input_ids, **kwargs
                )
            elif latents is None:
                latents = read(thoughts.posterior)
            device = (kwargs.get("inputs_embeds") if input_ids is None else input_ids).device
            kwargs["latent_key_values"] = self.project_latents(latents.to(device))
        if every is not None:
            kwargs["reinference"] = _Reinference(
                every, input_ids.shape[1], lambda *text: self.project_latents(read(think(*text)))
            )
        return input_ids, kwargs

    # ---------------------------------------------------------------- a memory: from the prompt on, token by token

    def _start_memory(self, thoughts: "_Thoughts", input_ids, cache, kwargs) -> tuple[torch.Tensor, dict]:
        """Where the memory starts among kwargs, and what it may learn from."""
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("A memory learns from token ids: pass input_ids, and no inputs_embeds.")
        if kept_latents(cache):
            if thoughts.given is not None or thoughts.num_samples is not None:
                raise ValueError("The cache holds a memory of its text: latents of another sort do not fit to it.")
            return input_ids, kwargs
        steps = InferenceSettings.of(self.config, **thoughts.settings.settings).num_inference_steps
        sampling, heads = thoughts.num_samples is not None, self.config.num_attention_heads
        if thoughts.given is None and not steps and not sampling:
            return input_ids, kwargs  # no memory: the plain decoder
        reads_once = thoughts.given is None and steps == 1 and not sampling
        if thoughts.given is None and (not reads_once or thoughts.callback is not None):
            thoughts.posterior = infer_in_buckets(
                self, input_ids, kwargs["attention_mask"], thoughts.callback, **thoughts.settings.inference
            )
        if reads_once:  # as it writes
            kwargs["latent_state"] = prior_state(self.config, len(input_ids), input_ids.device)
        elif thoughts.posterior is None:
            latents = thoughts.latents.float()
            kwargs["latent_state"] = state_of(LatentPosterior(latents, torch.zeros_like(latents)), heads)
        else:  # it holds the prompt already
            kwargs["latent_state"] = state_of(thoughts.posterior, heads)
            kwargs["latent_writes"] = torch.zeros_like(input_ids, dtype=torch.bool)
        if sampling:
            input_ids, kwargs = self._expand_inputs_for_generation(thoughts.num_samples, input_ids=input_ids, **kwargs)
            precision = kwargs["latent_state"][..., -1:]
            samples = thoughts.samples()
            drawn = LatentPosterior(samples, torch.zeros_like(samples))
            kwargs["latent_state"] = torch.cat((state_of(drawn, heads)[..., :-1], precision), dim=-1)
        if thoughts.settings.sample_latents:
            kwargs["latent_noise"] = torch.zeros(len(input_ids), 0, self.config.hidden_size)  # drawn at each token
        return input_ids, kwargs

    def create_masks_for_generate(self, *args, attention_mask=None, **kwargs):
        """As transformers', which makes masks where a forward is compiled whole; a memory is told the real tokens."""
        if self.config.has_memory:
            return attention_mask
        return create_masks_for_generate(*args, attention_mask=attention_mask, **kwargs)

    def _memory_inputs(self, inputs: dict, latent_noise, latent_writes) -> dict:
        """What goes with the tokens of one forward pass: `latent_writes` of the prompt; each token after it writes."""
        tokens, cache = inputs.get("input_ids"), inputs.get(CACHE)
        if latent_writes is not None:
            first = 0 if cache is None else int(cache.get_seq_length())
            last = first + tokens.shape[1]
            writes = F.pad(latent_writes, (0, max(0, last - latent_writes.shape[1])), value=True)
            inputs["latent_writes"] = writes[:, first:last]
        if latent_noise is not None:
            inputs["latent_noise"] = torch.randn(*tokens.shape, self.config.hidden_size, device=tokens.device)
        return inputs

    def _check_prompts(self, input_ids, attention_mask=None) -> None:
        check_sequences(self, input_ids, attention_mask)
        if not input_ids.numel():
            raise ValueError(
                "A prompt must have a token, and a batch a prompt, got input_ids of the shape "
                f"{tuple(input_ids.shape)}: to write without a prompt, leave them out."
            )

    def _check_given(self, latents, posterior, num_latent_samples) -> int | None:
        """How many samples of thoughts, checked with the others."""
        if latents is not None and (posterior is not None or num_latent_samples is not None):
            raise ValueError("latents are given: posterior and num_latent_samples have nothing to say beside them.")
        if posterior is not None:
            check_posterior(posterior)
        if latents is not None and not (torch.is_tensor(latents) and latents.isfinite().all()):
            raise ValueError("latents must be a tensor of finite numbers.")
        if num_latent_samples is not None:
            return whole_number("num_latent_samples", num_latent_samples, least=1)

    @staticmethod
    def _output(output, posterior=None):
        """What transformers returns, with the posterior, its cache by both names."""
        if not isinstance(output, ModelOutput):
            return output
        kinds = {GenerateDecoderOnlyOutput: LTMGenerateOutput, GenerateBeamDecoderOnlyOutput: LTMGenerateBeamOutput}
        return kinds[type(output)](**output, posterior=posterior)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused with latents: continuous batching packs requests into one row, which has none for each of them.

        Every way into it comes through here: `generate_batch`, its context manager and `transformers serve`.
        """
        if self.config.num_latents:
            raise NotImplementedError("Continuous batching cannot give each request its own latents; use generate().")
        if self.config._attn_implementation == "banded_sdpa":  # which has no form for pages
            self.set_attn_implementation("sdpa")
        return super().init_continuous_batching(*args, **kwargs)

    def _check_reinference(self, generation_config, kwargs) -> None:
        if self.config.has_memory:
            raise ValueError("reinfer_every is for latents of a prompt: a memory thinks at every token.")
        drafts = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        several = (self._setting(generation_config, kwargs, "num_beams") or 1) > 1
        if several or any(self._setting(generation_config, kwargs, name) is not None for name in drafts):
            raise ValueError("reinfer_every works with greedy search and sampling, not with beams or drafted tokens.")

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers reads the signature
    def prepare_inputs_for_generation(
        self, input_ids, *args, reinference=None, latent_noise=None, latent_writes=None, **kwargs
    ):
        for name in ("tokenizer", "assistant_tokenizer"):  # of stopping criteria: transformers leaves them here
            kwargs.pop(name, None)
        if reinference is not None:
            if reinference.is_due(input_ids):
                self._think_again(reinference, input_ids, kwargs)
            if reinference.latent_key_values is not None:
                kwargs["latent_key_values"] = reinference.latent_key_values
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return self._memory_inputs(inputs, latent_noise, latent_writes)

    def _think_again(self, reinference, input_ids, kwargs) -> None:
        """New latents, and a new cache: of the text as read with them, up to its last token, which is read next."""
        reinference.latent_key_values = reinference.think(input_ids, kwargs.get("attention_mask"))
        if reinference.new_cache is None:
            return
        kwargs[CACHE] = reinference.new_cache(reinference.latent_key_values)
        before = {name: x[:, :-1] for name in ("attention_mask", "position_ids") if (x := kwargs.get(name)) is not None}
        others = {"next_sequence_length": None, "latent_key_values": reinference.latent_key_values}
        self(**super().prepare_inputs_for_generation(input_ids[:, :-1], **kwargs | before | others))

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache, reinference = model_kwargs.get(CACHE), model_kwargs.get("reinference")
        if cache is None:
            return
        if (latents := model_kwargs.get("latent_key_values")) is not None:  # a compiled forward could not
            keep_latents(cache, latent_key_values=latents)
        elif self.config.has_memory:  # a layer that can take it back, as drafts that are not accepted ask for
            keep_latents(cache, **kept_latents(cache))
            if generation_config.is_assistant:
                cache.activate_past_recording()

        def new_cache(latent_key_values):
            fresh = {"latent_key_values": latent_key_values}
            self._prepare_cache_for_generation(generation_config, fresh, *args)
            return fresh[CACHE]

        if reinference is not None:
            reinference.new_cache = new_cache

    def _validate_model_kwargs(self, model_kwargs):
        # `reinference` is for `prepare_inputs_for_generation` alone.
        super()._validate_model_kwargs({name: x for name, x in model_kwargs.items() if name != "reinference"})

    def _get_candidate_generator(self, *args, **kwargs):
        given, early_exit = kwargs["model_kwargs"], kwargs["generation_config"].assistant_early_exit
        others = {name: value for name, value in given.items() if name not in _OF_LATENTS}
        # A draft model has latents of its own shape, or none: it infers its own. The first layers are this model's.
        if early_exit is not None and given.get("latent_key_values") is not None:
            reading = [layer for layer in self.config.reading_layers if layer < early_exit]
            others["latent_key_values"] = given["latent_key_values"][:, : len(reading)]
        return super()._get_candidate_generator(*args, **kwargs | {"model_kwargs": others})

    def _begin_of_text(self, latents, generation_config, kwargs) -> torch.Tensor:
        """(B, 1) tokens for the given latents, and where they are, since all weights may be offloaded; or one."""
        bos = self._setting(generation_config, kwargs, "bos_token_id")
        if bos is None:
            raise ValueError("Generation without a prompt needs a bos_token_id.")
        rows, device = (1, self.device) if latents is None else (len(latents), latents.device)
        return torch.full((rows, 1), bos, dtype=torch.long, device=device)

    def _setting(self, generation_config, kwargs, name):
        """A setting of this call: the keyword, else the given generation config's, else the model's own."""
        for value in (kwargs.get(name), getattr(generation_config, name, None)):
            if value is not None:
                return value
        return getattr(self.generation_config, name, None)

    def _pop_inference_settings(self, generation_config, kwargs) -> "_Asked":
        """What this call asks for, out of `kwargs`, checked."""
        if generation_config is not None and not isinstance(generation_config, GenerationConfig):
            raise ValueError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}.")
        asked = {name: self._setting(generation_config, kwargs, name) for name in _SETTINGS}
        for name in _SETTINGS:
            kwargs.pop(name, None)
        seed, every, sample = (asked.pop(name) for name in ("inference_seed", "reinfer_every", "sample_latents"))
        method = method_of(InferenceSettings.of(self.config, **asked))
        if sample not in (None, True, False):
            raise ValueError(f"sample_latents must be True, False or None, got {sample!r}.")
        if sample is None:
            samples = bool(self._setting(generation_config, kwargs, "do_sample"))
            sample = samples and method.has_variance and not self.config.has_memory
        seed = None if seed is None else whole_number("inference_seed", seed)
        return _Asked(asked, seed, sample, None if every is None else whole_number("reinfer_every", every, least=1))

    def _padding_mask(self, input_ids, generation_config, kwargs) -> torch.Tensor:
        """The mask that transformers would make: padding is told by its token where that is not the end of text."""
        pad, eos = (self._setting(generation_config, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
        if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else [eos]):
            return torch.ones_like(input_ids)
        return (input_ids != pad).long()

    # A generation config made from the model's would drop fields that transformers does not know when it is reloaded.
    def _set_inference_defaults(self):
        self.generation_config._from_model_config = False
        self.generation_config.update(**dict.fromkeys(_SETTINGS), defaults_only=True, allow_custom_entries=True)

    def adjust_generation_fn(self, *args, **kwargs):
        super().adjust_generation_fn(*args, **kwargs)
        self._set_inference_defaults()
