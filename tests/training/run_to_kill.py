"""A short training run for tests that kill it, or go on with it on other processes: a folder, and arguments as JSON."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from ltm_hf import LTMConfig, LTMForCausalLM
from ltm_hf.training import LTMTrainer, LTMTrainingArguments

BLOCK = 16


class Recording(LTMTrainer):
    """Notes the rows of each step. At step `poison`, the last process's loss is infinite, its gradient not."""

    poison = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        step = self.state.global_step + 1
        self.rows.setdefault(step, []).extend(self.ids[tuple(row)] for row in inputs["input_ids"].tolist())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        last = self.args.process_index == self.args.world_size - 1
        return loss + torch.inf if step == self.poison and last else loss


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == self.step


def main(folder, rows=52, streaming=False, stop_at=None, poison=None, record=None, **arguments):
    """52 rows: neither batches nor steps divide them. record: a folder for what each process read and came to."""
    set_seed(0)
    config = LTMConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=BLOCK, sliding_window=4, num_latents=4, num_inference_steps=2, bos_token_id=1,
        eos_token_id=0, attention_dropout=0.1,
    )  # fmt: skip
    defaults = dict(
        output_dir=folder, max_steps=44, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        learning_rate=1e-2, warmup_steps=5, logging_steps=3, save_steps=1, save_total_limit=2,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    blocks = torch.randint(2, 61, (rows, BLOCK), generator=torch.Generator().manual_seed(1)).tolist()
    dataset = Dataset.from_dict({"input_ids": blocks})
    if streaming:
        dataset = dataset.to_iterable_dataset(num_shards=4)
    args = LTMTrainingArguments(**defaults | arguments)
    trainer = Recording(LTMForCausalLM(config), args, train_dataset=dataset, callbacks=[StopAt(stop_at)])
    trainer.poison, trainer.rows = poison, {}
    trainer.ids = {tuple(block): index for index, block in enumerate(blocks)}
    trainer.train(resume_from_checkpoint="last")
    if record:
        weights = torch.cat([parameter.flatten() for parameter in trainer.model.parameters()])
        found = {"world": args.world_size, "rows": trainer.rows, "weights": weights.double().sum().item()}
        os.makedirs(record, exist_ok=True)
        Path(record, f"{args.process_index}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():  # a process that leaves while the other's threads talk to it may abort
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _, folder, arguments = globals().get("argv", sys.argv)
    main(folder, **json.loads(arguments))
