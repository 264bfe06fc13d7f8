"""What cannot work, or would be taken and do nothing: refused by name, before any work."""

import re
from collections.abc import Callable, Mapping

from torch.utils.data import IterableDataset

# Columns that say which tokens count, where texts begin or what is to be read instead of tokens.
SAYS_MORE = re.compile(
    r".*_masks?|position_ids|seq_lengths|label_ids|shift_labels|inputs_embeds|latents|latent_key_values"
)
READ = ("attention_mask", "special_tokens_mask")  # the latter is a tokenizer's by-product, and says nothing


def check_model(trainer) -> None:
    """Raise a ValueError for a model that `DualRateMixin` cannot train."""
    if not hasattr(trainer.model.config, "num_latents"):
        raise ValueError(
            f"A {trainer.model.config.model_type!r} model is no Latent Thought Model: make it the decoder of one with "
            "LTMForCausalLM.from_pretrained_backbone."
        )
    if getattr(getattr(trainer.model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "Prompt learning puts tokens before the text that inference does not know: use LoRA, or another "
            "PEFT method that changes weights."
        )


def check_options(trainer) -> None:
    """Raise a ValueError for arguments that do not go with each other, or with the model."""
    args, config = trainer.args, trainer.model.config
    if trainer.compute_metrics is not None and args.prediction_loss_only:
        raise ValueError("compute_metrics takes predictions, and prediction_loss_only makes none: leave out either.")
    if args.slow_optimizer == "muon" and (trainer.optimizer or trainer.optimizer_cls_and_kwargs):
        raise ValueError("slow_optimizer='muon' and an optimiser of your own exclude each other.")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if getattr(parallel, "cp_enabled", False) or getattr(parallel, "sp_enabled", False):
        raise ValueError("parallelism_config splits texts over processes, and latents are of a whole text.")
    if config.has_encoder and _is_sharded(trainer):
        raise ValueError(
            f"inference_method={config.inference_method!r} trains its encoder outside the forward pass that FSDP and "
            "DeepSpeed know: use one process or DDP."
        )
    if args.learn_through_errors and _is_sharded(trainer):
        raise ValueError("learn_through_errors takes second derivatives, which FSDP and DeepSpeed do not: use DDP.")


def _is_sharded(trainer) -> bool:
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


# ---------------------------------------------------------------- data sets


def check_columns(dataset, read: tuple[str, ...] = READ) -> None:
    """Raise a ValueError for a column that would be dropped, although it changes what a row means."""
    names = getattr(dataset, "column_names", None)
    if names is None and hasattr(dataset, "__len__") and len(dataset) and isinstance(dataset[0], Mapping):
        names = dataset[0].keys()
    for name in names or ():
        if SAYS_MORE.fullmatch(name) and name not in read:
            raise ValueError(
                f"The rows have a column {name!r}, which would be left out: input_ids, labels (-100 where nothing is "
                "scored) and attention_mask are read. Put what it says into these, or remove it."
            )


def check_some(dataset, name: str) -> None:
    """Raise a ValueError for a data set without rows."""
    if hasattr(dataset, "__len__") and not len(dataset):
        raise ValueError(f"{name} is empty: it has no rows.")


def check_scored(dataset, name: str, count: Callable[[dict], int]) -> None:
    """Raise a ValueError unless some row has a token that `count` finds scored. Streams are not looked at."""
    check_some(dataset, name)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return
    if not any(count(dataset[index]) for index in range(len(dataset))):
        raise ValueError(
            f"{name} has no token to score: all labels are -100, or no row has two tokens, of which one predicts the "
            "other."
        )
