"""What the harness is told to write, its settings and their refusals, and its own command line on tasks of ours."""

import importlib
import json
import math
import runpy
import sys
from functools import partial

import pytest
import torch
from transformers import GPT2Config

pytest.importorskip("lm_eval")

import datasets
import lm_eval.tasks
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ltm_hf.evaluation.lm_eval import HFLTM

LENGTH, STEPS, SEED = 16, 4, 3  # as the conftest has them
FOX = "the quick brown fox"
PROMPTS = ["the cat", FOX, "the dog sat on the", "a"]


@pytest.fixture
def generated(ask):
    def generated(lm, **settings):
        settings = dict(until=[], max_gen_toks=6, do_sample=False) | settings
        return lm.generate_until(ask(*[(prompt, dict(settings)) for prompt in PROMPTS]), disable_tqdm=True)

    return generated


@pytest.mark.parametrize("kind", ["memory", "model"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_generate_until_is_generate(kind, evaluator, tokenizer, batch_size, request, generated):
    model = request.getfixturevalue(kind)
    texts = generated(evaluator(model, batch_size=batch_size))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, -(LENGTH - 6) :]
        output = model.generate(ids, num_inference_steps=STEPS, inference_seed=SEED, do_sample=False, max_new_tokens=6)
        written = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == written
    assert generated(evaluator(model, latents="none")) != texts  # latents matter here


def test_stop_strings(evaluator, generated):
    whole = generated(evaluator(batch_size=2))
    stop = next(letter for text in whole for letter in text[1:-1] if letter.isascii() and letter.isalnum())
    texts = generated(evaluator(batch_size=2), until=[stop])
    assert texts == [text.split(stop)[0] for text in whole] != whole


def test_a_sample_of_latents_is_the_same_in_any_batch(evaluator, generated):
    texts = []
    for size in (1, 4):
        torch.manual_seed(size)  # is no matter
        texts.append(generated(evaluator(latents="sample", batch_size=size)))
    assert texts[0] == texts[1] != generated(evaluator(latents="mean"))
    assert generated(evaluator(latents="sample", inference_seed=SEED + 1)) != texts[0]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    generated(evaluator(latents="sample"))
    assert torch.rand(1) == expected  # torch's generator is left alone


def test_sampled_texts_follow_torchs_generator(evaluator, generated):
    lm = evaluator(latents="sample")
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generated(lm, do_sample=True, temperature=1.0))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("kind", ["memory", "model"])
def test_no_latents_are_the_decoder_alone(kind, evaluator, tokenizer, request, generated):
    model = request.getfixturevalue(kind)
    texts = generated(evaluator(model, latents="none", batch_size=4))
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids[:, -(LENGTH - 6) :]
        written = []
        with torch.no_grad():
            while len(written) < 6 and tokenizer.eos_token_id not in written:
                written.append(model(ids).logits[0, -1].argmax().item())
                ids = torch.cat([ids, torch.tensor([written[-1:]])], dim=1)
        assert text == tokenizer.decode(written, skip_special_tokens=True)


def test_gen_kwargs_go_before_the_models_settings(evaluator, fits, generated):
    steps = generated(evaluator(num_inference_steps=0), num_inference_steps=STEPS)
    assert steps == generated(evaluator()) != generated(evaluator(num_inference_steps=0))


# ------------------------------------------------------------------ as HFLM


def test_a_model_without_latents_is_hflm(evaluator, plain, generated, ask):
    pair = [evaluator(plain, cls=cls, batch_size=3) for cls in (HFLTM, HFLM)]
    requests = ask(("the cat", " sat on the mat"), ("the cat", " sat"), ("", "the mat"))
    rolled = ask(("the cat sat on the mat",), (f"the cat sat on the log {FOX} jumped",))
    ours, theirs = (
        (
            lm.loglikelihood(requests, disable_tqdm=True),
            lm.loglikelihood_rolling(rolled, disable_tqdm=True),
            generated(lm),
            lm.get_model_info(),
        )
        for lm in pair
    )
    assert ours == theirs


def test_what_was_measured_is_in_the_results(evaluator, make):
    lm = evaluator(num_inference_steps=None, model=make(latent_reader="paper", num_inference_steps=7))
    expected = dict(latents="mean", num_inference_steps=7, inference_seed=SEED, rolling="prefix", rolling_stride=8)
    assert expected.items() <= lm.get_model_info().items()
    info = evaluator(num_inference_steps=None, model=make(num_inference_steps=7)).get_model_info()
    assert dict(latents="mean", num_inference_steps=7).items() <= info.items() and "rolling_stride" not in info


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"latents": "median"}, "^latents must be one of mean, sample, none; got 'median'.$"),
        ({"rolling": "loose"}, "^rolling must be one of prefix, bound; got 'loose'.$"),
        ({"rolling": "bound", "latents": "none"}, "leaves nothing to bound"),
        ({"inference_seed": "x"}, "^inference_seed must be an integer, got 'x'.$"),
        ({"rolling_stride": 0}, "^rolling_stride must be None or an integer of 1 or more, got 0.$"),
        ({"num_inference_steps": -1}, "^num_inference_steps must be an integer of 0 or more, got -1.$"),
    ],
)
def test_settings_that_cannot_work(evaluator, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluator(**settings)


@pytest.mark.parametrize(
    "overrides, settings, sentence",
    [
        ({}, {"latents": "sample"}, "^latents must be mean or none for a memory"),
        ({}, {"rolling_stride": 4}, "^rolling_stride is of latents that are inferred anew: a memory infers at each"),
        ({}, {"rolling": "bound"}, "^rolling='bound' is of latents fitted with a variance to the whole text"),
        ({"latent_reader": "paper", "inference_method": "langevin"}, {"rolling": "bound"}, "^rolling='bound' is of"),
    ],
)
def test_settings_that_a_model_cannot_have(evaluator, make, overrides, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluator(make(**overrides), **settings)


def test_another_model_is_refused_before_it_is_loaded(tmp_path):
    GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(ValueError, match="^This is a 'gpt2' model, not an LTM: evaluate it with --model hf.$"):
        HFLTM(str(tmp_path))


def test_requests_that_do_not_fit(evaluator):
    with pytest.raises(ValueError, match="1 to 16 tokens .max_length.; got 1 and 17"):
        evaluator()._loglikelihood_tokens([(("", ""), [1], [3] * 17)])
    with pytest.raises(ValueError, match="got 0 and 1"):
        evaluator()._loglikelihood_tokens([(("", ""), [], [3])])
    assert evaluator()._loglikelihood_tokens([]) == []


def test_the_harness_is_optional(monkeypatch):
    monkeypatch.delitem(sys.modules, "ltm_hf.evaluation.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r'^ltm_hf.evaluation.lm_eval needs .*: pip install "ltm_hf\[eval\]"$'):
        importlib.import_module("ltm_hf.evaluation.lm_eval")


# ------------------------------------------------------------------ the command line

TASKS = {
    "ltm_choice": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        target_delimiter: ""
        doc_to_target: "{{answer}}"
        metric_list: [{metric: acc}]
    """,
    "ltm_rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}}"
        metric_list: [{metric: bits_per_byte}]
    """,
    "ltm_writing": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{written}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
        metric_list: [{metric: exact_match}]
    """,
}


def test_the_harness_own_command_line(tmp_path, monkeypatch, model, tokenizer, evaluator, ask, capsys):
    """A multiple choice, a perplexity and a text, from a saved folder, as `python -m ltm_hf.evaluation.lm_eval`."""
    questions = ["the cat sat on", "the dog sat on the mat and the cat sat on the log and on the", FOX]
    choices = [" the mat", " a log", " dogs"]
    written = evaluator().generate_until(
        ask(*[(question, dict(until=["\n"], max_gen_toks=6, do_sample=False)) for question in questions])
    )
    pairs = [(question, choice) for question in questions for choice in choices]
    likelihoods = [likelihood for likelihood, _ in evaluator().loglikelihood(ask(*pairs))]
    scores = [likelihoods[place : place + 3] for place in (0, 3, 6)]
    answers = [max(range(3), key=row.__getitem__) for row in scores]
    answers[2] = (answers[2] + 1) % 3  # two of three right
    written[0] = "something else"  # two of three right

    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        dict(question=question, choices=choices, answer=answer, written=text)
        for question, answer, text in zip(questions, answers, written, strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, lines in TASKS.items():
        data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(head + "\n".join(line.strip() for line in lines.splitlines()))

    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # the command sets it: put back after
    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False)
    )  # thousands of files
    monkeypatch.delitem(model_registry._objs, "ltm")  # the module runs once more, as a program
    monkeypatch.delitem(sys.modules, "ltm_hf.evaluation.lm_eval")
    arguments = {
        "--model": "ltm",
        "--model_args": f"pretrained={folder},num_inference_steps={STEPS},inference_seed={SEED},rolling_stride=4",
        "--tasks": ",".join(TASKS),
        "--include_path": str(tmp_path),
        "--batch_size": "2",
        "--output_path": str(tmp_path / "results.json"),
    }
    monkeypatch.setattr(sys, "argv", ["lm_eval", *(word for pair in arguments.items() for word in pair)])
    runpy.run_module("ltm_hf.evaluation.lm_eval", run_name="__main__")

    (path,) = tmp_path.glob("results*.json")
    results = json.loads(path.read_text())
    assert "|ltm_choice" in capsys.readouterr().out
    assert results["config"]["rolling_stride"] == 4
    figures = {name: results["results"][name] for name in TASKS}
    assert figures["ltm_choice"]["acc,none"] == pytest.approx(2 / 3)
    assert figures["ltm_writing"]["exact_match,none"] == pytest.approx(2 / 3)
    rolled = evaluator(rolling_stride=4).loglikelihood_rolling(ask(*[(question,) for question in questions]))
    expected = -sum(rolled) / sum(map(len, questions)) / math.log(2)
    assert figures["ltm_rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
