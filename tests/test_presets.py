import pytest
import torch

from ltm_hf import PRESETS, LTMForCausalLM, preset_config


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
    assert config.cross_attention_gate_init is None
    settings = (config.inference_optimizer, config.inference_learning_rate, config.inference_lr_schedule)
    assert settings == ("adamw", 0.3, "constant")
    assert (config.num_inference_steps, config.inference_noise) == (steps, "fresh")


def test_tiny_preset_runs():
    model = LTMForCausalLM(preset_config("ltm-tiny"))
    ids = torch.arange(2, 42).view(2, 20)
    posterior = model.infer_posterior(ids)
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
