import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ltm_hf import LTMForCausalLM
from ltm_hf.conversion.backbone import convert_config, freeze_all_but_new, from_pretrained_backbone
from ltm_hf.costs.flops import count_parameters
from ltm_hf.memory_ltm import prior_state
from ltm_hf.training import LTMTrainer, LTMTrainingArguments

LAYERS, NUM_LATENTS = 2, 6
NEW = ("model.reader", "cross_attn", "cross_attention_layernorm", "cross_attention_gate")

# Weights are larger than a real model starts with, so that distant tokens and rotary positions matter.
SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
SCALED = {
    "linear": dict(factor=2.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    "longrope": dict(
        factor=4.0, short_factor=[1.5] * 4, long_factor=[4.0] * 4, original_max_position_embeddings=16
    ),
}  # fmt: skip


def rope(kind="default", theta=10000.0):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **SCALED.get(kind, {})))


def llama(**options):
    return make_backbone(LlamaForCausalLM, LlamaConfig(**SHAPE | options))


def mistral(**options):
    return make_backbone(MistralForCausalLM, MistralConfig(**SHAPE | options))


def qwen2(**options):
    return make_backbone(Qwen2ForCausalLM, Qwen2Config(**SHAPE | options))


def qwen3(**options):
    return make_backbone(Qwen3ForCausalLM, Qwen3Config(**SHAPE | dict(head_dim=16) | options))


def make_backbone(model_class, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms that are not one, biases that are not zero
                parameter.data = 1 + 0.3 * torch.randn(parameter.shape)
    return model


BACKBONES = {
    "llama": lambda: llama(),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, one key-value head a head": lambda: llama(num_key_value_heads=4),
    "llama, wider heads": lambda: llama(head_dim=16),
    "llama, rope theta": lambda: llama(**rope(theta=50.0)),
    "llama, norm and activation": lambda: llama(rms_norm_eps=0.1, hidden_act="gelu"),
    **{f"llama, {kind} rope": lambda kind=kind: llama(**rope(kind)) for kind in SCALED},
    "mistral": lambda: mistral(sliding_window=None),
    "mistral, window": lambda: mistral(sliding_window=4),
    "mistral, tied": lambda: mistral(sliding_window=4, tie_word_embeddings=True, head_dim=16),
    "qwen2": lambda: qwen2(**rope(theta=1e6)),
    "qwen2, tied": lambda: qwen2(tie_word_embeddings=True),
    "qwen2, window": lambda: qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=0),
    "qwen2, window for no layer": lambda: qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=LAYERS),
    "qwen2, yarn rope": lambda: qwen2(**rope("yarn")),
    "qwen3": lambda: qwen3(**rope(theta=1e6)),
    "qwen3, tied": lambda: qwen3(tie_word_embeddings=True, num_key_value_heads=4),
    "qwen3, window": lambda: qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=0),
}


def assert_same_logits(model, backbone, ids, make_noise, scale=1.0):
    """Without latents; by the paper's reader with any, by a memory with latents of zero and while it holds nothing."""
    latents = scale * make_noise(len(ids), *model.config.latent_shape)
    with torch.no_grad():
        expected = backbone(ids).logits
        for given in (None, latents * (not model.config.has_memory)):
            torch.testing.assert_close(model(ids, latents=given).logits, expected, rtol=0, atol=1e-5)
        if model.config.has_memory:
            logits = model(ids, latent_state=prior_state(model.config, len(ids))).logits
            first, rest = (difference.abs().max() for difference in (logits - expected).split([8, ids.shape[1] - 8], 1))
            assert first < 1e-5 < 1e-4 < rest  # a chunk of tokens; what it has taught changes the next


def is_new(name):
    return any(module in name for module in NEW)


# ------------------------------------------------------------------ what it computes


@pytest.mark.parametrize(
    ("name", "reader"), [*((name, "paper") for name in BACKBONES), *((name, "memory") for name in ("llama", "qwen3"))]
)
def test_logits_are_the_backbones(name, reader, make_ids, make_noise):
    backbone = BACKBONES[name]()
    model = from_pretrained_backbone(backbone, NUM_LATENTS, latent_reader=reader)
    assert type(model) is LTMForCausalLM and not model.training
    assert model.config.tie_word_embeddings == backbone.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    # Once within, once beyond the positions that some kinds of rope treat apart.
    for length in (12, 70):
        assert_same_logits(model, backbone, make_ids(2, length), make_noise, scale=3.0)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(("reader", "gate"), [("paper", None), ("paper", 0.1), ("memory", 1)])
def test_gates(reader, gate, ids, make_noise):
    backbone = llama()
    model = from_pretrained_backbone(backbone, NUM_LATENTS, latent_reader=reader, latent_gate_init=gate)
    assert model.config.latent_gate_init == gate
    assert_same_logits(model, backbone, ids, make_noise)


@pytest.mark.parametrize("name", ["llama", "llama, llama3 rope", "mistral, window", "qwen2, window", "qwen3"])
def test_greedy_text_is_the_backbones(name, make_ids, pad_rows):
    backbone = BACKBONES[name]()
    model = from_pretrained_backbone(backbone, NUM_LATENTS, latent_reader="paper", pad_token_id=0)
    prompts, mask = pad_rows([make_ids(1, length, seed=length)[0] for length in (5, 9)], "left")
    settings = dict(attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(prompts, **settings), backbone.generate(prompts, **settings))


@pytest.mark.parametrize("make", [llama, lambda: mistral(sliding_window=10), qwen2, qwen3])
def test_a_narrower_window(make, make_ids, make_noise):
    backbone = make()
    model = from_pretrained_backbone(backbone, NUM_LATENTS, sliding_window=6, latent_reader="paper")
    assert model.config.sliding_window == 6 and set(model.config.layer_types) == {"sliding_attention"}
    assert_same_logits(model, backbone, make_ids(2, 6), make_noise)
    ids = make_ids(2, 20)
    with torch.no_grad():
        logits, expected = model(ids).logits, backbone(ids).logits
    torch.testing.assert_close(logits[:, :6], expected[:, :6], rtol=0, atol=1e-5)
    assert (logits[:, 6:] - expected[:, 6:]).abs().amax(dim=-1).min() > 1e-3


def test_without_latents(ids):
    backbone = llama()
    model = from_pretrained_backbone(backbone, 0)
    assert set(model.state_dict()) == set(backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, backbone(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_attention_weights_are_the_backbones(name, ids):
    backbone = BACKBONES[name]()
    model = from_pretrained_backbone(backbone, NUM_LATENTS)
    with torch.no_grad():
        for each in (model, backbone):
            each.set_attn_implementation("eager")
        ours, theirs = (each(ids, output_attentions=True).attentions for each in (model, backbone))
    assert len(ours) == LAYERS
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3, tied"])
def test_parameters_are_counted(name, reader):
    model = from_pretrained_backbone(BACKBONES[name](), NUM_LATENTS, latent_reader=reader)
    assert count_parameters(model.config) == model.num_parameters()


# ------------------------------------------------------------------ what it keeps


def test_configuration():
    backbone = mistral(
        sliding_window=8, bos_token_id=3, eos_token_id=[2, 5], pad_token_id=7, head_dim=16, rms_norm_eps=1e-4,
        attention_dropout=0.1, **rope("yarn", theta=500.0),
    )  # fmt: skip
    overrides = dict(latent_reader="paper", num_inference_steps=5, attention_dropout=0.0)
    config = from_pretrained_backbone(backbone, NUM_LATENTS, **overrides).config
    for name in set(SHAPE) - {"bos_token_id", "eos_token_id"} | {"head_dim", "rms_norm_eps", "rope_parameters"}:
        assert getattr(config, name) == getattr(backbone.config, name), name
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, [2, 5], 7)
    assert (config.sliding_window, config.num_latents, config.latent_position_stride) == (8, NUM_LATENTS, 10)
    assert (config.num_inference_steps, config.attention_dropout) == (5, 0.0)
    assert config.rope_parameters is not backbone.config.rope_parameters
    assert from_pretrained_backbone(backbone, 5).config.has_memory  # unless told otherwise


def test_no_token_ids_where_the_backbone_has_none():
    config = convert_config(LlamaConfig(**SHAPE | dict(bos_token_id=None, eos_token_id=None)), NUM_LATENTS)
    assert config.bos_token_id is config.eos_token_id is config.pad_token_id is None


def test_dtype_and_generation_settings(tmp_path):
    backbone = llama().bfloat16()
    backbone.generation_config.update(do_sample=True, temperature=0.7, repetition_penalty=1.1)
    backbone.save_pretrained(tmp_path)
    for given in (backbone, tmp_path, str(tmp_path)):
        model = from_pretrained_backbone(given, NUM_LATENTS)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        kept = model.generation_config
        assert (kept.do_sample, kept.temperature, kept.repetition_penalty) == (True, 0.7, 1.1)
        kept.num_inference_steps = 3
        model.save_pretrained(tmp_path / "saved")
        kept = LTMForCausalLM.from_pretrained(tmp_path / "saved").generation_config
        assert (kept.do_sample, kept.temperature, kept.repetition_penalty) == (True, 0.7, 1.1)
        assert kept.num_inference_steps == 3


def test_the_backbone_is_left_as_it_was():
    backbone = BACKBONES["llama, yarn rope"]()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    settings = [config.to_dict() for config in (backbone.config, backbone.generation_config)]
    model = from_pretrained_backbone(backbone, NUM_LATENTS, freeze_backbone=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.generation_config.update(temperature=0.1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert [config.to_dict() for config in (backbone.config, backbone.generation_config)] == settings


@pytest.mark.parametrize("name", ["llama", "llama, tied", "mistral, window", "qwen2, tied", "qwen3"])
def test_from_a_folder(name, tmp_path, ids, make_noise):
    backbone = BACKBONES[name]()
    backbone.save_pretrained(tmp_path)
    model = from_pretrained_backbone(tmp_path, NUM_LATENTS, latent_reader="paper")
    assert_same_logits(model, backbone, ids, make_noise)


@pytest.mark.parametrize("name", ["llama, llama3 rope", "qwen2", "qwen3"])
def test_save_and_reload(name, reader, tmp_path, ids, make_noise):
    backbone = BACKBONES[name]()
    from_pretrained_backbone(backbone, NUM_LATENTS, sliding_window=16, latent_reader=reader).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is LTMForCausalLM and model.config.sliding_window == 16
    assert (tmp_path / "modeling_ltm.py").exists()
    assert_same_logits(model, backbone, ids, make_noise)


# ------------------------------------------------------------------ training


@pytest.fixture
def train(tmp_path):
    def train(model, steps):
        generator = torch.Generator().manual_seed(0)
        # Halves that repeat each other, further apart than the window sees.
        half = torch.randint(3, 61, (64, 12), generator=generator)
        arguments = LTMTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            warmup_steps=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        blocks = Dataset.from_dict({"input_ids": half.repeat(1, 2).tolist()})
        trainer = LTMTrainer(model, arguments, train_dataset=blocks)
        trainer.train()
        return trainer.state.log_history[:steps]

    return train


@pytest.mark.parametrize(
    ("gate", "freeze_backbone"), [(None, False), (0.1, False), (0.1, True)], ids=["bare", "gated", "frozen"]
)
def test_the_papers_latents_come_alive(train, freeze_backbone, gate):
    torch.manual_seed(0)
    model = from_pretrained_backbone(
        llama(initializer_range=0.1), NUM_LATENTS, sliding_window=4, freeze_backbone=freeze_backbone,
        latent_reader="paper", latent_gate_init=gate, num_inference_steps=8,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kl = [entry["kl"] for entry in train(model, 6)]
    # Behind the zero projection there is nothing to infer; the first step opens it.
    assert kl[0] == 0 and min(kl[1:]) > 1e-5  # nats a token
    for layer in model.model.layers:
        assert (layer.cross_attn.o_proj.weight != 0).all()
    assert_trained(model, before, freeze_backbone)
    ids = torch.arange(3, 27).view(2, 12)
    posterior = model.eval().infer_posterior(ids)
    assert (posterior.kl_divergence() > 0).all()
    with torch.no_grad():
        assert not torch.equal(model(ids, latents=posterior.mean).logits, model(ids).logits)


@pytest.mark.parametrize("freeze_backbone", [False, True])
def test_a_memory_learns(train, freeze_backbone):
    torch.manual_seed(0)
    model = from_pretrained_backbone(
        llama(initializer_range=0.1), NUM_LATENTS, sliding_window=4, freeze_backbone=freeze_backbone, latent_chunk=4
    )
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gains = [entry["gain"] for entry in train(model, 6)]
    assert all(gain != 0 for gain in gains)
    assert_trained(model, before, freeze_backbone)


def assert_trained(model, before, freeze_backbone):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (freeze_backbone and not is_new(name)), name


def test_freezing(tmp_path, reader):
    model = from_pretrained_backbone(llama(), NUM_LATENTS, freeze_backbone=True, latent_reader=reader)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == is_new(name), name
    model.save_pretrained(tmp_path)
    reloaded = LTMForCausalLM.from_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in reloaded.parameters())
    freeze_all_but_new(reloaded)
    trainable = {name for name, parameter in reloaded.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name in reloaded.state_dict() if is_new(name)}


# ------------------------------------------------------------------ refusals


def refuse(match, given, num_latents=NUM_LATENTS, **arguments):
    with pytest.raises(ValueError, match=match):
        from_pretrained_backbone(given, num_latents, **arguments)


def test_other_architectures_are_refused_by_name(tmp_path, model):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    gpt2.save_pretrained(tmp_path / "gpt2")
    model.save_pretrained(tmp_path / "ltm")
    for given, name in ((gpt2, "gpt2"), (tmp_path / "gpt2", "gpt2"), (model, "ltm"), (tmp_path / "ltm", "ltm")):
        refuse(f"'{name}'.*llama, mistral, qwen2, qwen3", given)
    refuse("Linear", torch.nn.Linear(2, 2))


def test_biases_are_refused_by_name():
    for backbone, option in ((llama, "attention_bias"), (llama, "mlp_bias"), (qwen3, "attention_bias")):
        refuse(f"{option}=True", backbone(**{option: True}))


def test_quantized_weights_are_refused_by_name(tmp_path):
    llama().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    refuse("quantization_config", tmp_path)


def test_mixed_layers_are_refused_by_name():
    for config in (
        MistralConfig(**SHAPE, layer_types=["full_attention", "sliding_attention"]),
        Qwen2Config(**SHAPE, use_sliding_window=True, max_window_layers=1),
    ):
        with pytest.raises(ValueError, match="layer_types.*full_attention, sliding_attention"):
            convert_config(config, NUM_LATENTS)
    with pytest.raises(ValueError, match="layer_types.*chunked_attention"):
        convert_config(MistralConfig(**SHAPE, layer_types=["chunked_attention"] * LAYERS), NUM_LATENTS)


def test_arguments_are_refused_by_name():
    backbone = llama()
    refuse("num_latents .5.* multiple of num_hidden_layers", backbone, num_latents=5, latent_reader="paper")
    refuse("sliding_window", backbone, sliding_window=1)
    refuse("sliding_window .9. .*the backbone's .8.", mistral(sliding_window=8), sliding_window=9)
    refuse("latent_gate_init must not be 0", backbone, latent_gate_init=0)
    refuse("latent_gate_init must be a number", backbone, latent_gate_init=None)
    refuse("latent_chunk must be", backbone, sliding_window=4, latent_chunk=5)
    refuse("latent_reader must be one of", backbone, latent_reader="none")
    refuse("hidden_size", backbone, hidden_size=64)
    refuse("self_attention", backbone, self_attention="qwen2")
    refuse("num_inference_step:", backbone, num_inference_step=3)
    refuse("num_inference_steps", backbone, num_inference_steps=-1)
    refuse("freeze_backbone", backbone, num_latents=0, freeze_backbone=True)


def test_missing_left_over_and_misshapen_tensors_are_named(tmp_path):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)

    def refuse_weights(match, changed):
        save_file(changed, path, metadata={"format": "pt"})
        refuse(match, tmp_path)

    norm, up_proj = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
    refuse_weights(f"lacks tensors: {norm}", {name: weights[name] for name in weights if name != norm})
    refuse_weights("without a place in the model: model.layers.1.extra.weight",
                   weights | {"model.layers.1.extra.weight": torch.ones(2)})  # fmt: skip
    refuse_weights(f"another shape.*: {up_proj}", weights | {up_proj: torch.ones(47, 32)})


def test_models_that_are_no_language_models():
    config = LlamaConfig(**SHAPE)
    refuse("lacks tensors: lm_head.weight", LlamaModel(config))
    refuse("lm_head.weight|score.weight", LlamaForSequenceClassification(config))


def test_weights_that_are_not_in_memory():
    with torch.device("meta"):
        backbone = LlamaForCausalLM(LlamaConfig(**SHAPE))
    refuse("not in memory.*model.embed_tokens.weight", backbone)


def test_files_that_are_missing_or_pickled(tmp_path):
    with pytest.raises(OSError, match="nothing"):
        from_pretrained_backbone(tmp_path / "nothing", NUM_LATENTS)
    backbone = llama()
    backbone.config.save_pretrained(tmp_path)
    torch.save(backbone.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        from_pretrained_backbone(tmp_path, NUM_LATENTS)
