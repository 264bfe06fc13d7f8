"""examples/finetune.py on a small model and questions shaped as GSM8K's."""

import gzip
import json
import runpy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ltm_hf.data import prompt_inputs, train_tokenizer

pytest.importorskip("peft")
pytest.importorskip("trl")

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"
ROWS = [
    {"question": f"What is {a} + {a}?", "answer": f"{a} + {a} = <<{a}+{a}={2 * a}>>\n#### {2 * a}"} for a in range(40)
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """What the example printed, and the folder that it wrote."""
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then
    steps = "--max_steps 8 --warmup_steps 0 --learning_rate 2e-2 --eval_rows 4 --max_new_tokens 4 --use_cpu"

    def run(*arguments, files=tmp_path / "rows.jsonl.gz"):
        folder = tmp_path / "finetuned"
        options = (*steps.split(), "--files", files, "--output_dir", folder, *arguments)
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *map(str, options)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out, folder

    return run


@pytest.fixture
def tokenizer():
    return train_tokenizer((text for row in ROWS for text in row.values()), 300)


@pytest.fixture
def ltm(make_model, tokenizer, tmp_path, reader):
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = make_model(latent_reader=reader, vocab_size=len(tokenizer), initializer_range=0.02, **special)
    model.save_pretrained(tmp_path / "ltm")
    tokenizer.save_pretrained(tmp_path / "ltm")
    return tmp_path / "ltm"


def figures(printed):
    lines = [line for line in printed.splitlines() if " -> " in line]
    return {line.split()[0]: (float(line.split()[1]), float(line.split()[3])) for line in lines}


def writes(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = prompt_inputs({"prompt": [{"role": "user", "content": ROWS[0]["question"]}]}, tokenizer)
    return model.generate(**inputs, max_new_tokens=2, pad_token_id=0).shape == (1, inputs["input_ids"].shape[1] + 2)


@pytest.mark.parametrize("lora", [False, True])
def test_fine_tunes_a_checkpoint(run, ltm, reader, lora):
    """With `infer_from` prompt, the loss of the paper's reader is a predictor's; a memory's always is."""
    printed, folder = run("--model", ltm, *(["--lora", "--infer_from", "prompt"] if lora else []))
    is_memory = reader == "memory"
    assert set(figures(printed)) == {"eval_loss", "eval_no_latents"} | (set() if is_memory else {"eval_from_prompt"})
    assert ("a bound: latents fitted" in printed) != (is_memory or lora)
    before, after = figures(printed)["eval_loss"]
    assert after < before
    assert "User:\nWhat is" in printed and "\nAssistant:\n" in printed
    names = {path.name for path in folder.iterdir()}
    assert ("adapter_model.safetensors" in names, "model.safetensors" in names) == (lora, not lora)
    assert writes(folder)


@pytest.mark.parametrize("options", [["--lora"], ["--freeze_backbone", "--latent_reader", "paper"]], ids=str)
def test_fine_tunes_a_backbone(run, tokenizer, tmp_path, options):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes))
    backbone.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    printed, folder = run("--backbone", tmp_path / "llama", "--num_latents", 4, *options)
    assert "eval_loss" in figures(printed)
    assert writes(folder)


@pytest.mark.parametrize("reader", ["memory"], indirect=True)
def test_goes_on_from_a_checkpoint(run, ltm):
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1")

    def history(step):
        return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]

    _, folder = run("--model", ltm, "--max_steps", "2", *saving)
    before = history(2)
    run("--model", ltm, "--max_steps", "4", "--resume_from_checkpoint", "last", *saving)
    assert history(4)[: len(before)] == before  # seconds and all
