import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, LlamaConfig

from ltm_hf import LTMConfig
from ltm_hf.configuration_ltm import InferenceSettings

PAPER = dict(latent_reader="paper", num_latents=24)


def paper(**fields):
    return LTMConfig(**PAPER | fields)


def test_defaults_are_filled_in():
    """Of the default, a memory, and of the paper's reader."""
    sizes = dict(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_latents=12)
    memory, layered = LTMConfig(**sizes), paper(**sizes)
    for config in (memory, layered):
        assert (config.num_key_value_heads, config.head_dim) == (4, 16)
        assert config.layer_types == ["sliding_attention"] * 3
        assert config.rope_parameters["rope_theta"] == 10000.0
    assert memory.has_memory and not layered.has_memory
    assert (memory.latents_per_layer, memory.latent_shape, memory.reading_layers) == (12, (1, 12, 64), [])
    assert (layered.latents_per_layer, layered.latent_shape, layered.reading_layers) == (4, (3, 4, 64), [0, 1, 2])
    assert (memory.latent_chunk, memory.inference_kl_weight, memory.latent_position_stride) == (8, 0.01, None)
    assert (layered.inference_kl_weight, layered.latent_position_stride) == (1.0, 1024 // 12)
    assert LTMConfig(sliding_window=4).latent_chunk == 4 and LTMConfig(sliding_window=None).latent_chunk == 8


@pytest.mark.parametrize("fields", [{}, dict(latent_reader="paper"), dict(inference_method="amortized")], ids=str)
def test_the_twin(fields):
    """The same whatever the reader."""
    config = LTMConfig(**{"latent_reader": "paper"} | fields | dict(num_latents=0, sliding_window=None))
    assert config.layer_types == ["full_attention"] * 3
    assert not (config.has_memory or config.has_encoder or config.reading_layers or config.latents_per_layer)
    assert config.latent_position_stride is None


def test_more_latents_than_positions():
    assert paper(num_latents=2048 * 3, max_position_embeddings=1024).latent_position_stride == 1


def test_layers_that_read_latents():
    config = paper(latent_layers=[-1, 0])
    assert config.latent_layers == config.reading_layers == [0, 2]
    assert config.latent_shape == (2, 12, 512)


def test_rope_theta_is_folded_in():
    assert LTMConfig(rope_theta=500.0).rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (dict(num_latents=-3), r"num_latents \(-3\) must be 0 or a multiple"),
        (dict(latent_reader="memo"), "latent_reader must be one of memory, paper; got 'memo'"),
        (dict(latent_chunk=0), r"latent_chunk must be at least 1 and at most sliding_window \(256\).*got 0"),
        (dict(latent_chunk=17, sliding_window=16), r"latent_chunk.*\(16\).*got 17"),
        (dict(latent_layers=[0]), "latent_layers is for latent_reader='paper'"),
        (dict(latent_gate_init=None), "latent_gate_init must be a number for latent_reader='memory'"),
        (dict(hidden_size=36, head_dim=4), r"'memory' needs a hidden_size \(36\) that is a multiple"),
        (
            dict(inference_method="adamw"),
            "'memory' infers in closed form, with inference_method='natural'; got 'adamw'",
        ),
        (dict(inference_learning_rate=0.5), "in closed form, with inference_learning_rate=None; got 0.5"),
        (dict(inference_lr_schedule="cosine"), "in closed form, with inference_lr_schedule=None; got 'cosine'"),
        (dict(inference_noise="fixed"), "in closed form, with inference_noise='fresh'; got 'fixed'"),
        (dict(inference_tolerance=0.1), "in closed form, with inference_tolerance=None; got 0.1"),
        (PAPER | dict(num_latents=25), r"num_latents \(25\).*multiple of num_hidden_layers \(3\)"),
        (PAPER | dict(num_latents=3, latent_layers=[0, 2]), r"num_latents \(3\).*the latent_layers \(2\)"),
        (PAPER | dict(latent_layers=[]), r"latent_layers.*the 3 \(0 to 2\), got \[\]"),
        (PAPER | dict(latent_layers=[3]), r"latent_layers.*\[3\]"),
        (PAPER | dict(latent_layers=[2, -1]), r"latent_layers.*different.*\[2, -1\]"),
        (dict(latent_position_stride=0), "latent_position_stride must be 1 or more, got 0"),
        (dict(initializer_range=math.nan), "initializer_range must be 0 or more and finite, got nan"),
        (dict(rms_norm_eps=0.0), "rms_norm_eps must be positive and finite, got 0.0"),
        (dict(attention_dropout=1.0), "attention_dropout must be at least 0 and below 1, got 1.0"),
        (dict(hidden_act="silou"), "hidden_act must be one of .*silu.*; got 'silou'"),
        (dict(rope_theta=0.0), "rope_theta must be positive and finite, got 0.0"),
        (dict(rope_parameters={"rope_type": "yarm"}), "rope_type must be one of default, .*; got 'yarm'"),
        (dict(num_attention_heads=8, num_key_value_heads=3), "num_attention_heads.*num_key_value_heads"),
        (dict(hidden_size=30, num_attention_heads=8), "hidden_size.*num_attention_heads"),
        (dict(hidden_size=24, num_attention_heads=8), "head_dim must be even.*3"),
        (dict(sliding_window=1), "sliding_window"),
        (dict(self_attention="gpt2"), "self_attention.*mistral, qwen2, qwen3.*gpt2"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(num_inference_steps=-1), "num_inference_steps.*-1"),
        (dict(inference_kl_weight=0), "inference_kl_weight must be positive and finite, got 0"),
        (PAPER | dict(inference_learning_rate=-0.1), "inference_learning_rate.*positive"),
        (PAPER | dict(inference_learning_rate=float("nan")), "inference_learning_rate.*finite"),
        (PAPER | dict(inference_method="sgd"), "inference_method.*natural, adamw, lbfgs.*sgd"),
        (
            PAPER | dict(inference_lr_schedule="linear"),
            "inference_lr_schedule.*None, constant, cosine, inverse.*linear",
        ),
        (PAPER | dict(inference_noise="none"), "inference_noise.*fresh, fixed.*none"),
        (PAPER | dict(inference_tolerance=math.inf), "inference_tolerance must be None or finite, got inf"),
    ],
    ids=lambda given: " ".join(map(str, given)) if isinstance(given, dict) else "",
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
    config = paper(num_inference_steps=7, inference_learning_rate=0.2, inference_lr_schedule="cosine")
    settings = InferenceSettings.of(config, num_inference_steps=None, inference_learning_rate=0.4)
    assert (settings.num_inference_steps, settings.inference_learning_rate) == (7, 0.4)
    assert InferenceSettings.of(config, num_inference_steps=0).num_inference_steps == 0
    other = InferenceSettings.of(config, inference_method="adamw", inference_lr_schedule="constant")
    assert (other.inference_learning_rate, other.inference_lr_schedule) == (None, "constant")  # not the other method's


def test_of_a_memory_a_call_chooses_the_steps_alone():
    """What it is already may be said."""
    config = LTMConfig()
    assert InferenceSettings.of(config, num_inference_steps=3, inference_method="natural").num_inference_steps == 3
    for given in (dict(inference_method="adamw"), dict(inference_kl_weight=1.0), dict(inference_noise="fixed")):
        with pytest.raises(ValueError, match=f"^{next(iter(given))} is not a memory's to choose at each call"):
            InferenceSettings.of(config, **given)


OTHERS = [
    {},
    dict(num_latents=0),
    dict(sliding_window=None, latent_chunk=5),
    PAPER,
    PAPER | dict(inference_method="langevin"),
    PAPER | dict(num_latents=6, latent_layers=[-1]),
]


@pytest.mark.parametrize("overrides", OTHERS, ids=str)
def test_round_trip(tmp_path, overrides):
    config = LTMConfig(num_key_value_heads=2, rope_theta=500.0, **overrides)
    config.save_pretrained(tmp_path)
    for loaded in (LTMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LTMConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
    assert LTMConfig.from_pretrained(tmp_path, num_inference_steps=9).num_inference_steps == 9


def test_overrides_of_a_saved_one_are_as_if_given_at_once(tmp_path):
    paper(sliding_window=None, inference_method="langevin").save_pretrained(tmp_path)
    load = LTMConfig.from_pretrained
    assert load(tmp_path).layer_types == ["full_attention"] * 3
    config = load(tmp_path, sliding_window=4, num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_latents=6)
    assert config.layer_types == ["sliding_attention"] * 2 and config.num_hidden_layers == 2
    assert (config.head_dim, config.num_key_value_heads, config.latent_position_stride) == (16, 4, 170)
    assert load(tmp_path, max_position_embeddings=2048).latent_position_stride == 42  # as the weights have learned
    memory = load(tmp_path, latent_reader="memory", inference_method="natural", sliding_window=4)
    assert (memory.latent_chunk, memory.inference_kl_weight) == (4, 0.01)
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
