"""What lower precision costs: bfloat16, int8 and float8 weights, float8 matrix products, on trained models.

    python -m research.benchmarks.precision outputs/ltm-tiny
    python -m research.benchmarks.precision outputs/a outputs/b --files data/*.parquet --steps 2 16 --output costs.json

prints a Markdown table for each model, in nats a token: the float32 model's figures, and what each precision adds to
them, with the standard error of the difference block by block. The noise is the same for all. Figures are wholly in
that precision, inference and scoring; but "of float32" is the float32 model's bound at posteriors that were inferred in
that precision, as where only the fast loop has it. Blocks are those of examples/pretrain.py.

int8 and float8 weights are rounded by row when a checkpoint is loaded (`TorchAoConfig`), and the products are in
float32. Float8 products are those of torchao's float8 training, by row: weights and activations are rounded to e4m3,
and in the backward pass weights and gradients. EMULATED: the rounding is real, the multiplication is float32's, so that
any CPU can do it. The vocabulary projection is never rounded, nor are latents and their posteriors: these are float32.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from ltm_hf import cli
from ltm_hf.data import collate_blocks, load_corpus, pack
from ltm_hf.evaluation import score_blocks
from ltm_hf.evaluation.figures import as_figure, markdown_rows, ratio_and_error, written

from . import common

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
BOUNDS = ("bound", "of float32")  # of latents that are fitted to a text


def load(folder: str, precision: str):
    given, float8_products = PRECISIONS[precision]
    model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | given).eval()
    if float8_products:
        config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name != "lm_head")
    return model


def nats_of(model, reference, blocks, steps: int, num_particles: int) -> dict[str, torch.Tensor]:
    """(blocks,) nats by figure; "of float32" is the reference's bound at the model's posteriors."""
    if model.config.has_memory:
        figures = ("no_latents", "prediction", "prefix")
        return score_blocks(model, blocks, num_inference_steps=steps, figures=figures, progress=False).nats
    bounds = {name: [] for name in BOUNDS}
    with torch.no_grad():
        for start in range(0, len(blocks), 16):
            batch = collate_blocks(blocks[start : start + 16])["input_ids"]
            posterior = model.infer_posterior(batch, num_inference_steps=steps)
            for name, scorer in zip(bounds, (model, reference), strict=True):
                bounds[name].append(-scorer.elbo(batch, posterior, num_particles=num_particles).elbo.double())
    settings = dict(num_inference_steps=steps, figures=("no_latents", "prefix"), progress=False)
    return score_blocks(model, blocks, **settings).nats | {name: torch.cat(values) for name, values in bounds.items()}


def columns(config, steps: list[int]) -> dict[str, tuple[str, int]]:
    """Of a table: figure and steps. Those that no step changes stand once."""
    found = {"no latents": ("no_latents", steps[0])}
    if config.has_memory:
        found["prediction"] = ("prediction", steps[0])
    names = ("prefix",) if config.has_memory else (*BOUNDS, "prefix")
    return found | {f"{name}, T = {number}": (name, number) for number in steps for name in names}


def parse():
    options = common.parser("What lower precision costs.")
    options.add_argument("models", nargs="+", help="folders of checkpoints that examples/pretrain.py left")
    options.add_argument("--files", nargs="+", help="the corpus they learned from; default: examples/pretrain.py's")
    options.add_argument("--steps", type=cli.positive_int, nargs="+", default=[2, 16], help="default 2 16")
    options.add_argument("--blocks", type=cli.block, default=128, help="validation blocks; default 128")
    options.add_argument("--num_particles", type=cli.positive_int, default=4, help="samples of a bound; default 4")
    return options.parse_args()


def compared(folder: str, blocks: list[dict], args) -> tuple[dict, str]:
    """{precision: {steps: {figure: nats of each block}}}, and a table of it."""
    reference = load(folder, "float32")
    wanted, nats = columns(reference.config, args.steps), {}
    rows = [["precision", *wanted]]
    for precision in PRECISIONS:
        model = load(folder, precision)
        nats[precision] = {steps: nats_of(model, reference, blocks, steps, args.num_particles) for steps in args.steps}
        cells = []
        for name, steps in wanted.values():
            scores, is_first = nats[precision][steps][name], precision == "float32"
            difference = scores if is_first else scores - nats["float32"][steps][name]
            length = len(blocks[0]["input_ids"])
            tokens = length - (length // 2 if name == "prefix" else 1)
            figure = ratio_and_error(difference, torch.full_like(scores, tokens), torch.arange(len(scores)))
            cells.append(written(as_figure(*figure, n=len(scores)), digits=4 if is_first else 5, sign=not is_first))
        rows.append([precision, *cells])
    nats = {p: {t: {k: x.tolist() for k, x in n.items()} for t, n in by.items()} for p, by in nats.items()}
    return nats, markdown_rows(rows)


@cli.one_sentence()
def main() -> None:
    args = parse()
    common.begin(args)
    validation, results, where = load_corpus(args.files)["validation"], {}, common.environment(torch.device("cpu"))
    print(common.in_words(where))
    for folder in args.models:
        tokenizer, length = (
            AutoTokenizer.from_pretrained(folder),
            load(folder, "float32").config.max_position_embeddings,
        )
        blocks = list(islice(pack(validation, tokenizer, length).shuffle(seed=0), args.blocks))
        results[folder], rows = compared(folder, blocks, args)
        print(f"\n{Path(folder).name}: {len(blocks)} blocks of {length} tokens, {args.num_particles} particles\n{rows}")
    settings = {name: getattr(args, name) for name in ("steps", "blocks", "num_particles", "files")}
    common.write(args, {"settings": settings, "environment": where, "nats": results})


if __name__ == "__main__":
    main()
