"""`pipeline("text-generation")` with a Latent Thought Model: transformers' own, nothing of it is ours."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, TextStreamer, pipeline

from ltm_hf import LTMForCausalLM

GREEDY = dict(do_sample=False, max_new_tokens=12)
PROMPTS = ["The people of Spain", "h", "hello there, the people of Spain. hello hello hello", "user"]


def chat(*texts):
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


CHATS = [chat("hello"), chat("hello there", "people", "The people of Spain. hello?"), chat("user")]


@pytest.fixture(scope="module", params=["memory", "paper"])
def folder(request, chat_folders):
    return str(chat_folders[request.param])


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("text-generation", model=folder)


def written(pipe, ids, **settings):
    """What generate() writes after the ids, as text."""
    output = pipe.model.generate(ids, **GREEDY | settings)
    return pipe.tokenizer.decode(output[0, ids.shape[1] :])


def test_where_the_package_is_not_installed(chat_folders, tmp_path, monkeypatch):
    """Its code travels with a checkpoint of either reader: one is enough here."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code = """
        import json, sys
        sys.modules["ltm_hf"] = None
        from transformers import pipeline
        pipe = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
        print(json.dumps(pipe(json.loads(sys.argv[2]), batch_size=4, do_sample=False, max_new_tokens=12)))
    """
    folder = str(chat_folders["memory"])
    command = [sys.executable, "-c", textwrap.dedent(code), folder, json.dumps(PROMPTS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = pipeline("text-generation", model=folder)(PROMPTS, **GREEDY)
    assert json.loads(result.stdout.splitlines()[-1]) == expected


def test_continues_as_generate(pipe):
    ids = pipe.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    assert pipe(PROMPTS[0], **GREEDY) == [{"generated_text": PROMPTS[0] + written(pipe, ids)}]


def test_from_a_model_and_a_tokenizer(folder, pipe):
    model, tokenizer = LTMForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert pipeline("text-generation", model=model, tokenizer=tokenizer)(PROMPTS, **GREEDY) == pipe(PROMPTS, **GREEDY)


@pytest.mark.parametrize("inputs", [PROMPTS, CHATS], ids=["texts", "chats"])
@pytest.mark.parametrize("settings", [{}, dict(num_beams=3, num_return_sequences=2)], ids=str)
def test_a_batch_is_written_as_one_by_one(pipe, inputs, settings):
    settings = GREEDY | dict(num_inference_steps=5, return_full_text=False) | settings
    alone = [pipe(one, **settings) for one in inputs]
    assert len({text["generated_text"] for texts in alone for text in texts}) > 1
    assert pipe(inputs, batch_size=len(inputs), **settings) == alone


def test_a_batch_that_the_tokenizer_pads(folder, pipe):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    output = pipe.model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    expected = [result["generated_text"] for (result,) in pipe(PROMPTS, return_full_text=False, **GREEDY)]
    assert tokenizer.batch_decode(output) == expected


@pytest.mark.parametrize("steps", [0, 9])
def test_chat_template_and_inference_steps(pipe, steps):
    for messages in CHATS:
        inputs = pipe.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        (result,) = pipe(messages, num_inference_steps=steps, **GREEDY)
        answer = written(pipe, inputs["input_ids"], num_inference_steps=steps)
        assert result["generated_text"] == [*messages, {"role": "assistant", "content": answer}]


def test_inference_steps_of_the_pipeline_and_of_a_generation_config(folder, pipe):
    expected = pipe(PROMPTS, num_inference_steps=0, **GREEDY)
    config = GenerationConfig(num_inference_steps=0, **GREEDY)
    assert pipe(PROMPTS, generation_config=config) == expected != pipe(PROMPTS, **GREEDY)
    ours = pipeline("text-generation", model=folder, num_inference_steps=0)
    assert ours(PROMPTS, **GREEDY) == expected


def test_samples_by_default(pipe, monkeypatch):
    """A pipeline has defaults of its own: it samples. The paper's reader then reads a sample, not the mean."""
    torch.manual_seed(0)
    texts = {pipe(PROMPTS[0], max_new_tokens=12)[0]["generated_text"] for _ in range(4)}
    assert len(texts) > 1
    if pipe.model.config.has_memory:
        return
    latents, project = [], pipe.model.project_latents
    monkeypatch.setattr(pipe.model, "project_latents", lambda given: latents.append(given) or project(given))
    posterior = pipe.model.infer_posterior(pipe.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"])
    torch.manual_seed(0)
    sample = posterior.sample()
    torch.manual_seed(0)
    pipe(PROMPTS[0], max_new_tokens=2)
    pipe(PROMPTS[0], max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(latents, [sample, posterior.mean])


def test_several_texts_and_several_thoughts(pipe):
    torch.manual_seed(0)
    results = pipe(PROMPTS[0], max_new_tokens=12, num_return_sequences=2, num_latent_samples=3)
    texts = [result["generated_text"] for result in results]
    assert len(set(texts)) == 6 and all(text.startswith(PROMPTS[0]) for text in texts)


def test_stop_sequence(pipe):
    settings = GREEDY | dict(return_full_text=False)
    ((whole,), (tokens,)) = pipe(PROMPTS[0], **settings), pipe(PROMPTS[0], return_tensors=True, **GREEDY)
    written = [pipe.tokenizer.decode(token) for token in tokens["generated_token_ids"][-10:]]
    stop = next(text for text in written if len(text) > 1 and pipe.tokenizer.tokenize(text) == [text])
    (stopped,) = pipe(PROMPTS[0], stop_sequence=stop, **settings)
    assert whole["generated_text"].startswith(stopped["generated_text"]) and whole != stopped
    assert stopped["generated_text"].endswith(stop)


def test_streamer(pipe, capsys):
    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True)
    (result,) = pipe(PROMPTS[0], return_full_text=False, streamer=streamer, **GREEDY)
    assert capsys.readouterr().out == result["generated_text"] + "\n"
