"""EleutherAI's lm-evaluation-harness with one model more: latents from the context only, the continuation scored.

A memory learns from the context and, token by token, from the continuation so far.

    python -m ltm_hf.evaluation.lm_eval --model ltm --model_args pretrained=FOLDER --tasks hellaswag --batch_size 16

is the harness's own command line (source: lm_eval 0.4.13). `--model hf` would score the same folder without latents.
"""

import math
from collections import defaultdict
from contextlib import nullcontext

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from .. import cli

with cli.one_sentence() if __name__ == "__main__" else nullcontext():
    try:
        from lm_eval.api.registry import register_model
    except ModuleNotFoundError:
        raise ImportError(
            'ltm_hf.evaluation.lm_eval needs the lm-evaluation-harness: pip install "ltm_hf[eval]"'
        ) from None

from lm_eval.__main__ import cli_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import chunks
from tqdm.auto import tqdm
from transformers.utils import logging

from ..configuration_ltm import InferenceSettings
from ..inference_ltm import infer_posterior
from ..likelihood_ltm import elbo
from ..losses_ltm import IGNORED
from ..memory_ltm import state_of
from ..methods_ltm import method_of
from .figures import check_finite
from .likelihood import no_text_yet

logger = logging.get_logger(__name__)

LATENTS = ("mean", "sample", "none")
ROLLING = ("prefix", "bound")


@register_model("ltm")
class HFLTM(HFLM):
    """The harness's `HFLM` for Latent Thought Models. With `num_latents=0` or `latents="none"` it is `HFLM`.

    loglikelihood: log p(continuation | context, z) in nats, z inferred from the context's tokens, cut on the left to
        `max_length` as the harness does; once for requests that share a context. A context of one token, such as the
        begin-of-text that stands for an empty one, has nothing to infer from: z is the prior's. A memory goes on from
        there: each token of the continuation is scored with what those before it have left, as generate() reads it.
    loglikelihood_rolling: over the harness's windows. "prefix": the log-likelihood of a predictor; `rolling_stride`
        tokens are scored at a time, with latents inferred from the window's tokens before them. The decoder reads the
        same tokens whatever the stride, so the figure can be held against an autoregressive model's. A memory, which
        infers at each token, has no stride.
    generate_until: `generate()` with these settings; `--gen_kwargs` overrides them and takes its others.

    Results do not depend on the batch size, to rounding, except of texts that are sampled (`do_sample`).
    A tokenizer that begins each text with begin-of-text makes the harness score that token too in rolling tasks, after
    another one; `add_bos_token=False` is right there, since the harness puts it before the text by itself.
    """

    def __init__(
        self,
        pretrained,
        *,
        latents: str = "mean",
        num_inference_steps: int | None = None,
        inference_seed: int = 0,
        rolling: str = "prefix",
        rolling_stride: int | None = None,
        device: str | None = None,
        **kwargs,
    ):
        """`--model_args`, beside everything that `HFLM` takes.

        latents: what is read: the posterior's "mean" (the better predictor), a "sample" of it, or "none".
        num_inference_steps: default the model's. inference_seed: keys the noise of inference and of samples.
        rolling: "prefix"; or "bound", a lower bound of each window's log-likelihood with noise that the fit has not
            seen, -(NLL + KL), latents fitted to what is scored: perplexities are then upper bounds, and not to be
            held against a predictor's.
        rolling_stride: tokens scored at a time by "prefix"; default half of `max_length`.
        device: default cuda where there is one, else cpu.

        A memory takes "mean" or "none", no bound and no stride; a posterior without variance takes no bound.
        Raises ValueError for settings that cannot work and for a model that is no LTM, before weights are loaded, and
        for weights that are not finite.
        """
        for name, value, allowed in (("latents", latents, LATENTS), ("rolling", rolling, ROLLING)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
        if latents == "none" and rolling == "bound":
            raise ValueError("rolling='bound' is the ELBO of inferred latents: latents='none' leaves nothing to bound.")
        if type(inference_seed) is not int:
            raise ValueError(f"inference_seed must be an integer, got {inference_seed!r}.")
        if rolling_stride is not None and (type(rolling_stride) is not int or rolling_stride < 1):
            raise ValueError(f"rolling_stride must be None or an integer of 1 or more, got {rolling_stride!r}.")
        self.latents, self.rolling, self._rolling_stride = latents, rolling, rolling_stride
        self.num_inference_steps, self.inference_seed = num_inference_steps, inference_seed
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, device=device, **kwargs)
        check_finite(self.model)

    def _get_backend(self, config, backend="default", trust_remote_code=False):
        """The harness calls this as soon as it has the configuration."""
        if config.model_type != "ltm":
            raise ValueError(f"This is a {config.model_type!r} model, not an LTM: evaluate it with --model hf.")
        InferenceSettings.of(config, num_inference_steps=self.num_inference_steps)
        self._check_fits(config)
        super()._get_backend(config, backend="causal", trust_remote_code=trust_remote_code)

    def _check_fits(self, config) -> None:
        """Raise ValueError for settings that a model with such latents cannot have."""
        if not config.num_latents:
            return
        if config.has_memory and self.latents == "sample":
            raise ValueError("latents must be mean or none for a memory, which would draw a sample for each token.")
        if config.has_memory and self._rolling_stride is not None:
            raise ValueError("rolling_stride is of latents that are inferred anew: a memory infers at each token.")
        if self.rolling == "bound" and (config.has_memory or not method_of(config).has_variance):
            raise ValueError(
                "rolling='bound' is of latents fitted with a variance to the whole text, which this model has none of: "
                "take rolling='prefix'."
            )

    @property
    def infers(self) -> bool:
        """Whether there are latents to infer."""
        config = self.model.config
        return self.latents != "none" and bool(config.num_latents) and not (config.has_memory and not self._steps)

    @property
    def _steps(self) -> int:
        steps = self.num_inference_steps
        return self.model.config.num_inference_steps if steps is None else steps

    @property
    def rolling_stride(self) -> int:
        return self._rolling_stride or max(1, self.max_length // 2)

    def get_model_info(self) -> dict:
        """The harness's, for the file of results, and how this model thought: defaults are no `model_args`."""
        config, info = self.model.config, super().get_model_info()
        if not config.num_latents:
            return info
        info |= {"latents": self.latents, "num_inference_steps": self._steps}
        if config.has_memory:
            return info
        of_fits = {"inference_seed": self.inference_seed, "rolling": self.rolling}
        return info | of_fits | {"rolling_stride": self.rolling_stride}

    # -------------------------------------------------------------- likelihood

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding writes it) of each (strings, context tokens, continuation tokens).

        Windows of a rolling likelihood come here too, with None for their strings.
        """
        if not self.infers or not requests:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"A request needs a context and a continuation of 1 to {self.max_length} tokens (max_length); "
                    f"got {len(context)} and {len(continuation)}."
                )
        batch_size = self._batch_size_for(requests, override_bs)
        is_rolling = requests[0][0] is None
        if is_rolling and self.rolling == "bound":
            bounds = _finite([bound for some in chunks(requests, batch_size) for bound in self._bounds(some)])
            return [(bound, False) for bound in bounds]
        stride = self.rolling_stride if is_rolling and not self.model.config.has_memory else self.max_length

        scored = self._scored_by_context(requests, stride)
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        progress = tqdm(total=len(scored), desc="Running loglikelihood contexts", disable=disable_tqdm or self.rank > 0)
        for contexts in chunks(sorted(scored, key=len, reverse=True), batch_size):
            thoughts = self._think(contexts)
            rows = [(row, begun) for row, context in enumerate(contexts) for begun in scored[context]]
            for some in chunks(rows, batch_size):
                texts = [contexts[row] + begun for row, begun in some]
                logits = self._logits(texts, thoughts, [row for row, _ in some])
                for (row, begun), row_logits in zip(some, logits, strict=True):
                    first = len(contexts[row]) - 1
                    row_logits = row_logits[first : first + len(begun) + 1]
                    log_probs = row_logits.log_softmax(dim=-1, dtype=self.softmax_dtype or torch.float32)
                    likeliest = log_probs.argmax(dim=-1).tolist()
                    for request, last in scored[contexts[row]][begun]:
                        tokens = [*begun, last]
                        totals[request] += log_probs[torch.arange(len(tokens)), tokens].sum().item()
                        greedy[request] &= likeliest == tokens
            progress.update(len(contexts))
        progress.close()

        answers = list(zip(_finite(totals), greedy, strict=True))
        if not is_rolling:
            for (strings, *_), answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _scored_by_context(self, requests, stride: int) -> dict:
        """What is scored after each distinct context: context -> all but the last token -> (request, last token).

        One inference each, and one row of the decoder for continuations that differ in their last token only, such as
        the letters of a multiple choice.
        """
        scored = defaultdict(lambda: defaultdict(list))
        num_truncated = 0
        for request, (_, context, continuation) in enumerate(requests):
            num_truncated += len(context) + len(continuation) > self.max_length + 1
            for start in range(0, len(continuation), stride):
                part = continuation[start : start + stride]
                before = (*context, *continuation[:start])[-(self.max_length + 1 - len(part)) :]
                scored[before][tuple(part[:-1])].append((request, part[-1]))
        if num_truncated:
            logger.warning(f"{num_truncated} of {len(requests)} requests are cut on the left to max_length.")
        return scored

    def _batch_size_for(self, requests, override_bs) -> int:
        if self.batch_size != "auto" or override_bs:
            return override_bs or self.batch_size
        longest_first = sorted(requests, key=lambda request: -len(request[1] + request[2]))
        self.batch_sizes = {0: self._detect_batch_size(longest_first)}
        return self.batch_sizes[0]

    def _model_call(self, inps, attn_mask=None, labels=None):
        """The harness's. Where latents are inferred, all that calls it is the search for a batch size: what needs the
        most memory is a step of inference, for its backward."""
        if self.infers:
            with self._autocast():
                infer_posterior(self.model, inps, num_inference_steps=1)
        return super()._model_call(inps, attn_mask, labels)

    def _posterior(self, input_ids, attention_mask, labels=None):
        steps, seed = self.num_inference_steps, self.inference_seed
        with self._autocast():
            return infer_posterior(self.model, input_ids, attention_mask, labels, num_inference_steps=steps, seed=seed)

    def _think(self, contexts) -> dict:
        """What is read of contexts: arguments of the model, a row each."""
        config = self.model.config
        if config.has_memory and self._steps == 1:  # it reads a context with what follows
            return no_text_yet(self.model, len(contexts))
        input_ids, attention_mask = self._pad(contexts)
        posterior = self._posterior(input_ids, attention_mask)
        if not config.has_memory:
            return {"latents": posterior.mean if self.latents == "mean" else posterior.sample(self.inference_seed)}
        state = state_of(posterior, config.num_attention_heads)
        return {"latent_state": state, "latent_writes": attention_mask == 0}  # it holds the context already

    @torch.no_grad()
    def _logits(self, texts, thoughts: dict, rows: list[int]) -> torch.Tensor:
        """(B, S, vocabulary). Padding on the right needs no mask: no token looks ahead."""
        input_ids, _ = self._pad(texts)
        given = {name: tensor[rows] for name, tensor in thoughts.items()}
        if (writes := given.get("latent_writes")) is not None:
            given["latent_writes"] = F.pad(writes, (0, input_ids.shape[1] - writes.shape[1]), value=True)
        with self._autocast():
            return self.model(input_ids=input_ids, **given, use_cache=False).logits

    @torch.no_grad()
    def _bounds(self, windows) -> list[float]:
        """Nats: -(NLL + KL) of each window's scored tokens, latents fitted to them."""
        input_ids, attention_mask = self._pad([(*context, *scored) for _, context, scored in windows])
        labels = input_ids.clone()
        for row, (_, context, _) in zip(labels, windows, strict=True):
            row[: len(context)] = IGNORED
        posterior = self._posterior(input_ids, attention_mask, labels)
        with self._autocast():
            estimate = elbo(self.model, input_ids, posterior, attention_mask, labels, seed=self.inference_seed)
        return estimate.elbo.tolist()

    def _pad(self, texts) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and attention_mask, (B, S), padded on the right."""
        rows = [torch.tensor(text, device=self.device) for text in texts]
        masks = [torch.ones_like(row) for row in rows]
        return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)

    def _autocast(self):
        enabled = self.mixed_precision_dtype is not None
        return torch.autocast(self.device.type, self.mixed_precision_dtype, enabled=enabled)

    # -------------------------------------------------------------- generation

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        if not self.model.config.num_latents:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        settings = {
            "num_inference_steps": self.num_inference_steps,
            "inference_seed": self.inference_seed,
            "sample_latents": self.latents == "sample",
        }
        if self.latents == "none" and self.model.config.has_memory:
            settings["num_inference_steps"] = 0
        elif self.latents == "none":  # latents of zero say nothing
            settings["latents"] = torch.zeros((len(context), *self.model.config.latent_shape), device=context.device)
        # generate() seeds a sample of latents from torch's generator; a greedy text is no matter of the batches before.
        is_greedy = not generation_kwargs.get("do_sample")
        with torch.random.fork_rng(devices=[], enabled=is_greedy):
            if is_greedy:
                torch.default_generator.manual_seed(self.inference_seed)
            return super()._model_generate(context, max_length, stop, **settings | generation_kwargs)


def _finite(scores: list[float]) -> list[float]:
    """The scores. Raises ValueError for one that is not finite, which the harness would rank among the others."""
    wrong = sum(not math.isfinite(score) for score in scores)
    if wrong:
        raise ValueError(f"{wrong} of {len(scores)} log-likelihoods are not finite: the model's losses overflow.")
    return scores


if __name__ == "__main__":
    with cli.one_sentence():
        cli_evaluate()
