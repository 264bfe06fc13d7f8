"""Models of others: whole, fit for their tokenizers, and nobody's code run unasked."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ltm_hf import LTMForCausalLM
from ltm_hf.evaluation.sections import Subject
from ltm_hf.loading import load_causal_lm

STRANGER = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import PreTrainedConfig
class StrangerConfig(PreTrainedConfig):
    model_type = "stranger"
"""


@pytest.fixture
def folder(chat_folder, tmp_path):
    return shutil.copytree(chat_folder, tmp_path / "model")


def test_loads_our_own_without_its_code(folder):
    """Also one whose code would fail."""
    for path in folder.glob("*.py"):
        path.write_text("raise RuntimeError('somebody ran this')")
    for trust in (False, True):
        model, tokenizer = load_causal_lm(str(folder), trust_remote_code=trust)
        assert type(model) is LTMForCausalLM and not model.training and len(tokenizer) == model.config.vocab_size


def test_loads_any_other(folder):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(vocab_size=280, **sizes)).save_pretrained(folder)
    assert type(Subject.load(str(folder)).model) is LlamaForCausalLM


def test_runs_a_strangers_code_by_a_flag_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark, code = tmp_path / "ran", "stranger.StrangerConfig"
    auto_map = {"AutoConfig": code, "AutoModelForCausalLM": code, "AutoTokenizer": [code, None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": auto_map}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": auto_map}))
    (folder / "stranger.py").write_text(STRANGER.format(mark=str(mark)))
    with pytest.raises((OSError, ValueError)):
        Subject.load(str(folder))
    assert not mark.exists()
    with pytest.raises(Exception):  # noqa: B017  whatever, after it ran
        Subject.load(str(folder), trust_remote_code=True)
    assert mark.exists()


def test_weights_that_are_not_finite(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(weights | {name: weights[name].index_fill(0, torch.tensor([3]), torch.inf)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"is not finite in {name}"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("name", ["", "/nowhere", "../nowhere", "a/b/c", "~/nowhere", "-x"])
def test_no_folder_and_no_name_of_the_hub(name):
    with pytest.raises(OSError, match="There is no folder"):
        load_causal_lm(name)


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]"])
def test_a_tokenizer_that_cannot_be_read(folder, text):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="The tokenizer of .* cannot be read"):
        load_causal_lm(str(folder))
