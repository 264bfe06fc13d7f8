"""Half and mixed precision, int8 and float8, weights that lie elsewhere: near the float32 model, or equal."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import TorchAoConfig

from ltm_hf import LTMForCausalLM
from ltm_hf.likelihood_ltm import Text, negative_log_likelihood

GREEDY = dict(do_sample=False, max_new_tokens=14, min_new_tokens=14)


def distance(actual, expected):
    """Relative, of the whole tensor."""
    return ((actual - expected).norm() / expected.norm()).item()


def assert_near(actual, expected, tolerance):
    for name in ("mean", "log_variance", "elbo_trace"):
        x, y = getattr(actual, name), getattr(expected, name)
        assert x.dtype == torch.float32 and x.isfinite().all(), name
        assert distance(x, y) < tolerance, name
    assert actual.num_non_finite == 0


@pytest.fixture(params=["memory", "adamw"])
def way(request):
    """A way to infer for each reader."""
    return request.param


@pytest.fixture
def model(make_thinker, way):
    return make_thinker(way)


@pytest.fixture
def latents(model, make_noise):
    return make_noise(3, *model.config.latent_shape)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ------------------------------------------------------------------ half and mixed precision

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.2), (torch.float16, 0.02)], ids=str)


@DTYPES
def test_half_precision(model, way, folder, ids, latents, pad_rows, dtype, tolerance):
    half = LTMForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    posterior = half.infer_posterior(ids)
    assert_near(posterior, model.infer_posterior(ids), tolerance)
    with torch.no_grad():
        logits = half(ids, latents=latents).logits.float()
        assert distance(logits, model(ids, latents=latents).logits) < tolerance
        nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(dim=1)
        torch.testing.assert_close(negative_log_likelihood(half, Text.of(half, ids), latents), nll)  # summed in float32
        assert distance(half.elbo(ids, posterior).elbo, model.elbo(ids, posterior).elbo) < tolerance
    text = half.generate(ids, **GREEDY)
    assert way == "memory" or torch.equal(text, half.generate(ids, latents=posterior.mean, **GREEDY))
    assert (text == model.generate(ids, **GREEDY)).float().mean() > 0.7
    batch, mask = pad_rows([ids[0], ids[1, :7]], "left", extra=0)
    padded = half.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(padded[:1, :13], text[:1, :13])  # rounding differs later on


@DTYPES
def test_mixed_precision(make_thinker, way, ids, dtype, tolerance):
    """Both loops of a training step inside one autocast region."""
    results = []
    for enabled in (False, True):
        model = make_thinker(way).train()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            posterior = model.infer_posterior(ids)
            loss = model(ids, latents=posterior.mean, labels=ids).loss
        loss.backward()
        results.append((posterior, loss, {name: p.grad for name, p in model.named_parameters()}))
    (posterior, loss, gradients), (mixed_posterior, mixed_loss, mixed_gradients) = results
    assert_near(mixed_posterior, posterior, tolerance)
    assert mixed_loss.dtype == torch.float32 and distance(mixed_loss, loss) < tolerance
    for name, gradient in gradients.items():
        if gradient is None:  # of what a memory learns by reading
            assert mixed_gradients[name] is None and name == "model.reader.scales.log_precision"
            continue
        assert distance(mixed_gradients[name], gradient) < 2 * tolerance, name


# ------------------------------------------------------------------ int8 and float8


@pytest.fixture(params=[("Int8", 0.06), ("Float8", 0.15)], ids=["int8", "float8"])
def weights(request):
    """How torchao rounds weights, the class of the weights that it rounded, and how far at most they move logits."""
    quantization, (name, tolerance) = pytest.importorskip("torchao.quantization"), request.param
    return getattr(quantization, f"{name}WeightOnlyConfig")(), getattr(quantization, f"{name}Tensor"), tolerance


def quantized_in_place(folder, config):
    from torchao.quantization import quantize_

    model = LTMForCausalLM.from_pretrained(folder)
    quantize_(model, config)
    return model


def quantized_when_loaded(folder, config):
    return LTMForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config))


def count(model, kind):
    return sum(isinstance(parameter, kind) for parameter in model.parameters())


def num_products(model):
    """Of the layers and the reader, but for the head, which may be tied."""
    return sum(isinstance(module, torch.nn.Linear) for module in model.model.modules())


def dequantized(model, quantized, kind):
    """`model` with the weights that the quantised one stands for, in float32. A rounded head leaves its embeddings."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for name, parameter in quantized.named_parameters(remove_duplicate=False):
        weight = parameter.dequantize() if isinstance(parameter, kind) else parameter
        model.get_parameter(name).data = weight.detach().clone()
    return model


@pytest.mark.parametrize("quantize", [quantized_in_place, quantized_when_loaded])
def test_rounded_weights(make_thinker, way, folder, ids, latents, weights, quantize):
    """Latents are differentiated through rounded matrices as through the float32 matrices that they stand for."""
    config, kind, tolerance = weights
    model = quantize(folder, config)
    assert count(model, kind) >= num_products(model)
    logits = model(ids, latents=latents).logits
    assert 0.001 < distance(logits, make_thinker(way)(ids, latents=latents).logits) < tolerance
    exact = dequantized(make_thinker(way), model, kind)
    assert distance(logits, exact(ids, latents=latents).logits) < 1e-5
    posterior = model.infer_posterior(ids)
    assert_near(posterior, exact.infer_posterior(ids), 1e-4)
    expected = exact.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids + 0, **GREEDY), expected)


def test_rounded_weights_are_saved_and_reloaded(folder, ids, weights, tmp_path):
    config, kind, _ = weights
    model = quantized_when_loaded(folder, config)
    model.save_pretrained(tmp_path)
    loaded = LTMForCausalLM.from_pretrained(tmp_path)
    assert count(loaded, kind) == count(model, kind) >= num_products(model)
    assert torch.equal(loaded.infer_posterior(ids).mean, model.infer_posterior(ids).mean)
    assert torch.equal(loaded.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_float8_products(make_thinker, way, ids, latents):
    """Weights, activations and what flows back all rounded, by torchao's emulation; scales by row know no batch."""
    float8 = pytest.importorskip("torchao.float8")
    model, rounded = (make_thinker(way, initializer_range=0.1) for _ in range(2))
    config = replace(float8.Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
    float8.convert_to_float8_training(rounded, config=config, module_filter_fn=lambda _, name: name != "lm_head")
    with torch.no_grad():
        assert 0.01 < distance(rounded(ids, latents=latents).logits, model(ids, latents=latents).logits) < 0.15
    posterior = rounded.infer_posterior(ids)
    assert_near(posterior, model.infer_posterior(ids), 0.25)
    assert distance(posterior.mean, model.infer_posterior(ids).mean) > 0.01
    torch.testing.assert_close(rounded.infer_posterior(ids[1:]).mean, posterior.mean[1:])
    text = rounded.generate(ids, **GREEDY)
    assert way == "memory" or torch.equal(text, rounded.generate(ids, latents=posterior.mean, **GREEDY))


# ------------------------------------------------------------------ weights elsewhere

ON_DISK = {"model.layers.1": "disk", "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu",
           "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip


@pytest.mark.parametrize("device_map", ["cpu", "auto", ON_DISK, {"": "disk"}], ids=["cpu", "auto", "layer", "all"])
def test_device_map(model, way, folder, ids, latents, device_map, tmp_path):
    if way == "memory" and device_map is ON_DISK:
        device_map = device_map | {"model.reader": "cpu"}
    mapped = LTMForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in mapped.parameters()) == isinstance(device_map, dict)
    assert torch.equal(mapped(ids, latents=latents).logits, model(ids, latents=latents).logits)
    assert torch.equal(mapped.infer_posterior(ids).mean, model.infer_posterior(ids).mean)
    assert torch.equal(mapped.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
