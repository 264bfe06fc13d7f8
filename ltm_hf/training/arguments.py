"""Training arguments with the paper's values as defaults (section 4, "Training")."""

import copy
import json
import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from ..configuration_ltm import InferenceSettings
from ..methods_ltm import method_of
from .numbers import check_numbers
from .objectives import OBJECTIVES
from .sharding import GATHER_DURING_INFERENCE
from .texts import INFER_FROM

SLOW_OPTIMIZERS = ("adamw", "muon")

LOWER_IS_BETTER = (
    "loss", "perplexity", "perplexity_bound", "nll", "no_latents", "from_prompt", "prediction_sampled", "second_half",
)  # fmt: skip
SECRETS = ("_token", "_key", "password", "secret")  # ends of names
TOKENS = ("eos_token", "pad_token", "bos_token", "unk_token")  # which are none


@dataclass
class DualRateArguments:
    """What `DualRateMixin` reads: to be placed before any `TrainingArguments`, as the mixin before any `Trainer`.

    Raises ValueError for a value that cannot work. Pickled, as in each checkpoint's training_args.bin, they are without
    `hub_token` and other secrets.
    """

    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Train anew in an output_dir that holds a model or checkpoints, which is refused otherwise unless "
            "the run resumes. Its checkpoints are deleted when training starts, and its model replaced when one is "
            "saved. Where there is a checkpoint to resume from, resume_from_checkpoint comes first."
        },
    )
    include_num_input_tokens_seen: str | bool = field(
        default=True, metadata={"help": "Count the tokens read, padding too, for the model card."}
    )
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Fast steps on the latents for each slow step; default: the model's."}
    )
    num_inference_steps_min: int | None = field(
        default=None,
        metadata={
            "help": "Draw each slow step's number of fast steps from this one to num_inference_steps, all equally "
            "likely, for one model that serves every number; default: always num_inference_steps."
        },
    )
    inference_learning_rate: float | None = field(
        default=None, metadata={"help": "Step size of inference when training starts; default: the model's."}
    )
    inference_learning_rate_end: float | None = field(
        default=None,
        metadata={
            "help": "Step size of inference when training ends, reached linearly. Default: for adamw 0.34 / 0.30 of "
            "the start (the paper goes from 0.30 to 0.34), else the start."
        },
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "What the decoder learns from. 'elbo': a sample of the posterior fitted to the text (Algorithm 1); "
            "'elbo_trajectory': the mean over the samples of all fast steps and the final one (as the released code "
            "does); 'prediction': each token from what those before it have left in a memory. Default: 'prediction' "
            "for a memory, else 'elbo'.",
            "choices": (*OBJECTIVES, None),
        },
    )
    learn_through_errors: bool = field(
        default=False,
        metadata={
            "help": "Of a memory: let the slow step's gradient go through the errors by which it infers, too, by "
            "second derivatives, with all logits and more time; one process or DDP. Default: they are constants, the "
            "decoder frozen where it infers."
        },
    )
    infer_from: str | None = field(
        default=None,
        metadata={
            "help": "What latents are inferred from. 'labels': the tokens that the loss scores, given those before "
            "them; loss + kl bounds -log p(completion | prompt) with z from the prior. 'text': the prompt as well, as "
            "if it were scored; loss + kl bounds the same less tightly, since the kl pays for both. 'prompt': what "
            "comes before the first scored token, which is all that generate() sees; no kl is paid, and the loss is "
            "that of a predictor, on average no lower than that of its mixture over q(z | prompt). Default: 'text' for "
            "a memory, else 'labels'.",
            "choices": (*INFER_FROM, None),
        },
    )
    gather_during_inference: str = field(
        default="auto",
        metadata={
            "help": "Under FSDP2 and ZeRO-3, gather the sharded parameters once for all fast steps of a batch: "
            "'always', 'never' (at each use, for models that do not fit a device), or 'auto': if all of them take at "
            "most a quarter of the device's memory.",
            "choices": GATHER_DURING_INFERENCE,
        },
    )

    kl_annealing_steps: int = field(
        default=0,
        metadata={
            "help": "With inference_method='amortized', optimiser steps over which the weight of the KL in the loss "
            "rises linearly from 0 to 1; 0: it is 1 throughout."
        },
    )

    slow_optimizer: str = field(
        default="adamw",
        metadata={
            "help": "Optimiser of the decoder. 'adamw': what `optim` names; 'muon': torch.optim.Muon (torch 2.9) "
            "for the layers' matrices, AdamW for embeddings, head, norms and gates.",
            "choices": SLOW_OPTIMIZERS,
        },
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of Muon's matrices; default: twice learning_rate."},
    )

    def __post_init__(self):
        check_numbers(self)
        named = {
            "objective": (*OBJECTIVES, None),
            "infer_from": (*INFER_FROM, None),
            "gather_during_inference": GATHER_DURING_INFERENCE,
            "slow_optimizer": SLOW_OPTIMIZERS,
        }
        for name, choices in named.items():
            if getattr(self, name) not in choices:
                known = ", ".join(filter(None, choices))
                raise ValueError(f"{name} must be one of {known}; got {getattr(self, name)!r}.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps must be 1 or more, or -1 for num_train_epochs; got {self.max_steps}.")
        for name in getattr(self, "_VALID_DICT_FIELDS", ()):  # which may be the path of a file, too
            if isinstance(value := getattr(self, name), str) and value.startswith("{"):
                try:
                    json.loads(value)
                except ValueError as error:
                    raise ValueError(f"{name} must be JSON, got {value!r}: {error}.") from None
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor must be 0: a smoothed loss is no likelihood, and bounds nothing.")
        if self.label_names not in (None, ["labels"]):
            raise ValueError(
                f"label_names must be ['labels'], the column that says what is scored; got {self.label_names}."
            )
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better = False  # Trainer knows it of names that end with "loss" alone
        super().__post_init__()
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # transformers' old and new
            if (getattr(self, name, None) or {}).get("use_reentrant"):
                raise ValueError(f"{name}: use_reentrant must be False; reentrant checkpoints cannot give ∂NLL/∂z.")
        self._check_schedule()
        self._check_slow_optimizer()

    def _check_schedule(self) -> None:
        """Complete what a schedule needs, and make one before there is anything to lose."""
        name = self.lr_scheduler_type.value
        if self.lr_scheduler_kwargs is None and "min_lr" in name:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        if self.lr_scheduler_kwargs is None and name == "warmup_stable_decay" and self.max_steps > 0:
            self.lr_scheduler_kwargs = {"num_decay_steps": math.ceil(self.max_steps / 10), "min_lr_ratio": 0.1}
        given = f"lr_scheduler_kwargs={self.lr_scheduler_kwargs} with lr_scheduler_type={name!r}"
        if self.lr_scheduler_kwargs and name in ("constant", "constant_with_warmup"):
            raise ValueError(f"{given}: this schedule takes none.")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.learning_rate)
        try:
            get_scheduler(
                name, optimizer, num_warmup_steps=1, num_training_steps=100,
                scheduler_specific_kwargs=self.lr_scheduler_kwargs,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ValueError(f"{given}: {error}") from error

    def _check_slow_optimizer(self) -> None:
        if self.slow_optimizer != "muon":
            if self.muon_learning_rate is not None:
                raise ValueError("muon_learning_rate is for slow_optimizer='muon'.")
            return
        if self.deepspeed_plugin is not None:
            raise ValueError(
                "slow_optimizer='muon' needs whole matrices, and DeepSpeed's ZeRO flattens them: take 'adamw'."
            )
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"slow_optimizer='muon' needs torch 2.9 or later, got {torch.__version__}: take 'adamw'.")
        if self.optim not in ("adamw_torch", "adamw_torch_fused"):
            optim = getattr(self.optim, "value", self.optim)
            raise ValueError(
                f"Beside slow_optimizer='muon', optim must be adamw_torch or adamw_torch_fused, got {optim!r}."
            )
        if self.muon_learning_rate is None:
            self.muon_learning_rate = 2 * self.learning_rate

    def __getstate__(self) -> dict:
        return without_secrets(vars(self))

    def __copy__(self):
        twin = object.__new__(type(self))  # with its secrets: it stays in this process
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo):
        twin = memo[id(self)] = copy.copy(self)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def inference_steps(self, config) -> tuple[int, int]:
        """The least and the most fast steps of a slow step of this model. Raises ValueError if least is above most.

        A memory takes none: it infers within the slow step.
        """
        if not config.num_latents or config.has_memory or not method_of(InferenceSettings.of(config)).takes_steps:
            return 0, 0
        most = config.num_inference_steps if self.num_inference_steps is None else self.num_inference_steps
        least = most if self.num_inference_steps_min is None else self.num_inference_steps_min
        if least > most:
            raise ValueError(f"num_inference_steps_min must be at most num_inference_steps ({most}), got {least}.")
        return least, most

    def inference_rates(self, config) -> tuple[float, float]:
        """The step size of inference when training starts, and when it ends."""
        settings = InferenceSettings.of(config)
        start, end = self.inference_learning_rate, self.inference_learning_rate_end
        if start is None:
            start = settings.inference_learning_rate or method_of(settings).default_step_size
        if end is None:
            end = start * method_of(settings).growth
        return start, end

    def inference_rate(self, config, share: float) -> float:
        """The step size of inference when a share of training is over: linear."""
        start, end = self.inference_rates(config)
        return start + (end - start) * share


@dataclass
class LTMTrainingArguments(DualRateArguments, TrainingArguments):
    """`TrainingArguments` of dual-rate learning.

    The slow optimiser is the paper's: AdamW 4e-4, betas (0.9, 0.95), weight decay 0.1 on matrices only, 1,000 warm-up
    steps, cosine to a tenth, gradients clipped to norm 1. The paper's batch is 512 sequences of 1,024 tokens: set
    `per_device_train_batch_size` and `gradient_accumulation_steps` to it.

    Raises ValueError for a value that cannot work.
    """

    learning_rate: float = field(default=4e-4, metadata={"help": "Peak learning rate of the decoder (slow)."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of the decoder's AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay, on matrices only."})
    warmup_steps: float = field(default=1000, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Schedule of the learning rate."})
    lr_scheduler_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Arguments of the schedule, as JSON; default: to a tenth, for one that ends above zero."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "The slow step uses every parameter, so that DDP need not look for others."}
    )


def without_secrets(value):
    """A copy of a dictionary, and of those in it, without what its name calls a secret."""
    if not isinstance(value, dict):
        return value
    return {
        name: None if str(name).endswith(SECRETS) and name not in TOKENS else without_secrets(entry)
        for name, entry in value.items()
    }
