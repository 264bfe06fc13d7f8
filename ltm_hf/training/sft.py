"""Supervised fine-tuning: dual-rate learning under TRL's SFTTrainer, with its data formats, templates and adapters."""

from dataclasses import dataclass

from transformers import Trainer

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    raise ImportError("ltm_hf.training.sft needs TRL: pip install 'ltm_hf[finetune]'") from None

from ..data.chat import AsText
from ..data.packing import real_tokens
from .arguments import DualRateArguments
from .card_mixin import ModelCardMixin
from .checks import READ, check_columns, check_some
from .trainer import DualRateMixin, without_logits

MASKS = ("completion_mask", "assistant_masks")  # which TRL makes labels of


def latent_modules(config) -> list[str]:
    """The modules that a decoder made by `from_pretrained_backbone` has yet to learn.

    An adapter for one should train them whole, as its `modules_to_save`.
    """
    return ["reader"] if config.has_memory else ["cross_attn", "cross_attention_layernorm", "cross_attention_gate"]


@dataclass
class LTMSFTConfig(DualRateArguments, SFTConfig):
    """TRL's `SFTConfig` and the fields of `DualRateArguments`. Defaults are TRL's, bfloat16 and checkpointing included.

    Raises ValueError for packing and padding-free batches, which put several texts into one row where they would share
    one set of latents, and for a loss that is no likelihood.
    """

    def __post_init__(self):
        for name in ("packing", "eval_packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(f"{name} must be off: texts in one row would share one set of latents.")
        if self.loss_type == "dft":
            raise ValueError("loss_type must be 'nll': a reweighted loss is no likelihood, and bounds nothing.")
        super().__post_init__()


class _SFTTrainer(SFTTrainer):
    """TRL's, whose loss goes past the model to its body and its head, between which a memory is read."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.config.has_memory:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not return_outputs and self.label_smoother is None:
            inputs = without_logits(self, inputs)
        return Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch)


class LTMSFTTrainer(ModelCardMixin, DualRateMixin, _SFTTrainer):
    """TRL's `SFTTrainer` with the step, figures and evaluation of `DualRateMixin`, and the card of `ModelCardMixin`.

    Takes `LTMSFTConfig`, the data sets of `SFTTrainer` (`prompt` and `completion`, `messages`, `text`) and, for an
    adapter, `peft_config`. What TRL does not score (the prompt, other turns than the assistant's) the bound does not
    score either; `infer_from` says whether the latents are fitted to it. In rows that are token ids already, padding
    that an `attention_mask` marks is taken off.
    With objective="elbo_trajectory", `num_tokens` counts a token once for each forward pass of the slow step.
    A special token that a text or a message names is spelt by its letters. With a memory, TRL's own figures (entropy,
    token accuracy, num_tokens) are not logged.
    """

    def __init__(self, model, args=None, data_collator=None, train_dataset=None, eval_dataset=None, *others, **kwargs):
        named = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, rows in {"train_dataset": train_dataset, **named}.items():
            check_some(rows, name)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, *others, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, *args, **kwargs):
        if "input_ids" in (dataset.column_names or ()):
            check_columns(dataset, (*READ, *MASKS))
            if "attention_mask" in dataset.column_names:
                dataset = dataset.map(_unpadded, remove_columns="attention_mask")
        return super()._prepare_dataset(dataset, AsText(processing_class), *args, **kwargs)

    def _get_dataloader(self, dataset, *args, **kwargs):
        if self._skip_prepare_dataset:
            check_columns(dataset, MASKS)
        return super()._get_dataloader(dataset, *args, **kwargs)


def _unpadded(row: dict) -> dict:
    real = real_tokens(row["attention_mask"])
    return {name: row[name][real] for name in ("input_ids", "labels", *MASKS) if name in row}


__all__ = ["LTMSFTConfig", "LTMSFTTrainer", "latent_modules"]
