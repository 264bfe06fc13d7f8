import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, LlamaConfig

from ltm_hf import LTMConfig
from ltm_hf.configuration_ltm import InferenceSettings


def test_defaults_are_filled_in():
    config = LTMConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_latents=12)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert (config.latents_per_layer, config.latent_shape) == (4, (3, 4, 64))
    assert config.latent_position_stride == 1024 // 12
    assert config.layer_types == ["sliding_attention"] * 3
    assert config.rope_parameters["rope_theta"] == 10000.0


def test_without_window_and_latents():
    config = LTMConfig(num_latents=0, sliding_window=None)
    assert config.layer_types == ["full_attention"] * 3
    assert config.latents_per_layer == 0 and config.latent_position_stride is None


def test_more_latents_than_positions():
    assert LTMConfig(num_latents=2048 * 3, max_position_embeddings=1024).latent_position_stride == 1


def test_layers_that_read_latents():
    config = LTMConfig(cross_attention_layers=[-1, 0])
    assert config.cross_attention_layers == config.reading_layers == [0, 2]
    assert config.latent_shape == (2, 12, 512)
    assert LTMConfig().reading_layers == [0, 1, 2] and LTMConfig(num_latents=0).reading_layers == []


def test_rope_theta_is_folded_in():
    assert LTMConfig(rope_theta=500.0).rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(num_latents=25), r"num_latents \(25\).*multiple of num_hidden_layers \(3\)"),
        (dict(num_latents=-3), "num_latents"),
        (dict(latent_position_stride=0), "latent_position_stride must be 1 or more, got 0"),
        (dict(initializer_range=math.nan), "initializer_range must be 0 or more and finite, got nan"),
        (dict(rms_norm_eps=0.0), "rms_norm_eps must be positive and finite, got 0.0"),
        (dict(attention_dropout=1.0), "attention_dropout must be at least 0 and below 1, got 1.0"),
        (dict(initial_mean_std=-1), "initial_mean_std must be 0 or more and finite, got -1"),
        (dict(hidden_act="silou"), "hidden_act must be one of .*silu.*; got 'silou'"),
        (dict(rope_theta=0.0), "rope_theta must be positive and finite, got 0.0"),
        (dict(rope_parameters={"rope_type": "yarm"}), "rope_type must be one of default, .*; got 'yarm'"),
        (dict(num_latents=3, cross_attention_layers=[0, 2]), r"num_latents \(3\).*the cross_attention_layers \(2\)"),
        (dict(cross_attention_layers=[]), r"cross_attention_layers.*the 3 \(0 to 2\), got \[\]"),
        (dict(cross_attention_layers=[3]), r"cross_attention_layers.*\[3\]"),
        (dict(cross_attention_layers=[2, -1]), r"cross_attention_layers.*different.*\[2, -1\]"),
        (
            dict(cross_attention_value_projection=False, num_key_value_heads=4),
            "cross_attention_value_projection.*got 4, 8, 64",
        ),
        (
            dict(cross_attention_value_projection=False, head_dim=32),
            "cross_attention_value_projection.*got 8, 8, 32 and 512",
        ),
        (dict(cross_attention_keys="values"), "cross_attention_keys must be latents or embeddings.*'values'"),
        (dict(cross_attention_keys="embeddings"), "cross_attention_keys='embeddings' needs a latent_embedding_std"),
        (dict(latent_embedding_std=-1), "latent_embedding_std.*-1"),
        (dict(cross_attention_query_std=float("nan")), "cross_attention_query_std.*nan"),
        (dict(num_attention_heads=8, num_key_value_heads=3), "num_attention_heads.*num_key_value_heads"),
        (dict(hidden_size=30, num_attention_heads=8), "hidden_size.*num_attention_heads"),
        (dict(hidden_size=24, num_attention_heads=8), "head_dim must be even.*3"),
        (dict(sliding_window=1), "sliding_window"),
        (dict(self_attention="gpt2"), "self_attention.*mistral, qwen2, qwen3.*gpt2"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(num_inference_steps=-1), "num_inference_steps.*-1"),
        (dict(inference_learning_rate=0), "inference_learning_rate.*positive"),
        (dict(inference_learning_rate=-0.1), "inference_learning_rate.*positive"),
        (dict(inference_learning_rate=float("nan")), "inference_learning_rate.*finite"),
        (dict(inference_learning_rate=float("inf")), "inference_learning_rate.*finite"),
        (dict(inference_weight_decay=-0.1), "inference_weight_decay"),
        (dict(inference_optimizer="sgd"), "inference_optimizer.*natural, lbfgs, map, adamw.*sgd"),
        (dict(inference_lr_schedule="linear"), "inference_lr_schedule.*constant, cosine, inverse.*linear"),
        (dict(inference_precision="full"), "inference_precision.*stein, unit.*full"),
        (dict(inference_noise="none"), "inference_noise.*fresh, fixed.*none"),
    ],
)
def test_values_that_do_not_fit_are_named(overrides, words):
    with pytest.raises(ValueError, match=words):
        LTMConfig(**overrides)


@pytest.mark.parametrize("overrides", [dict(num_latents="24"), dict(inference_noise=1), dict(sliding_window=2.5)])
def test_wrong_types(overrides):
    with pytest.raises(StrictDataclassFieldValidationError):
        LTMConfig(**overrides)
    (name, value), config = next(iter(overrides.items())), LTMConfig()
    with pytest.raises(StrictDataclassFieldValidationError):
        setattr(config, name, value)


def test_settings_take_overrides_that_are_given():
    config = LTMConfig(num_inference_steps=7, inference_learning_rate=0.2)
    settings = InferenceSettings.of(config, num_inference_steps=None, inference_learning_rate=0.4)
    assert (settings.num_inference_steps, settings.inference_learning_rate) == (7, 0.4)
    assert InferenceSettings.of(config, num_inference_steps=0).num_inference_steps == 0


@pytest.mark.parametrize("overrides", [{}, dict(num_latents=0), dict(sliding_window=None, num_latents=6)])
def test_round_trip(tmp_path, overrides):
    config = LTMConfig(num_key_value_heads=2, inference_optimizer="adamw", rope_theta=500.0, **overrides)
    config.save_pretrained(tmp_path)
    for loaded in (LTMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LTMConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
    assert LTMConfig.from_pretrained(tmp_path, num_inference_steps=9).num_inference_steps == 9


def test_overrides_of_a_saved_one_are_as_if_given_at_once(tmp_path):
    LTMConfig(sliding_window=None, inference_method="langevin").save_pretrained(tmp_path)
    load = LTMConfig.from_pretrained
    assert load(tmp_path).layer_types == ["full_attention"] * 3
    config = load(tmp_path, sliding_window=4, num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_latents=6)
    assert config.layer_types == ["sliding_attention"] * 2 and config.num_hidden_layers == 2
    assert (config.head_dim, config.num_key_value_heads, config.latent_position_stride) == (16, 4, 170)
    assert load(tmp_path, max_position_embeddings=2048).latent_position_stride == 42  # as the weights have learned
    assert InferenceSettings.of(load(tmp_path, inference_method="variational")).inference_learning_rate == 0.5
    with pytest.raises(ValueError, match=r"num_latents \(25\)"):
        load(tmp_path, num_latents=25)
    with pytest.raises(ValueError, match="layer_types follow from sliding_window"):
        load(tmp_path, layer_types=["sliding_attention"] * 3)


def test_a_window_changed_later_takes_effect():
    config = LTMConfig(sliding_window=None)
    config.sliding_window, config.num_hidden_layers = 4, 2
    assert config.layer_types == ["sliding_attention"] * 2


def test_saved_folder_names_the_code_of_all_three_classes(tmp_path):
    LTMConfig().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_ltm.LTMConfig",
        "AutoModel": "decoder_ltm.LTMModel",
        "AutoModelForCausalLM": "modeling_ltm.LTMForCausalLM",
    }


def test_configuration_of_another_architecture(tmp_path):
    LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama"):
        LTMConfig.from_pretrained(tmp_path)
