"""What trained models gain by thinking: bound and prefix loss after so many steps, by each inference method.

    python -m research.benchmarks.inference outputs/ltm-tiny-paper
    python -m research.benchmarks.inference outputs/a outputs/b --files data/*.parquet --steps 1 2 4 8 16 32 64 128 \\
        --methods natural lbfgs --output inference.json

prints a Markdown table for each model, in nats a token ± standard error over blocks, by its own method first, then by
those asked for; what latents save of the prefix loss is a difference block by block. A step costs one gradient of the
likelihood; a method without steps has one column. Bounds are scored with noise that no fit has seen, the same for all
methods; a memory infers by its own alone, and has no bound. Validation blocks are those of examples/pretrain.py on the
same files (default: its corpus).
"""

from itertools import islice
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import ltm_hf  # noqa: F401  registers the model
from ltm_hf import cli
from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.data import load_corpus, pack
from ltm_hf.evaluation import BlockScores, score_blocks
from ltm_hf.evaluation.figures import markdown_rows, with_error
from ltm_hf.methods_ltm import method_of

from . import common

ROWS = {"bound": ("bound", None), "prefix": ("prefix", None), "saved on prefix": ("prefix_no_latents", "prefix")}


def scored(model, blocks, methods: list[str], steps: list[int], num_particles: int) -> dict[str, list[BlockScores]]:
    """By method, the model's own first, for each number of steps; once for a method that takes none."""
    config, found = model.config, {}
    for name in [config.inference_method] if config.has_memory else dict.fromkeys([config.inference_method, *methods]):
        method = method_of(InferenceSettings.of(config, inference_method=name))
        figures = [*(["bound"] if method.has_variance and not config.has_memory else []), "prefix", "prefix_no_latents"]
        given = dict(inference_method=name, num_particles=num_particles, figures=figures, progress=False)
        numbers = steps if method.takes_steps else [None]
        found[name] = [score_blocks(model, blocks, num_inference_steps=number, **given) for number in numbers]
    return found


def table(found: dict[str, list[BlockScores]], steps: list[int]) -> str:
    rows = [["", "", *map(str, steps)]]
    for method, scores in found.items():
        for words, (figure, minus) in ROWS.items():
            if figure in scores[0].nats:
                cells = [with_error(*one.mean(figure, minus), 4) for one in scores]
                rows.append([method, words, *cells, *["–"] * (len(steps) - len(cells))])
    return markdown_rows(rows)


def parse():
    options = common.parser("Bound and prefix loss after so many steps of inference, by each method.")
    options.add_argument("models", nargs="+", help="folders of checkpoints that examples/pretrain.py left")
    options.add_argument("--files", nargs="+", help="the corpus they learned from; default: examples/pretrain.py's")
    names = InferenceSettings.CHOICES["inference_method"]
    options.add_argument("--methods", nargs="*", choices=names, default=["natural", "lbfgs", "adamw"])
    options.add_argument("--steps", type=cli.count, nargs="+", default=[0, 1, 2, 4, 8, 16, 32])
    options.add_argument("--blocks", type=cli.block, default=128, help="validation blocks; default 128")
    options.add_argument("--num_particles", type=cli.positive_int, default=4, help="samples of a bound; default 4")
    return options.parse_args()


@cli.one_sentence()
def main() -> None:
    args = parse()
    common.begin(args)
    corpus, nats, where = load_corpus(args.files)["validation"], {}, common.environment(args.device)
    print(common.in_words(where))
    for folder in args.models:
        model = AutoModelForCausalLM.from_pretrained(folder).to(args.device).eval()
        tokenizer, length = AutoTokenizer.from_pretrained(folder), model.config.max_position_embeddings
        blocks = list(islice(pack(corpus, tokenizer, length).shuffle(seed=0), args.blocks))
        figures = ["no_latents", "prediction"] if model.config.has_memory else ["no_latents"]
        exact = score_blocks(model, blocks, progress=False, figures=figures)
        found = scored(model, blocks, args.methods, args.steps, args.num_particles)
        words = ", ".join(f"{name} {with_error(*exact.mean(name), 4)}" for name in exact.nats)
        print(
            f"\n{Path(folder).name}: {len(blocks)} blocks of {length} tokens, {args.num_particles} particles; {words}"
        )
        print(f"\n{table(found, args.steps)}", flush=True)
        nats[folder] = {name: x.tolist() for name, x in exact.nats.items()}
        for method, scores in found.items():
            nats[folder][method] = [{name: x.tolist() for name, x in one.nats.items()} for one in scores]
    settings = {name: getattr(args, name) for name in ("steps", "methods", "blocks", "num_particles", "files")}
    common.write(args, {"settings": settings, "environment": where, "nats": nats})


if __name__ == "__main__":
    main()
