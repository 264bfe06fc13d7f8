"""The seven zero-shot corpora of the paper: where they are, how their tokenisation is undone, what was published."""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset

from ..data.corpora import documents_of
from ..data.files import columns_of, file_type, read_rows, visible
from ..data.numbers import check_at_least
from .figures import markdown_rows, with_error
from .likelihood import Likelihood

# ------------------------------------------------------------------ text as it was before it was tokenised


def _substitute(text: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


_CONTRACTIONS = ((r" (n't|'(?:s|m|d|ll|re|ve))\b", r"\1"),)
_PUNCTUATION = ((r" ([,.;:?!%)\]}])", r"\1"), (r"([(\[{]) ", r"\1"))
_QUOTES = ((r'" ([^"]*?) "', r'"\1"'),)


def detokenize_ptb(text: str) -> str:
    """Mikolov's Penn Treebank: lower case, no punctuation but periods and apostrophes; `<unk>` and N stay."""
    return _substitute(
        text.strip(), (*_CONTRACTIONS, (r"(\w) '(?=\s|$)", r"\1'"), (r"\$ (?=[N\d])", "$"), *_PUNCTUATION)
    )


def detokenize_wikitext(text: str) -> str:
    """The raw WikiText: ` @-@ ` for hyphens within words and numbers, spaces around punctuation and headings' marks."""
    headings = (
        (r"(?m)^ ?((?:= )+)(.+?)((?: =)+) ?$", lambda m: m[1].replace(" ", "") + f" {m[2]} " + m[3].replace(" ", "")),
    )
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = _substitute(text, (*_CONTRACTIONS, (r"(\w)s '(?=\s)", r"\1s'"), *_QUOTES, *_PUNCTUATION, *headings))
    return re.sub(r"(?m)^ +| +$", "", text)


def detokenize_lm1b(text: str) -> str:
    """The One Billion Word Benchmark: Penn Treebank's conventions with quotes."""
    text = _substitute(
        text.strip(),
        ((r"``|''", '"'), ("-LRB-", "("), ("-RRB-", ")"), *_CONTRACTIONS, (r"(\w)s '(?=\s)", r"\1s'"), *_QUOTES),
    )
    return _substitute(text, ((r"\$ (?=\d)", "$"), (r"\s+", " "), *_PUNCTUATION))


def detokenize_lambada(text: str) -> str:
    """OpenAI's LAMBADA is text already; its quotes become plain ones, as GPT-2's authors did."""
    return _substitute(text.strip(), ((r"[“”]|``|''", '"'), (r"[‘’]", "'")))


def detokenize_scientific(text: str) -> str:
    """Articles of Cohan et al. (2018): lower case with spaces around punctuation, `@xmath0` and `@xcite` stay."""
    return _substitute(text.strip(), ((r"[ \t]+", " "), *_PUNCTUATION))


# ------------------------------------------------------------------ rows to documents


def _each_row(rows: Iterable[str]) -> Iterator[str]:
    yield from rows


def _forty_sentences(rows: Iterable[str]) -> Iterator[str]:
    """Penn Treebank has sentences in the order of its articles, and no mark where an article ends."""
    rows = list(rows)
    for start in range(0, len(rows), 40):
        yield "\n".join(row.strip() for row in rows[start : start + 40])


def _articles(rows: Iterable[str]) -> Iterator[str]:
    """WikiText's lines from one heading of the first level to the next."""
    lines: list[str] = []
    for row in rows:
        if re.fullmatch(r" ?= [^=].* = ?\n?", row) and lines:
            yield "\n".join(lines)
            lines = []
        if row.strip():
            lines.append(row.rstrip("\n"))
    if lines:
        yield "\n".join(lines)


# ------------------------------------------------------------------ the data sets


@dataclass(frozen=True)
class ZeroShotDataset:
    """Where a column of the paper's table comes from.

    hub: (repository, configuration, split, revision) on the Hub, with its column of text. split: as the released
    protocol takes them, test for LM1B and AG News and validation elsewhere; OpenAI's LAMBADA is a test split.
    local: file patterns under a folder; stand_in: how a local file differs from the Hub's data set.
    """

    name: str
    hub: tuple[str, str | None, str, str | None]
    column: str
    license: str
    detokenize: Callable[[str], str]
    documents: Callable[[Iterable[str]], Iterator[str]] = _each_row
    local: tuple[str, ...] = ()
    stand_in: str | None = None


_PARQUET = "refs/convert/parquet"  # the Hub's own conversion of a data set that is a script
ZERO_SHOT = {
    dataset.name: dataset
    for dataset in (
        ZeroShotDataset(
            "PTB", ("ptb-text-only/ptb_text_only", None, "validation", _PARQUET), "sentence",
            "LDC user agreement (research)", detokenize_ptb, _forty_sentences, ("ptb/ptb.valid.txt*",),
        ),
        ZeroShotDataset(
            "WikiText", ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation", None), "text",
            "CC BY-SA 3.0 / GFDL", detokenize_wikitext, _articles,
            ("wikitext*/wiki.valid.raw*", "wikitext*/wiki.test.raw*"), "test split",
        ),
        ZeroShotDataset(
            "LM1B", ("dvruette/lm1b", None, "test", None), "text", "Apache-2.0 (WMT news crawl)", detokenize_lm1b,
            local=("lm1b/*test*",),
        ),
        ZeroShotDataset(
            "LAMBADA", ("EleutherAI/lambada_openai", "en", "test", None), "text", "CC BY 4.0", detokenize_lambada,
            local=("lambada/lambada_test*",),
        ),
        ZeroShotDataset(
            "AG News", ("fancyzhx/ag_news", None, "test", None), "text", "non-commercial research", str.strip,
            local=("ag_news/test*",),
        ),
        ZeroShotDataset(
            "PubMed", ("armanc/scientific_papers", "pubmed", "validation", _PARQUET), "article", "not stated",
            detokenize_scientific, local=("pubmed*/*validation*", "pubmed*/test*"), stand_in="abstracts",
        ),
        ZeroShotDataset(
            "Arxiv", ("armanc/scientific_papers", "arxiv", "validation", _PARQUET), "article", "not stated",
            detokenize_scientific, local=("arxiv*/*validation*", "arxiv*/dev*"), stand_in="abstracts",
        ),
    )
}  # fmt: skip


def load_zero_shot(
    name: str, folder: str | Path | None = None, num_documents: int | None = None, seed: int = 0
) -> tuple[list[str], str]:
    """Documents of one of `ZERO_SHOT`, as text, and in words where they are from.

    folder: of local files, laid out as `ZeroShotDataset.local` says; default: the Hub.
    num_documents: so many of them, drawn by the seed; default all.

    Raises ValueError for another name, a data set without text, what is wrong in a file, by its line, and a number
    below 1; FileNotFoundError where the folder has no such file.
    """
    check_at_least(1, num_documents=1 if num_documents is None else num_documents)
    if name not in ZERO_SHOT:
        raise ValueError(f"There is no zero-shot data set {name!r}; there are {', '.join(ZERO_SHOT)}.")
    dataset = ZERO_SHOT[name]
    if folder is None:
        repository, config, split, revision = dataset.hub
        rows = load_dataset(repository, config, split=split, revision=revision)[dataset.column]
        source = f"{repository}, {split}"
    else:
        files = [file for pattern in dataset.local for file in visible(folder, pattern) if file_type(file)]
        if not files:
            raise FileNotFoundError(f"{name}: there is no {' or '.join(dataset.local)} in {str(folder)!r}.")
        rows = _rows(dataset, files[0])
        source = f"{files[0].parent.name}/{files[0].name}" + (f" ({dataset.stand_in})" if dataset.stand_in else "")
    texts = [text for text in map(dataset.detokenize, dataset.documents(rows)) if text and not text.isspace()]
    if not texts:
        raise ValueError(f"{name}: there is no document with any text in {source}.")
    if num_documents is not None and num_documents < len(texts):
        texts = random.Random(seed).sample(texts, num_documents)
    return texts, source


def _rows(dataset: ZeroShotDataset, file: Path) -> list[str]:
    if file_type(file) == "text":
        ((_, row),) = read_rows(str(file))
        return row["text"].removesuffix("\n").split("\n")
    columns = columns_of([str(file)])
    column = "text" if "text" in columns else dataset.column
    if column not in columns:
        raise ValueError(f"{dataset.name}: {file.name} has no column {column!r}, only {', '.join(columns)}.")
    return [row["text"] for row in documents_of([str(file)], column)]


# ------------------------------------------------------------------ tables

# Perplexities of the paper's table, in GPT-2 tokens: LTM's by the released protocol, which is no bound.
PUBLISHED = {
    "GPT-2-Medium": (130.04, 32.14, 44.03, 36.09, 44.53, 23.33, 23.82),
    "GPT-2-Large": (161.33, 30.09, 45.61, 34.26, 39.93, 68.15, 21.01),
    "AR (Sahoo et al.)": (82.05, 25.75, 51.25, 51.28, 52.09, 49.01, 41.73),
    "AR-Retrained": (258.95, 52.49, 107.37, 61.55, 110.31, 60.61, 55.35),
    "SEDD": (100.09, 34.28, 68.20, 49.86, 62.09, 44.53, 38.48),
    "MDLM": (95.26, 32.83, 67.01, 47.52, 61.15, 41.89, 37.37),
    "MD4": (66.07, 25.84, 51.45, 44.12, None, None, None),
    "LTM-Small": (34.71, 18.87, 23.59, 19.31, 34.76, 22.73, 21.67),
    "LTM-Medium": (32.06, 17.39, 25.16, 17.32, 27.89, 20.45, 19.22),
    "LTM-Large": (4.43, 3.66, 3.92, 3.48, 4.56, 3.87, 3.54),
}

# What is shown of a model, best known as what.
_SHOWN = {
    "released": "released protocol, not a bound; for comparison with published tables only",
    "bound": "≤, bound with fresh noise",
    "prediction": "exact, by a memory of what came before",
    "prefix": "after a prefix, latents from the prefix",
    "prefix_prediction": "after the same prefix, by a memory that goes on learning",
    "no_latents": "exact, no latents",
    "prefix_no_latents": "after the same prefix, no latents",
}


def zero_shot_table(results: dict[str, dict[str, Likelihood]]) -> str:
    """Perplexities by model and data set, measured and published, and bits per byte, as Markdown.

    results: by model's name, by data set's name.
    """
    names = [name for name in ZERO_SHOT if any(name in columns for columns in results.values())]

    def lines(cell: Callable[[Likelihood, str], str]) -> list[list[str]]:
        return [
            [model, meaning, *(cell(columns[name], kind) if name in columns else "–" for name in names)]
            for model, columns in results.items()
            for kind, meaning in _SHOWN.items()
            if any(kind in columns[name] for name in names if name in columns)
        ]

    def perplexity(likelihood, kind):
        return with_error(likelihood.perplexity(kind), None, 2) if kind in likelihood else "–"

    def bits(likelihood, kind):
        return with_error(*likelihood.bits_per_byte[kind]) if kind in likelihood.bits_per_byte else "–"

    published = [
        [f"{model}, published", _SHOWN["released"] if model.startswith("LTM") else "", *_published(values, names)]
        for model, values in PUBLISHED.items()
    ]
    measured = [line for line in lines(bits) if set(line[2:]) != {"–"}]
    return (
        "Perplexity, exp(nats / tokens). Published rows count GPT-2 tokens; with other vocabularies, compare bits per "
        f"byte instead.\n\n{markdown_rows([['model', 'figure', *names], *lines(perplexity), *published])}\n\n"
        f"Bits per byte, ± standard error over documents.\n\n{markdown_rows([['model', 'figure', *names], *measured])}"
    )


def _published(values, names) -> list[str]:
    by_name = dict(zip(ZERO_SHOT, values, strict=True))
    return ["–" if by_name[name] is None else f"{by_name[name]:.2f}" for name in names]


def plot_zero_shot(results: dict[str, dict[str, Likelihood]], path: str | Path) -> None:
    """Write a PNG of the perplexities of `zero_shot_table`: measured as markers, published as dashes."""
    from matplotlib.figure import Figure

    names = [name for name in ZERO_SHOT if any(name in columns for columns in results.values())]
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    shown = [
        (model, kind, columns)
        for model, columns in results.items()
        for kind in _SHOWN
        if any(kind in likelihood for likelihood in columns.values())
    ]
    for index, (model, kind, columns) in enumerate(shown):  # side by side, right of what was published
        points = [
            (place + 0.45 * index / len(shown), columns[name].perplexity(kind))
            for place, name in enumerate(names)
            if name in columns and kind in columns[name]
        ]
        marker = "x" if kind == "released" else "o"
        axes.plot(*zip(*points, strict=True), marker, ms=5, color=f"C{index}", label=f"{model}: {_SHOWN[kind]}")
    for model, values in PUBLISHED.items():
        for place, name in enumerate(names):
            value = dict(zip(ZERO_SHOT, values, strict=True))[name]
            if value is not None:
                color = "C3" if model.startswith("LTM") else "grey"
                axes.plot([place - 0.35, place - 0.1], [value, value], "-", color=color, lw=1)
    axes.plot([], [], "-", color="grey", lw=1, label="published, autoregressive and diffusion (GPT-2 tokens)")
    axes.plot([], [], "-", color="C3", lw=1, label="published LTM: released protocol, not a bound")
    axes.set_yscale("log")
    axes.set_xticks(range(len(names)), names)
    axes.set(
        ylabel="perplexity (log scale)", title="Zero-shot perplexity: tokens of different vocabularies do not compare"
    )
    axes.grid(alpha=0.3, axis="y")
    figure.legend(fontsize=8, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=120)
