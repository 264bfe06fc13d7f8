"""Evaluation of a model with latents, as a Trainer's: bounds and losses in nats a token, and logits where asked for."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers.utils import logging

from ..posterior_ltm import IGNORED, elbo, infer_posterior, negative_log_likelihood
from .monitor import fit_figures, mean, trace_sums, variance_sums
from .online import no_latents, online_thoughts, reading
from .sharding import gathered
from .unrolled import split_labels

logger = logging.get_logger(__name__)


class EvaluationMixin:
    """Of `DualRateMixin`, which says what the figures mean. `compute_metrics` and `predict()` see the logits of the
    decoder given the latents that `eval_loss` is scored with, at the posterior's mean: with infer_from="labels" they
    were fitted to the very text that is predicted. Over nothing, figures are NaN, which is never the best.
    """

    def __init__(self, *args, **kwargs):
        self._eval_sums = defaultdict(float)  # of all processes
        self._fit_sums = defaultdict(float)  # of the fast loop, on this process
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The bound of a batch in nats a token, with fresh noise, and the loss without latents beside it."""
        inputs = self._prepare_inputs(inputs)
        decoder = self.accelerator.unwrap_model(model, keep_torch_compile=True)
        sequences, num_tokens = self._sequences(inputs), self._num_scored(inputs)
        with gathered(decoder, self.args.gather_during_inference), self.compute_loss_context_manager():
            plain = negative_log_likelihood(decoder, **sequences)
            rows = {"tokens": num_tokens, "plain": plain, "nll": plain, "kl": torch.zeros_like(plain)}
            if self._online:
                found, logits = self._score_online(decoder, sequences)
            elif self._predicts:
                found, logits = self._score_unrolled(decoder, sequences)
            elif decoder.config.num_latents:
                found, logits = self._score_bound(decoder, inputs)
            else:
                found, logits = {}, lambda: self._logits(decoder, sequences)
            rows |= found
            logits = None if prediction_loss_only else logits()
        # All processes', without the rows that only fill up the last batch.
        figures = self.accelerator.gather_for_metrics(torch.stack([row.float() for row in rows.values()], dim=1))
        for name, total in zip(rows, figures.cpu().sum(dim=0, dtype=torch.float64).tolist(), strict=True):
            self._eval_sums[name] += total
        loss = (rows["nll"] + rows["kl"] * self._pays_kl).sum() / num_tokens.sum().clamp(min=1)
        return loss, logits, None if prediction_loss_only else inputs.get("labels", inputs["input_ids"])

    # Each gives sums over rows, (B,) by name, and what makes the logits (B, S, vocabulary).

    def _score_online(self, decoder, sequences) -> tuple[dict, Callable]:
        thoughts, prelude = online_thoughts(decoder, self._inference_learning_rate(decoder.config), **sequences)
        latents = no_latents(decoder, sequences["input_ids"])
        with reading(decoder, thoughts):
            nll = negative_log_likelihood(decoder, **sequences, latents=latents, prelude=prelude)

        def logits():
            with reading(decoder, thoughts):
                return self._logits(decoder, sequences, latents)

        return {"nll": nll}, logits

    def _score_unrolled(self, decoder, sequences) -> tuple[dict, Callable]:
        first, rest = split_labels(**sequences)
        posterior = infer_posterior(decoder, **sequences | {"labels": first}, **self._fit)
        nothing = torch.zeros_like(posterior.mean)
        nll = sum(
            negative_log_likelihood(decoder, **sequences | {"labels": labels}, latents=latents)
            for labels, latents in ((first, nothing), (rest, posterior.mean))
        )
        self._fit_sums["non_finite_rows"] += posterior.num_non_finite
        after = F.pad((rest != IGNORED).cumsum(dim=1) > 0, (0, 1), value=True)[:, 1:, None]  # what the next token is of
        return {"nll": nll}, lambda: torch.where(
            after, self._logits(decoder, sequences, posterior.mean), self._logits(decoder, sequences, nothing)
        )

    def _score_bound(self, decoder, inputs) -> tuple[dict, Callable]:
        sequences, evidence = self._sequences(inputs), self._evidence(inputs)
        posterior = read = infer_posterior(decoder, **evidence, **self._fit)
        estimate = elbo(decoder, posterior=posterior, **sequences, seed=self._seed(0))
        rows = {"nll": estimate.nll}
        if self._reads_mean:
            rows["nll"] = negative_log_likelihood(decoder, latents=posterior.mean, **sequences)
        fit_sums = {"non_finite_rows": posterior.num_non_finite}
        if self._has_kl:
            rows["kl"] = estimate.kl
            final = estimate.elbo if self.args.infer_from == "labels" else None  # of what the steps saw
            fit_sums |= trace_sums(posterior, evidence, self.args.inference_steps(decoder.config)[1], final)
            if not self._eval_sums:  # the first batch will do
                fit_sums |= variance_sums(decoder, posterior, evidence, self._seed(0))
        for name, total in fit_sums.items():
            self._fit_sums[name] += total
        if self._any_prompt(inputs):
            if self.args.infer_from != "prompt":
                posterior = infer_posterior(decoder, **prompts(**sequences), **self._fit)
            have = self._have_prompts(inputs)
            from_prompt = negative_log_likelihood(decoder, latents=posterior.mean, **sequences)
            rows |= {"from_prompt": from_prompt * have, "prompt_tokens": self._num_scored(inputs) * have}
        return rows, lambda: self._logits(decoder, sequences, read.mean)

    @property
    def _fit(self) -> dict:
        return {"num_inference_steps": self.args.num_inference_steps, "seed": self._seed(0)}

    @staticmethod
    def _logits(decoder, sequences, latents=None) -> torch.Tensor:
        given = {name: sequences[name] for name in ("input_ids", "attention_mask")}
        return decoder(**given, latents=latents, use_cache=False).logits

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._eval_sums.clear()
        self._fit_sums.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums, fit_sums = self._eval_sums, self._reduced(self._fit_sums)
        if not sums["tokens"]:
            logger.warning(
                f"{metric_key_prefix}: no token is scored, since there are no rows, or all their labels are -100: its "
                "figures are NaN."
            )
        nll, kl, plain = (mean(sums[name], sums["tokens"]) for name in ("nll", "kl", "plain"))
        bound = nll + kl * self._pays_kl
        figures = {"loss": bound}
        if self._has_kl:
            figures["perplexity_bound"] = perplexity(bound)
        if self.model.config.num_latents:
            figures |= {"nll": nll, "no_latents": plain, "gain": plain - nll}
            if self._has_kl and not self._predicts:
                figures |= {"kl": kl, **fit_figures(fit_sums)}
            if fit_sums["non_finite_rows"]:
                figures["non_finite_rows"] = fit_sums["non_finite_rows"]
            if sums["prompt_tokens"]:
                figures["from_prompt"] = sums["from_prompt"] / sums["prompt_tokens"]
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output


def prompts(input_ids, attention_mask=None, labels=None) -> dict[str, torch.Tensor]:
    """What comes before the first scored token of each row, as `infer_posterior` and `generate` take it.

    All are (B, S); returns `input_ids` and `attention_mask`, (B, longest prompt), with the completions masked out.
    """
    scored = torch.ones_like(input_ids) if labels is None else labels != IGNORED
    mask = scored.cumsum(dim=1) == 0
    if attention_mask is not None:
        mask = mask & attention_mask.bool()
    width = max(1, int((mask.any(dim=0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).max()))
    return {"input_ids": input_ids[:, :width], "attention_mask": mask[:, :width].long()}


def perplexity(nats: float) -> float:
    """exp, as far as a float goes."""
    return math.exp(min(nats, 700.0))  # the largest that a float holds is e⁷⁰⁹
