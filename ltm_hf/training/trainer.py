"""Dual-rate learning (paper Algorithm 1) as a transformers Trainer."""

import math
import time
from collections import defaultdict
from contextlib import nullcontext

import torch
from transformers import Trainer, TrainerCallback

from ..costs.flops import training_flops
from ..data import collate_blocks
from ..inference_ltm import frozen
from ..likelihood_ltm import Text, negative_log_likelihood
from .arguments import DualRateArguments
from .card_mixin import ModelCardMixin
from .checks import check_columns, check_model, check_options, check_scored
from .divergence import DivergenceMixin
from .evaluation import EvaluationMixin
from .monitor import mean, peak_flops, perplexity, watch
from .muon import MuonWithAdamW
from .objectives import Now, Thoughts, objective_of
from .order import DataOrderMixin
from .sharding import accumulating, float32_reductions, gathered
from .texts import have_prompts


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
    `class MyArguments(DualRateArguments, SomeArguments)`. What the slow step learns from is an `Objective`, the
    model's own unless the arguments name another; the other trainer's loss sees what it gives as more inputs.
    Labels of -100 are not scored, in training and evaluation; `infer_from` says what is inferred from. A model with
    `num_latents=0` trains as any causal LM, so that the baseline of a comparison needs nothing else. One wrapped by
    PEFT has its adapters frozen in the fast loop like all else; they learn in the slow step.

    Logs are in nats a scored token, over the steps since the last log; evaluation gives the same names on a whole set:
        loss: what the objective says, at samples of the posterior. eval_loss: a bound where a KL is paid, else exact
            or, of a point, the loss given it.
        kl, bound, perplexity_bound: where latents are fitted to the text, KL(q || prior), loss + kl and its exponent.
        gain: what the last batch's latents save. eval_no_latents: the exact loss of the plain decoder.
        eval_from_prompt: of rows with a prompt, the exact loss by the mean of q(z | prompt), as in greedy generation.
        eval_prediction_sampled, eval_second_half: of a memory (`Prediction`).
        eval_elbo_trace and the others of the fast loop: see `monitor`, which also warns of what goes wrong.
        inference_seconds a step, where inference runs before it; tokens_per_second (scored, all processes) and, on a
            GPU of `monitor.PEAK_TFLOPS`, mfu: the share of its dense bfloat16 FLOPs that `training_flops` accounts for.

    Raises TypeError for arguments without the fields of `DualRateArguments`, ValueError for a model that is no LTM or
    does not fit to the objective, for prompt learning of PEFT, for rows that hold several texts (`position_ids`), and
    for an encoder whose weights would be sharded.
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
        self.objective = objective_of(self.model.config, self.args)
        self._extra = None  # nats whose gradient this batch learns from beside its loss
        self._sums = defaultdict(float)  # since the last log, on this process
        self._since = (0, 0.0)  # the step and the time at which `_sums` began
        self._step_tokens = 0  # scored in this step so far, on this process
        self._last_batch = None  # its text, and what the last pass over it was given
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
        return Text.of(self.model, **batch).num_tokens.sum().item()

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
        text = self._text(inputs)
        num_tokens = text.num_tokens.sum().item()
        self._sums["tokens"] += num_tokens
        self._step_tokens += num_tokens
        decoder = self.accelerator.unwrap_model(model, keep_torch_compile=True).train()
        _without_noise(decoder)
        thoughts = self._think(decoder, text)
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch * len(thoughts.passes)  # the losses below then add up to their mean
        loss = 0
        for number, given in enumerate(thoughts.passes, start=1):
            with nullcontext() if number == len(thoughts.passes) else accumulating(self.accelerator, model):
                loss += super().training_step(model, {**inputs, **given}, num_items_in_batch)
        self._extra = None
        _without_noise(decoder)
        self._last_batch = text, {name: x.detach() if torch.is_tensor(x) else x for name, x in given.items()}
        return loss if num_items_in_batch is not None else loss / len(thoughts.passes)

    def _think(self, decoder, text: Text) -> Thoughts:
        """The fast loop, and what is logged of it."""
        if self.objective.infer_from == "prompt" and self._last_batch is None and self.model.config.num_latents:
            if not self.accelerator.reduce(have_prompts(text).sum(), "sum"):
                raise ValueError(
                    "infer_from='prompt' needs rows with a prompt: two or more tokens with a label of -100 before the "
                    "first that is scored. The first batch has none."
                )
        start, seed = time.perf_counter(), self._seed(self.state.global_step + 1)
        now = Now(self.state.global_step, self.state.max_steps)
        with gathered(decoder, self.args.gather_during_inference, keep=True):
            thoughts = self.objective.step(decoder, text, seed, now)
        self._extra = thoughts.extra
        self._sums["inference_seconds"] += time.perf_counter() - start
        self._sums["kl"] += 0.0 if thoughts.kl is None else thoughts.kl.sum().item()
        self._sums["non_finite_rows"] += thoughts.num_non_finite
        if self._peak_flops:
            cost = training_flops(self.model.config, text.input_ids.shape[1])
            self._sums["flops"] += text.input_ids.numel() * self.objective.flops(cost, thoughts.num_steps)
        return thoughts

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        """The loss given latents, with the gradient of what else is learned from: in an amortised step, weighted KL."""
        loss = super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        if self._extra is None:
            return loss
        if num_items_in_batch is None:  # the loss is a mean over this batch's tokens
            num_items_in_batch = self._text(inputs).num_tokens.sum()
        elif self.args.average_tokens_across_devices:  # of all processes, whose gradients will be averaged
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        return loss + (self._extra - self._extra.detach()) / num_items_in_batch

    def _seed(self, visit: int) -> int:
        """Noise of its own for each step of training; 0 is evaluation's. The same after a resume, and on every rank."""
        return self.args.seed * 2**32 + visit

    def _text(self, inputs) -> Text:
        if inputs.get("position_ids") is not None:
            raise ValueError(
                "Rows with position_ids hold several texts, which would share one set of latents: pad texts to rows of "
                "their own, without packing or padding-free batches."
            )
        return Text.of(self.model, *(inputs.get(name) for name in ("input_ids", "attention_mask", "labels")))

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay on matrices only: neither on norms, gates nor addresses."""
        shapes = ((name, getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters())  # ZeRO-3 flattens
        return [name for name, shape in shapes if len(shape) == 2]

    def create_optimizer(self, model=None):
        if self.optimizer is None and self.args.slow_optimizer == "muon":
            self.optimizer = MuonWithAdamW.of_trainer(self, self.model if model is None else model)
        return super().create_optimizer(model)

    # ---------------------------------------------------------------- logging

    def log(self, logs, start_time=None):
        if "loss" in logs and self._sums:
            logs.update(self._figures(logs["loss"]))
        super().log(logs, start_time)

    def _figures(self, loss: float) -> dict[str, float]:
        seconds, objective = time.perf_counter() - self._since[1], self.objective
        sums = self._reduced(self._sums)
        figures = {"tokens_per_second": sums["tokens"] / seconds}
        if not sums["tokens"]:
            figures["loss"] = loss = math.nan
        kl = mean(sums["kl"], sums["tokens"])
        bound = loss + kl * objective.pays_kl
        if self.model.config.num_latents:
            figures |= {"kl": kl} if objective.has_kl else {}
            figures |= {"bound": bound} if objective.has_kl else {}
            figures["gain"] = self._gain()
            if objective.infers_first:
                steps = self.state.global_step - self._since[0]
                figures["inference_seconds"] = self._sums["inference_seconds"] / steps
            if sums["non_finite_rows"]:
                figures["non_finite_rows"] = sums["non_finite_rows"]
        if self._peak_flops:
            figures["mfu"] = sums["flops"] / seconds / (self._peak_flops * self.args.world_size)
        if objective.perplexity:
            figures[objective.perplexity] = perplexity(bound)
        self._sums.clear()
        return figures

    @torch.no_grad()
    def _gain(self) -> float:
        """Nats a token that the last batch's latents save, on all processes, under the weights as they are now."""
        decoder, (text, given) = (
            self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=True),
            self._last_batch,
        )
        whole = gathered(decoder, self.args.gather_during_inference)
        with whole, self.compute_loss_context_manager(), frozen(decoder) as decoder:  # no dropout
            plain = negative_log_likelihood(decoder, text)
            thinking = negative_log_likelihood(decoder, text, **self.objective.measured(text, given))
        sums = self._reduced({"saved": (plain - thinking).sum().item(), "tokens": text.num_tokens.sum().item()})
        return mean(sums["saved"], sums["tokens"])

    def _reduced(self, sums) -> dict[str, float]:
        """The sums over all processes."""
        names = sorted(sums)
        totals = torch.tensor([sums[name] for name in names], dtype=torch.float64, device=self.args.device)
        return defaultdict(float, zip(names, self.accelerator.reduce(totals, "sum").tolist(), strict=True))


def _without_noise(decoder) -> None:
    """Until it is next set to train: NEFTune's noise is for what learns, not for what thinks or is measured."""
    decoder.get_input_embeddings().eval()


def without_logits(trainer, inputs: dict) -> dict:
    """Inputs for a loss alone, unless `trainer` reads logits for it."""
    # Without logits in the output, ZeRO-3 takes the head's weight for in use when the next fast loop gathers it.
    zero3 = any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())
    reads = trainer.compute_loss_func is not None or "labels" not in inputs or zero3
    return inputs if reads else {**inputs, "loss_reduction": "mean"}


class LTMTrainer(ModelCardMixin, DualRateMixin, Trainer):
    """transformers' `Trainer` with the step of `DualRateMixin`, which says what it logs and evaluates.

    Takes `LTMTrainingArguments` and data sets of `input_ids` (as from `ltm_hf.data.pack`) and, where not all of them
    are to be scored, `labels`; rows of different lengths are padded.
    """

    def __init__(self, *args, data_collator=None, **kwargs):
        super().__init__(*args, data_collator=data_collator or collate_blocks, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer`'s. All logits exist only for who reads them: the caller, or a loss function of the user's."""
        inputs = inputs if return_outputs else without_logits(self, inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    def _get_dataloader(self, dataset, *args, **kwargs):
        if self.data_collator is collate_blocks:
            check_columns(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)
