"""The cards that a trainer writes: with each checkpoint, of its step and its figures."""

import functools
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import ltm_hf
from ltm_hf import LTMForCausalLM
from ltm_hf.costs.flops import training_flops
from ltm_hf.evaluation import Likelihood
from ltm_hf.training import LTMTrainer, LTMTrainingArguments

HubStub = runpy.run_path(str(Path(__file__).parents[1] / "hub_stub.py"))["HubStub"]
DATA = "HuggingFaceFW/fineweb-edu"
FIGURES = {  # of a card, by what evaluation calls them
    "paper": {"bound": "loss", "nll": "nll", "kl": "kl", "no_latents": "no_latents"},
    "memory": {"prediction": "loss", "prediction_sampled": "prediction_sampled", "no_latents": "no_latents"},
}


@pytest.fixture(autouse=True)
def no_forgotten_variable(monkeypatch):
    """A name that the template reads and nobody gives it would leave a silent gap."""
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))


def section(card, title):
    """The text under a heading, and its table as a dictionary."""
    text = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card.text, re.DOTALL | re.MULTILINE)[1]
    return text, dict(re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE))


@pytest.fixture
def make_trainer(tmp_path, make_model):
    """A trainer on blocks of 16 tokens, 4 a step; it saves and evaluates every 2 of 4 steps unless told otherwise."""

    def make(folder="run", model=None, card_facts=None, trainer_class=LTMTrainer, **arguments):
        defaults = dict(
            max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, warmup_steps=0, save_strategy="steps",
            save_steps=2, eval_strategy="steps", eval_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        blocks = torch.randint(3, 61, (18, 16), generator=torch.Generator().manual_seed(0)).tolist()
        blocks = Dataset.from_dict({"input_ids": blocks})
        return trainer_class(
            make_model() if model is None else model,
            LTMTrainingArguments(output_dir=str(tmp_path / folder), **defaults | arguments),
            train_dataset=blocks,
            eval_dataset=blocks.select(range(3)),
            card_facts=card_facts,
        )

    return make


def check_card(folder, trainer, step, tokens):
    """The card in a folder is that of a step: returns it."""
    card = ModelCard.load(folder / "README.md")
    _, training = section(card, "Training")
    assert training["optimiser steps"] == str(step) and training["tokens"] == str(tokens)
    assert training["tokens of a sequence"] == "16" and training["hardware"] == "CPU"
    (metrics,) = [e for e in trainer.state.log_history if e["step"] == step and "eval_loss" in e] or [{}]
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    names = FIGURES[trainer.model.config.latent_reader]
    expected = {name: metrics[f"eval_{logged}"] for name, logged in names.items()} if metrics else {}
    expected |= {"perplexity": math.exp(metrics["eval_loss"])} if metrics else {}
    assert figures == pytest.approx(expected)
    flops = training_flops(trainer.model.config, 16).training_step
    assert section(card, "Cost")[1]["whole run (not a token)"] == f"{flops * tokens / 1e6:.2f} M"
    return card


@pytest.mark.parametrize(
    ("reader", "settings", "how"),
    [("paper", {"num_inference_steps": 3}, "by 3 inference steps"), ("memory", {}, "each token given those before it")],
)
def test_each_checkpoint_has_its_own_card(make_trainer, make_model, tmp_path, reader, settings, how):
    facts = dict(dataset_name=DATA, license="mit", language="en")
    trainer = make_trainer(model=make_model(reader), card_facts=facts, eval_steps=4, **settings)
    trainer.model.config.update(settings)  # for check_card
    trainer.train()
    first = check_card(tmp_path / "run" / "checkpoint-2", trainer, 2, 128)
    assert section(first, "Figures")[0].strip() == "Not recorded."  # and not those of another step
    last = check_card(tmp_path / "run" / "checkpoint-4", trainer, 4, 256)
    text = section(last, "Figures")[0]
    assert "± nan" not in text and how in text and f"{DATA}, held out: 3 blocks; perplexity" in text
    for card, name in ((first, "run/checkpoint-2"), (last, "run/checkpoint-4")):
        assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", [DATA])
        assert f'name = "{name}"' in card.text and "base_model" not in card.data.to_dict()

    trainer.save_model()
    assert 'name = "run"' in check_card(tmp_path / "run", trainer, 4, 256).text
    trainer.evaluate(trainer.train_dataset)  # logged as the same figures of the same step, and yet of other data
    trainer.create_model_card()
    trainer.state.log_history.pop()
    check_card(tmp_path / "run", trainer, 4, 256)


@pytest.mark.parametrize("save_steps", [1, 2])
def test_the_card_of_the_best_model_is_that_of_its_step(make_trainer, tmp_path, save_steps):
    """Of bounds 3, 2, 1, 4 the third is best; where it was not saved, Trainer loads the best that was: the second."""

    class Scripted(LTMTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_loss"] = [3.0, 2.0, 1.0, 4.0][self.state.global_step - 1]
            return output

    trainer = make_trainer(
        trainer_class=Scripted, eval_steps=1, save_steps=save_steps, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    best = 3 if save_steps == 1 else 2
    for folder, step in (("", best), ("checkpoint-2", 2), ("checkpoint-4", 4)):
        check_card(tmp_path / "run" / folder, trainer, step, 64 * step)
    saved, loaded = (load_file(tmp_path / "run" / f / "model.safetensors") for f in (f"checkpoint-{best}", ""))
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)  # the premise: that step made these weights
    trainer.evaluate()  # logged under the last step, though of the best weights
    trainer.create_model_card()
    trainer.state.log_history.pop()
    check_card(tmp_path / "run", trainer, best, 64 * best)


def test_tokens_and_steps_go_on_after_a_resume(make_trainer, tmp_path):
    make_trainer("run 1").train()
    resumed = make_trainer("run 2")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run 1" / "checkpoint-2"))
    cards = [(tmp_path / run / "checkpoint-4" / "README.md").read_text() for run in ("run 1", "run 2")]
    assert cards[0].replace("run 1", "run 2") == cards[1]
    check_card(tmp_path / "run 2" / "checkpoint-4", resumed, 4, 256)


def test_last_batch_of_an_epoch_is_counted_as_it_is(make_trainer, tmp_path):
    """18 blocks: the fifth step of an epoch reads 2 of them."""
    trainer = make_trainer(max_steps=-1, num_train_epochs=2, save_steps=6)
    trainer.train()
    check_card(tmp_path / "run" / "checkpoint-6", trainer, 6, (18 + 4) * 16)


def test_several_validation_sets_and_the_baseline(make_trainer, make_model, tmp_path):
    trainer = make_trainer(model=make_model(num_latents=0), max_steps=2)
    trainer.eval_dataset = {"short": trainer.eval_dataset, "long": trainer.eval_dataset.select([0])}
    trainer.train()
    text, _ = section(ModelCard.load(tmp_path / "run" / "checkpoint-2" / "README.md"), "Figures")
    assert "short, held out: 3 blocks" in text and "long, held out: 1 blocks" in text and "bound" not in text


def test_before_training_nothing_is_known(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.model.config._name_or_path = "someone/before"
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    _, training = section(card, "Training")
    assert training["optimiser steps"] == training["tokens"] == training["tokens of a sequence"] == "not recorded"
    assert card.data.license is None and card.data.eval_results is None
    assert card.data.base_model == training["started from"] == "someone/before"


@pytest.mark.parametrize(("count", "words"), [(1, "NVIDIA H100"), (8, "8 x NVIDIA H100")])
def test_hardware_is_named_and_counted(make_trainer, monkeypatch, count, words):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    trainer = make_trainer()
    monkeypatch.setattr(LTMTrainingArguments, "device", torch.device("cuda"))
    monkeypatch.setattr(LTMTrainingArguments, "world_size", count)
    assert trainer._known_facts()["hardware"] == words


def test_arguments_of_create_model_card(make_trainer, tmp_path):
    """Trainer's own names and this card's; what is given at the call comes before what was given at the start."""
    trainer = make_trainer(card_facts={"license": "mit", "hardware": "an abacus"})
    trainer.create_model_card(
        "en", model_name="Thoughts", tags="mine", finetuned_from="a/b", tasks="text-generation", dataset="PTB",
        dataset_tags=["ptb", "wikitext"], dataset_args="plain", license="cc0-1.0",
        likelihood=Likelihood({"bound": (3.25, 0.051), "released": (2.5, 0.03)}, 123_456, 128),
    )  # fmt: skip
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (card.data.language, card.data.license, card.data.base_model) == ("en", "cc0-1.0", "a/b")
    assert "mine" in card.data.tags and "# Thoughts" in card.text
    _, training = section(card, "Training")
    assert training["data"] == "ptb, wikitext" and training["hardware"] == "an abacus"
    assert "3.250 ± 0.051" in section(card, "Figures")[0] and "released protocol" in card.text


def test_a_fact_that_no_card_has_is_refused_at_once(make_trainer):
    with pytest.raises(TypeError, match="licence"):
        make_trainer(card_facts={"licence": "mit"})


def test_a_card_that_cannot_be_written_stops_nothing(make_trainer, tmp_path, caplog):
    trainer = make_trainer(card_facts={"name": ""})
    trainer.train()
    assert trainer.state.global_step == 4 and not list((tmp_path / "run").rglob("README.md"))
    assert "name must not be empty" in caplog.text and "checkpoint-4" in caplog.text


def test_an_adapter_keeps_the_card_of_its_library(make_trainer, make_model, tmp_path):
    peft = pytest.importorskip("peft")
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    model = LTMForCausalLM.from_pretrained(tmp_path / "base")
    trainer = make_trainer(model=peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])))
    for write in (trainer.save_model, lambda: trainer.create_model_card(language="en")):
        write()
        card = ModelCard.load(tmp_path / "run" / "README.md")
        assert card.data.library_name == "peft" and "latent thought vectors" not in card.text
        assert str(tmp_path) not in card.content and card.data.tags  # the path of the base model


# In a process of its own: huggingface_hub reads HF_ENDPOINT once.
PUSH = """
import sys
import torch
from datasets import Dataset
from transformers import TrainerCallback
from ltm_hf import LTMConfig, LTMForCausalLM
from ltm_hf.training import LTMTrainer, LTMTrainingArguments

shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_latents=4)
blocks = Dataset.from_dict({"input_ids": torch.randint(3, 61, (16, 16)).tolist()})
arguments = LTMTrainingArguments(
    output_dir=sys.argv[1], max_steps=4, per_device_train_batch_size=4, save_strategy="steps", save_steps=2,
    eval_strategy="steps", eval_steps=2, report_to="none", use_cpu=True, push_to_hub=True, hub_model_id="someone/mine",
    hub_strategy="every_save", warmup_steps=0, disable_tqdm=True,
)

class Wait(TrainerCallback):  # pushes run beside the training and read the folder when they get to it
    def on_save(self, *args, **kwargs):
        trainer.push_in_progress.wait_until_done()

model = LTMForCausalLM(LTMConfig(vocab_size=61, max_position_embeddings=16, sliding_window=4, **shape))
trainer = LTMTrainer(model, arguments, train_dataset=blocks, eval_dataset=blocks.select(range(3)))
trainer.add_callback(Wait)
trainer.train()
trainer.push_to_hub(language="en", dataset="a corpus")
"""


def test_every_push_brings_the_card_and_the_code_of_its_weights(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with HubStub() as hub:
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_dummy", "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HTTPS_PROXY": "http://127.0.0.1:9"}
        environment |= {"PYTHONPATH": str(Path(ltm_hf.__file__).parents[1]), "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HUB_OFFLINE": "0"}
        result = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "run")], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
    commits = [files for files in hub.commits["someone/mine"].values() if "model.safetensors" in files]
    cards = [ModelCard(files["README.md"].decode()) for files in commits]
    steps = [section(card, "Training")[1]["optimiser steps"] for card in cards]
    assert steps == ["2", "4", "4"]  # two saves and the end
    for files, step in zip(commits, steps, strict=True):
        assert files["model.safetensors"] == (tmp_path / "run" / f"checkpoint-{step}/model.safetensors").read_bytes()
        for name in ("configuration", "generation", "modeling", "posterior"):
            assert files[f"{name}_ltm.py"] == (Path(ltm_hf.__file__).parent / f"{name}_ltm.py").read_bytes()
    for card in cards:
        assert card.data.model_name == "someone/mine" and 'name = "someone/mine"' in card.text
    assert cards[-1].data.language == "en" and section(cards[-1], "Training")[1]["data"] == "a corpus"
