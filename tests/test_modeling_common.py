"""What transformers asks of every model. What only a Latent Thought Model does is in `test_modeling.py`."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from ltm_hf import LTMForCausalLM, LTMModel

VARIANTS = {
    "memory": dict(latent_reader="memory"),
    "paper": dict(latent_reader="paper"),
    "memory, qwen3, full attention": dict(latent_reader="memory", self_attention="qwen3", sliding_window=None),
    "paper, qwen2, untied": dict(latent_reader="paper", self_attention="qwen2", tie_word_embeddings=False),
    "twin": dict(num_latents=0),
}
both_classes = pytest.mark.parametrize("model_class", [LTMModel, LTMForCausalLM])


@pytest.fixture(params=VARIANTS)
def tester(request, make_tester):
    return make_tester(**VARIANTS[request.param])


@pytest.fixture
def inputs(tester):
    return tester.prepare_config_and_inputs_for_common()[1]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------ inputs and outputs


@torch.no_grad()
@both_classes
def test_outputs_that_are_asked_for(tester, inputs, model_class):
    model = tester.make_model(model_class)
    model.set_attn_implementation("eager")  # no other returns the weights
    output = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 12, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, 12, 12)] * 2
    cross_attentions = output.cross_attentions or ()
    layers = len(tester.get_config().reading_layers)
    assert [tuple(weights.shape) for weights in cross_attentions] == [(3, 4, 12, 2)] * layers
    for weights in (*output.attentions, *cross_attentions):
        close(weights.sum(-1), torch.ones(3, 4, 12))
    assert isinstance(output.past_key_values, DynamicCache) and output.past_key_values.get_seq_length() == 12
    if not model.config.has_memory:  # which is read after the last layer
        last = output.hidden_states[-1]
        close(model.lm_head(last) if model_class is LTMForCausalLM else last, output[0])

    plain = model(**inputs, use_cache=False)
    assert plain.hidden_states is plain.attentions is plain.cross_attentions is plain.past_key_values is None
    close(plain[0], output[0])


@torch.no_grad()
@both_classes
def test_outputs_as_a_tuple(tester, inputs, model_class):
    model = tester.make_model(model_class)
    flags = dict(output_hidden_states=True, output_attentions=True, use_cache=True)
    as_tuple, named = (model(**inputs, **flags, return_dict=choice) for choice in (False, True))
    assert type(as_tuple) is tuple
    assert [type(entry) for entry in as_tuple] == [type(entry) for entry in named.to_tuple()]
    close(*([entry for entry in entries if not isinstance(entry, Cache)] for entries in (as_tuple, named.to_tuple())))


@torch.no_grad()
@both_classes
def test_embeddings_replace_ids(tester, inputs, model_class):
    model = tester.make_model(model_class)
    expected = model(**inputs)[0]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    close(model(inputs_embeds=embeds, **inputs)[0], expected)


@both_classes
def test_exactly_one_input(make_model, ids, model_class):
    model = make_model(model_class)
    with pytest.raises(ValueError, match="Exactly one of input_ids, inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="Exactly one of input_ids, inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


@torch.no_grad()
@pytest.mark.parametrize(("kept", "places"), [(1, [-1]), (3, [-3, -2, -1]), (torch.tensor([2, 5]), [2, 5])], ids=str)
def test_logits_to_keep(tester, inputs, kept, places):
    model = tester.make_model()
    close(model(**inputs, logits_to_keep=kept).logits, model(**inputs).logits[:, places])


@torch.no_grad()
def test_loss(tester, inputs):
    model, labels = tester.make_model(), inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    output = model(**inputs, labels=labels)
    logits = output.logits[:, :-1].flatten(0, 1)
    total = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    close(output.loss, total / (labels[:, 1:] != -100).sum())
    close(model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss, total / 7)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1), (torch.float64, 1e-5)], ids=str
)
def test_dtypes(tester, inputs, dtype, tolerance):
    """Latents may stay float32, as they are inferred."""
    model = tester.make_model()
    expected = model(**inputs).logits
    logits = model.to(dtype)(**inputs).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).norm() < tolerance * expected.norm()


# ------------------------------------------------------------------ attention and caches


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_implementations_agree(tester, inputs, implementation):
    eager, other, real = tester.make_model(), tester.make_model(), inputs["attention_mask"].bool()
    eager.set_attn_implementation("eager")
    other.set_attn_implementation(implementation)
    with torch.compiler.set_stance("force_eager"):  # compiling flex_attention takes longer than this whole file
        close(other(**inputs).logits[real], eager(**inputs).logits[real])
    if tester.num_latents and implementation == "sdpa":  # flex_attention has no backward on a CPU
        inputs.pop("latents")
        expected, posterior = (model.infer_posterior(**inputs, num_inference_steps=4) for model in (eager, other))
        close(posterior.mean, expected.mean, 1e-4)
        close(posterior.log_variance, expected.log_variance, 1e-4)


@torch.no_grad()
@both_classes
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_read_as_alone(tester, ids, pad_rows, model_class, side):
    """In a batch and with padding, whatever token it holds."""
    model, rows = tester.make_model(model_class), [ids[0], ids[1, :5], ids[2, :1]]
    latents = tester.prepare_config_and_inputs_for_common()[1].get("latents")
    batch, mask = pad_rows(rows, side, fill=7)
    together = model(batch, attention_mask=mask, latents=latents)[0]
    for index, row in enumerate(rows):
        alone = model(row[None], latents=None if latents is None else latents[index : index + 1])[0][0]
        close(together[index, mask[index].bool()], alone)


@torch.no_grad()
@pytest.mark.parametrize("steps", [(5, 1, 1, 1, 1, 1, 1, 1), (7, 5), (1,) * 12], ids=str)
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_caches_change_nothing(tester, inputs, cache_class, steps):
    """Far past the window, with padding on the left."""
    model = tester.make_model()
    expected = model(**inputs).logits
    cache = cache_class(config=model.config, **(dict(max_cache_len=16) if cache_class is StaticCache else {}))
    ids, mask, parts, done = inputs.pop("input_ids"), inputs.pop("attention_mask"), [], 0
    for step in steps:
        now, done = slice(done, done + step), done + step
        output = model(ids[:, now], attention_mask=mask[:, :done], past_key_values=cache, use_cache=True, **inputs)
        parts.append(output.logits)
    close(torch.cat(parts, dim=1)[mask.bool()], expected[mask.bool()])
    assert cache.get_seq_length() == 12
    if tester.sliding_window:
        assert all(layer.keys.shape[2] <= tester.sliding_window for layer in cache.layers)


# ------------------------------------------------------------------ gradients


def gradients(model, **inputs):
    """Of a random direction of the model's output: every parameter's, and the latents'."""
    latents = inputs.get("latents")
    if latents is not None:
        inputs["latents"] = latents = latents.clone().requires_grad_()
    output = model(**inputs)[0]
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients if latents is None else gradients | {"latents": latents.grad}


@both_classes
def test_every_parameter_learns(tester, inputs, model_class):
    for name, gradient in gradients(tester.make_model(model_class), **inputs).items():
        if "log_precision" not in name:  # which latents that are given have nothing to do with
            assert gradient is not None and gradient.abs().max() > 0, name
    inputs.pop("latents", None)
    for name, gradient in gradients(tester.make_model(model_class), **inputs).items():
        assert (gradient is None) == ("cross_att" in name or "reader" in name), name


@both_classes
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tester, inputs, model_class, use_reentrant):
    expected = gradients(tester.make_model(model_class).train(), **inputs)
    model, runs = tester.make_model(model_class).train(), []
    model.gradient_checkpointing_enable(dict(use_reentrant=use_reentrant))
    model.base_model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    close(gradients(model, **inputs), expected)
    assert len(runs) == 2  # once more in backward


# ------------------------------------------------------------------ weights


def from_meta(model_class, config):
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu").init_weights()
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda model_class, config: model_class(config),
        lambda model_class, config: model_class.from_pretrained(None, config=config, state_dict={}),
        from_meta,
    ],
    ids=["constructor", "checkpoint that lacks all", "meta device"],
)
@both_classes
def test_initialisation(tester, model_class, build):
    config = tester.get_config(hidden_size=128, num_hidden_layers=3, initializer_range=0.02,
                               num_latents=3 * bool(tester.num_latents))  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(model_class, config)
    for name, tensor in model.named_parameters():
        if name.endswith("bias"):
            assert (tensor == 0).all(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        elif "gate.weight" in name:
            assert (tensor == 0.5).all(), name
        elif "reader." in name:
            assert name.endswith("map.weight") or tensor.std() > 0.1 or tensor.ndim == 1  # see test_memory_model.py
        else:
            std = 0.02 / 6**0.5 if "o_proj" in name else 0.02
            assert tensor.std().item() == pytest.approx(std, rel=0.05), name
    for name, buffer in model_class(config).named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@torch.no_grad()
@both_classes
def test_round_trip(tester, inputs, tmp_path, model_class):
    model = tester.make_model(model_class, num_inference_steps=3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for auto in (model_class, AutoModel if model_class is LTMModel else AutoModelForCausalLM):
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is model_class and not loaded.training
        assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"])
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
        if model_class is LTMForCausalLM and tester.num_latents:
            ids = inputs["input_ids"]
            assert torch.equal(loaded.infer_posterior(ids).mean, model.infer_posterior(ids).mean)


@torch.no_grad()
def test_checkpoints_of_the_base_model_and_of_the_whole(tester, inputs, tmp_path):
    model = tester.make_model()
    expected = model.model(**inputs).last_hidden_state
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(base) is LTMModel and torch.equal(base(**inputs).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    whole, report = LTMForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert torch.equal(whole.model(**inputs).last_hidden_state, expected)
    assert set(report["missing_keys"]) == (set() if whole.config.tie_word_embeddings else {"lm_head.weight"})


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(make_model, tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = LTMForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


@torch.no_grad()
@pytest.mark.parametrize("size", [70, 40])
def test_resized_vocabulary(tester, inputs, tmp_path, size):
    model, kept = tester.make_model(), min(size, tester.vocab_size)
    ids = inputs["input_ids"] = inputs["input_ids"] % kept
    before = model(**inputs).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.model.embed_tokens.num_embeddings == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    ids[0, -1] = size - 1
    after = model(**inputs, labels=ids)
    assert after.logits.shape == (3, 12, size) and after.loss.isfinite()
    close(after.logits[1:, :, :kept], before[1:, :, :kept])  # with their latents
    if tester.num_latents:
        assert model.infer_posterior(ids).mean.isfinite().all()
    model.save_pretrained(tmp_path)
    assert torch.equal(LTMForCausalLM.from_pretrained(tmp_path)(**inputs).logits, after.logits)


def test_checkpoint_of_another_architecture(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="llama"):
        LTMForCausalLM.from_pretrained(tmp_path)


# ------------------------------------------------------------------ several devices


@both_classes
def test_parallel_plans(tester, model_class):
    """Every rule is for a module that is there, and every projection of a layer has a rule to split it."""
    model = tester.make_model(model_class)
    modules = {re.sub(r"\.\d+\b", ".*", name): module for name, module in model.named_modules()}
    for plan in (model.tp_plan, model.pp_plan, model.fsdp_plan):
        assert plan and set(plan) <= set(modules)
    for name, module in modules.items():
        assert name in model.tp_plan or not isinstance(module, nn.Linear) or "reader" in name, name
    if model_class is LTMForCausalLM:
        assert "lm_head" in model.tp_plan and "lm_head" in model.pp_plan and "lm_head" in model.fsdp_plan


TWO_PROCESSES = """
import sys
import torch
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig
from ltm_hf import LTMForCausalLM
from ltm_hf.memory_ltm import prior_state

def results(model):
    posterior = model.infer_posterior(ids, num_inference_steps=2)
    memory = model.config.has_memory
    read = dict(latent_state=prior_state(model.config, 3)) if memory else dict(latents=model.sample_prior(3, seed=0))
    output = model(ids, labels=ids, **read)
    loss = model(ids, labels=ids, **read, loss_reduction="mean", use_cache=False).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    tensors = [posterior.mean, posterior.log_variance, output.logits, output.loss, loss, *gradients]
    return [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]

torch.distributed.init_process_group("gloo")
ids = torch.arange(3, 39).view(3, 12)
for folder in sys.argv[1:]:
    model = LTMForCausalLM.from_pretrained(folder)
    expected = results(model)
    for setting in ("tp_size", "fsdp_size"):
        split = LTMForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**{setting: 2}))
        assert isinstance(split.model.layers[0].self_attn.q_proj.weight, DTensor)
        torch.testing.assert_close(results(split), expected, rtol=1e-4, atol=1e-4)
        settings = dict(max_new_tokens=4, do_sample=False)
        assert torch.equal(split.generate(ids, **settings), model.generate(ids, **settings))
"""


def test_two_processes_change_nothing(make_model, tmp_path):
    """Tensor parallel, where each holds half of every head's weights, and fully sharded."""
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    # The oldest transformers splits no odd vocabulary.
    for reader in ("memory", "paper"):
        make_model(latent_reader=reader, self_attention="qwen3", vocab_size=62).save_pretrained(tmp_path / reader)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*launch, tmp_path / "run.py", tmp_path / "memory", tmp_path / "paper"], capture_output=True,
                         text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "match nothing" not in run.stderr  # transformers' warning of a rule for no module
