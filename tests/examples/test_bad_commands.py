"""Command lines that cannot work: one sentence, status 2, nothing written, nothing that was there touched."""

import json
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = json.dumps(
    {"hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 32, "sliding_window": 8, "num_latents": 4}
)


@pytest.fixture(scope="session")
def places(chat_folder, make_model, tmp_path_factory):
    """What the command lines name."""
    root = tmp_path_factory.mktemp("places")
    broken = {name: shutil.copytree(chat_folder, root / name) for name in ("nan", "cut", "lacking", "other", "tongue")}
    weights = load_file(chat_folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, broken["nan"] / "model.safetensors")
    save_file({n: w for n, w in weights.items() if n != name}, broken["lacking"] / "model.safetensors")
    whole = (chat_folder / "model.safetensors").read_bytes()
    (broken["cut"] / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    config = json.loads((chat_folder / "config.json").read_text())
    (broken["other"] / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    tokenizer = json.loads((chat_folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = 5000
    (broken["tongue"] / "tokenizer.json").write_text(json.dumps(tokenizer))
    plain = make_model(vocab_size=len(tokenizer["model"]["vocab"]), max_position_embeddings=128, num_latents=0)
    shutil.copytree(chat_folder, root / "plain", ignore=shutil.ignore_patterns("*.safetensors"))
    plain.save_pretrained(root / "plain")
    (root / "docs.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(40)))
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(8)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("mine")
    (root / "file").write_text("mine")
    (root / "params.json").write_text('{"dim": 32}')
    torch.save([torch.zeros(2)], root / "list.pt")
    (root / "text.pt").write_text("hello")
    return {path.stem: path for path in root.iterdir()} | {
        "model": chat_folder, "docs": root / "docs.jsonl", "list": root / "list.pt",
        "nowhere": root / "nowhere", "text": root / "text.pt", "tiny": shlex.quote(TINY),
    }  # fmt: skip


PRETRAIN = "pretrain --files {docs} --config_overrides {tiny} --output_dir out --use_cpu"
FINETUNE = "finetune --files {rows} --output_dir out --use_cpu --model {model}"
EVALUATE = "evaluate --model {model} --device cpu --output_dir out"
PREPARE = "prepare_data out --files {docs}"
CONVERT = "ltm_hf.conversion.original"
GSM8K = "ltm_hf.evaluation.gsm8k {model} --data {mine}"

CASES = {
    # what is unknown
    PRETRAIN + " --preset ltm-huge": "There is no preset 'ltm-huge'",
    PRETRAIN + " --max_stepz 3": "no option '--max_stepz'; did you mean --max_steps?",
    PRETRAIN + """ --config_overrides '{{"slidng_window": 4}}'""": "'slidng_window'; did you mean 'sliding_window'?",
    PRETRAIN + " --config_overrides {{bad": "--config_overrides is not JSON",
    PRETRAIN + " --config_overrides [1]": "must be an object",
    PRETRAIN + """ --config_overrides '{{"hidden_size": "32"}}'""": "Field 'hidden_size' expected int",
    PRETRAIN + " --report_to nonsense": "report_to: 'nonsense' is unknown or not installed",
    FINETUNE + " --lora_rnk 3": "no option '--lora_rnk'; did you mean --lora_rank?",
    EVALUATE + " --device abacus": "there is no device 'abacus' here",
    "serve {model} --reset": "no option '--reset'",
    "chat {model} --max_new_tokenz 3": "did you mean --max_new_tokens?",
    "ltm_hf.costs.planner --preset nope": "invalid choice: 'nope'",
    # numbers out of range
    PRETRAIN + " --block_size 33": "--block_size is 33 and the model takes 32 tokens",
    PRETRAIN + " --block_size 1": "--block_size must be 2 or more, below 2**31, got 1",
    PRETRAIN + " --eval_blocks 0": "--eval_blocks must be 1 or more, below 2**31, got 0",
    PRETRAIN + " --train_tokenizer 100": "--train_tokenizer must be 258 or more, below 2**31, got 100",
    PRETRAIN + " --streaming --max_steps 3 --shuffle_buffer 0": "--shuffle_buffer must be 1 or more",
    PRETRAIN + " --seed 4294967296": "seed must be",
    PRETRAIN + " --train_tokenizer 99999999999999999999": "--train_tokenizer must be",
    PRETRAIN + " --save_strategy steps --save_steps 0": "save_steps must be above 0",
    PRETRAIN + " --adam_beta2 1": "adam_beta2 must be at least 0 and below 1",
    PRETRAIN + " --num_train_epochs nan": "num_train_epochs must be above 0 and finite",
    FINETUNE + " --eval_rows 0": "--eval_rows must be 1 or more, below 2**31, got 0",
    FINETUNE + " --max_length 500": "--max_length is 500 and the model takes 128 tokens",
    PREPARE + " --validation_fraction nan": "must be a number between 0 and 1, got 'nan'",
    PREPARE + " --documents_per_shard 0": "must be an integer of 1 or more, below 2**31, got '0'",
    EVALUATE + " --steps 0 -1": "must be an integer of 0 or more, below 2**31, got '-1'",
    EVALUATE + " --prefix_length 128": "--prefix_length must be below the block's 128 tokens, got 128",
    EVALUATE + " --max_new_tokens 100": "the model has room for 96",
    "generate {model} --temperature 0": "must be a number from 0.001 to 1000, got '0'",
    "generate {plain} --prompt hello --max_new_tokens 128": "leaves no room for 128 more",
    "generate {model} --prompt ''": "--prompt is empty",
    "chat {model} --max_new_tokens 127": "leaves no room for a message",
    "serve {model} --port 65536": "must be an integer of 0 or more, below 2**16, got '65536'",
    GSM8K + " --problems 0": "must be an integer of 1 or more, below 2**31, got '0'",
    "ltm_hf.costs.planner --preset ltm-small --gpus 0": "num_gpus must be an integer of 1 or more, got 0",
    # what would do nothing
    "pretrain --prepared ''": "--prepared is empty",
    PRETRAIN + """ --config_overrides '{{"problem_type": "regression"}}'""": "LTMConfig has no field 'problem_type'",
    "generate {model} more": "There is no place for 'more'",
    PRETRAIN + " --tokenizer gpt2 --train_tokenizer 300": "--tokenizer does nothing with --train_tokenizer",
    PRETRAIN + " --stream_shards 2": "--stream_shards does nothing without --streaming",
    PRETRAIN + " --dataset_name some/data": "--dataset_name does nothing with --files",
    PRETRAIN + " --save_steps 2": "--save_steps does nothing with --save_strategy no",
    PRETRAIN + " --max_steps 3 --num_train_epochs 2": "--num_train_epochs does nothing with --max_steps",
    PRETRAIN + " --streaming --num_train_epochs 2": "--streaming needs --max_steps",
    PRETRAIN + """ --train_tokenizer 300 --config_overrides '{{"vocab_size": 400}}'""": "vocab_size is the tokenizer's",
    PRETRAIN + """ --config_overrides '{{"num_latents": 0}}' --num_inference_steps 3""": "with a model without latents",
    EVALUATE + " --model {plain} --num_particles 2": "--num_particles does nothing with models without a bound",
    FINETUNE + " --model {plain} --infer_from prompt": "with a model without latents",
    "generate {plain} --prompt hello --num_inference_steps 3": "with a model without latents",
    "pretrain --prepared {mine} --tokenizer gpt2": "--tokenizer does nothing with --prepared",
    "prepare_data out --dataset_config_name main": "--dataset_config_name does nothing without --dataset_name",
    FINETUNE + " --lora_rank 4": "--lora_rank does nothing without --lora",
    FINETUNE + " --num_latents 4": "--num_latents does nothing without --backbone",
    EVALUATE + " --only text --num_particles 2": "--num_particles does nothing without the section likelihood or",
    EVALUATE + " --only gsm8k": "--only gsm8k needs --gsm8k",
    EVALUATE + " --problems 3": "--problems does nothing without the section gsm8k",
    "generate {model} --greedy --top_p 0.5": "do nothing with --greedy",
    "generate {model} --num_inference_steps 2": "does nothing without --prompt",
    "chat {model} --greedy --seed 3": "--seed does nothing with --greedy",
    "serve {model} --message hello --max_tokens 500": "500 new tokens are asked for",
    "serve {model} --max_tokens 3": "--max_tokens does nothing without --message",
    GSM8K + " --greedy --samples 2": "--samples does nothing with --greedy",
    "ltm_hf.costs.planner --preset ltm-tiny --num-inference-steps 3": "does nothing with ltm-tiny, whose training has",
    # what is not there, or not whole
    PRETRAIN + " --files {nowhere}.txt": "There is no file",
    "pretrain --prepared {nowhere}": "There is no prepared data",
    FINETUNE + " --files {nowhere}.jsonl": "There is no file",
    FINETUNE + " --model {nowhere}": "There is no folder",
    FINETUNE + " --files {docs}": "need messages, prompt and completion, or question and answer; these have text",
    "evaluate --model {model} {nan} --output_dir out": "is not finite in model.layers.0.mlp.down_proj.weight",
    "evaluate --model {model} {model} --output_dir out": "--model names one model twice",
    EVALUATE + " --zero_shot {mine}": "is no folder with",
    EVALUATE + " --judge {nowhere}": "There is no folder",
    EVALUATE + " --gsm8k {nowhere}": "--gsm8k: there is no folder",
    "generate {cut}": "cannot be read: Error while deserializing header",
    "generate {lacking}": "lacks the tensor model.layers.0.mlp.down_proj.weight",
    "generate {other}": "has another shape than its configuration says of model.embed_tokens.weight",
    "generate {tongue}": "The tokenizer has 5001 entries and the model 280",
    "generate {mine}": "cannot be read",
    "chat {nowhere}": "There is no folder",
    "serve {nowhere} --port 0": "There is no folder",
    CONVERT + " {nowhere}.pt {params} out": "There is no file",
    CONVERT + " {text} {params} out": "cannot be read as tensors alone",
    CONVERT + " {list} {params} out": "is no dictionary of tensors",
    # places that are taken
    "prepare_data {mine} --files {docs}": "is not empty and holds no prepared data",
    "prepare_data {file} --files {docs}": "is not a folder",
    "evaluate --model {model} --output_dir {file}": "is not a folder",
    "figures memory {mine}": "is a folder",
    CONVERT + " {list} {params} {mine}": "is not empty",
}  # fmt: skip


@pytest.mark.parametrize("line", CASES)
def test_one_sentence(line, places, tmp_path, monkeypatch, capsys):
    name, *words = shlex.split(line.format(**places))
    if name in ("finetune", "serve"):
        pytest.importorskip({"finetune": "trl", "serve": "fastapi"}[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("sys.argv", [name, *words])
    before = {path: path.read_bytes() for path in places["docs"].parent.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        if "." in name:
            runpy.run_module(name, run_name="__main__", alter_sys=False)
        else:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    *_, last = capsys.readouterr().err.strip().splitlines()
    command, _, sentence = last.partition(": error: ")
    assert stopped.value.code == 2 and command.removesuffix(".py") == name and CASES[line] in sentence
    assert not list(tmp_path.iterdir())
    assert before == {path: path.read_bytes() for path in places["docs"].parent.rglob("*") if path.is_file()}
