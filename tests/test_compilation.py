"""torch.compile, torch.export and flex_attention: one graph, no graph for each step, the same figures.

The backends "eager" and "aot_eager" need no C++ compiler.
"""

import functools
import io
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.export import Dim
from transformers import CompileConfig

from ltm_hf import infer_posterior
from ltm_hf.memory_ltm import prior_state

GREEDY = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same_posterior(actual, expected, tolerance=1e-5):
    for name in ("mean", "log_variance", "elbo_trace"):
        close(getattr(actual, name), getattr(expected, name), tolerance)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


ONE_LAYER = dict(num_hidden_layers=1, num_latents=2)  # a graph takes a second a layer


@pytest.fixture
def make_model(make_model):
    return functools.partial(make_model, **ONE_LAYER)


@pytest.fixture
def latents(model):
    return model.sample_prior(3, seed=0)


@pytest.fixture
def make_paper(make_model):
    return functools.partial(make_model, latent_reader="paper")


@pytest.fixture
def mask(ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return mask


def num_graphs():
    return counters["stats"]["unique_graphs"]


# ------------------------------------------------------------------ forward


@pytest.mark.parametrize("given", ["nothing", "latents", "mask and labels", "keys and values"])
@torch.no_grad()
def test_forward(model, reader, ids, latents, mask, given):
    inputs = {} if given == "nothing" else dict(latents=latents)
    if given == "mask and labels":
        inputs |= dict(attention_mask=mask, labels=ids.clone(), use_cache=False)
    elif given == "keys and values":
        if reader == "memory":
            pytest.skip("A memory's latents have none.")
        inputs = dict(latent_key_values=model.project_latents(latents))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for tokens in (ids, ids.flip(0)):
        actual, expected = compiled(tokens, **inputs), model(tokens, **inputs)
        close(actual.logits, expected.logits)
        if "labels" in inputs:
            close(actual.loss, expected.loss)
    assert num_graphs() == 1


def test_training_step(make_model, reader, ids, latents):
    """With latents that are given; that of a memory is in `test_memory_model.py`."""
    results = []
    for compiled in (False, True):
        model = make_model(latent_reader=reader).train()
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = step(ids, latents=latents, labels=ids, use_cache=False).loss
        loss.backward()
        results.append((loss, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]))
    (loss, gradients), (compiled_loss, compiled_gradients) = results
    close(compiled_loss, loss)
    for actual, expected in zip(compiled_gradients, gradients, strict=True):
        close(actual, expected)


# ------------------------------------------------------------------ inference


def compile_module(model):
    model.compile(fullgraph=True, backend="eager")
    return model


def compile_forward(model):
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    return model


def compile_wrapper(model):
    return torch.compile(model, fullgraph=True, backend="eager")


@pytest.mark.parametrize("compiled", [compile_module, compile_forward, compile_wrapper])
def test_inference_compiles_once(make_paper, make_ids, compiled):
    """A graph for what no latent changes, one for all fast steps of all batches, and one for the slow step.

    Though the fast loop freezes the decoder.
    """
    model, plain = compiled(make_paper(attention_dropout=0.1).train()), make_paper()
    for seed in range(3):
        ids = make_ids(seed=seed)
        posterior = infer_posterior(model, ids, num_inference_steps=5)
        # A compiled head takes all tokens at once, another the scored ones: sums in another order.
        same_posterior(posterior, plain.infer_posterior(ids, num_inference_steps=5), 1e-4)
        assert num_graphs() == (3 if seed else 2)
        model(ids, latents=posterior.mean, labels=ids.clone(), use_cache=False).loss.backward()
        assert num_graphs() == 3


def test_gradient_of_a_compiled_decoder(make_paper, ids, mask):
    """The joint graph of forward and backward, with padding, by two methods."""
    model = make_paper()
    model.compile(fullgraph=True, backend="aot_eager")
    for method in ("natural", "adamw"):
        same_posterior(
            model.infer_posterior(ids, mask, inference_method=method),
            make_paper().infer_posterior(ids, mask, inference_method=method),
        )
    assert num_graphs() == 2


def no_more_graphs():
    """Nor none because there are too many already."""
    return torch._dynamo.config.patch(error_on_recompile=True, fail_on_recompile_limit_hit=True)


def test_lengths_share_a_graph(make_paper, make_ids):
    model = make_paper()
    model.compile(fullgraph=True, backend="eager", dynamic=True)
    model.infer_posterior(make_ids(length=12))
    with no_more_graphs():
        for length in (7, 20):
            ids = make_ids(length=length)
            same_posterior(model.infer_posterior(ids), make_paper().infer_posterior(ids))


def learn(model, ids):
    return model(ids, labels=ids, latent_state=prior_state(model.config, 3), loss_reduction="mean").loss


def write(model, ids):
    return model.generate(ids, **GREEDY)


@pytest.mark.parametrize("use", [learn, write])
def test_a_memory_compiles_no_more_than_its_layers(make_model, make_ids, use):
    """No graph for each batch, length or chunk."""
    model = make_model()
    model.compile(backend="eager", dynamic=True)
    use(model, make_ids(length=12))
    with no_more_graphs():
        ids = make_ids(length=20)
        close(use(model, ids), use(make_model(), ids), 1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(make_paper, ids):
    model = make_paper()
    model.compile(fullgraph=True)
    same_posterior(model.infer_posterior(ids), make_paper().infer_posterior(ids), 1e-4)


# ------------------------------------------------------------------ decoding


def compiled_decoding(backend="eager"):
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return dict(cache_implementation="static", compile_config=config, **GREEDY)


@pytest.mark.parametrize(
    "overrides",
    [dict(latent_reader="paper"), dict(latent_reader="paper", sliding_window=None), dict(num_latents=0)],
    ids=str,
)
def test_generate_with_a_compiled_static_cache(make_model, make_ids, pad_rows, overrides):
    model, plain = make_model(**overrides), make_model(**overrides)
    rows = [make_ids(1, length, seed=length)[0] for length in (5, 7)]
    batch, mask = pad_rows(rows, "left", extra=0)
    expected = plain.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(batch, attention_mask=mask, **compiled_decoding()), expected)
    assert hasattr(model, "_compiled_call") and 0 < num_graphs() < GREEDY["max_new_tokens"] - 1
    with no_more_graphs():  # another prompt, other latents
        batch = batch.roll(1, dims=1).clamp(min=3)
        assert torch.equal(model.generate(batch, **compiled_decoding()), plain.generate(batch, **GREEDY))


def test_a_memory_with_a_compiled_static_cache(make_model, ids):
    """Its layers are compiled, and it runs as it is."""
    model, settings = make_model(), compiled_decoding()
    settings["compile_config"].fullgraph = False
    assert torch.equal(model.generate(ids, **settings), make_model().generate(ids, **GREEDY))
    assert hasattr(model, "_compiled_call") and 0 < num_graphs() < GREEDY["max_new_tokens"] - 1


def test_generate_with_a_compiled_model(make_paper, ids):
    """Prefill, decoding and inference of the latents all go through the compiled module, in inference mode too."""
    model, expected = make_paper(), make_paper().generate(ids, **GREEDY)
    model.compile(fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.equal(model.generate(ids + 0, cache_implementation="static", **GREEDY), expected)
        with no_more_graphs():
            assert torch.equal(model.generate(ids + 0, cache_implementation="static", **GREEDY), expected)


# ------------------------------------------------------------------ export


@pytest.mark.parametrize("case", ["memory", "paper", "paper, projected"])
@torch.no_grad()
def test_export(make_model, ids, mask, make_ids, case):
    """Latents are an input, batch and length are free; saved and loaded."""
    model = make_model(latent_reader=case.split(",")[0])
    given, thoughts = "latents", model.sample_prior(3, seed=0)
    if case == "paper, projected":
        given, thoughts = "latent_key_values", model.project_latents(thoughts)
    inputs = {"input_ids": ids, "attention_mask": mask, given: thoughts}
    free = {name: {0: Dim.DYNAMIC} if name == given else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    program = torch.export.export(model, (), inputs | dict(use_cache=False), dynamic_shapes=free | dict(use_cache=None))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    others = {"input_ids": make_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long), given: thoughts[1:]}
    for call in (inputs, others):
        close(exported(**call, use_cache=False).logits, model(**call, use_cache=False).logits)


def test_gradient_of_an_exported_decoder(model, ids, latents):
    exported = torch.export.export(model, (), dict(input_ids=ids, latents=latents, use_cache=False)).module()
    gradients = []
    for decoder in (model, exported):
        z = latents.clone().requires_grad_()
        logits = decoder(input_ids=ids, latents=z, use_cache=False).logits
        gradients.append(torch.autograd.grad(logits.square().mean(), z)[0])
    assert gradients[0].abs().max() > 1e-3
    close(*gradients)


# ------------------------------------------------------------------ flex_attention


@pytest.fixture
def flex_model(make_model, reader):
    model = make_model(latent_reader=reader)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # transformers compiles flex_attention itself
        yield model


@torch.no_grad()
def test_flex_attention_is_sdpa(flex_model, model, ids, latents, mask):
    for inputs in (dict(), dict(latents=latents), dict(latents=latents, attention_mask=mask)):
        close(flex_model(ids, **inputs).logits, model(ids, **inputs).logits, 1e-4)
    assert torch.equal(flex_model.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_flex_attention_has_no_backward_on_the_cpu(flex_model, model, ids):
    """Inference takes sdpa there, and gives flex_attention back, after an error too."""
    same_posterior(
        flex_model.infer_posterior(ids, num_inference_steps=2), model.infer_posterior(ids, num_inference_steps=2), 1e-4
    )
    assert flex_model.config._attn_implementation == "flex_attention"

    def stop(*step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flex_model.infer_posterior(ids, callback=stop)
    assert flex_model.config._attn_implementation == "flex_attention"
