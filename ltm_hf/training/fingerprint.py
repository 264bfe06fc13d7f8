"""What makes a run the run it is: kept in its checkpoints, so that none goes on as another."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import datasets
from torch.optim.lr_scheduler import LambdaLR

FINGERPRINT = "fingerprint.json"
ROWS = 1024  # of the training data that are looked at, evenly spread
COLUMNS = ("input_ids", "labels", "attention_mask")
ARGUMENTS = (
    "seed", "data_seed", "train_sampling_strategy", "optim", "optim_args", "slow_optimizer",
)  # fmt: skip
DIGESTS = ("tokenizer", "train_dataset")
INCIDENTAL = (  # in a configuration: where it is from, how it is stored and run
    "transformers_version", "architectures", "auto_map", "dtype", "use_cache", "return_dict", "_name_or_path",
    "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
)  # fmt: skip


def fingerprint(trainer) -> dict:
    """By name, what a run must have in common with the checkpoint that it goes on from; digests of what is large.

    The model's configuration and its adapters'; the tokenizer's entries and special tokens; the seeds and how rows are
    drawn; the optimisers; what the decoder learns from (`objective`, `infer_from`); and the training data: how many
    rows there are, and up to 1,024 of them, evenly spread. Of a stream of `datasets` it is the first row, of other
    streams nothing.

    Free to change: steps and epochs, learning rates, their schedule and weight decay (from the next step on), batch
    size and accumulation, number and kind of processes, precision, the number and size of inference steps, and
    whatever concerns evaluation, logging and saving. Only where the learning rate is the state of its schedule, which a
    checkpoint brings (reduce_lr_on_plateau, greedy, DeepSpeed), must it be the same.
    """
    args, model = trainer.args, trainer.model
    found = {name: getattr(getattr(args, name), "value", getattr(args, name)) for name in ARGUMENTS}
    found |= {"objective": type(trainer.objective).__name__, "infer_from": trainer.objective.infer_from}
    if found["data_seed"] is None:
        found["data_seed"] = args.seed
    if trainer.is_deepspeed_enabled or args.lr_scheduler_type.value in ("reduce_lr_on_plateau", "greedy"):
        found["learning_rate"] = args.learning_rate
    found["configuration"] = _essential(model.config.to_dict())
    for name, adapter in getattr(model, "peft_config", {}).items():
        found[f"adapter {name}"] = _essential(adapter.to_dict())
    if hasattr(trainer.processing_class, "get_vocab"):
        entries, special = trainer.processing_class.get_vocab(), trainer.processing_class.special_tokens_map
        found["tokenizer"] = _digest([sorted(entries.items()), sorted(special.items())])
    found["train_dataset"] = _data(trainer.train_dataset)
    return json.loads(json.dumps(found, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def check_same_run(checkpoint: str | Path, now: dict) -> None:
    """Raise a ValueError that names what differs between a run and that of a checkpoint, which holds its fingerprint.

    A checkpoint of another trainer holds none, and passes.
    """
    path = Path(checkpoint, FINGERPRINT)
    if path.is_file() and (others := _differences(json.loads(path.read_text(encoding="utf-8")), now)):
        raise ValueError(
            f"Cannot resume from {checkpoint}: it was made with another {', '.join(others)}. Go on with the same, or "
            "start a new run in another output_dir."
        )


def _differences(then: dict, now: dict) -> list[str]:
    """Of what both know, which a newer library may not."""
    found = []
    for name in sorted(then.keys() & now.keys()):
        its, mine = then[name], now[name]
        if its == mine or (name in DIGESTS and None in (its, mine)):
            continue
        if isinstance(its, dict) and isinstance(mine, dict):
            found += [f"{name}.{inner}" for inner in _differences(its, mine)]
        else:
            found.append(name if name in DIGESTS else f"{name} ({its}, now {mine})")
    return found


def _essential(configuration: dict) -> dict:
    """Special tokens are the tokenizer's, which Trainer gives to the model."""
    return {
        name: value
        for name, value in configuration.items()
        if name not in INCIDENTAL and not name.startswith("output_") and not name.endswith("_token_id")
    }


def _data(dataset) -> str | None:
    if isinstance(dataset, datasets.IterableDataset):
        return _digest(_columns(list(dataset.take(1))))
    if not hasattr(dataset, "__len__"):
        return None
    last = len(dataset) - 1
    indices = sorted({round(last * place / (ROWS - 1)) for place in range(ROWS)})
    if isinstance(dataset, datasets.Dataset):
        names = [name for name in COLUMNS if name in dataset.column_names] or dataset.column_names
        return _digest([len(dataset), sorted(dataset.with_format(None).select_columns(names)[indices].items())])
    rows, again = (_columns([dataset[index] for index in indices]) for _ in range(2))
    return _digest([len(dataset), rows]) if rows == again else None  # rows that are drawn anew cannot be compared


def _columns(rows: list) -> list:
    """(name, values) of what the model reads, or of everything."""
    if not rows or not isinstance(rows[0], Mapping):
        return [str(row) for row in rows]
    names = [name for name in COLUMNS if name in rows[0]] or sorted(rows[0])
    return [(name, [_plain(row.get(name)) for row in rows]) for name in sorted(names)]


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else value


def _digest(value) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


# ---------------------------------------------------------------- what may change takes effect


HYPERPARAMETERS = ("initial_lr", "weight_decay", "betas", "eps")  # of an optimiser's groups; initial_lr: the peak


def hyperparameters(optimizer) -> list[dict]:
    """As the arguments of now have made them."""
    return [{name: group[name] for name in HYPERPARAMETERS if name in group} for group in optimizer.param_groups]


def set_hyperparameters(optimizer, scheduler, given: list[dict]) -> None:
    """In place of those that a checkpoint's optimiser and scheduler bring, which would win over the arguments.

    Only where the schedule is a function of the step: the state of others is their learning rate.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = [group["initial_lr"] for group in given]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, values, rate in zip(optimizer.param_groups, given, scheduler._last_lr, strict=True):
        group.update(values, lr=rate)
