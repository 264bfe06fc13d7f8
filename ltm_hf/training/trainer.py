"""Dual-rate learning (paper Algorithm 1) as a transformers Trainer."""

import math
import time
from collections import defaultdict

import torch
from transformers import Trainer

from ..data import collate_blocks
from ..posterior_ltm import IGNORED, elbo, infer_posterior, negative_log_likelihood, scored_tokens


class LTMTrainer(Trainer):
    """`Trainer` whose step infers the latents with the decoder frozen (fast), then trains the decoder (slow).

    Takes `LTMTrainingArguments` and data sets of `input_ids` (as from `ltm_hf.data.pack`); labels are the input.
    A model with `num_latents=0` trains as any causal LM, so that the baseline of a comparison needs nothing else.

    Beside Trainer's own, it logs, in nats a token over the steps since the last log:
        loss: -log p(x|z) at samples of the posterior that no fit has seen; kl: KL(q || prior);
        bound: loss + kl, which bounds the model's loss on the batches from above, before each was learned from;
        perplexity_bound: exp(bound); gain: what the last batch's latents save, loss at no latents - loss;
    and inference_seconds (in the fast loop, a step) and tokens_per_second (read from the data, all processes).
    Evaluation gives the same names on the whole set, and `eval_loss` is the bound.
    """

    def __init__(self, *args, data_collator=None, **kwargs):
        super().__init__(*args, data_collator=data_collator or collate_blocks, **kwargs)
        self._sums = defaultdict(float)  # since the last log, on this process
        self._eval_sums = defaultdict(float)
        self._since = (0, 0.0)  # the step and the time at which `_sums` began
        self._last_batch = None

    # ---------------------------------------------------------------- the step

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        thoughts = self._think(self.accelerator.unwrap_model(model, keep_torch_compile=False).train(), inputs)
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch * len(thoughts)  # the losses below then add up to their mean
        loss = sum(
            super(LTMTrainer, self).training_step(model, {**inputs, "latents": latents}, num_items_in_batch)
            for latents in thoughts
        )
        self._last_batch = {**inputs, "latents": thoughts[-1]}
        return loss if num_items_in_batch is not None else loss / len(thoughts)

    def _think(self, decoder, inputs) -> list[torch.Tensor | None]:
        """The latents that the decoder learns from, one (B, L, N, D) tensor for each forward pass of the slow step."""
        if not self._sums:
            self._since = (self.state.global_step, time.perf_counter())
        self._sums["tokens"] += self._num_scored(inputs)
        if not decoder.config.num_latents:
            return [None]
        start = time.perf_counter()
        seed = self._seed(self.state.global_step + 1)
        trajectory = []
        posterior = infer_posterior(
            decoder,
            **self._sequences(inputs),
            num_inference_steps=self.args.num_inference_steps,
            inference_learning_rate=self._inference_learning_rate(decoder.config),
            seed=seed,
            callback=lambda step, latents, elbo: trajectory.append(latents),
        )
        self._sums["inference_seconds"] += time.perf_counter() - start
        self._sums["kl"] += posterior.kl_divergence().sum().item()
        self._sums["non_finite_rows"] += posterior.num_non_finite
        final = posterior.sample(seed)
        return [*trajectory, final] if self.args.slow_gradient == "trajectory" else [final]

    def _inference_learning_rate(self, config) -> float:
        """The step size of inference now, linear over training."""
        start, end = self.args.inference_learning_rate, self.args.inference_learning_rate_end
        if start is None:
            start = config.inference_learning_rate
        if end is None:
            end = start * 0.34 / 0.30 if config.inference_optimizer == "adamw" else start
        return start + (end - start) * min(1.0, self.state.global_step / max(1, self.state.max_steps - 1))

    def _seed(self, visit: int) -> int:
        """Noise of its own for each step of training; 0 is evaluation's. The same after a resume, and on every rank."""
        return self.args.seed * 2**32 + visit

    @staticmethod
    def _sequences(inputs) -> dict:
        return {name: inputs.get(name) for name in ("input_ids", "attention_mask", "labels")}

    def _num_scored(self, inputs) -> int:
        return int((scored_tokens(**self._sequences(inputs)) != IGNORED).sum())

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay on matrices only: neither on norms nor on gates."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    # ---------------------------------------------------------------- evaluation

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The bound of a batch in nats a token, with fresh noise, and the loss without latents beside it."""
        inputs = self._prepare_inputs(inputs)
        decoder = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        sequences = self._sequences(inputs)
        num_tokens = self._num_scored(inputs)
        with self.compute_loss_context_manager():
            plain = negative_log_likelihood(decoder, **sequences).sum().item()
            nll, kl = plain, 0.0
            if decoder.config.num_latents:
                posterior = infer_posterior(
                    decoder, **sequences, num_inference_steps=self.args.num_inference_steps, seed=self._seed(0)
                )
                estimate = elbo(decoder, posterior=posterior, **sequences, seed=self._seed(0))
                nll, kl = estimate.nll.sum().item(), estimate.kl.sum().item()
        for name, value in (("nll", nll), ("kl", kl), ("plain", plain), ("tokens", num_tokens)):
            self._eval_sums[name] += value
        return torch.tensor((nll + kl) / max(1, num_tokens), device=self.args.device), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._eval_sums.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._reduced(self._eval_sums)
        nll, kl, plain = (sums[name] / max(1, sums["tokens"]) for name in ("nll", "kl", "plain"))
        figures = {"loss": nll + kl, "perplexity_bound": _exp(nll + kl)}
        if self.model.config.num_latents:
            figures |= {"nll": nll, "kl": kl, "no_latents": plain, "gain": plain - nll}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    # ---------------------------------------------------------------- logging

    def log(self, logs, start_time=None):
        if "loss" in logs and self._sums:
            logs.update(self._figures(logs["loss"]))
        super().log(logs, start_time)

    def _figures(self, loss: float) -> dict[str, float]:
        seconds = time.perf_counter() - self._since[1]
        sums = self._reduced(self._sums)
        figures = {"tokens_per_second": sums["tokens"] / seconds}
        kl = sums["kl"] / max(1, sums["tokens"])
        if self.model.config.num_latents:
            figures |= {"kl": kl, "bound": loss + kl, "gain": self._gain()}
            figures["inference_seconds"] = self._sums["inference_seconds"] / (self.state.global_step - self._since[0])
            if sums["non_finite_rows"]:
                figures["non_finite_rows"] = sums["non_finite_rows"]
        figures["perplexity_bound"] = _exp(loss + kl)
        self._sums.clear()
        return figures

    @torch.no_grad()
    def _gain(self) -> float:
        """Nats a token that the last batch's latents save, under the weights as they are now."""
        decoder = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        sequences = self._sequences(self._last_batch)
        with self.compute_loss_context_manager():
            plain, thinking = (
                negative_log_likelihood(decoder, **sequences, latents=latents).sum().item()
                for latents in (None, self._last_batch["latents"])
            )
        return (plain - thinking) / max(1, self._num_scored(self._last_batch))

    def _reduced(self, sums) -> dict[str, float]:
        """The sums over all processes."""
        names = sorted(sums)
        totals = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.args.device)
        return defaultdict(float, zip(names, self.accelerator.reduce(totals, "sum").tolist(), strict=True))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # the largest that a float holds is e⁷⁰⁹
