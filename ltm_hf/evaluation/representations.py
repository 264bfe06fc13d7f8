"""Texts as points: the posterior means of their latents, and whether a text's topic can be read from them.

A memory's posterior is the one that it holds when it has read the text. The probe needs scikit-learn (the extra
`examples`). Shapes: R rows (texts or blocks), F features, C classes, L layers, N latents a layer, D hidden.
"""

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


def readers(config) -> list[str]:
    """In words, what reads the latents: each of the L."""
    return ["memory"] if config.has_memory else [f"layer {layer + 1}" for layer in config.reading_layers]


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


def tf_idf(train_texts: Sequence[str], test_texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, F) TF-IDF of the words that two or more training texts hold, by scikit-learn. A row is of length 1, or zero.

    Raises ValueError where there is no such word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(token_pattern=r"\w+", min_df=2).fit(train_texts)
    return tuple(torch.from_numpy(words.transform(part).toarray()).float() for part in (train_texts, test_texts))


# ------------------------------------------------------------------ what can be read from features


def nearest_neighbours(
    queries: torch.Tensor, candidates: torch.Tensor, count: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, count) cosines and indices of the candidates nearest to each query, nearest first; (R, F) and (C, F)."""
    if not 1 <= count <= len(candidates):
        raise ValueError(f"count must lie between 1 and the {len(candidates)} candidates, got {count}.")
    cosines = F.normalize(queries, dim=1) @ F.normalize(candidates, dim=1).T
    return tuple(cosines.topk(count, dim=1))


def linear_probe(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    test_labels: torch.Tensor,
    standardize: bool = True,
    seed: int = 0,
) -> torch.Tensor:
    """(R,) whether a multinomial logistic regression is right on each test row.

    Its penalty, of seven, is the one with the least cross-entropy on a fifth of the TRAINING rows, which `seed`
    chooses; the fit is then repeated on all of them.
    standardize: each feature to mean 0 and deviation 1 over the training rows. Raises ValueError for features and
    labels that do not fit together, and for training rows too few to hold some of each class out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = [*([StandardScaler()] if standardize else []), LogisticRegression(max_iter=1000)]
    probe = GridSearchCV(
        make_pipeline(*steps),
        {"logisticregression__C": [10.0**exponent / len(train) for exponent in range(-1, 6)]},
        scoring="neg_log_loss",
        cv=StratifiedShuffleSplit(1, test_size=0.2, random_state=seed),
    )
    guessed = probe.fit(train.numpy(), train_labels.numpy()).predict(test.numpy())
    return torch.from_numpy(guessed) == test_labels


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
    labels = [torch.tensor(part) for part in (texts.train_labels, texts.test_labels)]
    result = settings | {
        "source": texts.source, "classes": texts.classes, "num_train": len(labels[0]), "num_test": len(labels[1]),
        "num_features": {name: train.shape[1] for name, (train, _) in features.items()},
    }  # fmt: skip
    result |= _probed(features, labels, seed)
    return result | _near(features, labels, texts, num_neighbours, num_examples)


def _probed(features: dict, labels: list[torch.Tensor], seed: int) -> dict:
    """How often the probe is right, by features, and where posterior means are right and others are not."""
    right = {
        name: linear_probe(train, labels[0], test, labels[1], standardize=name != "TF-IDF", seed=seed)
        for name, (train, test) in features.items()
    }
    right["the majority class"] = labels[1] == labels[0].mode().values
    thoughts = right[THOUGHTS].double()
    difference = {name: figure(thoughts - one.double()) for name, one in right.items() if name != THOUGHTS}
    return {"accuracy": {name: figure(one) for name, one in right.items()}, "difference": difference}


def _near(features: dict, labels: list[torch.Tensor], texts: LabelledTexts, count: int, num_examples: int) -> dict:
    """How often nearest neighbours are of the same class, by features, and some of them."""
    found = {}
    for name, (train, test) in features.items():
        centre = 0.0 if name == "TF-IDF" else train.mean(dim=0)
        found[name] = nearest_neighbours(test - centre, train - centre, count)
    train, test = labels
    same = {name: figure((train[near] == test[:, None]).double().mean(dim=1)) for name, (_, near) in found.items()}
    shares = [F.one_hot(part, len(texts.classes)).double().mean(0) for part in labels]

    def neighbour(cosine, row):
        return {"text": texts.train_texts[row], "class": texts.classes[texts.train_labels[row]], "cosine": cosine}

    near = zip(texts.test_texts, texts.test_labels, *(part.tolist() for part in found[THOUGHTS]), strict=True)
    examples = [
        {"text": text, "class": texts.classes[label], "neighbours": list(map(neighbour, cosines, rows))}
        for text, label, cosines, rows in list(near)[:num_examples]
    ]
    chance = (shares[0] @ shares[1]).item()
    return {"num_neighbours": count, "same_class": same, "same_class_by_chance": chance, "examples": examples}


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
        f"over {result['num_test']} test texts; inference steps: {result['num_inference_steps']}. Neighbours: the "
        f"{result['num_neighbours']} nearest training texts by cosine. Texts: {result['source']}.\n\n"
        f"{markdown_rows(examples)}"
    )


def _verdict(baseline: str, difference: dict) -> str:
    if not beyond_noise(difference):
        return f"Posterior means against {baseline}: no difference that these texts can show."
    return f"Posterior means tell the class {'better' if difference['value'] > 0 else 'worse'} than {baseline}."
