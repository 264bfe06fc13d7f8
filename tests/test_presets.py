import re
from pathlib import Path

import pytest
import torch

from ltm_hf import PRESETS, LTMConfig, LTMForCausalLM, preset_config
from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.costs.flops import count_parameters, training_flops
from ltm_hf.methods_ltm import step_size


@pytest.mark.parametrize(
    ("name", "count"), [("ltm-small", 38_369_280), ("ltm-medium", 51_005_952), ("ltm-large", 76_279_296)]
)
def test_parameter_counts_of_the_paper(name, count):
    with torch.device("meta"):
        model = LTMForCausalLM(preset_config(name))
    assert model.num_parameters() == count


@pytest.mark.parametrize(
    ("name", "layers", "latents", "stride", "steps"),
    [("ltm-small", 3, 24, 42, 16), ("ltm-medium", 6, 24, 42, 16), ("ltm-large", 12, 96, 10, 64)],
)
def test_shapes_of_the_paper(name, layers, latents, stride, steps):
    config = preset_config(name)
    assert (config.vocab_size, config.sliding_window, config.max_position_embeddings) == (50258, 256, 1024)
    assert config.latent_shape == (layers, latents // layers, 512)
    assert config.latent_position_stride == stride
    assert config.num_inference_steps == steps


@pytest.mark.parametrize("name", ["ltm-tiny-paper", "ltm-small", "ltm-medium", "ltm-large"])
def test_readers_and_inference_of_the_paper(name):
    """In each layer, without a gate; AdamW at 0.3, noise fresh at each step of Algorithm 1."""
    config = preset_config(name)
    assert config.reading_layers == [*range(config.num_hidden_layers)] and config.latent_gate_init is None
    settings = InferenceSettings.of(config)
    assert (settings.inference_method, settings.inference_noise) == ("adamw", "fresh")
    assert [step_size(settings, step) for step in (0, 15)] == [0.3, 0.3]
    assert settings.inference_kl_weight == 1.0


@pytest.mark.parametrize("name", ["ltm-tiny", "ltm-small-memory"])
def test_the_default_is_a_memory(name):
    config = preset_config(name)
    assert config.has_memory and config.num_latents == LTMConfig().num_latents == 64
    assert InferenceSettings.of(config) == InferenceSettings.of(LTMConfig())


@pytest.mark.parametrize("name", ["ltm-tiny", "ltm-tiny-paper"])
def test_tiny_presets_run(name):
    model = LTMForCausalLM(preset_config(name))
    ids = torch.arange(2, 42).view(2, 20)
    posterior = model.infer_posterior(ids, num_inference_steps=2)
    output = model(ids, latents=posterior.mean, labels=ids)
    assert output.logits.shape == (2, 20, model.config.vocab_size)
    assert output.loss.isfinite()


@pytest.mark.parametrize("name", PRESETS)
def test_fields_can_be_overridden(name):
    config = preset_config(name, num_latents=0, sliding_window=None)
    assert config.num_latents == 0 and config.sliding_window is None
    assert preset_config(name).num_latents > 0


def test_unknown_preset():
    with pytest.raises(ValueError, match="ltm-huge.*ltm-small"):
        preset_config("ltm-huge")


def test_unknown_field():
    with pytest.raises(ValueError, match="no field 'num_latent'; did you mean 'num_latents'"):
        preset_config("ltm-tiny", num_latent=3)
    assert preset_config("ltm-tiny", rope_theta=500.0).rope_parameters["rope_theta"] == 500.0


def test_the_table_of_the_docs():
    """docs/train.md says of each preset what this implementation computes."""
    page = (Path(__file__).parents[1] / "docs" / "train.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| ([\d,]+) \| ([\d.]+) ([MG]) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == [*PRESETS]
    for name, reader, parameters, number, unit in rows:
        config = preset_config(name)
        assert (reader, parameters) == (config.latent_reader, f"{count_parameters(config):,}")
        assert float(number) == float(f"{training_flops(config).training_step / {'M': 1e6, 'G': 1e9}[unit]:.3g}")
