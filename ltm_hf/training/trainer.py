"""Dual-rate learning (paper Algorithm 1) as a transformers Trainer."""

import math
import random
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import Trainer, TrainerCallback

from ..configuration_ltm import InferenceSettings
from ..data import collate_blocks
from ..flops import training_flops
from ..posterior_ltm import (
    IGNORED,
    Prelude,
    amortized_posterior,
    frozen,
    infer_posterior,
    negative_log_likelihood,
    scored_tokens,
)
from .arguments import DualRateArguments
from .card_mixin import ModelCardMixin
from .checks import check_columns, check_model, check_options, check_scored
from .divergence import DivergenceMixin
from .evaluation import EvaluationMixin, perplexity, prompts
from .monitor import mean, peak_flops, watch
from .muon import MuonWithAdamW
from .online import no_latents, online_thoughts, reading
from .order import DataOrderMixin
from .sharding import accumulating, float32_reductions, gathered
from .unrolled import split_labels, unrolled_posterior


class _NoInputGradients(TrainerCallback):
    """With gradient checkpointing, transformers makes embeddings ask for a gradient, which reentrant checkpoints need.

    The others do not; in the fast loop it costs memory, and torch.compile its one graph.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.gradient_checkpointing:
            model.disable_input_require_grads()


class DualRateMixin(EvaluationMixin, DivergenceMixin, DataOrderMixin):
    """A `Trainer` step that infers the latents with the decoder frozen (fast), then trains the decoder (slow).

    Placed before any `Trainer`: `class MyTrainer(DualRateMixin, SomeTrainer)`, whose arguments are likewise
    `class MyArguments(DualRateArguments, SomeArguments)`. The other trainer's loss sees one more input, `latents`.
    Labels of -100 are not scored, in training and evaluation; `infer_from` says what the latents are fitted to.
    A model with `num_latents=0` trains as any causal LM, so that the baseline of a comparison needs nothing else.
    By `inference_method="amortized"` there is no fast loop: the encoder learns with the decoder, at samples of what it
    gives, from loss + weight·kl (`kl_annealing_steps`), and both are logged without the weight. By "langevin" the
    decoder learns at the end of a chain: a point, so that kl, bound and what derives from them are not logged, and
    `eval_loss` is the loss given it, which bounds nothing.
    The model may be wrapped by PEFT: adapters are frozen in the fast loop like all else, and learn in the slow step.

    Beside the trainer's own, it logs, in nats a scored token over the steps since the last log:
        loss: -log p(x|z) at samples of the posterior that no fit has seen; kl: KL(q || prior);
        bound: loss + kl, which bounds the model's loss on the batches from above, before each was learned from; with
            infer_from="prompt" the loss alone, since z then follows from the prompt and is not paid for; and with
            slow_gradient="unrolled" or "online", whose loss is exact: of a predictor that stops once to think, or
            thinks at every token ("online" fits no latents to a whole text: no kl is logged);
        perplexity_bound: exp(bound); gain: what the last batch's latents save, loss at no latents - loss;
    and inference_seconds (in the fast loop, a step), tokens_per_second (scored, all processes) and, on a GPU that
    `monitor.PEAK_TFLOPS` knows, mfu: the share of its dense bfloat16 FLOPs that `training_flops` accounts for.
    Evaluation gives the same names on the whole set, and `eval_loss` is the bound; with slow_gradient="unrolled" the
    exact loss of a predictor that thinks once, after half of the tokens, and with "online" of one that takes a step at
    every token. `eval_no_latents` is the exact loss
    of the plain decoder and, for rows that have a prompt, `eval_from_prompt` that of a predictor which reads the mean
    of q(z | prompt), as greedy generation does. Of the fast loop it gives `eval_elbo_trace`, the ELBO a token at each
    step, each with its own noise, and after the last one where infer_from="labels" (trackers, which take numbers, get
    steps 0, 1, 2, 4, … and the last as `eval_elbo_trace/STEP`); `eval_elbo_last_gain`, the last rise;
    `eval_gain_if_wider` and `eval_gain_if_narrower`, what the ELBO would gain on the first batch if all variances were
    e times as large or as small.
    What goes wrong by these figures is a warning, once for each cause (`monitor.diagnose`).

    Raises TypeError for arguments without the fields of `DualRateArguments`, ValueError for a model that is no LTM, for
    prompt learning of PEFT, for rows that hold several texts (`position_ids`), and for an encoder whose weights would
    be sharded.
    """

    def __init__(self, model=None, args=None, *others, **kwargs):
        if not isinstance(args, DualRateArguments):
            raise TypeError(
                f"{type(self).__name__} needs arguments with the fields of DualRateArguments, such as "
                f"LTMTrainingArguments; got {type(args).__name__}."
            )
        super().__init__(model, args, *others, **kwargs)
        check_model(self)
        check_options(self)
        self._beside = None  # what this batch pays beside the loss given latents: nats with gradient, value, tokens
        self._sums = defaultdict(float)  # since the last log, on this process
        self._since = (0, 0.0)  # the step and the time at which `_sums` began
        self._step_tokens = 0  # scored in this step so far, on this process
        self._last_batch = None
        self._peak_flops = peak_flops(self.args.device)
        self.add_callback(_NoInputGradients)
        watch(self)

    def train(self, *args, **kwargs):
        """`Trainer.train`. Raises ValueError for a data set that has nothing to learn from, or to evaluate."""
        data = {"train_dataset": self.train_dataset}
        if self.args.eval_strategy != "no":
            data |= self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval_dataset": self.eval_dataset}
        for name, rows in data.items():
            check_scored(rows, name, self._looked_at)
        return super().train(*args, **kwargs)

    def _looked_at(self, row: dict) -> int:
        """The scored tokens of a row of a data set."""
        batch = self._get_collator_with_removed_columns(self.data_collator)([row])
        length, longest = batch["input_ids"].shape[1], self.model.config.max_position_embeddings
        if length > longest:
            raise ValueError(f"A row has {length} tokens, and the model takes {longest} (max_position_embeddings).")
        return self._num_scored(batch).sum().item()

    def _judge_step(self):
        super()._judge_step()
        self._step_tokens = 0

    def _cause(self):
        return "" if self._any(self._step_tokens > 0) else ": none of its tokens is scored, all labels are -100"

    def _run_state(self):
        step, start = self._since
        return super()._run_state() | {"sums": dict(self._sums), "since": (step, time.perf_counter() - start)}

    def _begin_run(self, states):
        super()._begin_run(states)
        self._sums.clear()  # `auto_find_batch_size` starts over after running out of memory
        for state in states[self.args.process_index :: self.args.world_size]:
            for name, value in state["sums"].items():
                self._sums[name] += value
        for step, seconds in (state["since"] for state in states[:1]):
            self._since = (step, time.perf_counter() - seconds)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        float32_reductions(self.accelerator)

    def create_scheduler(self, num_training_steps, optimizer=None):
        warmup = self.args.get_warmup_steps(num_training_steps)
        return super().create_scheduler(
            max(num_training_steps, warmup + 1), optimizer
        )  # polynomial divides by the rest

    # ---------------------------------------------------------------- the step

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        if not self._sums:
            self._since = (self.state.global_step, time.perf_counter())
        num_tokens = self._num_scored(inputs).sum().item()
        self._sums["tokens"] += num_tokens
        self._step_tokens += num_tokens
        decoder = self.accelerator.unwrap_model(model, keep_torch_compile=True).train()
        _without_noise(decoder)
        unread, context = [], nullcontext()
        if decoder.config.num_latents and not self._infers:
            thoughts = [None]
            unread = [p for name, p in decoder.named_parameters() if ".cross_att" in name and p.requires_grad]
            if unread:  # DDP waits for the gradient of every parameter
                self._beside = 0.0 * sum(p.sum() for p in unread), 0, 0
        elif self._online:
            read, prelude = self._think_online(decoder, inputs)
            thoughts, context, inputs = [no_latents(decoder, inputs["input_ids"])], read, {**inputs, "prelude": prelude}
        elif self._predicts:
            share = random.Random(self._seed(self.state.global_step + 1)).uniform(0.25, 0.75)
            prefix, rest = split_labels(**self._sequences(inputs), share=share)
            thought, prelude = self._think_unrolled(decoder, {**inputs, "labels": prefix})
            thoughts, inputs = [thought], {**inputs, "labels": rest, "prelude": prelude}
        else:
            thoughts = self._think(decoder, inputs)
        self._count_flops(inputs["input_ids"], slow_steps=len(thoughts))
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch * len(thoughts)  # the losses below then add up to their mean
        loss = 0
        for number, latents in enumerate(thoughts, start=1):
            with context, nullcontext() if number == len(thoughts) else accumulating(self.accelerator, model):
                loss += super().training_step(model, {**inputs, "latents": latents}, num_items_in_batch)
        self._beside = None
        _without_noise(decoder)
        for parameter in unread:  # it has learned nothing: neither does it decay
            parameter.grad = None
        inputs.pop("prelude", None)
        self._last_batch = {**inputs, "latents": None if thoughts[-1] is None else thoughts[-1].detach()}
        return loss if num_items_in_batch is not None else loss / len(thoughts)

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        """The loss given latents, and what is paid beside it.

        In an unrolled step that is the prefix's, in an amortised one the weighted KL: in its gradient, not its value.
        """
        loss = super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        if self._beside is None:
            return loss
        nats, value, tokens = self._beside
        if num_items_in_batch is None:  # the loss is a mean over this batch's tokens
            scored = self._num_scored(inputs).sum()
            num_items_in_batch = scored + tokens
            loss = loss * scored / num_items_in_batch
        elif self.args.average_tokens_across_devices:  # of all processes, whose gradients will be averaged
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        return loss + (nats - nats.detach() + value) / num_items_in_batch

    @property
    def _kl_weight(self) -> float:
        if not self._pays_kl:
            return 0.0
        steps = self.args.kl_annealing_steps
        return min(1.0, self.state.global_step / steps) if steps else 1.0

    def _think(self, decoder, inputs) -> list[torch.Tensor | None]:
        """The latents that the decoder learns from, one (B, L, N, D) tensor for each forward pass of the slow step."""
        if not decoder.config.num_latents:
            return [None]
        if self.args.infer_from == "prompt" and self._last_batch is None and not self._any_prompt(inputs):
            raise ValueError(
                "infer_from='prompt' needs rows with a prompt: two or more tokens with a label of -100 before the "
                "first that is scored. The first batch has none."
            )
        start = time.perf_counter()
        seed = self._seed(self.state.global_step + 1)
        trajectory = []  # the samples that the decoder learns from beside the last
        keep = self.args.slow_gradient == "trajectory"
        if decoder.config.inference_method == "amortized":
            posterior = amortized_posterior(decoder, **self._evidence(inputs))
            self._beside = self._kl_weight * posterior.kl_divergence().sum(), 0, 0
        else:
            with gathered(decoder, self.args.gather_during_inference, keep=True):
                posterior = infer_posterior(
                    decoder,
                    **self._evidence(inputs),
                    **self._drawn(decoder.config, seed),
                    seed=seed,
                    callback=(lambda step, latents, elbo: trajectory.append(latents)) if keep else None,
                )
        self._count_inference(posterior, self._evidence(inputs)["input_ids"], start)
        return [*trajectory, *self._samples(posterior, seed)]

    def _count_inference(self, posterior, input_ids, start: float) -> None:
        self._sums["inference_seconds"] += time.perf_counter() - start
        if self._has_kl:
            self._sums["kl"] += posterior.kl_divergence().sum().item()
        self._sums["non_finite_rows"] += posterior.num_non_finite
        self._count_flops(input_ids, fast_steps=len(posterior.elbo_trace))

    def _drawn(self, config, seed: int) -> dict:
        """How many steps of inference, and their size."""
        return {
            "num_inference_steps": random.Random(seed).randint(*self.args.inference_steps(config)),
            "inference_learning_rate": self._inference_learning_rate(config),
        }

    def _think_unrolled(self, decoder, inputs) -> tuple[torch.Tensor, Prelude]:
        """Latents fitted to the labels, which are a prefix's, and the prelude of the forward pass that reads them."""
        start = time.perf_counter()
        drawn = self._drawn(decoder.config, self._seed(self.state.global_step + 1))
        with self.compute_loss_context_manager():
            posterior, nats, prelude = unrolled_posterior(decoder, **drawn, **self._sequences(inputs))
        self._beside = nats, nats.detach(), self._num_scored(inputs).sum()
        self._count_inference(posterior, inputs["input_ids"], start)
        return posterior.mean, prelude

    def _think_online(self, decoder, inputs) -> tuple[AbstractContextManager, Prelude]:
        """What makes each token read latents of its own, and the prelude of the forward pass under it."""
        start = time.perf_counter()
        step_size = self._inference_learning_rate(decoder.config)
        with self.compute_loss_context_manager():
            thoughts, prelude = online_thoughts(decoder, step_size, **self._sequences(inputs))
        self._sums["inference_seconds"] += time.perf_counter() - start
        self._count_flops(inputs["input_ids"], fast_steps=1)
        return reading(decoder, thoughts), prelude

    def _online_nll(self, decoder, sequences) -> torch.Tensor:
        """(B,) nats, each token given latents that one step has fitted to all tokens before it."""
        thoughts, prelude = online_thoughts(decoder, self._inference_learning_rate(decoder.config), **sequences)
        with reading(decoder, thoughts):
            latents = no_latents(decoder, sequences["input_ids"])
            return negative_log_likelihood(decoder, **sequences, latents=latents, prelude=prelude)

    def _samples(self, posterior, seed: int) -> list[torch.Tensor]:
        """Of the fitted posterior, for the decoder to learn from."""
        return [posterior.mean if self._reads_mean else posterior.sample(seed)]

    def _count_flops(self, input_ids, fast_steps=0, slow_steps=0) -> None:
        if self._peak_flops:
            cost = training_flops(self.model.config, input_ids.shape[1])
            fast = fast_steps * self.args.fast_step_flops(cost)
            self._sums["flops"] += input_ids.numel() * (fast + cost.step(0, slow_steps))

    def _inference_learning_rate(self, config) -> float:
        """The step size of inference now, linear over training."""
        start, end = self.args.inference_learning_rate, self.args.inference_learning_rate_end
        if start is None:
            start = InferenceSettings.of(config).inference_learning_rate
        if end is None:
            adamw = config.inference_method == "variational" and config.inference_optimizer == "adamw"
            end = start * 0.34 / 0.30 if adamw else start
        return start + (end - start) * min(1.0, self.state.global_step / max(1, self.state.max_steps - 1))

    def _seed(self, visit: int) -> int:
        """Noise of its own for each step of training; 0 is evaluation's. The same after a resume, and on every rank."""
        return self.args.seed * 2**32 + visit

    @staticmethod
    def _sequences(inputs) -> dict:
        if inputs.get("position_ids") is not None:
            raise ValueError(
                "Rows with position_ids hold several texts, which would share one set of latents: pad texts to rows of "
                "their own, without packing or padding-free batches."
            )
        return {name: inputs.get(name) for name in ("input_ids", "attention_mask", "labels")}

    def _evidence(self, inputs) -> dict:
        """What the latents are fitted to, as arguments of `infer_posterior`."""
        sequences = self._sequences(inputs)
        if self.args.infer_from == "labels":
            return sequences
        if self.args.infer_from == "text":
            return sequences | {"labels": None}
        return prompts(**sequences)

    def _have_prompts(self, inputs) -> torch.Tensor:
        """(B,): whether a row has a prompt that latents can be inferred from."""
        return prompts(**self._sequences(inputs))["attention_mask"].sum(dim=1) > 1

    def _any_prompt(self, inputs) -> bool:
        """The same answer on all processes, since sharded decoders run together."""
        return bool(self.accelerator.reduce(self._have_prompts(inputs).sum(), "sum"))

    @property
    def _has_kl(self) -> bool:
        """Whether what latents cost can be told: not of a point, which is where a chain ends."""
        return not self.model.config.num_latents or self.model.config.inference_method != "langevin"

    @property
    def _pays_kl(self) -> bool:
        return self._has_kl and self.args.infer_from != "prompt"

    @property
    def _reads_mean(self) -> bool:
        """Whether latents are all that "map" found in a prompt, whose variance says nothing: as in generation."""
        return self.args.infer_from == "prompt" and self.model.config.inference_optimizer == "map"

    @property
    def _predicts(self) -> bool:
        """Whether the gradient goes through inference, without noise: the loss is exact, of a predictor that thinks."""
        return self.args.slow_gradient in ("unrolled", "online") and bool(self.model.config.num_latents)

    @property
    def _online(self) -> bool:
        return self._predicts and self.args.slow_gradient == "online"

    @property
    def _infers(self) -> bool:
        """Whether this step of training has a fast loop."""
        return self.state.global_step >= self.args.inference_start_ratio * self.state.max_steps

    def _num_scored(self, inputs) -> torch.Tensor:
        """(B,)"""
        return (scored_tokens(**self._sequences(inputs)) != IGNORED).sum(dim=1)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay on matrices only: neither on norms nor on gates."""
        shapes = ((name, getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters())  # ZeRO-3 flattens
        return [name for name, shape in shapes if len(shape) >= 2]

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.args.slow_optimizer == "muon":
            self.optimizer = MuonWithAdamW.of_trainer(self, self.model if model is None else model)
        return super().create_optimizer(model)

    # ---------------------------------------------------------------- logging

    def log(self, logs, start_time=None):
        if "loss" in logs and self._sums:
            logs.update(self._figures(logs["loss"]))
        traces = {name: logs.pop(name) for name in list(logs) if name.endswith("elbo_trace")}
        points = {  # trackers take numbers
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

    def _figures(self, loss: float) -> dict[str, float]:
        seconds = time.perf_counter() - self._since[1]
        sums = self._reduced(self._sums)
        figures = {"tokens_per_second": sums["tokens"] / seconds}
        if not sums["tokens"]:
            figures["loss"] = loss = math.nan
        kl = mean(sums["kl"], sums["tokens"])
        bound = loss if self._predicts else loss + kl * self._pays_kl
        if self.model.config.num_latents:
            figures |= {"kl": kl, "bound": bound} if self._has_kl else {}
            if self._online:  # no latents are fitted to a whole text
                del figures["kl"]
            figures["gain"] = self._gain()
            figures["inference_seconds"] = self._sums["inference_seconds"] / (self.state.global_step - self._since[0])
            if sums["non_finite_rows"]:
                figures["non_finite_rows"] = sums["non_finite_rows"]
        if self._peak_flops:
            figures["mfu"] = sums["flops"] / seconds / (self._peak_flops * self.args.world_size)
        if self._has_kl:
            figures["perplexity_bound"] = perplexity(bound)
        self._sums.clear()
        return figures

    @torch.no_grad()
    def _gain(self) -> float:
        """Nats a token that the last batch's latents save, on all processes, under the weights as they are now."""
        decoder = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=True)
        sequences = self._sequences(self._last_batch)
        whole = gathered(decoder, self.args.gather_during_inference)
        with whole, self.compute_loss_context_manager(), frozen(decoder) as decoder:  # no dropout
            latents = self._last_batch["latents"]
            plain = negative_log_likelihood(decoder, **sequences)
            if latents is not None and self._online:
                thinking = self._online_nll(decoder, sequences)
            else:
                thinking = negative_log_likelihood(decoder, **sequences, latents=latents)
        saved = (plain - thinking).sum().item()
        sums = self._reduced({"saved": saved, "tokens": self._num_scored(self._last_batch).sum().item()})
        return mean(sums["saved"], sums["tokens"])

    def _reduced(self, sums) -> dict[str, float]:
        """The sums over all processes."""
        names = sorted(sums)
        totals = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.args.device)
        return defaultdict(float, zip(names, self.accelerator.reduce(totals, "sum").tolist(), strict=True))


def _without_noise(decoder) -> None:
    """Until it is next set to train: NEFTune's noise is for what learns, not for what thinks or is measured."""
    decoder.get_input_embeddings().eval()


class LTMTrainer(ModelCardMixin, DualRateMixin, Trainer):
    """transformers' `Trainer` with the step of `DualRateMixin`, which says what it logs and evaluates.

    Takes `LTMTrainingArguments` and data sets of `input_ids` (as from `ltm_hf.data.pack`) and, where not all of them
    are to be scored, `labels`; rows of different lengths are padded.
    """

    def __init__(self, *args, data_collator=None, **kwargs):
        super().__init__(*args, data_collator=data_collator or collate_blocks, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer`'s. All logits exist only for who reads them: the caller, or a loss function of the user's."""
        # Without logits in the output, ZeRO-3 takes the head's weight for in use when the next fast loop gathers it.
        zero3 = any(hasattr(parameter, "ds_id") for parameter in self.model.parameters())
        if not return_outputs and self.compute_loss_func is None and "labels" in inputs and not zero3:
            inputs = {**inputs, "loss_reduction": "mean"}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    def _get_dataloader(self, dataset, *args, **kwargs):
        if self.data_collator is collate_blocks:
            check_columns(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)
