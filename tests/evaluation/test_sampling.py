"""Written texts: the same in any batch, from the distribution that the model gives, cut where they end."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ltm_hf.data import train_tokenizer
from ltm_hf.evaluation import sampling
from ltm_hf.evaluation.sampling import GREEDY, MULTINOMIAL, Decoding, check_room, complete_texts, sample_texts

PROMPTS = ["the cat", "the dog sat on the mat and the cat", "a", "the mat and"]
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 5, 280)


@pytest.fixture
def make(make_model, tokenizer):
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return lambda reader: make_model(latent_reader=reader, vocab_size=len(tokenizer), **ids)


@pytest.fixture
def model(make, reader):
    return make(reader)


@pytest.fixture
def paper(make):
    return make("paper")


@pytest.fixture
def memory(make):
    return make("memory")


@pytest.fixture(scope="module")
def gpt2(tokenizer):
    """Another architecture, with learned positions and one token for begin, end and padding, as GPT-2 has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = dict(n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.5)
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **shape)).eval()


@pytest.fixture
def flat(gpt2):
    """Every token as likely as any other."""
    flat = GPT2LMHeadModel(gpt2.config).eval()
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
    return flat


@pytest.mark.parametrize("decoding", [MULTINOMIAL, GREEDY], ids=["multinomial", "greedy"])
@pytest.mark.parametrize("name", ["memory", "paper", "gpt2"])
def test_texts_are_the_same_in_any_batch(name, decoding, tokenizer, request):
    model = request.getfixturevalue(name)
    samples = 2 if decoding.do_sample else 1
    for write in (
        lambda size: sample_texts(model, tokenizer, 4, 10, decoding, batch_size=size, **QUIET),
        lambda size: complete_texts(
            model, tokenizer, PROMPTS, 10, decoding, num_samples=samples, batch_size=size, **QUIET
        ),
    ):
        assert write(1) == write(3)


def test_texts_follow_the_seed_and_nothing_else(model, tokenizer):
    def write(seed):
        samples = sample_texts(model, tokenizer, 4, 8, seed=seed, **QUIET)
        return samples + complete_texts(model, tokenizer, PROMPTS, 8, seed=seed, **QUIET)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = write(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert write(0) == first
    assert all(one != other for one, other in zip(write(1), first, strict=True))


def test_a_text_depends_on_its_own_number_and_prompt_only(model, tokenizer):
    """A part of a job, a longer job and one with more samples write the same texts."""
    whole = complete_texts(model, tokenizer, PROMPTS, 8, num_samples=3, **QUIET)
    assert len({text.text for texts in whole for text in texts}) == 12
    part = complete_texts(model, tokenizer, PROMPTS[2:], 8, num_samples=2, keys=[2, 3], **QUIET)
    assert part == [texts[:2] for texts in whole[2:]]
    assert sample_texts(model, tokenizer, 6, 8, **QUIET)[:3] == sample_texts(model, tokenizer, 3, 8, **QUIET)
    twice = complete_texts(model, tokenizer, [PROMPTS[0]] * 2, 8, num_samples=2, **QUIET)
    assert len({text.text for texts in twice for text in texts}) == 4


def test_draws_have_the_models_distribution(gpt2, tokenizer):
    """Of 4,000 first tokens: Pearson's chi-squared over the tokens expected at least 5 times, rest pooled."""
    decoding, n = Decoding(temperature=1.5, top_k=40, top_p=0.9), 4000
    with torch.no_grad():
        scores = gpt2(torch.tensor([[tokenizer.bos_token_id]])).logits[:, -1]
    for warper in decoding.warpers():
        scores = warper(None, scores)
    expected = n * scores[0].softmax(-1)
    written = sample_texts(gpt2, tokenizer, n, 1, decoding, batch_size=1000, **QUIET)
    tokens = torch.tensor([text.tokens[0] if text.tokens else tokenizer.eos_token_id for text in written])
    observed = tokens.bincount(minlength=len(expected)).float()
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    pooled = [torch.cat((x[common], x[~common].sum()[None])) for x in (observed, expected)]
    chi_squared = ((pooled[0] - pooled[1]) ** 2 / pooled[1].clamp(min=1e-9)).sum().item()
    freedom = common.sum().item()
    assert freedom > 10 and chi_squared < freedom + 4 * (2 * freedom) ** 0.5


def test_draws_of_successive_tokens_and_of_several_texts_are_independent(flat, tokenizer):
    flat.generation_config.suppress_tokens = list(range(4, len(tokenizer)))  # four tokens left, end-of-text among them
    flat.generation_config.suppress_tokens.append(0)  # three
    tokens = torch.tensor([text.tokens for text in sample_texts(flat, tokenizer, 900, 3, batch_size=900, **QUIET)])
    for one, other in ((tokens[:, 0], tokens[:, 1]), (tokens[:, 0], tokens[:, 2]), (tokens[:-1, 0], tokens[1:, 0])):
        joint = torch.bincount(3 * (one - 1) + other - 1, minlength=9) / len(one)
        assert (joint - 1 / 9).abs().max() < 4 * (8 / 81 / 900) ** 0.5  # four standard deviations


def test_latents_of_texts_without_a_prompt_are_the_priors(paper, tokenizer):
    texts = sample_texts(paper, tokenizer, 4, 10, GREEDY, batch_size=3, seed=7, **QUIET)
    assert len({text.text for text in texts}) > 1  # one token to start from: the latents make the difference
    for latents, text in zip(paper.sample_prior(4, seed=7), texts, strict=True):
        output = paper.generate(latents=latents[None], do_sample=False, max_new_tokens=10)[0, 1:].tolist()
        assert output[: len(text.tokens)] == text.tokens


def test_a_memory_begins_a_text_without_a_prompt_with_nothing(memory, tokenizer):
    first, *others = sample_texts(memory, tokenizer, 3, 10, GREEDY, **QUIET)
    output = memory.generate(do_sample=False, max_new_tokens=10)[0, 1:].tolist()
    assert output[: len(first.tokens)] == first.tokens and others == [first] * 2
    forgetful = memory.generate(do_sample=False, max_new_tokens=10, num_inference_steps=0)[0, 1:].tolist()
    assert forgetful != output  # and goes on from there


def test_a_memory_that_draws_its_thoughts_is_refused(memory, tokenizer):
    memory.generation_config.sample_latents = True
    for write in (lambda: sample_texts(memory, tokenizer, 1, 4), lambda: complete_texts(memory, tokenizer, ["a"], 4)):
        with pytest.raises(ValueError, match="^The generation config says sample_latents=True: a memory draws"):
            write()


def test_greedy_completions_are_generates(model, tokenizer):
    texts = complete_texts(model, tokenizer, PROMPTS, 10, GREEDY, num_inference_steps=3, **QUIET)
    for prompt, (text,) in zip(PROMPTS, texts, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=10, num_inference_steps=3)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert new[: len(text.tokens)] == text.tokens
        assert text.text == tokenizer.decode(text.tokens, skip_special_tokens=True)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert complete_texts(model, tokenizer, ids, 10, GREEDY, num_inference_steps=3, **QUIET) == texts


def test_each_continuation_reads_its_own_sample_of_the_prompts_posterior(paper, tokenizer, monkeypatch):
    seen, generate = [], type(paper).generate
    monkeypatch.setattr(
        type(paper), "generate", lambda self, **given: (seen.append(given["latents"]), generate(self, **given))[1]
    )
    posterior = paper.infer_posterior(**tokenizer(PROMPTS[1], return_tensors="pt"))
    complete_texts(paper, tokenizer, [PROMPTS[1]], 1, GREEDY, **QUIET)
    torch.testing.assert_close(seen[-1], posterior.mean)
    complete_texts(paper, tokenizer, [PROMPTS[1]], 1, num_samples=200, batch_size=200, **QUIET)
    noise = (seen[-1] - posterior.mean) / (0.5 * posterior.log_variance).exp()
    assert noise.mean().abs() < 0.05 and abs(noise.var() - 1) < 0.05  # of 200 x 128 numbers
    assert noise.mean(dim=0).abs().max() < 5 / 200**0.5


def test_a_prompts_latents_are_inferred_once_and_as_long_as_asked(paper, tokenizer, monkeypatch):
    calls, infer = [], sampling.infer_posterior

    def counted(model, input_ids, *args, **settings):
        calls.append((len(input_ids), settings["num_inference_steps"]))
        return infer(model, input_ids, *args, **settings)

    monkeypatch.setattr(sampling, "infer_posterior", counted)
    complete_texts(paper, tokenizer, PROMPTS[:2], 2, num_samples=3, num_inference_steps=5, **QUIET)
    paper.generation_config.num_inference_steps = 7
    complete_texts(paper, tokenizer, PROMPTS[:2], 2, num_samples=3, **QUIET)
    assert calls == [(2, 5), (2, 7)]


def test_texts_end_at_end_of_text(paper, gpt2, tokenizer):
    for one in (paper, gpt2):
        one.generation_config.suppress_tokens = [tokenizer.eos_token_id]
        assert all(not text.ended and len(text.tokens) == 6 for text in sample_texts(one, tokenizer, 3, 6, **QUIET))
        one.generation_config.suppress_tokens = list(range(1, len(tokenizer)))
        assert sample_texts(one, tokenizer, 3, 6, **QUIET) == [("", [], True)] * 3
        one.generation_config.suppress_tokens = None
    letter = tokenizer.convert_tokens_to_ids("t")  # no special token, that decoding would leave out
    paper.generation_config.eos_token_id = [letter, tokenizer.eos_token_id]
    paper.generation_config.suppress_tokens = [i for i in range(len(tokenizer)) if i not in (letter, letter - 1)]
    texts = sample_texts(paper, tokenizer, 8, 3, **QUIET)
    assert {len(text.tokens) for text in texts} >= {0, 3} and all("t" not in text.text for text in texts)
    assert all(text.ended == (len(text.tokens) < 3) for text in texts)


def test_texts_end_at_a_stop_string(paper, tokenizer):
    others = [index for index in range(len(tokenizer)) if not tokenizer.decode(index).isalpha()]
    paper.generation_config.suppress_tokens = others
    whole = [text for (text,) in complete_texts(paper, tokenizer, PROMPTS, 12, **QUIET)]
    stop = whole[0].text[3:5]
    stopped = [text for (text,) in complete_texts(paper, tokenizer, PROMPTS, 12, stop_strings=[stop], **QUIET)]
    assert stopped[0].ended and stop in stopped[0].text and len(stopped[0].tokens) < 12
    assert stopped == [  # alone too, where nothing fills a row up after it has stopped
        text for (text,) in complete_texts(paper, tokenizer, PROMPTS, 12, stop_strings=[stop], batch_size=1, **QUIET)
    ]
    for before, after in zip(whole, stopped, strict=True):
        assert after.ended == (stop in before.text) and before.text.startswith(after.text)


def test_training_mode_is_restored_and_dropout_is_off(gpt2, tokenizer):
    expected = sample_texts(gpt2, tokenizer, 2, 5, **QUIET)
    gpt2.train()
    assert sample_texts(gpt2, tokenizer, 2, 5, **QUIET) == expected
    assert gpt2.training
    gpt2.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["the"], "max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more"),
        ({"prompts": ["the"], "max_new_tokens": 4, "num_samples": 0}, "num_samples must be an integer of 1 or more"),
        ({"prompts": ["the"], "max_new_tokens": 4, "batch_size": 0}, "batch_size must be an integer of 1 or more"),
        ({"prompts": ["the"], "max_new_tokens": 63}, "more than the 64"),
        ({"prompts": [[5], []], "max_new_tokens": 4}, "Prompt 1 is empty"),
        ({"prompts": ["the"], "max_new_tokens": 4, "keys": [1, 2]}, "1 prompts and 2 keys"),
    ],
)
def test_bad_input_is_refused_before_any_computation(options, message, paper, tokenizer, monkeypatch):
    monkeypatch.setattr(type(paper), "generate", None)
    with pytest.raises(ValueError, match=message):
        complete_texts(paper, tokenizer, **options, **QUIET)


def test_no_begin_of_text_and_no_room_and_no_prompts(paper, tokenizer):
    with pytest.raises(ValueError, match="more than the 64"):
        sample_texts(paper, tokenizer, 1, 64, **QUIET)
    assert complete_texts(paper, tokenizer, [], 4, **QUIET) == []
    check_room(paper, [4], 60)  # just fits
    tokenizer = train_tokenizer(["the cat"], 260)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="begin-of-text"):
        sample_texts(paper, tokenizer, 1, 4, **QUIET)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 0}, {"top_p": 1.5}])
def test_decoding_refuses_what_transformers_refuses(settings):
    with pytest.raises(ValueError):
        Decoding(**settings)
