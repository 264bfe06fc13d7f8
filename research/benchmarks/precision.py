"""What lower precision costs the bound: bfloat16, int8 and float8 weights, float8 matrix products, on trained models.

    python examples/benchmarks/precision.py outputs/ltm-tiny-natural
    python examples/benchmarks/precision.py outputs/a outputs/b --files data/*.parquet --steps 2 16 --output costs.json

prints a Markdown table for each model, in nats a token: the float32 model's figures, and what each precision adds to
them, with the standard error of the difference block by block. The noise is the same for all. "bound", "prefix" and "no
latents" are wholly in that precision, inference and scoring; "of float32" is the float32 model's bound at posteriors
that were inferred in that precision, as where only the fast loop has it. Blocks are those of examples/pretrain.py.

int8 and float8 weights are rounded by row when a checkpoint is loaded (`TorchAoConfig`), and the products are in
float32. Float8 products are those of torchao's float8 training, by row: weights and activations are rounded to e4m3,
and in the backward pass weights and gradients. EMULATED: the rounding is real, the multiplication is float32's, so that
any CPU can do it. The vocabulary projection is never rounded, nor are latents and their posteriors: these are float32.
"""

import argparse
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
from train_step import at_least, environment
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from ltm_hf.data import collate_blocks, load_corpus, pack
from ltm_hf.evaluation import score_blocks
from ltm_hf.evaluation.figures import as_figure, markdown_rows, ratio_and_error, written

INT8, FLOAT8 = (
    dict(quantization_config=TorchAoConfig(kind())) for kind in (Int8WeightOnlyConfig, Float8WeightOnlyConfig)
)
PRECISIONS = {  # arguments of from_pretrained, and whether the products are in float8
    "float32": ({}, False),
    "bfloat16": (dict(dtype=torch.bfloat16), False),
    "int8 weights": (INT8, False),
    "float8 weights": (FLOAT8, False),
    "float8 products": ({}, True),
    "float8 products, else bfloat16": (dict(dtype=torch.bfloat16), True),
}


def load(folder: str, precision: str):
    given, float8_products = PRECISIONS[precision]
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | given).eval()
    if float8_products:
        config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name != "lm_head")
    return model


def nats_of(model, reference, blocks, steps: int, num_particles: int) -> dict[str, torch.Tensor]:
    """(blocks,) nats by figure; "of float32" is the reference's bound at the model's posteriors."""
    settings = dict(num_inference_steps=steps, figures=["prefix", "no_latents"], progress=False)
    bounds = {"bound": [], "of float32": []}
    with torch.no_grad():
        for start in range(0, len(blocks), 16):
            batch = collate_blocks(blocks[start : start + 16])["input_ids"]
            posterior = model.infer_posterior(batch, num_inference_steps=steps)
            for name, scorer in zip(bounds, (model, reference), strict=True):
                bounds[name].append(-scorer.elbo(batch, posterior, num_particles=num_particles).elbo.double())
    nats = score_blocks(model, blocks, **settings).nats
    return nats | {name: torch.cat(values) for name, values in bounds.items()}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("models", nargs="+", help="folders of checkpoints that examples/pretrain.py left")
    parser.add_argument("--files", nargs="+", help="the corpus that they learned from; default: examples/pretrain.py's")
    parser.add_argument("--steps", type=at_least(1), nargs="+", default=[2, 16], help="of inference; default 2 16")
    parser.add_argument("--blocks", type=at_least(2), default=128, help="validation blocks; default 128")
    parser.add_argument("--num_particles", type=at_least(1), default=4, help="samples of a bound; default 4")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU; default: torch's. 1 where others compute too")
    parser.add_argument("--output", help="JSON file to write the nats of each block to")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    validation, results = load_corpus(options.files)["validation"], {}
    where = environment(torch.device("cpu"))
    print(", ".join(where.values()))
    for folder in options.models:
        reference, tokenizer = load(folder, "float32"), AutoTokenizer.from_pretrained(folder)
        length = reference.config.max_position_embeddings
        blocks = list(islice(pack(validation, tokenizer, length).shuffle(seed=0), options.blocks))
        columns = {"no latents": ("no_latents", options.steps[0])}
        for steps in options.steps:
            names = ("bound", "of float32", "prefix")
            columns |= {f"{name}, T = {steps}": (name, steps) for name in names}
        rows, nats = [["precision", *columns]], {}
        for precision in PRECISIONS:
            model = load(folder, precision)
            nats[precision] = {
                steps: nats_of(model, reference, blocks, steps, options.num_particles) for steps in options.steps
            }
            cells = []
            for name, steps in columns.values():
                scores, is_first = nats[precision][steps][name], precision == "float32"
                difference = scores if is_first else scores - nats["float32"][steps][name]
                tokens = length - (length // 2 if name == "prefix" else 1)
                figure = ratio_and_error(difference, torch.full_like(scores, tokens), torch.arange(len(scores)))
                cells.append(written(as_figure(*figure, n=len(scores)), digits=4 if is_first else 5, sign=not is_first))
            rows.append([precision, *cells])
        print(f"\n{Path(folder).name}: {len(blocks)} blocks of {length} tokens, {options.num_particles} particles")
        print(markdown_rows(rows), flush=True)
        results[folder] = {
            p: {t: {k: x.tolist() for k, x in n.items()} for t, n in by.items()} for p, by in nats.items()
        }
        if options.output:
            settings = {name: value for name, value in vars(options).items() if name not in ("models", "output")}
            report = {"settings": settings, "environment": where, "nats": results}
            Path(options.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
