"""The bound with fresh noise after so many inference steps, for each inference optimiser, on one trained model.

    python examples/benchmarks/inference_steps.py outputs/ltm-tiny --steps 1 2 4 8 16 32

prints a Markdown table in nats a token. Validation blocks are those of examples/pretrain.py on its default corpus.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ltm_hf  # noqa: F401  registers the model
from ltm_hf.data import collate_blocks, load_corpus, pack

OPTIMIZERS = {
    "natural, Stein precision, 0.5 / (1 + 0.5 t)": dict(
        inference_optimizer="natural", inference_precision="stein", inference_learning_rate=0.5,
        inference_lr_schedule="inverse",
    ),
    "natural, Stein precision, 0.3": dict(
        inference_optimizer="natural", inference_precision="stein", inference_learning_rate=0.3,
        inference_lr_schedule="constant",
    ),
    "natural, precision 1, 0.3": dict(
        inference_optimizer="natural", inference_precision="unit", inference_learning_rate=0.3,
        inference_lr_schedule="constant",
    ),
    "AdamW 0.3, constant (paper)": dict(
        inference_optimizer="adamw", inference_learning_rate=0.3, inference_lr_schedule="constant"
    ),
    "AdamW 0.3, cosine (released code)": dict(
        inference_optimizer="adamw", inference_learning_rate=0.3, inference_lr_schedule="cosine"
    ),
}  # fmt: skip


@torch.no_grad()
def bound(model, batches, num_particles, **settings) -> float:
    """Nats a token, pooled over the batches."""
    total, tokens = 0.0, 0
    for input_ids in batches:
        posterior = model.infer_posterior(input_ids, **settings)
        estimate = model.elbo(input_ids, posterior, num_particles=num_particles)
        total -= estimate.elbo.sum().item()
        tokens += estimate.num_tokens.sum().item()
    return total / tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a checkpoint that examples/pretrain.py left")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--blocks", type=int, default=64, help="validation blocks")
    parser.add_argument("--num_particles", type=int, default=4)
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    blocks = pack(load_corpus()["validation"], tokenizer, model.config.max_position_embeddings).shuffle(seed=0)
    blocks = blocks.select(range(min(options.blocks, len(blocks))))
    batches = [collate_blocks([blocks[i] for i in range(s, min(s + 16, len(blocks)))])["input_ids"]
               for s in range(0, len(blocks), 16)]  # fmt: skip

    print(f"{len(blocks)} blocks of {len(blocks[0]['input_ids'])} tokens, {options.num_particles} particles")
    print(f"the prior itself: {bound(model, batches, options.num_particles, num_inference_steps=0):.4f}\n")
    print("| inference | " + " | ".join(f"T = {steps}" for steps in options.steps) + " |")
    print("|---" * (len(options.steps) + 1) + "|")
    for name, settings in OPTIMIZERS.items():
        bounds = [bound(model, batches, options.num_particles, num_inference_steps=steps, **settings)
                  for steps in options.steps]  # fmt: skip
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in bounds) + " |", flush=True)


if __name__ == "__main__":
    main()
