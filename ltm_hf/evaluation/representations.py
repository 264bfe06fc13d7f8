"""Texts as points: the posterior means of their latents, and whether a text's topic can be read from them.

Shapes: R rows (texts or blocks), F features, C classes, L layers, N latents a layer, D hidden.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..configuration_ltm import InferenceSettings
from ..data import collate_blocks, encode
from ..data.files import columns_of, file_type, local_files, read_rows
from ..data.numbers import check_at_least
from ..inference_ltm import infer_posterior
from ..likelihood_ltm import check_sequences
from ..posterior_ltm import LatentPosterior
from .figures import beyond_noise, check_finite, evaluating, figure, markdown_rows, shortened, written


def settings_of(model, num_inference_steps: int | None, seed: int) -> dict:
    """What a study records of its inference.

    Raises ValueError for a model without latents or with weights that are not finite, and for a wrong step count.
    """
    if not model.config.num_latents:
        raise ValueError("This model was built with num_latents=0: it has no latents to look into.")
    settings = InferenceSettings.of(model.config, num_inference_steps=num_inference_steps)
    check_finite(model)
    return {"num_inference_steps": settings.num_inference_steps, "seed": seed}


def check_blocks(blocks, least_tokens: int = 1) -> None:
    """Raise a ValueError if there is no block or one is shorter than `least_tokens`: 2 have one to score."""
    if not len(blocks):
        raise ValueError("There is no block to look at.")
    lengths = [len(blocks[index]["input_ids"]) for index in range(len(blocks))]
    if min(lengths) < least_tokens:
        short = lengths.index(min(lengths))
        raise ValueError(f"Row {short} has {lengths[short]} tokens; {least_tokens} or more are needed.")


def batches(blocks, batch_size: int, device, description: str | None = None) -> Iterator[tuple]:
    """(rows, input_ids, attention_mask) of consecutive rows, a slice and two (B, S); padded on the right."""
    check_at_least(1, batch_size=batch_size)
    for start in tqdm(range(0, len(blocks), batch_size), desc=description, disable=description is None, leave=False):
        rows = slice(start, min(start + batch_size, len(blocks)))
        batch = collate_blocks([blocks[index] for index in range(rows.start, rows.stop)])
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        yield rows, batch["input_ids"].to(device), mask.to(device)


def infer_posteriors(
    model,
    blocks,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LatentPosterior:
    """The posterior of every row, on the CPU: (R, L, N, D). A row's does not depend on the batch size.

    blocks: rows with `input_ids`, of any lengths. num_inference_steps: default the model's.
    """
    settings_of(model, num_inference_steps, seed)
    check_blocks(blocks)
    found = []
    with evaluating(model):
        for _, input_ids, mask in batches(blocks, batch_size, model.device, "Inferring" if progress else None):
            found.append(infer_posterior(model, input_ids, mask, num_inference_steps=num_inference_steps, seed=seed))
    parts = ([getattr(posterior, name).cpu() for posterior in found] for name in ("mean", "log_variance", "keys"))
    mean, log_variance, keys = (torch.cat(part) for part in parts)
    return LatentPosterior(mean, log_variance, keys=keys, num_non_finite=sum(one.num_non_finite for one in found))


def tokenize(tokenizer, texts: Sequence[str], max_length: int) -> list[dict]:
    """Rows with `input_ids`, begin-of-text first where the tokenizer has it, cut after `max_length` tokens.

    Raises ValueError if there is no text, or one of them has no token.
    """
    if not len(texts):
        raise ValueError("There is no text to look at.")
    check_at_least(1, max_length=max_length)
    encoded = encode(tokenizer, texts, begin=True, truncation=True, max_length=max_length)
    rows = [{"input_ids": ids} for ids in encoded["input_ids"]]
    check_blocks(rows)
    return rows


# ------------------------------------------------------------------ texts to features


def posterior_means(
    model,
    tokenizer,
    texts: Sequence[str],
    max_length: int | None = None,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> torch.Tensor:
    """(R, L·N·D) means of the texts' posteriors. max_length: tokens of a text, default the model's."""
    rows = tokenize(tokenizer, texts, max_length or model.config.max_position_embeddings)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))  # little padding
    sorted_rows = [rows[index] for index in order]
    means = infer_posteriors(model, sorted_rows, batch_size, num_inference_steps, seed, progress).mean.flatten(1)
    return means[torch.tensor(order).argsort()]


@torch.no_grad()
def mean_pooled_embeddings(model, tokenizer, texts: Sequence[str], max_length: int | None = None) -> torch.Tensor:
    """(R, D) means over a text's tokens of the decoder's input embeddings: what it knows of words without thinking."""
    rows = tokenize(tokenizer, texts, max_length or model.config.max_position_embeddings)
    for row in rows:
        check_sequences(model, torch.tensor([row["input_ids"]]))
    embed = model.get_input_embeddings()
    return torch.stack(
        [embed(torch.tensor(row["input_ids"], device=model.device)).float().mean(0).cpu() for row in rows]
    )


def tf_idf(
    train_texts: Sequence[str], test_texts: Sequence[str], min_texts: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, F) TF-IDF of lower-cased words: count · (ln((1 + R) / (1 + texts with it)) + 1), rows of length 1.

    Words and document frequencies are those of the training texts: words that at least `min_texts` of them hold, in
    alphabetical order. The weights are scikit-learn's defaults. A text without a known word is a row of zeros.
    """
    train, test = ([Counter(re.findall(r"\w+", text.lower())) for text in part] for part in (train_texts, test_texts))
    num_texts = Counter(word for counts in train for word in counts)
    columns = {word: i for i, word in enumerate(sorted(w for w, texts in num_texts.items() if texts >= min_texts))}
    idf = torch.tensor([math.log((1 + len(train)) / (1 + num_texts[word])) + 1 for word in columns])

    def weigh(rows):
        counted = torch.zeros(len(rows), len(columns))
        for row, counts in zip(counted, rows, strict=True):
            for word in counts.keys() & columns.keys():
                row[columns[word]] = counts[word]
        return F.normalize(counted * idf, dim=1)

    return weigh(train), weigh(test)


# ------------------------------------------------------------------ what can be read from features


def nearest_neighbours(
    queries: torch.Tensor, candidates: torch.Tensor, count: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, count) cosines and indices of the candidates nearest to each query, nearest first; (R, F) and (C, F)."""
    if not 1 <= count <= len(candidates):
        raise ValueError(f"count must lie between 1 and the {len(candidates)} candidates, got {count}.")
    cosines = F.normalize(queries, dim=1) @ F.normalize(candidates, dim=1).T
    return tuple(cosines.topk(count, dim=1))


PENALTIES = tuple(10.0**exponent for exponent in range(-5, 2))


def linear_probe(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    standardize: bool = True,
    penalties: Sequence[float] = PENALTIES,
    validation_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[torch.Tensor, float]:
    """(R,) whether a multinomial logistic regression is right on each test row, and the penalty it was given.

    It minimises the mean cross-entropy in nats + penalty / 2 · ‖weights‖² by L-BFGS in float64, from zero: convex, so
    nothing is drawn. The penalty is the one with the least cross-entropy on a part of the TRAINING rows, which `seed`
    chooses; the fit is then repeated on all of them. standardize: each feature to mean 0 and deviation 1 over the rows
    of the fit; what is constant there is left out. Raises ValueError for features and labels that do not fit together.
    """
    if train.shape[1:] != test.shape[1:] or len(train) != len(train_labels) or len(test) != len(test_labels):
        raise ValueError(
            f"Features must be (rows, features) with a label a row; got {tuple(train.shape)} with {len(train_labels)} "
            f"labels to train and {tuple(test.shape)} with {len(test_labels)} to test on."
        )
    held_out = round(validation_fraction * len(train))
    if not 1 <= held_out < len(train) or not len(test):
        raise ValueError(
            f"There are {len(train)} rows to train and {len(test)} to test on: {held_out} of the first cannot be held "
            "out to choose the penalty and leave others to fit."
        )
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    validation, fitted = order[:held_out], order[held_out:]

    def logits_of(rows, labels, others, penalty):
        if standardize:
            rows, others = _standardized(rows, others)
        weights, bias = _logistic_regression(rows.double(), labels, num_classes, penalty)
        return others.double() @ weights + bias

    def validation_loss(penalty):
        logits = logits_of(train[fitted], train_labels[fitted], train[validation], penalty)
        return F.cross_entropy(logits, train_labels[validation]).item()

    penalty = min(penalties, key=validation_loss)
    return logits_of(train, train_labels, test, penalty).argmax(dim=1) == test_labels, penalty


def _standardized(rows: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, deviation = rows.mean(dim=0), rows.std(dim=0, correction=0)
    scale = torch.where(deviation > 1e-6 * rows.abs().amax(dim=0), 1 / deviation, 0.0)  # rounding is no variance
    return (rows - mean) * scale, (others - mean) * scale


@torch.enable_grad()
def _logistic_regression(rows, labels, num_classes, penalty) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (F, C) and biases (C,), which are not penalised."""
    weights = torch.zeros(rows.shape[1], num_classes, dtype=rows.dtype, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=rows.dtype, requires_grad=True)
    lbfgs = torch.optim.LBFGS([weights, bias], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def objective():
        lbfgs.zero_grad()
        loss = F.cross_entropy(rows @ weights + bias, labels) + 0.5 * penalty * weights.square().sum()
        loss.backward()
        return loss

    lbfgs.step(objective)
    return weights.detach(), bias.detach()


# ------------------------------------------------------------------ the study: does z capture topic?


@dataclass(frozen=True)
class LabelledTexts:
    """Texts of several classes to train and test a probe on; labels index `classes`; `source` says where from."""

    train_texts: list[str]
    train_labels: list[int]
    test_texts: list[str]
    test_labels: list[int]
    classes: list[str]
    source: str


def load_labelled_texts(
    name_or_files: str | Path | Sequence[str | Path] = "fancyzhx/ag_news",
    *,
    num_train: int = 400,
    num_test: int = 200,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    text_column: str = "text",
    label_column: str = "label",
    seed: int = 0,
) -> LabelledTexts:
    """So many rows of a classification data set, drawn by the seed: a Hub name with two splits, or json/parquet files.

    Files have no splits: test and training rows are cut from one shuffle of their rows, and `source` says so.
    Raises FileNotFoundError for a missing file, ValueError for a missing column or too few rows.
    """
    files = local_files(name_or_files)
    if files is None:
        parts = [load_dataset(name_or_files, config_name, split=split) for split in (train_split, test_split)]
        source = f"{name_or_files}: rows of its {train_split} split to train, of its {test_split} split to test on"
    elif file_type(files[0]) == "text":
        raise ValueError(f"{files[0]!r} is text without labels; labelled texts are read from json and parquet files.")
    else:
        parts = [_labelled_rows(files, text_column, label_column)]
        names = ", ".join(Path(file).name for file in files)
        source = f"{names}: a single set of {len(parts[0])} rows, cut by seed {seed} into rows to train and to test on"
    columns = parts[0].column_names
    if not {text_column, label_column} <= set(columns):
        raise ValueError(f"There are no columns {text_column!r} and {label_column!r}; there are {', '.join(columns)}.")
    feature = parts[0].features[label_column]
    parts = [part.select_columns([text_column, label_column]).shuffle(seed=seed) for part in parts]
    available = [len(part) for part in parts] if len(parts) == 2 else [len(parts[0]) - num_test, len(parts[0])]
    if min(num_train, num_test) < 1 or available[0] < num_train or available[1] < num_test:
        raise ValueError(f"{num_train} rows to train and {num_test} to test on cannot be drawn from {source}.")
    test = parts[-1].select(range(num_test))
    first = 0 if len(parts) == 2 else num_test
    train = parts[0].select(range(first, first + num_train))
    values = sorted({*train[label_column], *test[label_column]})
    names = getattr(feature, "names", None)
    labels = [[values.index(value) for value in part[label_column]] for part in (train, test)]
    return LabelledTexts(
        train_texts=list(train[text_column]),
        train_labels=labels[0],
        test_texts=list(test[text_column]),
        test_labels=labels[1],
        classes=[names[value] if names else str(value) for value in values],
        source=source,
    )


def _labelled_rows(files: Sequence[str], text_column: str, label_column: str) -> Dataset:
    columns = (text_column, label_column)
    if not set(columns) <= set(found := columns_of(files)):
        raise ValueError(f"There are no columns {text_column!r} and {label_column!r}; there are {', '.join(found)}.")
    rows = []
    for file in files:
        for place, row in read_rows(file, columns):
            if not isinstance(row.get(text_column), str) or row.get(label_column) is None:
                raise ValueError(f"{place}: there must be a string as {text_column!r} and a label as {label_column!r}.")
            rows.append({name: row[name] for name in columns})
    return Dataset.from_list(rows)


THOUGHTS = "posterior means"


def topic_probe(
    model,
    tokenizer,
    texts: LabelledTexts,
    num_neighbours: int = 5,
    num_examples: int = 3,
    max_length: int | None = None,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Can the class of a text be read from its latents? A linear probe and nearest neighbours, beside three baselines.

    `accuracy`: of `linear_probe` on each representation, over test rows. `difference`: the posterior means' accuracy
    less the baseline's, row by row. `same_class`: the share of a test text's nearest training texts, by cosine, that
    are of its class. Posterior means and embeddings are standardised for the probe and centred on the training rows'
    mean for the cosine; TF-IDF rows have length 1 and are left so. `max_length`: tokens of a text, default the model's.

    Raises ValueError, before any computation, for a model without latents or whose weights are not finite, and for
    numbers out of range.
    """
    settings = settings_of(model, num_inference_steps, seed)
    check_at_least(1, batch_size=batch_size)
    if num_neighbours not in range(1, len(texts.train_texts) + 1):
        raise ValueError(
            f"num_neighbours must lie between 1 and the {len(texts.train_texts)} training texts, got {num_neighbours}."
        )
    parts = (texts.train_texts, texts.test_texts)
    thought = (max_length, batch_size, num_inference_steps, seed, progress)
    features = {
        THOUGHTS: [posterior_means(model, tokenizer, part, *thought) for part in parts],
        "mean-pooled embeddings": [mean_pooled_embeddings(model, tokenizer, part, max_length) for part in parts],
        "TF-IDF": tf_idf(*parts),
    }
    train_labels, test_labels = torch.tensor(texts.train_labels), torch.tensor(texts.test_labels)
    right, penalties, neighbours = {}, {}, {}
    for name, (train, test) in features.items():
        dense = name != "TF-IDF"
        right[name], penalties[name] = linear_probe(
            train, train_labels, test, test_labels, standardize=dense, seed=seed
        )
        centre = train.mean(dim=0) if dense else 0.0
        neighbours[name] = nearest_neighbours(test - centre, train - centre, num_neighbours)
    right["the majority class"] = test_labels == train_labels.mode().values
    shares = [F.one_hot(labels, len(texts.classes)).double().mean(0) for labels in (train_labels, test_labels)]
    cosines, indices = neighbours[THOUGHTS]
    return {
        **settings,
        "source": texts.source,
        "classes": texts.classes,
        "num_train": len(train_labels),
        "num_test": len(test_labels),
        "num_features": {name: train.shape[1] for name, (train, _) in features.items()},
        "penalty": penalties,
        "accuracy": {name: figure(correct) for name, correct in right.items()},
        "difference": {
            name: figure(right[THOUGHTS].double() - correct.double())
            for name, correct in right.items()
            if name != THOUGHTS
        },
        "num_neighbours": num_neighbours,
        "same_class": {
            name: figure((train_labels[found] == test_labels[:, None]).double().mean(dim=1))
            for name, (_, found) in neighbours.items()
        },
        "same_class_by_chance": (shares[0] @ shares[1]).item(),
        "examples": [
            {
                "text": texts.test_texts[row],
                "class": texts.classes[texts.test_labels[row]],
                "neighbours": [
                    {
                        "text": texts.train_texts[index],
                        "class": texts.classes[texts.train_labels[index]],
                        "cosine": cosine,
                    }
                    for cosine, index in zip(cosines[row].tolist(), indices[row].tolist(), strict=True)
                ],
            }
            for row in range(min(num_examples, len(test_labels)))
        ],
    }


def topic_probe_markdown(result: dict) -> str:
    """A table of `topic_probe`, in percent, what it shows, and examples of nearest neighbours."""
    rows = [["", "features", "probe accuracy, %", "posterior means less this", "neighbours of its class, %"]]
    for name, accuracy in result["accuracy"].items():
        difference, same = result["difference"].get(name), result["same_class"].get(name)
        rows.append(
            [
                name,
                str(result["num_features"].get(name, "–")),
                written(accuracy, 1, 100),
                "–" if difference is None else written(difference, 1, 100, sign=True),
                f"{100 * result['same_class_by_chance']:.1f} by chance" if same is None else written(same, 1, 100),
            ]
        )
    examples = [["text", "class", "nearest by posterior mean", "class", "cosine"]]
    for example in result["examples"]:
        nearest = example["neighbours"][0]
        examples.append(
            [
                shortened(example["text"]),
                example["class"],
                shortened(nearest["text"]),
                nearest["class"],
                f"{nearest['cosine']:.2f}",
            ]
        )
    verdicts = " ".join(_verdict(name, difference) for name, difference in result["difference"].items())
    return (
        f"{markdown_rows(rows)}\n\n{verdicts} Logistic regression on {result['num_train']} texts, ± standard error "
        f"over {result['num_test']} test texts; {result['num_inference_steps']} inference steps. Neighbours: the "
        f"{result['num_neighbours']} nearest training texts by cosine. Texts: {result['source']}.\n\n"
        f"{markdown_rows(examples)}"
    )


def _verdict(baseline: str, difference: dict) -> str:
    if not beyond_noise(difference):
        return f"Posterior means against {baseline}: no difference that these texts can show."
    return f"Posterior means tell the class {'better' if difference['value'] > 0 else 'worse'} than {baseline}."
