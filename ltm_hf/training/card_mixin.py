"""A trainer that writes the model card beside each model that it saves."""

import inspect
import logging
import math
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback

from ..evaluation import Likelihood
from .card import remove_local_base, write_model_card

logger = logging.getLogger(__name__)

# Arguments of Trainer.create_model_card as write_model_card calls them; None: no place in this card.
NAMES = dict(
    model_name="name", finetuned_from="base_model", dataset="dataset_name", dataset_tags="dataset_name",
    tasks=None, dataset_args=None,
)  # fmt: skip


class ModelCardMixin:
    """Before any `Trainer`: each folder that gets a model gets the model's card, checkpoints and pushes included.

    A card tells the step that made the weights beside it (the best one, once `load_best_model_at_end` has loaded it),
    the tokens read by then, and the figures of the evaluation at that step, or none. It replaces a README.md that is
    there. A card that cannot be written is a warning, and the run goes on. An adapter (PEFT) keeps its library's card,
    but for the path of a base model on this machine.

    card_facts: arguments of `write_model_card`, where the trainer does not know them or not as you want them.
    Raises TypeError for a name that `write_model_card` does not take.
    """

    def __init__(self, *args, card_facts: dict | None = None, **kwargs):
        self._card_facts = card_facts or {}
        inspect.signature(write_model_card).bind_partial(None, None, **self._card_facts)
        super().__init__(*args, **kwargs)
        self.add_callback(_PushCardAndCode)

    def create_model_card(self, language=None, license=None, tags=None, model_name=None, **facts):
        """Write `output_dir/README.md`, the card of the weights as they are now; `push_to_hub` passes arguments on.

        facts: other arguments of `Trainer.create_model_card` and `write_model_card`; one that is None is not given.
        """
        facts = dict(language=language, license=license, tags=tags, model_name=model_name, **facts)
        facts = {name: fact for name, fact in facts.items() if fact is not None}
        if not self._has_card():
            super().create_model_card(**facts)
            if self.is_world_process_zero():
                remove_local_base(self.args.output_dir)
            return
        if (self.hub_model_id or "").endswith(f"/{model_name}"):
            facts["model_name"] = self.hub_model_id  # push_to_hub leaves the owner out, and without one nothing loads
        if self.is_world_process_zero():
            facts = {NAMES.get(name, name): fact for name, fact in facts.items()}
            facts.pop(None, None)
            self._write_card(self.args.output_dir, facts)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save and self._has_card():
            self._write_card(output_dir or self.args.output_dir, {})
        elif self.args.should_save:
            remove_local_base(output_dir or self.args.output_dir)

    def _has_card(self) -> bool:
        return isinstance(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), PreTrainedModel)

    def _write_card(self, folder, facts: dict) -> None:
        try:
            root, path = Path(self.args.output_dir).resolve(), Path(folder).resolve()
            name = self.hub_model_id or (f"{root.name}/{path.name}" if root in path.parents else path.name)
            write_model_card(folder, self.model, **{"name": name, **self._known_facts(), **self._card_facts, **facts})
        except Exception:  # whatever it is, the run is worth more
            logger.warning("The model card in %s could not be written.", folder, exc_info=True)

    def _known_facts(self) -> dict:
        args, state, step = self.args, self.state, self.state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint and not self.is_in_train:
            step = int(state.best_model_checkpoint.rsplit("-", 1)[1])  # Trainer loaded it when training ended
        record = {}
        for entry in reversed(state.log_history):  # of several evaluations at a step the first, training's own, stays
            record |= entry if entry["step"] == step else {}
        tokens = state.num_input_tokens_seen if step == state.global_step else record.get("num_input_tokens_seen")
        text, _ = getattr(self, "_last_batch", None) or (None, None)
        packed = text is not None and text.mask is None  # nothing is padded: all rows are of one length
        hardware = args.device.type.upper()
        if hardware == "CUDA":
            hardware = torch.cuda.get_device_name(args.device)
        return dict(
            license=None,
            base_model=self.model.config._name_or_path,
            training_arguments=args,
            num_training_steps=step or None,
            num_training_tokens=tokens or None,
            block_size=text.input_ids.shape[1] if packed else None,
            # Several processes on a CPU are not several CPUs.
            hardware=hardware if args.world_size == 1 or hardware == "CPU" else f"{args.world_size} x {hardware}",
            likelihood=self._evaluated(record),
            num_inference_steps=args.num_inference_steps,
        )

    def _evaluated(self, record: dict) -> Likelihood | dict[str, Likelihood] | None:
        """What Trainer's evaluation found, which has no standard errors; by name where there are several data sets."""
        keys = self.objective.figures
        data = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        found = {}
        for name, blocks in data.items():
            metrics = {figure: f"eval_{name}_{key}" if name else f"eval_{key}" for figure, key in keys.items()}
            figures = {figure: (record[metric], math.nan) for figure, metric in metrics.items() if metric in record}
            if figures:
                found[name] = Likelihood(figures, None, len(blocks) if hasattr(blocks, "__len__") else None)
        return found.get("", found or None)


class _PushCardAndCode(TrainerCallback):
    """Of a checkpoint, Trainer pushes copies of the weights and the configuration: its card and code go with them."""

    def on_push_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
            for path in [*checkpoint.glob("*.py"), *checkpoint.glob("README.md")]:
                shutil.copy(path, args.output_dir)
