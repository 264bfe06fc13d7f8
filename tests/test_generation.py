import json

import pytest
import torch
import transformers
from accelerate import cpu_offload
from transformers import GenerationConfig, StaticCache

from ltm_hf import LatentPosterior, LTMForCausalLM, preset_config
from ltm_hf.cache_ltm import kept_latents

# Three windows and more, and no early end.
GREEDY = dict(do_sample=False, max_new_tokens=14, min_new_tokens=14)


@pytest.fixture
def prompts(make_ids):
    return make_ids(length=7)


def continuation(ids, prompt_length):
    return ids[:, prompt_length:].tolist()


def manual_greedy(model, prompt, latents, new_tokens):
    """Greedy decoding one token at a time from the whole text, without generate()."""
    ids = prompt
    for _ in range(new_tokens):
        logits = model(ids, latents=latents).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return ids


# ------------------------------------------------------------------ what is inferred, and from what


@torch.no_grad()
def test_greedy_reads_the_posterior_mean_of_the_prompt(model, prompts):
    posterior = model.infer_posterior(prompts)
    expected = manual_greedy(model, prompts, posterior.mean, 14)
    assert torch.equal(model.generate(prompts, **GREEDY), expected)
    assert torch.equal(model.generate(input_ids=prompts, **GREEDY), expected)
    assert torch.equal(model.generate(prompts, latents=posterior.mean, **GREEDY), expected)
    assert not torch.equal(model.generate(prompts, latents=torch.zeros_like(posterior.mean), **GREEDY), expected)


@pytest.mark.parametrize(
    ("kwargs", "settings"),
    [
        (dict(num_inference_steps=9), dict(num_inference_steps=9)),
        (dict(num_inference_steps=0), dict(num_inference_steps=0)),
        (
            dict(inference_optimizer="adamw", inference_learning_rate=0.3),
            dict(inference_optimizer="adamw", inference_learning_rate=0.3),
        ),
        (dict(inference_lr_schedule="constant"), dict(inference_lr_schedule="constant")),
        (dict(inference_precision="unit"), dict(inference_precision="unit")),
        (dict(inference_noise="fixed", num_inference_steps=4), dict(noise="fixed", num_inference_steps=4)),
        (dict(inference_seed=3), dict(seed=3)),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
@pytest.mark.parametrize("given_in", ["keywords", "generation config"])
def test_settings_of_one_call(model, prompts, kwargs, settings, given_in):
    posterior = model.infer_posterior(prompts, **settings)
    expected = model.generate(prompts, latents=posterior.mean, **GREEDY)
    if given_in == "keywords":
        actual = model.generate(prompts, **GREEDY, **kwargs)
    else:
        actual = model.generate(prompts, GenerationConfig(**GREEDY, **kwargs, pad_token_id=0, eos_token_id=2))
    assert torch.equal(actual, expected)
    assert not torch.allclose(posterior.mean, model.infer_posterior(prompts).mean)


def test_more_steps_have_an_effect(model, make_ids):
    prompts = make_ids(rows=8, length=7)
    few, many = (model.generate(prompts, num_inference_steps=steps, **GREEDY) for steps in (0, 16))
    assert not torch.equal(few, many)


def test_inference_runs_once_a_call(model, prompts, monkeypatch):
    calls, project = [], model.project_latents
    monkeypatch.setattr(model, "project_latents", lambda latents: calls.append(latents.shape) or project(latents))
    model.generate(prompts, num_beams=3, num_return_sequences=2, **GREEDY)
    assert calls == [(3, 2, 2, 32)]


def test_settings_are_saved_reloaded_and_in_effect(model, prompts, tmp_path):
    model.generation_config.num_inference_steps = 7
    model.generation_config.inference_seed = 5
    model.generation_config.inference_noise = "fixed"
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["num_inference_steps"], saved["inference_seed"], saved["inference_noise"]) == (7, 5, "fixed")
    loaded = LTMForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.num_inference_steps == 7
    posterior = model.infer_posterior(prompts, num_inference_steps=7, seed=5, noise="fixed")
    expected = model.generate(prompts, latents=posterior.mean, **GREEDY)
    for ours in (model, loaded):
        assert torch.equal(ours.generate(prompts, **GREEDY), expected)
    # A call's own settings go first.
    posterior = model.infer_posterior(prompts, num_inference_steps=1, seed=5, noise="fixed")
    expected = model.generate(prompts, latents=posterior.mean, **GREEDY)
    assert torch.equal(loaded.generate(prompts, num_inference_steps=1, **GREEDY), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert LTMForCausalLM.from_pretrained(tmp_path / "again").generation_config.inference_seed == 5


def test_model_without_saved_settings(model, prompts, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = LTMForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(prompts, **GREEDY), model.generate(prompts, **GREEDY))


# ------------------------------------------------------------------ decoding


@pytest.mark.parametrize("kwargs", [{}, dict(cache_implementation="static"), dict(prefill_chunk_size=3)], ids=str)
def test_caches_change_nothing(model, prompts, kwargs):
    uncached = model.generate(prompts, use_cache=False, **GREEDY)
    assert uncached.shape == (3, 21)
    assert torch.equal(model.generate(prompts, **GREEDY, **kwargs), uncached)


@pytest.mark.parametrize("overrides", [dict(sliding_window=None), dict(num_latents=0), dict(sliding_window=2)])
def test_other_models(make_model, prompts, overrides):
    model = make_model(**overrides)
    latents = model.infer_posterior(prompts).mean if model.config.num_latents else None
    expected = manual_greedy(model, prompts, latents, 14)
    assert torch.equal(model.generate(prompts, **GREEDY), expected)
    assert torch.equal(model.generate(prompts, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize("settings", [{}, dict(inference_optimizer="adamw", inference_learning_rate=0.3)], ids=str)
@pytest.mark.parametrize("mask_given", [True, False])
@pytest.mark.parametrize("kwargs", [{}, dict(num_beams=3), dict(cache_implementation="static")], ids=str)
def test_left_padded_rows_read_as_alone(model, prompts, pad_rows, settings, mask_given, kwargs):
    rows = [prompts[0], prompts[1, :3], prompts[2, :1]]
    batch, mask = pad_rows(rows, "left")
    given = dict(attention_mask=mask) if mask_given else {}
    together = continuation(model.generate(batch, **given, **GREEDY, **settings, **kwargs), batch.shape[1])
    for row, text in zip(rows, together, strict=True):
        alone = model.generate(row[None], **GREEDY, **settings, **kwargs)
        assert continuation(alone, len(row)) == [text]


def test_mask_counts_where_padding_is_an_ordinary_token(model, prompts, pad_rows):
    batch, mask = pad_rows([prompts[0], prompts[1, :3]], "left", fill=9)
    together = continuation(model.generate(batch, attention_mask=mask, **GREEDY), batch.shape[1])
    alone = continuation(model.generate(prompts[1:2, :3], **GREEDY), 3)
    assert together[1:] == alone
    assert continuation(model.generate(batch, **GREEDY), batch.shape[1])[1:] != alone


def test_padding_with_the_end_of_text_is_read(model, prompts, pad_rows):
    """As in transformers: without a mask, an end of text is a token like any other."""
    batch, _ = pad_rows([prompts[0], prompts[1, :3]], "left", fill=2)
    posterior = model.infer_posterior(batch)
    expected = model.generate(batch, latents=posterior.mean, pad_token_id=2, **GREEDY)
    assert torch.equal(model.generate(batch, pad_token_id=2, **GREEDY), expected)


@torch.no_grad()
def test_beams(model, prompts):
    latents = model.infer_posterior(prompts).mean
    settings = GREEDY | dict(num_beams=4)
    beams = model.generate(prompts, **settings)
    assert torch.equal(beams, model.generate(prompts, use_cache=False, **settings))

    def score(ids):
        log_probabilities = model(ids, latents=latents).logits[:, 6:-1].log_softmax(-1)
        return log_probabilities.gather(-1, ids[:, 7:, None]).sum()

    assert score(beams) > score(model.generate(prompts, **GREEDY))
    several = model.generate(prompts, num_return_sequences=4, **settings)
    assert torch.equal(several[::4], beams)
    assert len({tuple(row) for row in several[:4].tolist()}) == 4


def test_sampling_follows_the_global_generator(model, prompts):
    kwargs = GREEDY | dict(do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    first, second = model.generate(prompts, **kwargs), model.generate(prompts, **kwargs)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompts, **kwargs), first)
    assert not torch.equal(first, second)
    assert first.shape == (9, 21)
    assert torch.equal(first[:, :7], prompts.repeat_interleave(3, dim=0))


def test_sampling_uses_the_cache_rightly(model, prompts):
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(model.generate(prompts, **GREEDY | dict(do_sample=True), use_cache=use_cache))
    assert torch.equal(*texts)


def test_sampled_or_mean_latents(model, prompts, monkeypatch):
    seen, project = [], model.project_latents
    monkeypatch.setattr(model, "project_latents", lambda latents: seen.append(latents) or project(latents))
    posterior = model.infer_posterior(prompts)

    def read(**kwargs):
        torch.manual_seed(0)
        model.generate(prompts, max_new_tokens=2, **kwargs)
        return seen[-1]

    torch.manual_seed(0)
    sample = posterior.sample()
    assert torch.equal(read(do_sample=False), posterior.mean)
    assert torch.equal(read(), posterior.mean)
    assert torch.equal(read(do_sample=True), sample)
    assert torch.equal(read(do_sample=True, sample_latents=False), posterior.mean)
    assert torch.equal(read(do_sample=False, sample_latents=True), sample)
    plain = dict(inference_optimizer="map", inference_learning_rate=0.05)
    assert torch.equal(read(do_sample=True, **plain), model.infer_posterior(prompts, **plain).mean)
    assert torch.equal(read(generation_config=GenerationConfig(do_sample=True)), sample)


def test_greedy_calls_agree_and_leave_the_generator_alone(model, prompts):
    before = torch.get_rng_state()
    first = model.generate(prompts, **GREEDY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(model.generate(prompts, **GREEDY), first)


def test_training_state_is_left_alone(model, prompts):
    model.train()
    model(prompts, labels=prompts).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.generate(prompts, **GREEDY)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(model, prompts, context):
    expected = model.generate(prompts, **GREEDY)
    with context():
        assert torch.equal(model.generate(prompts + 0, **GREEDY), expected)
        assert torch.equal(model.generate(prompts[:1] + 0, **GREEDY), expected[:1])


# The oldest transformers cannot take rejected tokens out of a full sliding cache: the window is longer than the text.
def test_prompt_lookup(make_model, prompts):
    model, prompt = make_model(sliding_window=64), prompts[:1].repeat(1, 3)
    expected = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), expected)


@pytest.mark.parametrize(
    "overrides",
    [dict(num_hidden_layers=1, num_latents=1), dict(num_hidden_layers=3, num_latents=3), dict(num_latents=0)],
    ids=["fewer layers", "more layers", "baseline"],
)
def test_assisted_decoding(make_model, prompts, overrides):
    """A draft model only proposes: the text is the model's own. A draft has latents of its own shape, or none."""
    model, draft = make_model(sliding_window=64), make_model(sliding_window=64, **overrides)
    expected = model.generate(prompts[:1], **GREEDY)
    assert torch.equal(model.generate(prompts[:1], assistant_model=draft, **GREEDY), expected)


@pytest.mark.skipif(transformers.__version__ < "5.18", reason="5.17 cannot shorten a cache that has unwritten layers")
@pytest.mark.parametrize("layers", [None, [0], [1]])
def test_drafts_of_the_first_layers(make_model, prompts, layers):
    model = make_model(sliding_window=64, cross_attention_layers=layers)
    expected = model.generate(prompts[:1], **GREEDY)
    assert torch.equal(model.generate(prompts[:1], assistant_early_exit=1, **GREEDY), expected)
    assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("kwargs", [{}, dict(num_return_sequences=2, do_sample=True)], ids=["greedy", "samples"])
def test_a_cache_is_continued_with_its_latents(model, prompts, kwargs):
    """The first tokens' keys and values were computed under them: a posterior of the longer text does not fit."""
    torch.manual_seed(0)
    first = model.generate(prompts, return_dict_in_generate=True, **GREEDY | kwargs)
    text = dict(inputs=first.sequences, attention_mask=torch.ones_like(first.sequences))
    latents = kept_latents(first.past_key_values)["latent_key_values"].clone()
    more = model.generate(**text, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(more, model.generate(**text, latent_key_values=latents, use_cache=False, **GREEDY))
    assert not torch.equal(more, model.generate(**text, **GREEDY))


def test_a_cache_continued_with_given_latents(model, prompts):
    latents = model.sample_prior(3, seed=0)
    first = model.generate(prompts, return_dict_in_generate=True, **GREEDY)
    more = model.generate(first.sequences, latents=latents, past_key_values=first.past_key_values, **GREEDY)
    # By hand: the old text under the old latents, the new text under the new ones.
    cache = model(first.sequences[:, :-1], latents=first.posterior.mean, use_cache=True).past_key_values
    ids, inputs = first.sequences, dict(past_key_values=cache, latents=latents, use_cache=True)
    for _ in range(14):
        logits = model(ids[:, -1:], **inputs).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(more, ids)


def test_an_emptied_cache_has_no_latents(model, prompts, make_ids):
    cache = StaticCache(model.config, max_cache_len=32)
    model.generate(prompts, past_key_values=cache, **GREEDY)
    cache.reset()
    others = make_ids(length=7, seed=1)
    assert torch.equal(model.generate(others, past_key_values=cache, **GREEDY), model.generate(others, **GREEDY))


def test_bfloat16(make_model, prompts):
    model = make_model().bfloat16()
    assert torch.equal(model.generate(prompts, **GREEDY), model.generate(prompts, **GREEDY))
    latents = model.infer_posterior(prompts).mean
    assert torch.equal(model.generate(prompts, latents=latents, **GREEDY), model.generate(prompts, **GREEDY))


def test_tiny_preset():
    model = LTMForCausalLM(preset_config("ltm-tiny", pad_token_id=0))
    prompt = torch.arange(2, 10)[None]
    assert torch.equal(model.generate(prompt, **GREEDY), model.generate(prompt, use_cache=False, **GREEDY))


# ------------------------------------------------------------------ without a prompt


@torch.no_grad()
def test_unconditional(model):
    latents = model.sample_prior(4, seed=1)
    texts = model.generate(latents=latents, **GREEDY)
    assert texts.shape == (4, 15) and (texts[:, 0] == model.config.bos_token_id).all()
    assert torch.equal(texts, manual_greedy(model, torch.ones(4, 1, dtype=torch.long), latents, 14))
    assert len({tuple(text) for text in texts.tolist()}) == 4


def test_nothing_to_infer_from(model):
    """From the begin-of-text token alone: the prior's mean, or a sample of the prior when sampling."""
    assert torch.equal(model.generate(**GREEDY), model.generate(latents=torch.zeros(1, 2, 2, 32), **GREEDY))
    prompts = torch.full((4, 1), model.config.bos_token_id)
    torch.manual_seed(0)
    latents = model.infer_posterior(prompts).sample()
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert model.generate(**GREEDY | dict(do_sample=True)).shape == (1, 15)


def test_no_prompt_and_no_bos_token(make_model):
    model = make_model(bos_token_id=None)
    with pytest.raises(ValueError, match="bos_token_id"):
        model.generate(latents=model.sample_prior(2, seed=0), max_new_tokens=2)
    assert model.generate(latents=model.sample_prior(2, seed=0), bos_token_id=1, **GREEDY).shape == (2, 15)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(latents=torch.zeros(2, 2, 2, 32)), "latents for 2 sequences and prompts for 3"),
        (dict(latents=torch.zeros(3, 4, 32)), r"latents.*\(3, 4, 32\)"),
        (dict(num_inference_steps=-1), "num_inference_steps.*-1"),
        (dict(inference_learning_rate=0.0), "inference_learning_rate.*positive"),
        (dict(inference_learning_rate=float("nan")), "inference_learning_rate.*finite"),
        (dict(inference_optimizer="sgd"), "inference_optimizer.*sgd"),
        (dict(inference_lr_schedule="linear"), "inference_lr_schedule.*linear"),
        (dict(inference_noise="none"), "inference_noise.*none"),
        (dict(num_inference_step=3), "num_inference_step"),
        (dict(latent=torch.zeros(3, 2, 2, 32)), "latent"),
        (dict(attention_mask=torch.ones(3, 6)), r"attention_mask.*\(3, 7\).*\(3, 6\)"),
    ],
)
def test_bad_arguments(model, prompts, kwargs, words):
    with pytest.raises(ValueError, match=words):
        model.generate(prompts, max_new_tokens=2, **kwargs)


@pytest.mark.parametrize("kwargs", [dict(num_inference_steps=-1), dict(inference_optimizer="sgd")], ids=str)
def test_bad_settings_are_refused_with_given_latents_too(model, prompts, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        model.generate(prompts, latents=model.sample_prior(3, seed=0), max_new_tokens=2, **kwargs)


@pytest.mark.parametrize("num_latents", [0, 4])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids + 58, r"below vocab_size \(61\)"),
        (lambda ids: ids - 61, "at least 0"),
        (lambda ids: ids.float(), "int64 or int32"),
        (lambda ids: ids[0], r"\(batch, tokens\)"),
    ],
    ids=["too large", "negative", "float", "one row"],
)
def test_bad_tokens(make_model, prompts, num_latents, change, words):
    with pytest.raises(ValueError, match=words):
        make_model(num_latents=num_latents).generate(change(prompts), max_new_tokens=2)


def test_embeddings_alone_have_no_tokens_to_infer_from(model, prompts):
    embeds = model.get_input_embeddings()(prompts)
    for kwargs in ({}, dict(posterior=model.infer_posterior(prompts), num_latent_samples=2)):
        with pytest.raises(ValueError, match="input_ids"):
            model.generate(inputs_embeds=embeds, max_new_tokens=2, **kwargs)


def test_embeddings_with_given_latents(model, prompts):
    embeds, posterior = model.get_input_embeddings()(prompts), model.infer_posterior(prompts)
    expected = model.generate(prompts, **GREEDY)
    for given in (dict(posterior=posterior), dict(latents=posterior.mean)):
        assert torch.equal(model.generate(inputs_embeds=embeds, **given, **GREEDY), expected[:, 7:])
    with pytest.raises(ValueError, match="latents for 2 sequences and prompts for 3"):
        model.generate(inputs_embeds=embeds, posterior=posterior[:2], **GREEDY)


def test_baseline_takes_no_latents(make_model, prompts, model):
    with pytest.raises(ValueError, match="num_latents=0"):
        make_model(num_latents=0).generate(prompts, latents=model.sample_prior(3, seed=0), max_new_tokens=2)


@pytest.mark.parametrize(
    "enter",
    [
        lambda model, config: model.generate_batch([[3, 4, 5]], config),
        lambda model, config: model.init_continuous_batching(generation_config=config),  # transformers serve's
        lambda model, config: model.continuous_batching_context_manager(generation_config=config).__enter__(),
        lambda model, config: model.generate(torch.tensor([[3, 4, 5]]), config, cache_implementation="paged"),
    ],
    ids=["generate_batch", "init", "context manager", "paged"],
)
def test_continuous_batching_is_refused(model, enter):
    """It packs requests into one row, where each would read another's latents, or none."""
    with pytest.raises(NotImplementedError, match="latents"):
        enter(model, GenerationConfig(max_new_tokens=2))


def test_baseline_is_batched_continuously(make_model, make_ids):
    model, config = make_model(num_latents=0), GenerationConfig(max_new_tokens=9, eos_token_id=2, pad_token_id=0)
    prompts = [make_ids(1, length, seed=length) for length in (7, 2)]
    texts = model.generate_batch([prompt[0].tolist() for prompt in prompts], config, warmup=False).values()
    for prompt, text in zip(prompts, texts, strict=True):
        assert text.generated_tokens == continuation(model.generate(prompt, config), prompt.shape[1])[0]


def test_offloaded_weights_change_nothing(make_model, prompts):
    """Outside a module's forward an offloaded weight is an empty shell: nothing may read one there."""
    model = make_model()
    expected = model.generate(prompts, **GREEDY)
    unprompted = model.generate(latents=model.sample_prior(2, seed=0), **GREEDY)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    assert torch.equal(model.generate(prompts, **GREEDY), expected)
    assert torch.equal(model.generate(latents=model.sample_prior(2, seed=0), **GREEDY), unprompted)


# ------------------------------------------------------------------ thoughts the caller holds


def test_infer_once_write_many_times(model, prompts):
    posterior = model.infer_posterior(prompts, num_inference_steps=5)
    expected = model.generate(prompts, num_inference_steps=5, **GREEDY)
    assert torch.equal(model.generate(prompts, posterior=posterior, **GREEDY), expected)
    assert torch.equal(model.generate(prompts[1:], posterior=posterior[1:], **GREEDY), expected[1:])
    torch.manual_seed(0)
    first = model.generate(prompts, posterior=posterior, do_sample=True, max_new_tokens=5)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(prompts, num_inference_steps=5, do_sample=True, max_new_tokens=5))


def test_several_thoughts_for_a_prompt(model, prompts):
    """Rows by prompt, then thought, then text; a thought's greedy text is that of its sample given as latents."""
    torch.manual_seed(0)
    ids = model.generate(prompts, num_latent_samples=3, num_return_sequences=2, num_beams=2, **GREEDY)
    assert ids.shape == (len(prompts) * 6, 7 + 14)
    assert torch.equal(ids[:, :7], prompts.repeat_interleave(6, dim=0))
    torch.manual_seed(0)
    ids = model.generate(prompts, num_latent_samples=3, **GREEDY)
    torch.manual_seed(0)
    posterior = model.infer_posterior(prompts)
    for thought in range(3):
        assert torch.equal(ids[thought::3], model.generate(prompts, latents=posterior.sample(), **GREEDY))


def test_the_result_carries_the_posterior(model, prompts):
    result = model.generate(prompts, return_dict_in_generate=True, **GREEDY)
    expected = model.infer_posterior(prompts)
    assert torch.equal(result.posterior.mean, expected.mean)
    given = model.generate(prompts, latents=expected.mean, return_dict_in_generate=True, **GREEDY)
    assert given.posterior is None and torch.equal(given.sequences, result.sequences)


def test_progress_of_inference_and_early_stop(model, prompts):
    steps = []
    model.generate(prompts, num_inference_steps=3, inference_callback=lambda step, *_: steps.append(step), **GREEDY)
    assert steps == [0, 1, 2]
    steps.clear()
    model.generate(prompts, num_inference_steps=50, inference_tolerance=1e6,
                   inference_callback=lambda step, *_: steps.append(step), **GREEDY)  # fmt: skip
    assert steps == list(range(8))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_latent_samples=0), "num_latent_samples must be an integer of 1 or more"),
        (dict(num_latent_samples=2.0), "num_latent_samples must be an integer of 1 or more, got 2.0"),
        (dict(reinfer_every=1.5), "reinfer_every must be an integer of 1 or more, got 1.5"),
        (dict(inference_seed="x"), "inference_seed must be an integer, got 'x'"),
        (dict(sample_latents="no"), "sample_latents must be True, False or None, got 'no'"),
        (dict(latents=torch.full((3, 2, 2, 32), torch.nan)), "latents must be a tensor of finite numbers"),
        (dict(latents=[1]), "latents must be a tensor of finite numbers"),
        (dict(posterior=torch.zeros(3, 2, 2, 32)), "posterior must be a LatentPosterior, got Tensor"),
        (dict(posterior=LatentPosterior(*torch.full((2, 3, 2, 2, 32), torch.nan))), "posterior holds numbers.*finite"),
        (dict(generation_config={"max_new_tokens": 2}), "generation_config must be a GenerationConfig, got dict"),
        (dict(inference_tolerance=float("nan")), "inference_tolerance must be None or finite"),
    ],
)
def test_bad_thoughts_are_named(model, prompts, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **kwargs)


@pytest.mark.parametrize("num_latents", [0, 4])
@pytest.mark.parametrize("inputs", [torch.zeros(1, 0).long(), torch.zeros(0, 4).long(), [[1, 2]], "hello"], ids=str)
def test_prompts_of_nothing_are_refused(make_model, inputs, num_latents):
    with pytest.raises(ValueError, match="^(A prompt must have a token|input_ids must be a tensor)"):
        make_model(num_latents=num_latents).generate(inputs, max_new_tokens=2)


def test_no_thoughts_are_drawn(model):
    with pytest.raises(ValueError, match="batch_size must be an integer of 1 or more, got 0"):
        model.sample_prior(0)


def test_latents_and_a_posterior_contradict(model, prompts):
    posterior = model.infer_posterior(prompts)
    with pytest.raises(ValueError, match="latents are given"):
        model.generate(prompts, latents=posterior.mean, posterior=posterior)
    with pytest.raises(ValueError, match="latents for 2 sequences and prompts for 3"):
        model.generate(prompts, posterior=posterior[:2])


# ------------------------------------------------------------------ thinking again while writing


def written_in_pieces(model, ids, every, mask=None, num_tokens=14, **kwargs):
    """What `reinfer_every` means: each piece is a call of its own, and the text so far its prompt."""
    mask = torch.ones_like(ids) if mask is None else mask
    for start in range(0, num_tokens, every):
        length = min(every, num_tokens - start)
        settings = dict(max_new_tokens=length, min_new_tokens=length) | kwargs
        ids = model.generate(ids, attention_mask=mask, **settings)
        mask = torch.nn.functional.pad(mask, (0, length), value=1)
    return ids


@pytest.mark.parametrize("kwargs", [{}, dict(use_cache=False), dict(cache_implementation="static")], ids=str)
@pytest.mark.parametrize("every", [1, 4])
def test_thinking_again(model, prompts, every, kwargs):
    expected = written_in_pieces(model, prompts, every, do_sample=False)
    assert torch.equal(model.generate(prompts, reinfer_every=every, **GREEDY, **kwargs), expected)
    assert not torch.equal(expected, model.generate(prompts, **GREEDY))


def test_thinking_again_with_settings_of_the_call(model, prompts):
    settings = dict(num_inference_steps=5, inference_seed=3)
    expected = written_in_pieces(model, prompts, 4, do_sample=False, **settings)
    steps = []
    ids = model.generate(
        prompts, reinfer_every=4, inference_callback=lambda step, *_: steps.append(step), **settings, **GREEDY
    )
    assert torch.equal(ids, expected)
    assert steps == 4 * list(range(5))
    config = GenerationConfig(reinfer_every=4, **settings, **GREEDY, pad_token_id=0, eos_token_id=2)
    assert torch.equal(model.generate(prompts, config), expected)


def test_thinking_again_when_sampling(model, prompts):
    ids = prompts.repeat_interleave(2, dim=0)
    torch.manual_seed(0)
    expected = written_in_pieces(model, ids, 4, do_sample=True)
    torch.manual_seed(0)
    again = model.generate(prompts, reinfer_every=4, **GREEDY | dict(do_sample=True, num_return_sequences=2))
    assert torch.equal(again, expected)


def test_thinking_again_row_by_row(model, prompts, pad_rows):
    rows = [prompts[0], prompts[1, :3]]
    batch, mask = pad_rows(rows, "left")
    together = continuation(model.generate(batch, attention_mask=mask, reinfer_every=4, **GREEDY), batch.shape[1])
    for row, text in zip(rows, together, strict=True):
        assert continuation(model.generate(row[None], reinfer_every=4, **GREEDY), len(row)) == [text]


def test_thinking_again_leaves_given_latents_and_caches(model, prompts):
    """The first tokens are written with what was given; the returned cache is that of the last thought."""
    latents = model.sample_prior(3, seed=0)
    result = model.generate(prompts, latents=latents, reinfer_every=10, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(result.sequences[:, :17], model.generate(prompts, latents=latents, max_new_tokens=10))
    last = model.infer_posterior(result.sequences[:, :17]).mean
    assert torch.equal(kept_latents(result.past_key_values)["latent_key_values"], model.project_latents(last))
    more = model.generate(result.sequences, past_key_values=result.past_key_values, **GREEDY)
    assert torch.equal(more, model.generate(result.sequences, latents=last, **GREEDY))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(reinfer_every=0), "reinfer_every must be an integer of 1 or more, got 0"),
        (dict(reinfer_every=2, num_beams=2), "greedy search and sampling"),
        (dict(reinfer_every=2, prompt_lookup_num_tokens=2), "greedy search and sampling"),
    ],
)
def test_thinking_again_is_refused(model, prompts, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **kwargs)
