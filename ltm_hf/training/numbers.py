"""Numbers among training arguments that cannot work, which transformers finds out late or never."""

import math

from transformers.integrations import get_available_reporting_integrations

_SEED = "an integer of 0 or more, below 2**32", lambda value: 0 <= value < 2**32
_ABOVE_0 = "above 0 and finite", lambda value: 0 < value < math.inf
_BETA = "at least 0 and below 1", lambda value: 0 <= value < 1
_COUNT = "1 or more", lambda value: 1 <= value < math.inf
_NOT_NEGATIVE = "0 or more", lambda value: 0 <= value < math.inf
_FITS = {
    "seed": _SEED,
    "data_seed": _SEED,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_epsilon": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "num_inference_steps": _NOT_NEGATIVE,
    "num_inference_steps_min": _NOT_NEGATIVE,
    "kl_annealing_steps": _NOT_NEGATIVE,
    "inference_learning_rate": _ABOVE_0,
    "inference_learning_rate_end": _ABOVE_0,
    "muon_learning_rate": _ABOVE_0,
    "num_train_epochs": _ABOVE_0,
    "logging_steps": _ABOVE_0,
    "eval_steps": _ABOVE_0,
    "save_steps": _ABOVE_0,
    "eval_accumulation_steps": _ABOVE_0,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "dataloader_num_workers": _NOT_NEGATIVE,
}


def check_numbers(args) -> None:
    """Raise ValueError, by name, for a number that no run can have, and for a tracker that is not installed."""
    for name, (words, fits) in _FITS.items():
        value = getattr(args, name)
        if value is not None and not fits(value):
            raise ValueError(f"{name} must be {words}, got {value}.")
    there = [*get_available_reporting_integrations(), "flyte", "all", "none"]  # flyte, which the first leaves out
    for tracker in args.report_to if isinstance(args.report_to, list) else [args.report_to]:
        if tracker not in (*there, None):
            raise ValueError(f"report_to: {tracker!r} is unknown or not installed; there are {', '.join(there)}.")
