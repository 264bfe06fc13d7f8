"""Decoders that learned by different inference methods, each scored by its own method and by variational inference.

    python examples/benchmarks/inference_methods.py outputs/ltm-tiny-natural outputs/langevin outputs/amortized \
        --steps 2 16

prints a Markdown table in nats a token, with standard errors over blocks; of what latents save, of the difference block
by block. Validation blocks are those of examples/pretrain.py on its default corpus. A chain has no finite bound.
"""

import argparse
import math
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import ltm_hf  # noqa: F401  registers the model
from ltm_hf.data import load_corpus, pack
from ltm_hf.evaluation import score_blocks

COLUMNS = {  # figure, and the one that it is less than
    "no latents": ("no_latents", None),
    "bound": ("bound", None),
    "saved": ("no_latents", "bound"),
    "nll": ("nll", None),
    "kl": ("kl", None),
    "prefix": ("prefix", None),
    "saved on it": ("prefix_no_latents", "prefix"),
}


def cell(mean: float, error: float) -> str:
    return f"{mean:.4f} ± {error:.4f}" if math.isfinite(mean) else "–"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders of checkpoints that examples/pretrain.py left")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 16], help="of variational inference")
    parser.add_argument("--blocks", type=int, default=128, help="validation blocks")
    parser.add_argument("--num_particles", type=int, default=4)
    options = parser.parse_args()

    corpus = load_corpus()["validation"]
    print("| model | scored by | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for folder in options.models:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        config = model.config
        blocks = pack(corpus, AutoTokenizer.from_pretrained(folder), config.max_position_embeddings).shuffle(seed=0)
        blocks = blocks.select(range(min(options.blocks, len(blocks))))
        ways = {f"variational, T = {steps}": ("variational", steps) for steps in options.steps}
        if config.inference_method == "langevin":
            ways = {f"langevin, T = {config.num_inference_steps}": ("langevin", None)} | ways
        elif config.inference_method == "amortized":
            ways = {"its encoder": ("amortized", None)} | ways
        for name, (method, steps) in ways.items():
            scores = score_blocks(
                model,
                blocks,
                num_inference_steps=steps,
                num_particles=options.num_particles,
                progress=False,
                inference_method=method,
            )
            cells = [cell(*scores.mean(*figures)) for figures in COLUMNS.values()]
            print(f"| {Path(folder).name} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
