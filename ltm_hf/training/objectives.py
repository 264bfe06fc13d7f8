"""What a slow step learns from. Each objective is a class: to add one, write it and enter it in `OBJECTIVES`."""

import random
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from ..configuration_ltm import InferenceSettings
from ..costs.flops import TrainingFlops, training_flops
from ..inference_ltm import amortized_posterior, infer_posterior
from ..likelihood_ltm import Text, elbo, negative_log_likelihood
from ..memory_ltm import prior_state, token_noise
from ..methods_ltm import method_of
from .monitor import trace_sums, variance_sums
from .texts import evidence_of, have_prompts, prompts_of, second_half, written


@dataclass
class Thoughts:
    """What inference gives a slow step.

    passes: what each forward pass of the step is given beside the text; their mean is learned from.
    kl: (B,) nats, of what was inferred; None where there is none to tell. extra: nats whose gradient is learned from
        too, and whose value is not part of the loss.
    num_steps: of inference. num_non_finite: rows whose inference turned non-finite.
    """

    passes: list[dict]
    kl: torch.Tensor | None = None
    extra: torch.Tensor | None = None
    num_steps: int = 0
    num_non_finite: int = 0


@dataclass
class Scores:
    """What evaluation finds of a batch: sums over rows, (B,) by name, and what goes with the text for logits."""

    rows: dict[str, torch.Tensor]
    given: dict
    fit: dict[str, float] = field(default_factory=dict)  # sums about the fast loop


class Objective:
    """What a slow step learns from, for one run: a model's configuration and training arguments.

    description: a line, for logs and cards.
    infers_first: whether inference runs before the slow step, not within it.
    has_kl: whether inference gives a KL. pays_kl: whether the loss's bound includes it.
    """

    description: ClassVar[str]

    infers_from: ClassVar[str] = "labels"  # unless `infer_from` is given

    def __init__(self, config, args):
        self.config, self.args = config, args
        self.infer_from = args.infer_from or self.infers_from

    @classmethod
    def check(cls, config, args) -> None:
        """Raise a ValueError, before any work, for arguments that do not fit."""

    infers_first: ClassVar[bool] = True
    has_kl: bool = False
    pays_kl: bool = False
    perplexity: str | None = "perplexity"  # what exp(loss + KL) is; None: of a loss that bounds nothing
    ALSO: ClassVar[dict[str, str]] = {}  # other sums of `evaluate`, by name, and the sum that each is divided by
    figures: dict[str, str]  # of a card, by name, and what evaluation calls them

    def step(self, decoder, text: Text, seed: int, now: "Now") -> Thoughts:
        """Infer what the slow step of a batch learns with, the decoder frozen.

        decoder: the bare model. seed: of this step's noise.
        """
        raise NotImplementedError

    def evaluate(self, decoder, text: Text, seed: int, first: bool, any_prompt: bool) -> Scores:
        """The loss of a batch without anything learned from it: `nll` (B,) among its rows.

        first: whether it is the first batch, which is enough for figures that cost more. any_prompt: whether a row of
        some process has a prompt.
        """
        raise NotImplementedError

    def measured(self, text: Text, given: dict) -> dict:
        """What the last pass was given, as its gain is measured."""
        return given

    def facts(self) -> dict[str, str]:
        """What a model card says of how it learned beside `description`, by label."""
        return {}

    def passes(self, num_steps: float) -> float:
        """Forward passes of a slow step after so many steps of inference."""
        return 1

    def flops(self, cost: TrainingFlops, num_steps: float) -> float:
        """FLOPs a token of a training step with so many steps of inference (see `flops.training_flops`)."""
        return num_steps * cost.fast_step + cost.step(0, self.passes(num_steps))


class Now(NamedTuple):
    """How far training is: optimiser steps taken, and in all."""

    step: int
    max_steps: int

    @property
    def share(self) -> float:
        return min(1.0, self.step / max(1, self.max_steps - 1))


class MaximumLikelihood(Objective):
    """Of a decoder without latents, the autoregressive twin."""

    description = "the likelihood"
    figures = {"no_latents": "loss"}

    def step(self, decoder, text, seed, now):
        return Thoughts([{}])

    def evaluate(self, decoder, text, seed, first, any_prompt):
        return Scores({"nll": negative_log_likelihood(decoder, text)}, {})


class Elbo(Objective):
    """The bound NLL + KL at a sample of the posterior that inference fits (Algorithm 1)."""

    ALSO = {"nll": "tokens", "from_prompt": "prompt_tokens"}
    description = "the ELBO, at a sample of the posterior fitted to the text (Algorithm 1)"

    def __init__(self, config, args):
        super().__init__(config, args)
        self.method = method_of(InferenceSettings.of(config))
        self.has_kl = self.method.has_variance
        self.perplexity = "perplexity_bound" if self.has_kl else None
        self.pays_kl = self.has_kl and self.infer_from != "prompt"
        self.figures = {"from_prompt": "from_prompt", "no_latents": "no_latents"}
        if not self.has_kl:
            self.figures |= {"nll": "nll"}  # which bounds nothing
        elif self.pays_kl:
            self.figures |= {"bound": "loss", "nll": "nll", "kl": "kl"}

    @classmethod
    def check(cls, config, args):
        if config.has_memory:
            raise ValueError(
                f"objective={args.objective!r} fits latents to a whole text, and a memory learns as it reads: take "
                "objective='prediction', or a model with latent_reader='paper'."
            )
        if args.learn_through_errors:
            raise ValueError("learn_through_errors is of a memory, which infers by errors within the slow step.")
        if method_of(InferenceSettings.of(config)).takes_steps:
            if args.kl_annealing_steps:
                raise ValueError("kl_annealing_steps is for inference_method='amortized'.")
            args.inference_steps(config)
        else:
            cls._check_encoder(config, args)

    @classmethod
    def _check_encoder(cls, config, args):
        name = f"inference_method={config.inference_method!r}"
        options = ("num_inference_steps", "num_inference_steps_min", "inference_learning_rate",
                   "inference_learning_rate_end")  # fmt: skip
        for option in options:
            if getattr(args, option):
                raise ValueError(f"{option} is of inference by steps, of which {name} takes none.")

    def step(self, decoder, text, seed, now):
        evidence = evidence_of(text, self.infer_from)
        if not self.method.takes_steps:
            posterior = amortized_posterior(decoder, evidence)
            kl, weight = posterior.kl_divergence(), self._kl_weight(now) * self.pays_kl
            return Thoughts([{"latents": posterior.sample(seed)}], kl.detach(), weight * kl.sum())
        posterior, samples = self._fit(decoder, evidence, seed, now)
        return Thoughts(
            [{"latents": latents} for latents in (*samples, posterior.sample(seed))],
            posterior.kl_divergence() if self.has_kl else None,
            num_steps=len(posterior.elbo_trace),
            num_non_finite=posterior.num_non_finite,
        )

    def facts(self):
        args, config = self.args, self.config
        if not self.method.takes_steps:
            steps = args.kl_annealing_steps
            return {"weight of the KL": f"0 to 1 over {steps} steps, linear" if steps else "1"}
        (least, most), (start, end) = args.inference_steps(config), args.inference_rates(config)
        return {
            "inference steps (fast)": f"{most}" if least == most else f"{least} to {most}",
            "inference step size": f"{start:g}" if end == start else f"{start:g} to {end:g}, linear over training",
        }

    def _fit(self, decoder, evidence: Text, seed: int, now: Now, callback=None):
        """The posterior, and samples of its way there that the decoder learns from as well."""
        fit = dict(
            num_inference_steps=random.Random(seed).randint(*self.args.inference_steps(self.config)),
            inference_learning_rate=self.args.inference_rate(self.config, now.share),
        )
        return infer_posterior(decoder, evidence, **fit, seed=seed, callback=callback), ()

    def _kl_weight(self, now: Now) -> float:
        steps = self.args.kl_annealing_steps
        return min(1.0, now.step / steps) if steps else 1.0

    def evaluate(self, decoder, text, seed, first, any_prompt):
        args, evidence = self.args, evidence_of(text, self.infer_from)
        fit = dict(num_inference_steps=args.num_inference_steps, seed=seed)
        posterior = read = infer_posterior(decoder, evidence, **fit)
        estimate = elbo(decoder, text, posterior, seed=seed)
        rows, sums = {"nll": estimate.nll}, {"non_finite_rows": posterior.num_non_finite}
        if self.has_kl:
            rows["kl"] = estimate.kl
            final = estimate.elbo if self.infer_from == "labels" else None  # of what the steps saw
            sums |= trace_sums(posterior, evidence, args.inference_steps(self.config)[1], final)
            if first:
                sums |= variance_sums(decoder, posterior, evidence, seed)
        if any_prompt:
            have = have_prompts(text)
            if self.infer_from != "prompt":
                posterior = infer_posterior(decoder, prompts_of(text), **fit)
            from_prompt = negative_log_likelihood(decoder, text, posterior.mean)
            rows |= {"from_prompt": from_prompt * have, "prompt_tokens": text.num_tokens * have}
        return Scores(rows, {"latents": read.mean}, sums)


class ElboTrajectory(Elbo):
    """The mean of the bound over the samples of all steps of inference and the final one, as the released code does."""

    description = "the mean of the ELBO along the steps of inference (the released code's)"

    @classmethod
    def check(cls, config, args):
        super().check(config, args)
        if not method_of(InferenceSettings.of(config)).takes_steps:
            raise ValueError(
                "objective='elbo_trajectory' is of inference by steps, of which inference_method="
                f"{config.inference_method!r} takes none."
            )

    def _fit(self, decoder, evidence, seed, now, callback=None):
        samples = []
        posterior, _ = super()._fit(decoder, evidence, seed, now, lambda step, latents, bound: samples.append(latents))
        return posterior, samples

    def passes(self, num_steps):
        return 1 + num_steps


class Prediction(Objective):
    """Each token from a fresh sample of the posterior that the tokens before it have left in the memory.

    z is drawn before its token is seen: no KL is owed, and the loss bounds a normalised predictor's (see memory_ltm).
    By the mean it is exact, and that is what evaluation calls the loss.
    """

    ALSO = {
        "prediction_sampled": "tokens",
        "second_half": "second_half_tokens",
        "second_half_no_latents": "second_half_tokens",
    }
    figures = {"prediction": "loss", "prediction_sampled": "prediction_sampled", "no_latents": "no_latents"}
    description = "each token predicted from a sample of the posterior given the tokens before it"
    infers_from = "text"
    infers_first = False

    @classmethod
    def check(cls, config, args):
        if not config.has_memory:
            raise ValueError(
                f"objective={args.objective!r} learns what a memory leaves to the next tokens: it needs a model with "
                "latent_reader='memory'."
            )
        options = ("num_inference_steps_min", "inference_learning_rate", "inference_learning_rate_end",
                   "kl_annealing_steps")  # fmt: skip
        for option in options:
            if getattr(args, option):
                raise ValueError(f"{option} is of inference before the slow step; a memory infers within it.")
        if args.num_inference_steps not in (None, 1):
            raise ValueError("num_inference_steps must be 1 or None: in training, a memory reads each text once.")
        if args.neftune_noise_alpha is not None:
            raise ValueError("neftune_noise_alpha does not go with a memory, which infers and learns in one pass.")

    def step(self, decoder, text, seed, now):
        noise = token_noise(text.keys, text.input_ids.shape[1], text.mask, self.config.hidden_size, seed)
        through = {"latent_errors_learn": True} if self.args.learn_through_errors else {}
        return Thoughts([self._start(text) | {"latent_noise": noise} | through])

    def _start(self, text: Text) -> dict:
        state = prior_state(self.config, len(text.input_ids), text.input_ids.device)
        return {"latent_state": state, "latent_writes": written(text, self.infer_from)}

    def evaluate(self, decoder, text, seed, first, any_prompt):
        given, half = self._start(text), second_half(text)
        noise = token_noise(text.keys, text.input_ids.shape[1], text.mask, self.config.hidden_size, seed)
        rows = {
            "nll": negative_log_likelihood(decoder, text, **given),
            "prediction_sampled": negative_log_likelihood(decoder, text, **given, latent_noise=noise),
            "second_half": negative_log_likelihood(decoder, half, **given),
            "second_half_no_latents": negative_log_likelihood(decoder, half),
            "second_half_tokens": half.num_tokens,
        }
        return Scores(rows, given)

    def facts(self):
        through = self.args.learn_through_errors
        return {"gradient": "through the errors of inference, too; its FLOPs are not counted"} if through else {}

    def measured(self, text, given):
        return {name: value for name, value in given.items() if name not in ("latent_noise", "latent_errors_learn")}

    def flops(self, cost, num_steps):
        return cost.step(0)


OBJECTIVES: dict[str, type[Objective]] = {
    "elbo": Elbo,
    "elbo_trajectory": ElboTrajectory,
    "prediction": Prediction,
}


def objective_of(config, args) -> Objective:
    """The objective of a run, checked: the one that the arguments name, or the reader's own; the twin's likelihood."""
    if not config.num_latents:
        return MaximumLikelihood(config, args)
    kind = OBJECTIVES[args.objective or default_objective(config)]
    kind.check(config, args)
    return kind(config, args)


def default_objective(config) -> str:
    return "prediction" if config.has_memory else "elbo"


def step_flops(config, args, sequence_length: int) -> float:
    """FLOPs a token of a step of training, fast loop included, on average (see `flops.training_flops`)."""
    steps = sum(args.inference_steps(config)) / 2
    return objective_of(config, args).flops(training_flops(config, sequence_length), steps)
