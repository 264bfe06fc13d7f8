"""Evaluation of a model with latents, as a Trainer's: bounds and losses in nats a token, and logits where asked for."""

from collections import defaultdict

import torch
from transformers.utils import logging

from ..likelihood_ltm import Text, negative_log_likelihood
from .monitor import fit_figures, mean, perplexity
from .sharding import gathered
from .texts import have_prompts

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
        """The loss of a batch in nats a token, with fresh noise where it is a bound, and without latents beside it."""
        inputs = self._prepare_inputs(inputs)
        decoder, text = self.accelerator.unwrap_model(model, keep_torch_compile=True), self._text(inputs)
        with gathered(decoder, self.args.gather_during_inference), self.compute_loss_context_manager():
            plain = negative_log_likelihood(decoder, text)
            rows = {"tokens": text.num_tokens, "plain": plain, "kl": torch.zeros_like(plain)}
            any_prompt = bool(self.accelerator.reduce(have_prompts(text).sum(), "sum"))  # sharded decoders run together
            scores = self.objective.evaluate(decoder, text, self._seed(0), not self._eval_sums, any_prompt)
            rows |= scores.rows
            logits = None if prediction_loss_only else self._logits(decoder, text, scores.given)
        for name, total in scores.fit.items():
            self._fit_sums[name] += total
        # All processes', without the rows that only fill up the last batch.
        figures = self.accelerator.gather_for_metrics(torch.stack([row.float() for row in rows.values()], dim=1))
        for name, total in zip(rows, figures.cpu().sum(dim=0, dtype=torch.float64).tolist(), strict=True):
            self._eval_sums[name] += total
        loss = (rows["nll"] + rows["kl"] * self.objective.pays_kl).sum() / text.num_tokens.sum().clamp(min=1)
        return loss, logits, None if prediction_loss_only else inputs.get("labels", inputs["input_ids"])

    @staticmethod
    def _logits(decoder, text: Text, given: dict) -> torch.Tensor:
        return decoder(input_ids=text.input_ids, attention_mask=text.mask, use_cache=False, **given).logits

    def log(self, logs, start_time=None):
        """As `Trainer`'s. Trackers take numbers: of a trace they get steps 0, 1, 2, 4, … and the last, NAME/STEP."""
        traces = {name: logs.pop(name) for name in list(logs) if name.endswith("elbo_trace")}
        points = {
            f"{name}/{step}": value
            for name, trace in traces.items()
            for step, value in enumerate(trace)
            if step & (step - 1) == 0 or step == len(trace) - 1
        }
        logs.update(points)
        super().log(logs, start_time)
        for entry in (logs, self.state.log_history[-1]):
            for name in points:
                del entry[name]
            entry.update(traces)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._eval_sums.clear()
        self._fit_sums.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if not self._eval_sums["tokens"]:
            logger.warning(
                f"{metric_key_prefix}: no token is scored, since there are no rows, or all their labels are -100: its "
                "figures are NaN."
            )
        figures = self._eval_figures()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def _eval_figures(self) -> dict[str, float]:
        sums, fit_sums, objective = self._eval_sums, self._reduced(self._fit_sums), self.objective
        nll, kl, plain = (mean(sums[name], sums["tokens"]) for name in ("nll", "kl", "plain"))
        bound = nll + kl * objective.pays_kl
        figures = {"loss": bound}
        if objective.perplexity:
            figures[objective.perplexity] = perplexity(bound)
        if not self.model.config.num_latents:
            return figures
        figures |= {"no_latents": plain, "gain": plain - nll}
        if objective.has_kl:
            figures |= {"kl": kl, **fit_figures(fit_sums)}
        if fit_sums["non_finite_rows"]:
            figures["non_finite_rows"] = fit_sums["non_finite_rows"]
        for name, tokens in objective.ALSO.items():
            if tokens == "tokens" or sums[tokens]:
                figures[name] = mean(sums[name], sums[tokens])
        return figures
