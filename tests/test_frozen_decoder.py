"""Inference takes the decoder as a fixed function: what no latent changes is computed once, all is left as it was."""

import functools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ltm_hf import LatentPosterior


def same_posterior(actual, expected, tolerance=1e-5):
    for name in ("mean", "log_variance"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


def test_weights_get_no_gradient(thinker, ids):
    parameters = dict(thinker.named_parameters())
    fixed = parameters["model.norm.weight"]
    fixed.requires_grad_(False)
    thinker(ids, labels=ids, latents=thinker.sample_prior(3, seed=0)).loss.backward()
    parameters["model.layers.0.mlp.up_proj.weight"].grad = None
    before = {name: None if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    posterior = thinker.infer_posterior(ids, num_inference_steps=2)
    for name, parameter in parameters.items():
        assert parameter.requires_grad == (parameter is not fixed), name
        assert torch.equal(parameter, weights[name]), name
        assert (parameter.grad is None) == (before[name] is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, before[name]), name
    for tensor in (posterior.mean, posterior.log_variance, posterior.elbo_trace):
        assert not tensor.requires_grad and tensor.grad_fn is None


def test_generators_are_left_alone(thinker, ids):
    before = torch.get_rng_state()
    posterior = thinker.infer_posterior(ids)
    thinker.elbo(ids, posterior, num_particles=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert thinker.infer_posterior(ids) == posterior


def test_dropout_in_training_does_not_reach_inference(make_model, reader, ids):
    """The attention's own, and that of a module which someone put in, as adapters are."""
    model = make_model(latent_reader=reader, attention_dropout=0.5)
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Dropout(0.5))
    model.train()
    before = torch.get_rng_state()
    posterior = model.infer_posterior(ids, num_inference_steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    same_posterior(posterior, make_model(latent_reader=reader).infer_posterior(ids, num_inference_steps=2))
    assert all(module.training for module in model.modules())
    assert model.model.layers[0].self_attn.attention_dropout == model.model.norm[1].p == 0.5


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_others_train_the_model_meanwhile(make_model, reader, ids, attention):
    """What another thread does between two steps of inference, done in turns."""
    model = make_model(latent_reader=reader, attention_dropout=0.3)
    expected = model.infer_posterior(ids, num_inference_steps=4)
    model.set_attn_implementation(attention)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = set()

    def train(step, latents, bound):
        assert model.config._attn_implementation == attention
        model.set_attn_implementation("sdpa")  # flex_attention has no backward on a CPU
        with torch.enable_grad():
            loss = model(ids, labels=ids).loss
            loss.backward()
        model.set_attn_implementation(attention)
        assert all(p.grad is not None for p in model.model.layers[0].mlp.parameters())
        losses.add(loss.item())
        optimizer.step()
        optimizer.zero_grad()

    same_posterior(model.infer_posterior(ids, num_inference_steps=4, callback=train), expected)
    assert len(losses) == 4  # of dropout, which is theirs


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_decoder_is_frozen_inside_and_free_after_an_error(model, ids, wrapped):
    """Copies of its modules are; the model itself where something has taken hold of one, as offloading does."""
    if wrapped:
        model.model.norm.forward = functools.partial(type(model.model.norm).forward, model.model.norm)
    seen = []

    def look(module, arguments):
        seen.append([parameter.requires_grad for parameter in module.parameters()])

    def stop(step, latents, bound):
        assert not latents.requires_grad
        assert any(parameter.requires_grad for parameter in model.parameters()) is not wrapped
        raise KeyboardInterrupt

    model.train().model.register_forward_pre_hook(look)
    with pytest.raises(KeyboardInterrupt):
        model.infer_posterior(ids, callback=stop)
    assert seen and not any(map(any, seen))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rows", [1, 3])
def test_inside_no_grad_and_inference_mode(thinker, way, make_ids, make_noise, rows, context):
    """Whatever is given there."""
    ids, shape = make_ids(rows), (rows, *thinker.config.latent_shape)
    given = {}
    if way != "amortized":
        given["initial_posterior"] = (make_noise(*shape), make_noise(*shape, seed=1) - 1)
    if way not in ("amortized", "memory"):
        given["epsilon"] = make_noise(*shape, seed=2)

    def infer(**inputs):
        inputs = {"input_ids": ids.clone()} | inputs
        for name, value in given.items():
            inputs[name] = value.clone() if torch.is_tensor(value) else LatentPosterior(*(x.clone() for x in value))
        return thinker.infer_posterior(**inputs, num_inference_steps=2)

    expected = infer()
    with context():
        for inputs in ({}, dict(attention_mask=torch.ones_like(ids), labels=ids.clone())):
            actual = infer(**inputs)
            assert not torch.is_grad_enabled()
            same_posterior(actual, expected)
            assert not actual.mean.is_inference()


@pytest.mark.parametrize("inside", [True, False])
def test_a_model_built_in_inference_mode(make_thinker, way, ids, inside):
    with torch.inference_mode():
        model = make_thinker(way)
    with torch.inference_mode(inside):
        posterior = model.infer_posterior(ids, num_inference_steps=2)
    same_posterior(posterior, make_thinker(way).infer_posterior(ids, num_inference_steps=2))


def test_gradient_checkpointing(make_model, reader, ids, pad_rows):
    """With inputs that want a gradient too, as adapters make them."""
    batch, mask = pad_rows([ids[0], ids[1, :7]], "left")
    model = make_model(latent_reader=reader).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    expected = make_model(latent_reader=reader).infer_posterior(batch, mask, num_inference_steps=4)
    for _ in range(2):
        same_posterior(model.infer_posterior(batch, mask, num_inference_steps=4), expected)


# ------------------------------------------------------------------ what all steps share


def mark_as_sharded(model):
    """As DeepSpeed's ZeRO-3 does."""
    model.lm_head.weight.ds_id, model.lm_head.weight.ds_status = 0, "available"


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "ZeRO-3"])
def test_what_reads_no_latents_is_computed_once(paper_model, ids, monkeypatch, sharded):
    expected = paper_model.infer_posterior(ids, num_inference_steps=5)
    if sharded:
        mark_as_sharded(paper_model)
    calls, decoder = Counter(), paper_model.model
    for name in (
        "embed_tokens", "rotary_emb", "layers.0.input_layernorm", "layers.0.self_attn", "layers.0.cross_attn",
        "layers.0.mlp", "layers.1.self_attn", "norm",
    ):  # fmt: skip
        module = decoder.get_submodule(name)
        monkeypatch.setattr(
            module,
            "forward",
            lambda *args, name=name, forward=module.forward, **kwargs: calls.update([name]) or forward(*args, **kwargs),
        )
    same_posterior(paper_model.infer_posterior(ids, num_inference_steps=5), expected)
    a_call = 5 if sharded else 1
    assert list(calls.values()) == [a_call, 2 * a_call, a_call, a_call, 5, 5, 5, 5]  # rotary: of tokens and of latents


class Operations(TorchDispatchMode):
    """How often each operation runs inside."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "ZeRO-3"])
def test_targets_are_found_once(paper_model, ids, pad_rows, sharded):
    """With padding and labels: what is scored, and where; and the posterior is the same to the last bit."""
    batch, mask = pad_rows([ids[0], ids[1, :7]], "left")
    labels = batch.masked_fill(torch.arange(batch.shape[1]) < 9, -100)
    expected = paper_model.infer_posterior(batch, mask, labels, num_inference_steps=5)
    if sharded:
        mark_as_sharded(paper_model)
    at_steps = []
    with Operations() as operations:
        actual = paper_model.infer_posterior(
            batch, mask, labels, num_inference_steps=5, callback=lambda *_: at_steps.append(operations.counts.copy())
        )
    found, shifted = (
        [counts[x] for counts in at_steps] for x in (torch.ops.aten.nonzero, torch.ops.aten.constant_pad_nd)
    )
    assert found == ([1, 2, 3, 4, 5] if sharded else [1] * 5) and shifted == [2] * 5
    assert actual == expected and torch.equal(actual.elbo_trace, expected.elbo_trace)


def test_layers_before_the_first_that_reads_latents_run_once(make_model, ids):
    options = dict(latent_reader="paper", num_hidden_layers=3, num_latents=2, latent_layers=[1])
    calls, model = [], make_model(**options)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    actual = model.infer_posterior(ids, num_inference_steps=4)
    assert calls == [0, 1, 2, 1, 2, 1, 2, 1, 2]
    naive = make_model(**options)
    mark_as_sharded(naive)  # then nothing is kept between steps
    same_posterior(actual, naive.infer_posterior(ids, num_inference_steps=4))
