import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ltm_hf import LTMForCausalLM
from ltm_hf.conversion.original import convert, main

REFERENCE = Path(__file__).parents[1] / "reference" / "mha"
PARAMS = dict(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40, max_seq_len=64, window_size=4, max_z_len=6,
    norm_eps=1e-4, rope_theta=500.0, fast_lr=0.25, num_steps=5,
)  # fmt: skip


def random_checkpoint(feed_forward=("w1", "w2", "w3"), seed=0):
    """A released checkpoint with fewer key-value heads than heads, tied."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(shape, generator=generator)

    dim, inner, keys = PARAMS["dim"], 48, 16
    weights = {"tok_embeddings.weight": draw(PARAMS["vocab_size"], dim), "norm.weight": 1 + draw(dim)}
    for layer in range(PARAMS["n_layers"]):
        prefix = f"layers.{layer}."
        for attention in ("attention", "cross_attention"):
            for name, rows in (("wq", dim), ("wk", keys), ("wv", keys), ("wo", dim)):
                weights[f"{prefix}{attention}.{name}.weight"] = draw(rows, dim)
        for name, shape in zip(feed_forward, ((inner, dim), (dim, inner), (inner, dim)), strict=True):
            weights[f"{prefix}feed_forward.{name}.weight"] = draw(*shape)
        for norm in ("attention_norm", "cross_attention_norm", "ffn_norm"):
            weights[f"{prefix}{norm}.weight"] = 1 + draw(dim)
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    return weights


def released_forward(weights, params, ids, latents):
    """Logits as the released code computes them: rotary on interleaved pairs, by complex numbers."""
    heads, kv_heads = params["n_heads"], params["n_kv_heads"]
    size = params["dim"] // heads
    length, per_layer = ids.shape[1], params["max_z_len"] // params["n_layers"]
    stride = params["max_seq_len"] // params["max_z_len"]

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weights[f"{name}.weight"]

    def rotate(x, positions):
        frequencies = params["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        turns = torch.polar(torch.ones(len(positions), size // 2), positions[:, None] * frequencies)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[None, :, None]).flatten(-2)

    def attention(x, source, prefix, positions, source_positions, mask=None):
        q, k, v = (
            F.linear(y, weights[f"{prefix}.{name}.weight"]).unflatten(-1, (-1, size))
            for y, name in ((x, "wq"), (source, "wk"), (source, "wv"))
        )
        q, k = rotate(q, positions), rotate(k, source_positions)
        k, v = (y.repeat_interleave(heads // kv_heads, dim=2) for y in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        return F.linear(mixed, weights[f"{prefix}.wo.weight"])

    positions = torch.arange(length)
    back = positions[:, None] - positions[None]
    window = (back >= 0) & (back < params["window_size"])
    h = weights["tok_embeddings.weight"][ids]
    for layer in range(params["n_layers"]):
        name = f"layers.{layer}."
        x = norm(h, f"{name}attention_norm")
        h = h + attention(x, x, f"{name}attention", positions, positions, window)
        x = norm(h, f"{name}cross_attention_norm")
        z = latents[:, layer * per_layer : (layer + 1) * per_layer]
        h = h + attention(x, z, f"{name}cross_attention", positions, torch.arange(per_layer) * stride)
        x = norm(h, f"{name}ffn_norm")
        w1, w2, w3 = (weights[f"{name}feed_forward.{w}.weight"] for w in ("w1", "w2", "w3"))
        h = h + F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
    return F.linear(norm(h, "norm"), weights["output.weight"])


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint and its hyper-parameters; returns both paths."""

    def write(weights, suffix=".safetensors", **params):
        path, params_path = tmp_path / f"weights{suffix}", tmp_path / "params.json"
        save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
        params_path.write_text(json.dumps({k: v for k, v in (PARAMS | params).items() if v is not None}))
        return path, params_path

    return write


@pytest.fixture
def inputs(make_noise):
    return torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0)), make_noise(2, 6, 32)


def assert_same(model, weights, inputs):
    """The converted model gives the logits of the released code."""
    ids, latents = inputs
    with torch.no_grad():
        logits = model(ids, latents=latents.view(2, 2, 3, 32)).logits
    torch.testing.assert_close(logits, released_forward(weights, PARAMS, ids, latents), rtol=1e-4, atol=1e-4)


def test_the_other_implementation_reproduces_the_reference():
    weights, expected = (load_file(REFERENCE / f"{name}.safetensors") for name in ("original_weights", "expected"))
    params = json.loads((REFERENCE / "params.json").read_text())
    logits = released_forward(weights, params, expected["input_ids"], expected["latents"])
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_grouped_heads(write, inputs):
    weights = random_checkpoint()
    model = convert(*write(weights))
    assert type(model) is LTMForCausalLM and model.dtype == torch.float32
    assert_same(model, weights, inputs)


def test_configuration(write):
    config = convert(*write(random_checkpoint())).config
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (32, 48, 40)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 2)
    assert (config.sliding_window, config.max_position_embeddings) == (4, 64)
    assert (config.num_latents, config.latent_position_stride) == (6, 10)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-4, 500.0)
    assert (config.bos_token_id, config.eos_token_id) == (39, 38)
    assert config.latent_reader == "paper" and config.latent_gate_init is None and config.inference_kl_weight == 1
    assert (config.inference_method, config.inference_lr_schedule) == ("adamw", "cosine")
    assert (config.inference_learning_rate, config.num_inference_steps, config.inference_noise) == (0.25, 5, "fixed")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("place", ["_orig_mod.{}", "{}"])
def test_files_and_names_of_compiled_models(write, inputs, suffix, place):
    weights = random_checkpoint()
    named = {place.format(name): tensor for name, tensor in weights.items()}
    assert_same(convert(*write(named, suffix)), weights, inputs)
    inner = {name.replace("attention.", "attention._orig_mod."): tensor for name, tensor in weights.items()}
    assert_same(convert(*write(inner, suffix)), weights, inputs)


def test_weights_under_the_key_model(write, inputs):
    weights = random_checkpoint()
    assert_same(convert(*write({"model": weights, "iteration": 7}, ".pt")), weights, inputs)


def test_other_names_of_the_feed_forward(write, inputs):
    weights = random_checkpoint()
    names = dict(zip(("w1", "w2", "w3"), ("gate_proj", "down_proj", "up_proj"), strict=True))
    renamed = {}
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(f"feed_forward.{old}", f"feed_forward.{new}")
        renamed[name] = tensor
    assert_same(convert(*write(renamed)), weights, inputs)


@pytest.mark.parametrize("kept", ["tok_embeddings.weight", "output.weight"])
def test_files_that_hold_tied_weights_once(write, inputs, kept):
    weights = random_checkpoint()
    dropped = {"tok_embeddings.weight", "output.weight"} - {kept}
    model = convert(*write({name: tensor for name, tensor in weights.items() if name not in dropped}))
    assert model.config.tie_word_embeddings
    assert_same(model, weights, inputs)


def test_untied_weights_stay_untied(write, inputs):
    weights = random_checkpoint()
    weights["output.weight"] = weights["output.weight"].flip(0).contiguous()
    model = convert(*write(weights))
    assert not model.config.tie_word_embeddings
    assert_same(model, weights, inputs)


def test_half_precision_checkpoints_become_float32(write):
    weights = {name: tensor.bfloat16() for name, tensor in random_checkpoint().items()}
    model = convert(*write(weights))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.embed_tokens.weight, weights["tok_embeddings.weight"].float())


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("layers.1.cross_attention.wo.weight", "model.layers.1.cross_attn.o_proj.weight"),
        ("norm.weight", "model.norm.weight"),
        ("layers.0.feed_forward.w1.weight", "model.layers.0.mlp.gate_proj.weight"),
    ],
)
def test_missing_tensors_are_named(write, missing, named):
    weights = random_checkpoint()
    del weights[missing]
    with pytest.raises(ValueError, match=f"lacks.*{named}"):
        convert(*write(weights))


@pytest.mark.parametrize("name", ["freqs_cis", "layers.0.attention.bias", "layers.2.attention_norm.weight"])
def test_left_over_tensors_are_named(write, name):
    named = "model.layers.2.input_layernorm.weight" if name.startswith("layers.2") else name
    with pytest.raises(ValueError, match=f"without a place in the model: {named}"):
        convert(*write(random_checkpoint() | {name: torch.ones(32)}))


def test_two_names_for_one_tensor(write):
    weights = random_checkpoint()
    doubled = weights | {"layers.0.feed_forward.gate_proj.weight": weights["layers.0.feed_forward.w1.weight"] + 1}
    with pytest.raises(ValueError, match="gate_proj"):
        convert(*write(doubled))


def test_misshapen_tensors_are_named(write):
    weights = random_checkpoint()
    weights["layers.0.attention.wo.weight"] = torch.ones(32, 16)
    with pytest.raises(ValueError, match=r"self_attn.o_proj.weight should be \(32, 32\).*\(32, 16\)"):
        convert(*write(weights))


@pytest.mark.parametrize("name", ["wq", "wk"])
@pytest.mark.parametrize("shape", [(24, 32), (33, 32), (32,)])
def test_misshapen_rotary_projections_are_named(write, name, shape):
    weights = random_checkpoint()
    weights[f"layers.0.attention.{name}.weight"] = torch.ones(shape)
    with pytest.raises(ValueError, match=f"(self_attn.{name[1]}_proj|attention.{name}).weight"):
        convert(*write(weights))


def test_missing_files(write, tmp_path):
    weights, params = write(random_checkpoint())
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        convert(tmp_path / "nothing.safetensors", params)
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        convert(weights, tmp_path / "nothing.json")


def test_unknown_suffix(write, tmp_path):
    _, params = write(random_checkpoint())
    (tmp_path / "weights.txt").write_text("")
    with pytest.raises(ValueError, match="weights.txt"):
        convert(tmp_path / "weights.txt", params)


def test_pickled_code_is_not_run(write, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    with pytest.raises(Exception, match="(?i)weights.only"):
        convert(*write(random_checkpoint() | {"trap": Trap()}, ".pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["dim", "window_size", "max_z_len"])
def test_missing_hyper_parameters_are_named(write, name):
    with pytest.raises(ValueError, match=name):
        convert(*write(random_checkpoint(), **{name: None}))


def test_latents_without_positions_are_not_supported(write):
    with pytest.raises(ValueError, match="use_z_pos_emb"):
        convert(*write(random_checkpoint(), use_z_pos_emb=False))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_command_line(write, inputs, tmp_path, capsys, suffix):
    weights = random_checkpoint()
    files = write(weights, suffix)
    main([*map(str, files), str(tmp_path / "converted")])
    assert "parameters written to" in capsys.readouterr().out
    model, converted = LTMForCausalLM.from_pretrained(tmp_path / "converted"), convert(*files)
    assert model.config.to_diff_dict() == converted.config.to_diff_dict() | {
        name: model.config.to_diff_dict()[name] for name in ("architectures", "dtype")
    }
    for name, tensor in converted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert_same(model, weights, inputs)


def test_command_line_errors(write, tmp_path, capsys):
    files = write(random_checkpoint() | {"freqs_cis": torch.ones(2)})
    for arguments, words in (
        ([*map(str, files), str(tmp_path / "out")], "freqs_cis"),
        ([str(tmp_path / "nothing.pt"), str(files[1]), str(tmp_path / "out")], "nothing.pt"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
