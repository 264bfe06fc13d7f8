"""Measure a model: likelihoods, thinking curves, written text, what its latents know; a report with tables and PNGs.

    python examples/evaluate.py                                              # outputs/ltm-tiny, a few CPU minutes
    python examples/evaluate.py --model outputs/ltm-tiny outputs/ltm-tiny/twin    # and others in the same tables
    python examples/evaluate.py --model my-ltm gpt2 --zero_shot hub --gsm8k hub --topics fancyzhx/ag_news
    python examples/evaluate.py --model gpt2 --zero_shot FOLDER --documents 50    # the seven corpora as local files

The first model is the one reported on; the others, any causal LMs, stand beside it. A run that is stopped goes on with
the sections that it has not finished. `README.md` in the report's folder holds all of it.
"""

import dataclasses
import math
from argparse import RawDescriptionHelpFormatter
from datetime import date
from pathlib import Path

import torch
import transformers

from ltm_hf import cli
from ltm_hf.data import CORPORA, load_corpus
from ltm_hf.evaluation.gsm8k import load_gsm8k
from ltm_hf.evaluation.report import Report
from ltm_hf.evaluation.representations import load_labelled_texts
from ltm_hf.evaluation.sampling import context_length
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
from ltm_hf.evaluation.thinking import takes_steps
from ltm_hf.evaluation.zero_shot import ZERO_SHOT, load_zero_shot
from ltm_hf.loading import load_causal_lm
from ltm_hf.training import add_to_model_index

OF_DOCUMENTS = ("likelihood", "thinking", "text", "latents")
SOURCES = ("zero_shot", "topics", "gsm8k")  # sections that need an option of their name
SECTIONS = (*OF_DOCUMENTS, *SOURCES)
USED_BY = {  # options, and the sections of which one must run for them to say anything; the others are of all
    ("corpus", "dataset_name", "files", "text_column", "whole"): OF_DOCUMENTS,
    ("block_size",): (*OF_DOCUMENTS, "zero_shot"),
    ("blocks",): ("likelihood", "latents", "zero_shot"),
    ("prefix_length", "num_samples"): ("likelihood", "zero_shot"),
    ("num_particles",): ("likelihood", "thinking", "zero_shot"),
    ("num_inference_steps",): tuple(section for section in SECTIONS if section != "thinking"),
    ("thinking_blocks", "steps"): ("thinking",),
    ("texts", "max_new_tokens", "judge"): ("text",),
    ("zero_shot", "documents"): ("zero_shot",),
    ("topics",): ("topics",),
    ("gsm8k", "problems", "shots", "samples"): ("gsm8k",),
}


def parse():
    parser = cli.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model", nargs="+", default=["outputs/ltm-tiny"], help="folders or names on the Hub; the first is reported on"
    )
    add("--output_dir", type=cli.folder, help="default: `report` in the first model's folder, or in outputs")
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections; the report then holds these alone")
    add("--device", type=cli.device, default=cli.DEVICE)
    add("--batch_size", type=cli.positive_int, default=16)
    add("--seed", type=cli.seed, default=0)
    add("--trust_remote_code", action="store_true", help="run the Python that comes with a model if need be")
    data = parser.add_argument_group("held-out documents; default: those that examples/pretrain.py holds out")
    data.add_argument("--corpus", choices=CORPORA, default="stdlib", help="one that needs no network; default stdlib")
    data.add_argument("--dataset_name", help="of the Hub")
    data.add_argument("--files", nargs="+", help="local text, json or parquet files")
    data.add_argument("--text_column")
    data.add_argument("--whole", action="store_true", help="all documents of it, where none were trained on")
    data.add_argument("--block_size", type=cli.block, help="tokens; default: what all models take, at most 1,024")
    data.add_argument("--blocks", type=cli.positive_int, default=64, help="for each figure; default 64")
    data.add_argument("--prefix_length", type=cli.positive_int, help="tokens; default: half of a block")
    thinking = parser.add_argument_group("thinking").add_argument
    thinking("--num_inference_steps", type=cli.count, help="default: each model's own")
    thinking("--num_particles", type=cli.positive_int, default=1, help="samples that the bound is averaged over")
    thinking("--num_samples", type=cli.count, default=16, help="of the importance-weighted bound; default 16, 0: none")
    thinking("--thinking_blocks", type=cli.positive_int, default=32, help="of the thinking curve; default 32")
    curve = [0, 1, 2, 4, 8, 16, 32]
    thinking("--steps", type=cli.count, nargs="+", default=curve, help="of the thinking curve")
    more = parser.add_argument_group("more sections").add_argument
    more("--texts", type=cli.positive_int, default=32, help="that the model writes, each way; default 32")
    more("--max_new_tokens", type=cli.positive_int, help="default 64, or what the model has room for")
    more("--judge", help="a causal LM whose perplexity of the texts is measured")
    more("--zero_shot", help="`hub`, or a folder with the corpora's files")
    more("--documents", type=cli.positive_int, default=100, help="of each zero-shot corpus")
    more("--topics", help="texts with labels: a Hub name or a file")
    more("--gsm8k", help="`hub`, or a folder with train and test files")
    more("--problems", type=cli.positive_int, default=100)
    more("--shots", type=cli.count, default=5)
    more("--samples", type=cli.positive_int, default=5)
    named, options = cli.given(parser), parser.parse_args()
    for name in SOURCES:
        if "only" in named and name in options.only and not getattr(options, name):
            raise ValueError(f"--only {name} needs --{name}.")
    check_sources(options)
    options.only = [name for name in options.only if name not in SOURCES or getattr(options, name)]
    cli.refuse_idle(
        named,
        *cli.idle_in_corpora(options),
        *(
            (not set(sections) & set(options.only), f"without the section {' or '.join(sections)}", names)
            for names, sections in USED_BY.items()
        ),
    )
    return options, named


def load_subjects(options, named):
    """The models, each under a name of its own. Raises OSError or ValueError."""
    subjects = [Subject.load(name, options.device, options.trust_remote_code) for name in options.model]
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        names = options.model
        subjects = [dataclasses.replace(subject, name=name) for subject, name in zip(subjects, names, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError("--model names one model twice.")
    has_steps = any(takes_steps(subject.model) for subject in subjects)
    has_bound = any(subject.has_bound for subject in subjects)
    cli.refuse_idle(
        named,
        (not has_steps, "with models that take no inference steps", ("num_inference_steps",)),
        (not has_bound, "with models without a bound", ("num_particles", "num_samples")),
    )
    return subjects


def check_sources(options):
    """Raise OSError or ValueError for what further sections need and is not there."""
    if options.zero_shot == "hub":
        _reach_one_corpus()
    elif options.zero_shot:
        patterns = [pattern for corpus in ZERO_SHOT.values() for pattern in corpus.local]
        if not any(any(Path(options.zero_shot).glob(pattern)) for pattern in patterns):
            raise OSError(f"--zero_shot: {options.zero_shot!r} is no folder with {', '.join(patterns)}; or say hub.")
    if options.gsm8k:
        if options.gsm8k == "hub":
            options.gsm8k = "openai/gsm8k"
        elif not Path(options.gsm8k).is_dir():
            raise OSError(f"--gsm8k: there is no folder {options.gsm8k!r}; or say hub.")
        load_gsm8k(options.gsm8k)
    if options.topics:
        load_labelled_texts(options.topics, seed=options.seed)
    if options.judge:
        load_causal_lm(options.judge)  # which the texts come before


def _reach_one_corpus():
    """Of the zero-shot ones on the Hub, where some may have gone. Raises the first's error where none can be had."""
    errors = []
    for name in ZERO_SHOT:
        try:
            return load_zero_shot(name, num_documents=1)
        except (OSError, ValueError) as error:
            errors.append(error)
    raise errors[0]


def check_lengths(options, block_size, longest):
    """Tokens of a text. longest: of the first model. Raises ValueError for texts or a prefix that do not fit."""
    if options.prefix_length and options.prefix_length >= block_size:
        raise ValueError(f"--prefix_length must be below the block's {block_size} tokens, got {options.prefix_length}.")
    room = (longest or math.inf) - min(32, block_size // 2)
    if options.max_new_tokens and options.max_new_tokens > room:
        raise ValueError(f"--max_new_tokens is {options.max_new_tokens}, and the model has room for {room}.")
    return options.max_new_tokens or min(64, room)


@cli.one_sentence()
def main():
    options, named = parse()
    subjects = load_subjects(options, named)
    block_size = shared_block_size(subjects, options.block_size)
    options.max_new_tokens = check_lengths(options, block_size, context_length(subjects[0].model))
    texts, source = [], None
    if set(OF_DOCUMENTS) & set(options.only):
        corpus = load_corpus(
            options.files or options.dataset_name, corpus=options.corpus, text_column=options.text_column
        )
        texts = [
            text for name in (["train"] if options.whole else []) + ["validation"] for text in corpus[name]["text"]
        ]
        source = options.dataset_name or ", ".join(options.files or [CORPORA[options.corpus].title])
    folder = Path(options.model[0])
    report = Report(
        options.output_dir or (folder / "report" if folder.is_dir() else Path("outputs/report")),
        f"Report on {', '.join(subject.name for subject in subjects)}",
        f"{date.today()}, {torch.cuda.get_device_name() if 'cuda' in options.device else 'CPU'}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}.",
    )
    figures = write(report, options, subjects, texts, source, block_size)
    if figures and (folder / "README.md").is_file():
        add_to_model_index(folder, figures)
        print(f"The figures are in the metadata of {folder / 'README.md'}.")
    print(f"The report is {report.folder / 'README.md'}.")


def write(report, options, subjects, texts, source, block_size):
    """The sections that are asked for. Returns the first model's figures for its card, by data set."""
    model, only, figures = subjects[0], options.only, {}
    shared = {"batch_size": options.batch_size, "seed": options.seed}
    thinks = shared | {"num_inference_steps": options.num_inference_steps}
    scores = thinks | {"num_particles": options.num_particles, "num_samples": options.num_samples}
    scores |= {"prefix_length": options.prefix_length, "num_blocks": options.blocks}
    if "likelihood" in only:
        found = likelihood_section(report, subjects, texts, source, block_size, **scores)
        figures |= {source: found[model.name]} if found else {}
    if "thinking" in only:
        particles = {"steps": options.steps, "num_particles": options.num_particles}
        thinking_section(report, subjects, texts, block_size, options.thinking_blocks, **shared, **particles)
    if "zero_shot" in only:
        local = None if options.zero_shot == "hub" else options.zero_shot
        figures |= zero_shot_section(report, subjects, local, options.documents, block_size, **scores)
    if "text" in only:
        lengths = {"n": options.texts, "max_new_tokens": options.max_new_tokens}
        lengths["prompt_tokens"] = min(32, block_size // 2)
        text_section(report, model, texts, judge=options.judge, **lengths, **thinks)
    if "latents" in only:
        latents_sections(report, model, texts, block_size, min(16, options.blocks), **thinks)
    if "topics" in only:
        topic_section(report, model, options.topics, **thinks)
    if "gsm8k" in only:
        asked = {"shots": options.shots, "samples": options.samples, "problems": options.problems}
        gsm8k_section(report, subjects, options.gsm8k, **asked, **thinks)
    return figures


if __name__ == "__main__":
    main()
