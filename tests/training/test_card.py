"""Model cards: what a run recorded is there, nothing else is, and the released protocol's figure stands apart."""

import functools
import math
import re
from types import SimpleNamespace

import jinja2
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from ltm_hf import PRESETS, preset_config
from ltm_hf.configuration_ltm import READERS
from ltm_hf.costs.flops import paper_training_flops, training_flops
from ltm_hf.data import train_tokenizer
from ltm_hf.evaluation import Likelihood
from ltm_hf.training import LTMTrainer, LTMTrainingArguments, add_to_model_index, write_model_card
from ltm_hf.training.objectives import Elbo, Prediction

FIGURES = {
    "bound": (3.25, 0.051),
    "nll": (3.0, 0.05),
    "kl": (0.25, 0.01),
    "no_latents": (3.1, 0.04),
    "prefix": (3.05, 0.04),
    "prefix_no_latents": (3.2, 0.04),
    "released": (2.5, 0.03),
}
LIKELIHOOD = Likelihood(FIGURES, num_tokens=123_456, num_blocks=128)
DATA = "HuggingFaceFW/fineweb-edu"


@pytest.fixture(autouse=True)
def no_forgotten_variable(monkeypatch):
    """A name that the template reads and nobody gives it would leave a silent gap."""
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))


@pytest.fixture
def arguments(tmp_path):
    return LTMTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=3)


def of(preset="ltm-small", **overrides):
    """A card asks a model for no more than its configuration."""
    return SimpleNamespace(config=preset_config(preset, **overrides))


def full_card(folder, arguments, **facts):
    defaults = dict(
        name="someone/ltm-small",
        language="en",
        dataset_name=DATA,
        dataset_license="odc-by",
        training_arguments=arguments,
        num_training_steps=1234,
        num_training_tokens=10**9,
        block_size=512,
        hardware="8 x NVIDIA H100",
        likelihood=LIKELIHOOD,
    )
    return write_model_card(folder, facts.pop("model", of()), **defaults | facts)


def section(card, title):
    """The text under a heading, and its table as a dictionary."""
    text = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card.text, re.DOTALL | re.MULTILINE)[1]
    return text, dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE))


def snippets(card, language):
    return re.findall(rf"```{language}\n(.*?)```", card.text, re.DOTALL)


def test_metadata(tmp_path, arguments):
    written = full_card(tmp_path, arguments, tags=["english"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.content == written.content == (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert (card.data.license, card.data.language) == ("apache-2.0", "en")
    assert card.data.tags == ["ltm", "custom_code", "english"]
    assert card.data.datasets == [DATA] and card.data.metrics == ["perplexity"]
    assert card.data.model_name == "someone/ltm-small"

    honest = {name: nats for name, (nats, _) in FIGURES.items() if name != "released"}
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == honest | {"perplexity": math.exp(3.25)}
    assert "bound" in results["perplexity"].metric_name
    for result in card.data.eval_results:
        assert (result.task_type, result.dataset_type, result.dataset_name) == ("text-generation", DATA, DATA)


def test_metadata_is_what_the_hub_parses(tmp_path, arguments):
    """The model-index's form by its specification, without huggingface_hub, from the file alone."""
    full_card(tmp_path, arguments, likelihood={"ptb": LIKELIHOOD, "wikitext": LIKELIHOOD})
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---\n")[1])
    (index,) = metadata["model-index"]
    assert index.keys() == {"name", "results"}
    assert [result["dataset"]["type"] for result in index["results"]] == ["ptb", "wikitext"]
    for result in index["results"]:
        assert result.keys() == {"task", "dataset", "metrics"} and result["task"]["type"] == "text-generation"
        assert all(isinstance(metric["value"], float) and metric["type"] for metric in result["metrics"])
    assert "model_name" not in metadata and "eval_results" not in metadata


def test_released_protocol_stands_apart(tmp_path, arguments):
    card = full_card(tmp_path, arguments)
    text, table = section(card, "Figures under the released protocol")
    assert text.strip().startswith("Not a bound; for comparison with published tables only.")
    assert table[DATA] == f"{math.exp(2.5):.2f}"
    honest, _ = section(card, "Figures")
    assert "3.250 ± 0.051" in honest and f"{math.exp(3.25):.2f}" in honest
    assert f"{DATA}, held out: 123,456 tokens in 128 blocks" in honest
    elsewhere = card.content.replace(text, "").replace("## Figures under the released protocol", "")
    assert "released" not in elsewhere and "2.5" not in honest and f"{math.exp(2.5):.2f}" not in elsewhere

    only_honest = Likelihood({"bound": (3.25, 0.05)}, 10, 1)
    assert "released" not in full_card(tmp_path, arguments, likelihood=only_honest).text


def test_architecture_inference_and_training(tmp_path, arguments):
    card = full_card(tmp_path, arguments)
    _, architecture = section(card, "Architecture")
    assert architecture["parameters"] == "38,369,280" and architecture["attention window"] == "256 tokens"
    assert architecture["layers"] == "3" and architecture["latent vectors"] == "24"
    assert architecture["read by"] == READERS["paper"] and architecture["layers that read latents"] == "1, 2, 3"
    _, inference = section(card, "Inference")
    assert inference == {
        "`num_inference_steps`": "16",
        "`inference_method`": "adamw",
        "`inference_learning_rate`": "0.3",
        "`inference_lr_schedule`": "constant",
        "`inference_noise`": "fresh",
        "`inference_kl_weight`": "1.0",
    }
    _, training = section(card, "Training")
    assert training["data"] == f"[{DATA}](https://huggingface.co/datasets/{DATA})"
    assert training["license of the data"] == "odc-by" and training["hardware"] == "8 x NVIDIA H100"
    assert training["optimiser steps"] == "1,234" and training["tokens"] == "1,000,000,000"
    assert training["batch"] == "4 sequences a device, gradients accumulated over 3"
    assert training["learning rate"] == "0.0004, cosine_with_min_lr, warm-up over 1000 steps"
    assert training["inference step size"] == "0.3 to 0.34, linear over training"
    assert training["learns from"] == Elbo.description
    assert "not recorded" not in card.text


@pytest.mark.parametrize("objective", ["elbo", "elbo_trajectory"])
def test_cost_is_that_of_the_run(tmp_path, arguments, objective):
    """The run's number of steps, not the configuration's; a decoder that learns from each of them pays for each."""
    arguments.num_inference_steps, arguments.objective = 7, objective
    _, cost = section(full_card(tmp_path, arguments), "Cost")
    config = preset_config("ltm-small", num_inference_steps=7)
    flops = training_flops(config, 512)
    passes = 1 if objective == "elbo" else 8
    step = 7 * flops.fast_step + passes * flops.slow_step
    assert cost["forward"] == f"{flops.forward / 1e6:.2f} M"
    assert cost[f"training step: 7 of inference, {passes} of learning"] == f"{step / 1e9:.2f} G"
    assert cost["training step in the paper's account"] == f"{paper_training_flops(config, 512) / 1e9:.2f} G"
    assert cost["whole run (not a token)"] == f"{step * 1e9 / 1e18:.2f} E"


def test_card_of_a_memory(tmp_path, arguments):
    """It says what a memory does, and nothing of fast loops, bounds and cross-attention."""
    config = preset_config("ltm-small-memory")
    card = full_card(
        tmp_path, arguments, model=of("ltm-small-memory"), likelihood=Likelihood({"prediction": (3.25, 0.05)}, 10, 1)
    )
    _, architecture = section(card, "Architecture")
    assert architecture["read by"] == READERS["memory"] and architecture["tokens that read the same memory"] == "8"
    assert section(card, "Inference")[1].keys() == {
        "`inference_method`",
        "`num_inference_steps`",
        "`inference_kl_weight`",
    }
    assert section(card, "Training")[1]["learns from"] == Prediction.description
    assert section(card, "Cost")[1]["training step"] == f"{training_flops(config, 512).slow_step / 1e6:.2f} M"
    for word in ("cross-attention", "gradient steps on", "fast", "bound", "at most"):
        assert word not in card.text, word


def test_cost_where_inference_steps_are_drawn(tmp_path, arguments):
    arguments.num_inference_steps, arguments.num_inference_steps_min = 4, 1
    card = full_card(tmp_path, arguments)
    _, cost = section(card, "Cost")
    config = preset_config("ltm-small", num_inference_steps=4)
    flops = training_flops(config, 512)
    step = 2.5 * flops.fast_step + flops.slow_step
    assert cost["training step: 2.5 of inference, 1 of learning"] == f"{step / 1e6:.2f} M"
    paper = paper_training_flops(config, 512) * 3.5 / 5
    assert cost["training step in the paper's account"] == f"{paper / 1e6:.2f} M"
    assert section(card, "Training")[1]["inference steps (fast)"] == "1 to 4"


def test_later_figures_join_the_metadata_and_leave_the_rest(tmp_path, arguments):
    """In place of what there was of the same data, beside what there was of others; without the released protocol."""
    before = full_card(tmp_path, arguments)
    news = Likelihood({"bound": (4.0, 0.1), "iw-8": (3.9, 0.1), "released": (3.0, 0.1)}, 10, 1)
    add_to_model_index(tmp_path, {"AG News": news})
    add_to_model_index(tmp_path, {"AG News": Likelihood({"bound": (5.0, 0.1)}, 10, 1)})
    card = ModelCard.load(tmp_path / "README.md")
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert {metric: value for (data, metric), value in found.items() if data == "AG News"} == {
        "perplexity": math.exp(5.0), "bound": 5.0,
    }  # fmt: skip
    assert found[DATA, "prefix"] == 3.05 and card.data.model_name == "someone/ltm-small"
    assert card.text.strip() == before.text.strip() and card.data.license == "apache-2.0"
    with pytest.raises(FileNotFoundError, match="There is no model card"):
        add_to_model_index(tmp_path / "nowhere", {"AG News": news})


def test_what_is_unknown_is_not_invented(tmp_path):
    card = write_model_card(tmp_path, of(), name="mine", license=None)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ltm", "custom_code"],
    }
    _, training = section(card, "Training")
    assert set(training.values()) == {"not recorded"}
    assert section(card, "Figures")[0].strip() == "Not recorded."
    assert section(card, "Cost")[1]["whole run (not a token)"] == "not recorded"
    assert "released" not in card.text and "None" not in card.text and "nan" not in card.text


@pytest.mark.parametrize(
    "name", ["presidents' messages", "sotu", "corpus/texts.txt", "/home/me/texts.txt", "~/texts.txt"]
)
def test_data_outside_the_hub_is_named_in_words_only(tmp_path, monkeypatch, name):
    """Of a path on this machine it is the last part."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "texts.txt").touch()
    card = write_model_card(tmp_path, of(), name=f"{tmp_path}/mine", dataset_name=name, likelihood=LIKELIHOOD)
    name = name.split("/")[-1]
    assert card.data.datasets is None and section(card, "Training")[1]["data"] == name
    assert card.data.eval_results[0].dataset_name == name and card.data.model_name == "mine"
    add_to_model_index(tmp_path, {str(tmp_path / "corpus"): LIKELIHOOD})
    assert str(tmp_path) not in ModelCard.load(tmp_path / "README.md").data.to_yaml()


def test_figures_that_json_cannot_hold(tmp_path):
    """A model that diverged, and a single block, which has no standard error."""
    likelihood = Likelihood({"bound": (900.0, math.nan), "nll": (math.nan, math.nan), "kl": (0.5, 0.1)}, 11, 1)
    card = write_model_card(tmp_path, of(), name="mine", likelihood=likelihood)
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {"bound": 900.0, "kl": 0.5}
    text, _ = section(card, "Figures")
    assert "± nan" not in text and "0.500 ± 0.100" in text and "perplexity at most inf" in text


def test_autoregressive_baseline(tmp_path, arguments):
    likelihood = Likelihood({"no_latents": (3.0, 0.1), "prefix_no_latents": (3.1, 0.1)}, 11, 2)
    card = write_model_card(
        tmp_path, of("ltm-tiny", num_latents=0), name="twin", likelihood=likelihood, training_arguments=arguments
    )
    perplexity = card.data.eval_results[0]
    assert perplexity.metric_value == math.exp(3.0) and "bound" not in perplexity.metric_name
    assert "perplexity 20.09" in section(card, "Figures")[0]
    assert "## Inference" not in card.text and "sample_prior" not in card.text and "autoregressive" in card.text
    assert "inference step" not in section(card, "Cost")[0] and "inference" not in section(card, "Training")[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_snippets_and_citation_of_every_preset(tmp_path, preset):
    card = write_model_card(tmp_path, of(preset), name=f'a "quoted" {preset}')
    (loading,) = snippets(card, "python")
    compile(loading, "README.md", "exec")
    steps = f"num_inference_steps={preset_config(preset).num_inference_steps}"
    assert (steps in loading) != preset_config(preset).has_memory
    (citation,) = snippets(card, "bibtex")
    assert "Kong, Deqian" in citation and "2502.01567" in citation and "2025" in citation
    assert "Latent Thought Models with Variational {B}ayes Inference-Time Computation" in citation
    assert "International Conference on Machine Learning" in citation


@pytest.mark.parametrize(("reader", "num_latents"), [("paper", 0), ("paper", 2), ("memory", 2)])
def test_the_snippet_loads_the_checkpoint(tmp_path, make_model, reader, num_latents, capsys):
    tokenizer = train_tokenizer(["The people of the United States."], 300)
    model = make_model(
        reader,
        num_latents=num_latents,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (loading,) = snippets(write_model_card(tmp_path, model, name=str(tmp_path)), "python")
    namespace = {}
    with torch.random.fork_rng(devices=[]):
        exec(compile(loading, "README.md", "exec"), namespace)
    assert namespace["output"].shape[0] == 1 and namespace["model"].config.num_latents == num_latents
    assert capsys.readouterr().out


def test_step_size_is_what_the_trainer_does(tmp_path, make_model):
    """The default end of the step size is the trainer's, told by the card."""
    for model in (make_model(inference_method="adamw", inference_learning_rate=0.3), make_model()):
        arguments = LTMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=11)
        trainer = LTMTrainer(model, arguments)
        trainer.state.max_steps = 11
        start, end = (trainer.args.inference_rate(model.config, share) for share in (0, 1))
        card = write_model_card(tmp_path, model, name="mine", training_arguments=arguments)
        expected = f"{start:g}" if start == end else f"{start:g} to {end:g}, linear over training"
        assert section(card, "Training")[1]["inference step size"] == expected


def test_empty_name(tmp_path):
    with pytest.raises(ValueError, match="name must not be empty"):
        write_model_card(tmp_path, of(), name="")
