"""A short training run for tests that kill it: `folder` and, as JSON, arguments that differ from those below."""

import json
import sys

import torch
from datasets import Dataset
from transformers import set_seed

from ltm_hf import LTMConfig, LTMForCausalLM
from ltm_hf.training import LTMTrainer, LTMTrainingArguments

BLOCK, ROWS = 16, 52  # rows that neither a batch nor a step divides


def rows(shard_ids):
    for shard in shard_ids:
        generator = torch.Generator().manual_seed(shard)
        for _ in range(ROWS // 4):
            yield {"input_ids": torch.randint(2, 61, (BLOCK,), generator=generator).tolist()}


def main(folder, streaming=False, **arguments):
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
    blocks = Dataset.from_dict({"input_ids": [row["input_ids"] for row in rows(range(4))]})
    if streaming:
        blocks = blocks.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=1)
    trainer = LTMTrainer(LTMForCausalLM(config), LTMTrainingArguments(**defaults | arguments), train_dataset=blocks)
    trainer.train(resume_from_checkpoint="last")


if __name__ == "__main__":
    _, folder, arguments = globals().get("argv", sys.argv)
    main(folder, **json.loads(arguments))
