"""What each process of `test_distributed.py` runs: `distributed_worker.py MODE FOLDER [CASE …]`.

Every case trains a tiny model on the same rows in the same order; rank 0 writes FOLDER/MODE.json.
"""

import json
import os
import sys
from pathlib import Path

import torch


def on_cpu():
    """accelerate chooses FSDP and DeepSpeed on accelerators only: let it take the CPU, with gloo, for one."""
    import accelerate.state
    import transformers.training_args

    def backend(self, *args, **kwargs):
        return "gloo", accelerate.state.DistributedType.MULTI_GPU

    def device(self):
        self.device = torch.device("cpu")

    accelerate.state.PartialState._prepare_backend = backend
    accelerate.state.PartialState.set_device = device
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


MODE, FOLDER = sys.argv[1], Path(sys.argv[2])
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
if MODE not in ("single", "ddp"):
    on_cpu()

from datasets import Dataset  # noqa: E402

from ltm_hf import LTMConfig, LTMForCausalLM  # noqa: E402
from ltm_hf.training import LTMTrainer, LTMTrainingArguments  # noqa: E402

FIGURES = ("loss", "kl", "bound", "gain", "grad_norm")


def make_rows(count, seed=0):
    """Prompts of 3 to 6 tokens and completions of 2 to 9."""
    generator = torch.Generator().manual_seed(seed)
    rows = {"input_ids": [], "labels": []}
    for _ in range(count):
        prompt, completion = (int(torch.randint(*span, (), generator=generator)) for span in ((3, 7), (2, 10)))
        ids = torch.randint(3, 61, (prompt + completion,), generator=generator).tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([-100] * prompt + ids[prompt:])
    return Dataset.from_dict(rows)


def make_model(**overrides):
    """Weights and gate are larger than a real model starts with, so that latents and distant tokens matter."""
    torch.manual_seed(0)
    settings = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=4, num_latents=4,
        num_inference_steps=3, cross_attention_gate_init=0.5, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LTMForCausalLM(LTMConfig(**settings | overrides))


def make_trainer(name, model=None, rows=None, trainer_class=LTMTrainer, **arguments):
    """8 rows a micro-batch over all processes, two of them a step."""
    defaults = dict(
        output_dir=str(FOLDER / MODE / name),
        max_steps=4,
        per_device_train_batch_size=8 // WORLD_SIZE,
        per_device_eval_batch_size=4 // WORLD_SIZE,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=MODE in ("single", "ddp"),
        disable_tqdm=True,
    )
    return trainer_class(
        model or make_model(),
        LTMTrainingArguments(**defaults | arguments),
        train_dataset=make_rows(64) if rows is None else rows,
        eval_dataset=make_rows(7, seed=1),
    )


def logs(trainer):
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [float(entry[name]) for entry in entries] for name in FIGURES}


def trained(name, **arguments):
    trainer = make_trainer(name, **arguments)
    trainer.train()
    return logs(trainer)


CASES = {
    "final": lambda: trained("final"),
    "trajectory": lambda: trained("trajectory", slow_gradient="trajectory"),
}


def main():
    results = {"world_size": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1}
    for name in sys.argv[3:] or CASES:
        results[name] = CASES[name]()
        if torch.distributed.is_initialized():
            results["world_size"] = torch.distributed.get_world_size()
    if int(os.environ.get("RANK", 0)) == 0:
        (FOLDER / f"{MODE}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
