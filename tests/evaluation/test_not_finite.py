"""What cannot be measured is said so: broken weights, losses that overflow, nothing to score, impossible settings."""

import json
import math

import pytest
import torch
from datasets import Dataset, DatasetDict

from ltm_hf.data import document_blocks, prefix_blocks, train_tokenizer
from ltm_hf.evaluation import (
    evaluate_documents,
    evaluate_likelihood,
    likelihood,
    markdown_table,
    plot_thinking,
    rebuilding,
    representations,
    sampling,
    score_blocks,
    sections,
    text,
    thinking_curve,
    thinking_table,
    usage,
)
from ltm_hf.evaluation.figures import check_finite, ratio_and_error, with_error
from ltm_hf.evaluation.gsm8k import evaluate_gsm8k
from ltm_hf.evaluation.report import Report, likelihood_from_json, likelihood_to_json
from ltm_hf.evaluation.sections import Subject

TEXTS = ["the cat sat on the mat and the dog", "the dog sat on the log", "a cat and a dog and a log", "the mat " * 9]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, 270)


@pytest.fixture(scope="module")
def make(make_model, tokenizer):
    """A model that the tokenizer fits, and one of these with a weight that is no number."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}

    def make(broken=False, **overrides):
        model = make_model(vocab_size=len(tokenizer), max_position_embeddings=16, **ids | overrides)
        if broken:
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
        return model

    return make


@pytest.fixture
def model(make):
    return make(latent_reader="paper")


@pytest.fixture
def broken(make, reader):
    return make(broken=True, latent_reader=reader)


@pytest.fixture(scope="module")
def blocks(tokenizer):
    return list(document_blocks(TEXTS, tokenizer, 16))


# ------------------------------------------------------------------ figures that came out as no numbers


def test_no_figure_of_broken_weights_is_a_number(broken, blocks):
    names = {*likelihood.default_figures(broken), "bound", "kl", "iw-2", "reinfer-4", "prior"}
    found = evaluate_likelihood(broken, blocks, figures=names, **QUIET)
    assert len(found.figures) == len(names) and all(math.isnan(value) for value, _ in found.figures.values())
    again = likelihood_from_json(json.loads(json.dumps(likelihood_to_json(found)).replace("NaN", "null")))
    for unit in ("nats a token", "perplexity", "bits per byte"):
        for one in (found, again):
            rows = [line.split("|")[2].strip() for line in markdown_table({"m": one}, unit).splitlines()[2:]]
            assert set(rows) == {"not finite"}


def test_a_curve_of_broken_weights(broken, blocks, tmp_path):
    pytest.importorskip("matplotlib")
    rows = thinking_curve(broken, blocks, steps=(0, 1), prefix_blocks=blocks, **QUIET)
    assert len(rows) == (2 if broken.config.has_memory else 4)
    from_json = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    for one in (rows, from_json):
        assert thinking_table({"m": one}).count("not finite") == 2 * len(one)
        plot_thinking({"m": one}, tmp_path / "thinking.png")


def test_a_block_whose_loss_overflows_is_not_left_out(model, blocks, monkeypatch):
    """Of the blocks together there is no figure, and of the others each its own."""
    nll_given = likelihood._Batch.nll_given

    def overflow(self, *args, **kwargs):
        nll = nll_given(self, *args, **kwargs)
        return nll.masked_fill(self.text.input_ids[:, 1] == blocks[1]["input_ids"][1], math.inf)

    monkeypatch.setattr(likelihood._Batch, "nll_given", overflow)
    scores = score_blocks(model, blocks, figures=["no_latents"], **QUIET)
    assert scores.nats["no_latents"].isfinite().sum() >= 1 and scores.likelihood()["no_latents"] == math.inf


@pytest.mark.parametrize(
    "measure",
    [
        lambda m, t, b: text.text_figures(m, t, TEXTS, n=2, max_new_tokens=2, prompt_tokens=2, features=None, **QUIET),
        lambda m, t, b: text.judged_losses(m, t, TEXTS),
        lambda m, t, b: sampling.sample_texts(m, t, 1, 2, **QUIET),
        lambda m, t, b: sampling.complete_texts(m, t, ["the"], 2, **QUIET),
        lambda m, t, b: representations.posterior_means(m, t, TEXTS, **QUIET),
        lambda m, t, b: rebuilding.reconstruction(m, t, b, **QUIET),
        lambda m, t, b: rebuilding.interpolation(m, t, [("the cat", "the dog")], **QUIET),
        lambda m, t, b: usage.latent_usage(m, b, **QUIET),
        lambda m, t, b: usage.latent_reading(m, t, b, **QUIET),
        lambda m, t, b: evaluate_gsm8k(m, t, GSM8K, shots=0, samples=1, max_new_tokens=2, **QUIET),
    ],
)
def test_texts_and_thoughts_of_broken_weights_are_not_looked_at(make, tokenizer, blocks, measure):
    with pytest.raises(ValueError, match=r"weights are not finite \(model.layers.1.mlp.down_proj.weight\)"):
        measure(make(broken=True), tokenizer, blocks)


GSM8K = DatasetDict({name: Dataset.from_list([{"question": "1?", "answer": "#### 1"}]) for name in ("train", "test")})


def test_the_harness_is_told_of_broken_weights(model, make, tokenizer, monkeypatch):
    module = pytest.importorskip("ltm_hf.evaluation.lm_eval")
    with pytest.raises(ValueError, match="weights are not finite"):
        module.HFLTM(make(broken=True), tokenizer=tokenizer)
    evaluator = module.HFLTM(model, tokenizer=tokenizer)
    monkeypatch.setattr(evaluator, "_logits", lambda texts, *_: torch.full((len(texts), 9, 270), math.nan))
    with pytest.raises(ValueError, match="2 of 2 log-likelihoods are not finite"):
        evaluator._loglikelihood_tokens([(("a", "b"), [1, 2], [3]), (("a", "c"), [1, 2], [4])], disable_tqdm=True)


def test_weights_that_no_float_can_tell_are_left_alone():
    whole = torch.nn.Linear(2, 2)
    whole.weight.requires_grad = False
    whole.weight.data = torch.ones(2, 2, dtype=torch.int8)
    check_finite(whole)
    check_finite(torch.nn.Linear(2, 2, device="meta"))


def test_a_report_says_what_is_not_finite(broken, tokenizer, tmp_path):
    pytest.importorskip("matplotlib")
    report, subject = Report(tmp_path, "T"), Subject("broken", broken, tokenizer)
    sections.likelihood_section(report, [subject], TEXTS, "texts", 16, batch_size=4, num_samples=2)
    sections.thinking_section(report, [subject], TEXTS, 16, 2, steps=(0, 1), batch_size=4)
    sections.latents_sections(report, subject, TEXTS, 16, 2, batch_size=4)
    words = (tmp_path / "README.md").read_text()
    is_memory = broken.config.has_memory
    assert ("| kl " in words) != is_memory and "0.000" not in words and " nan" not in words
    assert words.count("not finite") > 20
    assert words.count("Not measured: The model's weights are not finite") == (4 if is_memory else 5)


# ------------------------------------------------------------------ nothing to score


def test_a_mean_over_nothing_is_none(model, tokenizer):
    for rows, message in (
        ([], "There is no block to evaluate on"),
        ([{"input_ids": [1]}, {"input_ids": [2]}], "There is no token to score"),
        ([{"input_ids": [1, 5]}, {"input_ids": []}], "Block 1 has no token"),
        ([{"ids": [1, 5]}], "Block 0 has no token: a block is a row with input_ids"),
        ([{"input_ids": [1, 5], "labels": [-100, -100]}], "Block 0 has labels of its own"),
        ([{"input_ids": [1, 5, 0], "attention_mask": [1, 1, 0]}], "Block 0 has attention_mask of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_likelihood(model, rows, **QUIET)
    plain = [{"input_ids": [1, 5], "labels": [1, 5], "attention_mask": [1, 1]}]
    assert evaluate_likelihood(model, plain, **QUIET).num_tokens == 1
    with pytest.raises(ValueError, match="nothing follows any prefix"):
        following = [{"input_ids": [1, 5], "prefix_length": 2}]
        evaluate_likelihood(model, following, figures=["prefix"], **QUIET)
    with pytest.raises(ValueError, match="no token is counted"):
        ratio_and_error(torch.zeros(2), torch.zeros(2), torch.arange(2))
    with pytest.raises(ValueError, match="no text|texts must be"):
        text.judged_losses(model, tokenizer, [])
    with pytest.raises(ValueError, match="answer to problem 0 of the test split has no number"):
        asked = DatasetDict(GSM8K | {"test": Dataset.from_list([{"question": "1?", "answer": "one"}])})
        evaluate_gsm8k(model, tokenizer, asked, shots=0, **QUIET)
    assert text.pooled_perplexity(torch.tensor([9000.0]), torch.tensor([2]))["value"] is None
    assert with_error(math.inf, math.nan) == "inf" and with_error(None, None) == "not finite"


# ------------------------------------------------------------------ settings


BAD = [
    {"batch_size": 0},
    {"batch_size": 2.5},
    {"num_inference_steps": -1},
    {"num_particles": 0},
    {"num_samples": -1},
    {"num_blocks": 0},
    {"num_blocks": -3},
    {"prefix_length": 0},
    {"prefix_length": 16},
    {"block_size": 1},
    {"block_size": 0},
    {"block_size": 999},
]


@pytest.mark.parametrize("setting", BAD, ids=str)
def test_a_setting_that_cannot_be_is_refused_and_the_report_stays(model, tokenizer, tmp_path, monkeypatch, setting):
    monkeypatch.setattr(likelihood, "_Batch", None)  # nothing is computed
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        evaluate_documents(model, tokenizer, TEXTS, **setting, **QUIET)
    (tmp_path / "README.md").write_text("the report of before")
    report, subject = Report(tmp_path, "T"), Subject("m", model, tokenizer)
    settings = {"block_size": 16, "batch_size": 4} | setting
    with pytest.raises(ValueError, match=name):
        sections.likelihood_section(report, [subject], TEXTS, "texts", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "the report of before"


@pytest.mark.parametrize(
    ("section", "settings", "name"),
    [
        ("thinking_section", {"steps": []}, "steps"),
        ("thinking_section", {"steps": [0, -1]}, "steps"),
        ("thinking_section", {"num_blocks": 0, "steps": [1]}, "num_blocks"),
        ("latents_sections", {"num_blocks": -1}, "num_blocks"),
        ("latents_sections", {"num_inference_steps": -1}, "num_inference_steps"),
        ("text_section", {"n": 0, "max_new_tokens": 4}, "n must be"),
        ("text_section", {"n": 1, "max_new_tokens": 0}, "max_new_tokens"),
        ("text_section", {"n": 1, "max_new_tokens": 99}, "more than the 16 the model holds"),
        ("topic_section", {"num_neighbours": 0}, "num_neighbours"),
        ("gsm8k_section", {"problems": 0}, "problems"),
        ("gsm8k_section", {"shots": -1}, "shots"),
        ("zero_shot_section", {"num_documents": 0}, "num_documents"),
        ("topic_section", {}, "no file 'nowhere.jsonl'"),
        ("gsm8k_section", {}, "no folder './nowhere'"),
        ("zero_shot_section", {}, "no folder '.*/nowhere'"),
    ],
)
def test_every_section_refuses_before_anything_is_written(model, tokenizer, tmp_path, section, settings, name):
    report, subject = Report(tmp_path, "T"), Subject("m", model, tokenizer)
    blocks = {"block_size": 16, "num_blocks": 2}
    arguments = {
        "thinking_section": ([subject], TEXTS, *({**blocks, **settings}[key] for key in blocks)),
        "latents_sections": (subject, TEXTS, *({**blocks, **settings}[key] for key in blocks)),
        "text_section": (subject, TEXTS),
        "topic_section": (subject, "nowhere.jsonl"),
        "gsm8k_section": ([subject], "./nowhere"),
        "zero_shot_section": ([subject], tmp_path / "nowhere", settings.get("num_documents"), 16),
    }[section]
    rest = {key: value for key, value in settings.items() if key not in ("num_blocks", "num_documents")}
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        getattr(sections, section)(report, *arguments, **rest)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("measure", "name"),
    [
        (lambda m, t, b: thinking_curve(m, b, steps=[]), "steps"),
        (lambda m, t, b: thinking_curve(m, b, steps=[1.5]), r"steps\[0\]"),
        (lambda m, t, b: usage.latent_reading(m, t, b, num_tokens=0), "num_tokens"),
        (lambda m, t, b: rebuilding.interpolation(m, t, [("a", "b")], max_new_tokens=0), "max_new_tokens"),
        (lambda m, t, b: usage.latent_usage(m, b[:1]), "two sequences"),
        (lambda m, t, b: representations.posterior_means(m, t, TEXTS, max_length=-1), "max_length"),
        (lambda m, t, b: representations.topic_probe(m, t, LABELLED, num_neighbours=3), "num_neighbours"),
        (lambda m, t, b: sampling.complete_texts(m, t, ["a"], 2, num_inference_steps=-1), "num_inference_steps"),
        (lambda m, t, b: evaluate_gsm8k(m, t, GSM8K, shots=0.5), "shots"),
        (lambda m, t, b: evaluate_gsm8k(m, t, GSM8K, num_inference_steps="2"), "num_inference_steps"),
        (lambda m, t, b: prefix_blocks(TEXTS, t, 16, 2.5), "prefix_length"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_any_computation(
    model, tokenizer, blocks, monkeypatch, measure, name
):
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=name):
        measure(model, tokenizer, blocks)


LABELLED = representations.LabelledTexts(TEXTS[:2], [0, 1], TEXTS[2:], [0, 1], ["a", "b"], "made up")
