"""Texts as points: features against hand counts and naive loops, the probe on data whose answer is known."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset

from ltm_hf.data import train_tokenizer
from ltm_hf.evaluation import latent_plots, representations
from ltm_hf.evaluation.representations import (
    LabelledTexts,
    infer_posteriors,
    linear_probe,
    load_labelled_texts,
    mean_pooled_embeddings,
    nearest_neighbours,
    posterior_means,
    tf_idf,
    topic_probe,
    topic_probe_markdown,
)

AG_NEWS = Path(__file__).resolve().parents[3] / "shared/data/ag_news/test.jsonl.gz"
TEXTS = ["The people of Spain", "A treaty", "peace with honour, and war with none", "gold"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 280)


@pytest.fixture
def model(make_model, tokenizer, reader):
    ids = dict(bos_token_id=1, eos_token_id=0, pad_token_id=0)
    return make_model(latent_reader=reader, vocab_size=len(tokenizer), **ids)


# ------------------------------------------------------------------ texts to features


@pytest.mark.parametrize("batch_size", (1, 3))
def test_posterior_means_are_each_text_s_own(model, tokenizer, batch_size):
    """In the order of the texts, each as alone and without padding, cut after max_length tokens."""
    options = dict(num_inference_steps=3, seed=5)
    found = posterior_means(model, tokenizer, TEXTS, max_length=12, batch_size=batch_size, progress=False, **options)
    ids = [torch.tensor([tokenizer(text)["input_ids"][:12]]) for text in TEXTS]
    assert len({row.shape for row in ids}) == 3 and max(len(tokenizer(text)["input_ids"]) for text in TEXTS) > 12
    expected = torch.cat([model.infer_posterior(row, **options).mean.flatten(1) for row in ids])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_posteriors_of_rows(model, make_ids):
    """Mean, variance and keys are what one call for each row finds; training mode is left as it was."""
    model.train()
    blocks = [{"input_ids": ids[:length].tolist()} for ids, length in zip(make_ids(4), (12, 3, 1, 7), strict=True)]
    found = infer_posteriors(model, blocks, batch_size=3, progress=False)
    assert model.training and len(found) == 4
    for row, block in enumerate(blocks):
        own = model.eval().infer_posterior(torch.tensor([block["input_ids"]]))
        torch.testing.assert_close(found.mean[row], own.mean[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.log_variance[row], own.log_variance[0], rtol=1e-3, atol=1e-4)
        assert found.keys[row] == own.keys[0]
    assert not found.mean[2].any()  # a single token says nothing


def test_mean_pooled_embeddings(model, tokenizer):
    found = mean_pooled_embeddings(model, tokenizer, TEXTS, max_length=12)
    table = model.model.embed_tokens.weight
    for row, text in zip(found, TEXTS, strict=True):
        ids = tokenizer(text)["input_ids"][:12]
        torch.testing.assert_close(row, sum(table[index] for index in ids) / len(ids))


def test_tf_idf_counted_by_hand():
    """Three texts; `war` in two of them, `peace` in all; the others in one, and left out."""
    train, test = tf_idf(["War, war and peace", "Peace of mind", "peace! war?"], ["war war PEACE gold", "gold"])
    peace, war = math.log(4 / 4) + 1, math.log(4 / 3) + 1  # in alphabetical order
    expected = torch.tensor([[peace, 2 * war], [peace, 0], [peace, war]])
    torch.testing.assert_close(train, expected / expected.norm(dim=1, keepdim=True))
    row = torch.tensor([peace, 2 * war])
    torch.testing.assert_close(test, torch.stack((row / row.norm(), torch.zeros(2))))
    with pytest.raises(ValueError, match="no terms remain"):
        tf_idf(["a b", "c"], ["a"])


# ------------------------------------------------------------------ what can be read from features


def test_nearest_neighbours_against_a_loop(make_noise):
    queries, candidates = make_noise(4, 6), make_noise(9, 6, seed=1)
    cosines, indices = nearest_neighbours(queries, candidates, count=3)
    for row, query in enumerate(queries):
        naive = [(query @ other / (query.norm() * other.norm())).item() for other in candidates]
        order = sorted(range(9), key=lambda index: -naive[index])[:3]
        assert indices[row].tolist() == order
        assert cosines[row].tolist() == pytest.approx([naive[index] for index in order], abs=1e-6)
    for count in (0, 10):
        with pytest.raises(ValueError, match="between 1 and the 9"):
            nearest_neighbours(queries, candidates, count)


def clusters(make_noise, rows, seed):
    """Three classes at the corners of a triangle, in features of very different scales."""
    labels = torch.arange(rows) % 3
    corners = 10 * torch.eye(3)
    features = torch.cat((corners[labels] + make_noise(rows, 3, seed=seed), make_noise(rows, 2, seed=seed + 1)), dim=1)
    return features * torch.tensor([1e-3, 1e3, 1.0, 1.0, 1e4]), labels


def test_probe_separates_what_a_line_separates(make_noise):
    train, test = clusters(make_noise, 90, 0), clusters(make_noise, 60, 7)
    right = linear_probe(*train, *test)
    assert right.shape == (60,) and right.all()


def test_probe_reads_nothing_from_noise(make_noise):
    """Labels that features know nothing of: chance, within four standard errors of a third."""
    labels = torch.randint(3, (300,), generator=torch.Generator().manual_seed(1))
    right = linear_probe(make_noise(120, 40), labels[:120], make_noise(180, 40, seed=3), labels[120:])
    assert right.double().mean().item() == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / 180))


def test_probe_never_looks_at_the_test_rows(make_noise):
    """Whatever the other test rows are, a row is judged alike: penalty and scales come from training rows."""
    train, labels = clusters(make_noise, 60, 0)
    test, truth = clusters(make_noise, 30, 7)
    test = test + 3 * make_noise(30, 5, seed=9) * test.std(dim=0)  # so that some are wrong
    right = linear_probe(train, labels, test, truth)
    assert 0 < right.double().mean() < 1
    other = linear_probe(train, labels, torch.cat((test[:5], 1e3 * test[5:])), truth)
    assert (other[:5] == right[:5]).all()
    relabelled = linear_probe(train, labels, test, (truth + 1) % 3)
    assert not (relabelled & right).any()


def test_probe_without_standardising_keeps_the_scale():
    """A class told by a feature of little scale: read when standardised, out of any penalty's reach if not."""
    labels = torch.tensor([0] * 60 + [1] * 40)
    features = torch.stack((1e-9 * (2.0 * labels - 1), torch.ones(100)), dim=1)  # and a constant
    for standardize, accuracy in ((True, 1.0), (False, 0.6)):  # the majority alone
        right = linear_probe(features, labels, features, labels, standardize=standardize)
        assert right.double().mean().item() == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("train", "labels", "test", "message"),
    [
        ((9, 2), [0, 1] * 4, (3, 2), "inconsistent numbers of samples"),
        ((8, 2), [0, 1] * 4, (3, 4), "X has 4 features"),
        ((3, 2), [0, 1, 1], (3, 2), "The least populated class"),
    ],
)
def test_probe_refuses_what_does_not_fit(train, labels, test, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(torch.zeros(train), torch.tensor(labels), torch.zeros(test), torch.zeros(test[0]).long())


# ------------------------------------------------------------------ labelled texts


@pytest.fixture
def labelled_file(tmp_path):
    path = tmp_path / "news.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for index in range(30):
            file.write(json.dumps({"text": f"text {index}", "label": index % 3 + 5}) + "\n")
    return path


def test_a_file_is_cut_in_two(labelled_file):
    texts = load_labelled_texts(labelled_file, num_train=20, num_test=10, seed=1)
    assert len(set(texts.train_texts) | set(texts.test_texts)) == 30
    for part, labels in ((texts.train_texts, texts.train_labels), (texts.test_texts, texts.test_labels)):
        assert [int(text.split()[1]) % 3 for text in part] == labels
    assert texts.classes == ["5", "6", "7"]
    assert texts.source == "news.jsonl.gz: a single set of 30 rows, cut by seed 1 into rows to train and to test on"
    assert load_labelled_texts(labelled_file, num_train=20, num_test=10, seed=1) == texts
    assert load_labelled_texts(labelled_file, num_train=20, num_test=10, seed=2).test_texts != texts.test_texts


def test_more_training_rows_leave_the_test_rows(labelled_file):
    few, many = (load_labelled_texts(labelled_file, num_train=count, num_test=5) for count in (5, 25))
    assert few.test_texts == many.test_texts and few.train_texts == many.train_texts[:5]


def test_a_hub_name_has_splits(monkeypatch):
    rows = {
        name: Dataset.from_dict({"text": [f"{name} {i}" for i in range(8)], "label": [i % 2 for i in range(8)]})
        for name in ("train", "test")
    }
    rows = {name: part.cast_column("label", ClassLabel(names=["World", "Sports"])) for name, part in rows.items()}
    monkeypatch.setattr(representations, "load_dataset", lambda name, config, split: rows[split])
    texts = load_labelled_texts(num_train=8, num_test=4)
    assert all(text.startswith("train") for text in texts.train_texts) and len(texts.train_texts) == 8
    assert all(text.startswith("test") for text in texts.test_texts) and len(texts.test_texts) == 4
    assert texts.classes == ["World", "Sports"] and "its test split to test on" in texts.source
    assert [int(text.split()[1]) % 2 for text in texts.train_texts] == texts.train_labels


def test_labelled_texts_that_cannot_be_had(labelled_file, tmp_path):
    with pytest.raises(ValueError, match="21 rows to train and 10 to test on cannot be drawn"):
        load_labelled_texts(labelled_file, num_train=21, num_test=10)
    with pytest.raises(ValueError, match="no columns 'text' and 'topic'; there are text, label"):
        load_labelled_texts(labelled_file, label_column="topic")
    with pytest.raises(FileNotFoundError, match="missing.jsonl"):
        load_labelled_texts(tmp_path / "missing.jsonl")
    (tmp_path / "plain.txt").write_text("no label")
    with pytest.raises(ValueError, match="text without labels"):
        load_labelled_texts(tmp_path / "plain.txt")


# ------------------------------------------------------------------ the study


@pytest.fixture(scope="module")
def topics():
    """Two topics, told by their words, of several lengths: 10 and 9 texts to train, 6 and 7 to test on."""
    words = (["war", "treaty", "Spain", "army"], ["gold", "silver", "bank", "coin"])
    texts = [f"{w[i % 4]} and {w[(i + 1 + i // 4) % 4]} {'again ' * (i % 3)}" for i in range(16) for w in words]
    labels = [0, 1] * 16
    return LabelledTexts(texts[:19], labels[:19], texts[19:], labels[19:], ["war", "money"], "made up")


def test_topic_probe(model, tokenizer, topics, tmp_path):
    options = dict(num_neighbours=3, num_examples=2, num_inference_steps=1, progress=False)
    result = topic_probe(model, tokenizer, topics, **options)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["accuracy"]["TF-IDF"]["value"] == result["same_class"]["TF-IDF"]["value"] == 1.0
    assert result["accuracy"]["the majority class"]["value"] == pytest.approx(6 / 13)  # the training texts' majority
    assert result["same_class_by_chance"] == pytest.approx((10 * 6 + 9 * 7) / (19 * 13))
    assert {name: one["n"] for name, one in result["accuracy"].items()} == dict.fromkeys(result["accuracy"], 13)
    assert result["num_features"] | {"posterior means": 4 * 32, "mean-pooled embeddings": 32} == result["num_features"]
    thought = result["accuracy"]["posterior means"]["value"]
    for name, difference in result["difference"].items():
        assert difference["value"] == pytest.approx(thought - result["accuracy"][name]["value"])
    alone = topic_probe(model, tokenizer, topics, batch_size=1, **options)
    for name in ("accuracy", "difference", "same_class"):
        assert alone[name] == result[name]

    means = [posterior_means(model, tokenizer, part, num_inference_steps=1, progress=False)
             for part in (topics.train_texts, topics.test_texts)]  # fmt: skip
    train, test = (part - means[0].mean(dim=0) for part in means)
    nearest = torch.nn.functional.cosine_similarity(test[0], train).argsort(descending=True)[:3]
    assert [one["text"] for one in result["examples"][0]["neighbours"]] == [topics.train_texts[i] for i in nearest]
    assert result["examples"][1]["text"] == topics.test_texts[1] and result["examples"][1]["class"] == "war"

    table = topic_probe_markdown(result)
    assert "| TF-IDF " in table and "100.0 ± 0.0" in table and "49.8 by chance" in table and "made up" in table
    pytest.importorskip("matplotlib")
    latent_plots.plot_topic_probe(result, tmp_path / "topics.png")
    assert (tmp_path / "topics.png").read_bytes().startswith(b"\x89PNG")


def test_posteriors_that_say_nothing_are_no_better_than_the_majority(model, tokenizer, topics):
    """Without a step all means are the prior's: the probe is left with the bias, and the table says so."""
    result = topic_probe(model, tokenizer, topics, num_inference_steps=0, progress=False)
    assert result["accuracy"]["posterior means"]["value"] == pytest.approx(6 / 13)
    assert "Posterior means against the majority class: no difference" in topic_probe_markdown(result)
    assert "Posterior means tell the class worse than TF-IDF." in topic_probe_markdown(result)


def test_bad_input_is_refused(model, make_model, tokenizer, topics):
    with pytest.raises(ValueError, match="num_latents=0"):
        topic_probe(make_model(num_latents=0), tokenizer, topics, progress=False)
    with pytest.raises(ValueError, match="no text"):
        posterior_means(model, tokenizer, [], progress=False)
    with pytest.raises(ValueError, match="vocab_size"):
        mean_pooled_embeddings(make_model(vocab_size=5), tokenizer, TEXTS)

    def without_begin_of_text(texts, **_):
        return {"input_ids": [[3] * len(text) for text in texts]}

    with pytest.raises(ValueError, match="Row 1 has 0 tokens"):
        posterior_means(model, without_begin_of_text, ["a", ""], progress=False)


@pytest.mark.skipif(not AG_NEWS.exists(), reason="needs ../shared/data")
def test_words_tell_the_topics_of_ag_news():
    texts = load_labelled_texts(AG_NEWS, num_train=200, num_test=100)
    train, test = tf_idf(texts.train_texts, texts.test_texts)
    labels = torch.tensor(texts.train_labels), torch.tensor(texts.test_labels)
    right = linear_probe(train, labels[0], test, labels[1], standardize=False)
    assert len(texts.classes) == 4 and right.double().mean() > 0.55
