"""The examples as a person runs them: train, look at what is printed and left behind, let it write elsewhere."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltm_hf.training import LTMTrainingArguments
from ltm_hf.training.objectives import Elbo, Prediction

EXAMPLES = Path(__file__).parents[2] / "examples"
NO_PACKAGE = (
    "import sys; sys.modules['ltm_hf'] = None; import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
)


# By preset: rows of the table beside the twin, and what else is true of the model.
ROWS = {
    "ltm-tiny": ["LTM, by the mean", "LTM, by a sample at each token"],
    "ltm-tiny-paper": ["LTM, its bound"],
}
LEARNS_FROM = {"ltm-tiny": Prediction.description, "ltm-tiny-paper": Elbo.description}
WEIGHTS = {"ltm-tiny": "model.reader.", "ltm-tiny-paper": "cross_attn."}


def test_prints_an_honest_table(trained):
    preset, folder, printed = trained
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in printed.splitlines() if line.startswith("| ")}
    assert [cell.strip() for cell in rows.pop("nats a token")][::2] == ["all tokens", "second halves"]
    twin, cached, *own = rows
    assert (twin, own[:-2]) == ("autoregressive twin", ROWS[preset])
    assert cached.startswith("twin, with a continuous cache") and all("first halves alone" in name for name in own[-2:])
    whole = {name: float(cells[0].split("±")[0]) for name, cells in rows.items() if "alone" not in name}
    assert whole[twin] < 5.69  # log 300, 5.70, at first: four steps of training, and it shows
    assert rows[twin][1].strip() == "–"
    for name in (cached, *ROWS[preset]):
        assert float(rows[name][1].split("±")[0]) == pytest.approx(whole[name] - whole[twin], abs=0.0015)
    assert f"learns from {LEARNS_FROM[preset]}" in printed
    assert "standard library: " in printed and "Goes on, thinking:" in printed and "Without thinking:" in printed


@pytest.mark.parametrize(
    ("arguments", "has_twin"),
    [
        ((), True),
        (("--no_baseline",), False),
        (("--preset", "ltm-small"), False),
        (("--preset", "ltm-small", "--baseline"), True),
        (("--config_overrides", '{"num_latents": 0}'), False),
    ],
    ids=str,
)
def test_who_has_a_twin(monkeypatch, arguments, has_twin):
    """The tiny presets, unless it is said; never a model that is one."""
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--use_cpu", *arguments])
    assert runpy.run_path(str(EXAMPLES / "pretrain.py"))["parse"]()[0].baseline == has_twin


def test_leaves_a_complete_folder(trained, travelling_files):
    preset, folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "curves.png", "README.md"} <= names
    assert set(travelling_files) <= names
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| learns from | {LEARNS_FROM[preset]} |" in card and "| optimiser steps | 4 |" in card
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "model.embed_tokens.weight" in load_file(folder / "model.safetensors")


def test_the_twin_has_checkpoints_and_a_name_of_its_own(trained):
    preset, outputs, _ = trained
    for folder, name, has_latents in ((outputs, "mine", True), (outputs / "twin", "mine-twin", False)):
        names = load_file(folder / "checkpoint-4" / "model.safetensors")
        assert any(WEIGHTS[preset] in name for name in names) == has_latents
        assert (folder / "model.safetensors").is_file() and (folder / "README.md").is_file()
        assert torch.load(folder / "checkpoint-4" / "training_args.bin", weights_only=False).run_name == name


@pytest.mark.parametrize("arguments", [("--prompt", "The people", "--greedy"), ()])
def test_writes_in_a_process_without_the_package(trained, arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    words = [sys.executable, "-c", NO_PACKAGE, EXAMPLES / "generate.py", trained[1], "--max_new_tokens", 8, *arguments]
    result = subprocess.run([*map(str, words), "--trust_remote_code"], capture_output=True, text=True)
    assert result.stdout.strip(), result.stderr
    if "--greedy" in arguments:
        assert result.stdout.startswith("The people")
        refused = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        assert refused.returncode == 2 and "The package ltm_hf is not installed" in refused.stderr.splitlines()[-1]


def test_picture_of_the_architecture(run, tmp_path):
    run(EXAMPLES / "figures.py", "memory", tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_figures_too_come_from_the_device(make_tester, tmp_path):
    """Where the trainer leaves the model on the CPU until it trains, as it does where it is to be sharded."""

    class Trainer:
        def __init__(self, *args, **kwargs): ...

        def train(self, checkpoint): ...

        def save_model(self): ...

    train, devices = runpy.run_path(str(EXAMPLES / "pretrain.py"))["train"], []
    train.__globals__["LTMTrainer"] = Trainer
    train.__globals__["score_blocks"] = lambda model, *args, **kwargs: devices.append(model.device)
    args = LTMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args.__dict__["_setup_devices"] = device = torch.device("meta")  # a cached property, which `device` reads
    train(make_tester().get_config(), args, None, None, None, None)
    assert devices == [device, device]


SMALL = '{"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": %d}'


def write_story(path, rows=60):
    texts = [f"Number {i} sat on the mat, and number {i + 1} on the log." for i in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_trains_on_a_stream_without_end(run, tmp_path):
    """24 steps of 8 blocks: more than the two files hold, one of which is shorter."""
    files = [write_story(tmp_path / f"{rows}.jsonl", rows) for rows in (40, 60)]
    result = run(
        EXAMPLES / "pretrain.py", "--files", *files, "--streaming", "--train_tokenizer", 270, "--shuffle_buffer", 8,
        "--use_cpu", "--max_steps", 24, "--eval_blocks", 1, "--eval_strategy", "no", "--output_dir", tmp_path / "out",
        "--config_overrides", SMALL % 32,
    )  # fmt: skip
    assert "Validation, 1 blocks" in result.stdout
    assert "| optimiser steps | 24 |" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_trains_on_prepared_data(run, tmp_path):
    story = write_story(tmp_path / "story.jsonl")
    made = run(
        EXAMPLES / "prepare_data.py", tmp_path / "data", "--files", story, "--train_tokenizer", 270, "--block_size", 32
    )  # fmt: skip
    assert "train: " in made.stdout and (tmp_path / "data/index.json").is_file()
    arguments = [EXAMPLES / "pretrain.py", "--prepared", tmp_path / "data", "--use_cpu", "--max_steps", 2]
    arguments += ["--eval_blocks", 2, "--output_dir", tmp_path / "out", "--config_overrides"]
    result = run(*arguments, SMALL % 32)
    assert "Validation, 2 blocks" in result.stdout and (tmp_path / "out/model.safetensors").is_file()
    refused = run(*arguments, SMALL % 16, "--output_dir", tmp_path / "other", check=False)
    assert refused.returncode == 2 and "have 32 tokens and the model takes 16" in refused.stderr
