"""Numbers of transformers' training arguments that cannot work, which it finds out late or never."""

import math

from transformers.integrations import get_available_reporting_integrations

_AT_LEAST = {  # fields that are None or a finite number of so much or more
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
_ABOVE_0 = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")
_BELOW_1 = ("adam_beta1", "adam_beta2")


def check_numbers(args) -> None:
    """Raise ValueError, naming the argument of `TrainingArguments`, for a number that no run can have."""
    for name, least in _AT_LEAST.items():
        _check(args, name, f"a finite number of {least} or more", lambda value, least=least: least <= value < math.inf)
    for name in _ABOVE_0:
        _check(args, name, "a finite number above 0", lambda value: 0 < value < math.inf)
    for name in _BELOW_1:
        _check(args, name, "at least 0 and below 1", lambda value: 0 <= value < 1)
    for name in ("seed", "data_seed"):
        _check(args, name, "below 2**32", lambda value: value < 2**32)
    _check(args, "max_steps", "1 or more, or -1 for num_train_epochs", lambda value: value == -1 or value > 0)


def check_trackers(args) -> None:
    """Raise ValueError for a tracker (`report_to`) that is not installed."""
    there = [*get_available_reporting_integrations(), "flyte"]  # which transformers does not look for
    for name in args.report_to:
        if name not in there:
            raise ValueError(f"report_to: {name!r} is unknown or not installed; there are {', '.join(there)}.")


def _check(args, name, words, fits) -> None:
    value = getattr(args, name)
    if value is not None and not fits(value):
        raise ValueError(f"{name} must be {words}, got {value}.")
