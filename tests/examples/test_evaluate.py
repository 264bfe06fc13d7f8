"""The report of a checkpoint as a person makes it."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ltm_hf.data import train_tokenizer
from ltm_hf.training import write_model_card

EVALUATE = Path(__file__).parents[2] / "examples" / "evaluate.py"
DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
OF_TEXT = ("--device", "cpu", "--blocks", 4, "--texts", 2, "--max_new_tokens", 4)
SMALL = (*OF_TEXT, "--steps", 0, 2, "--thinking_blocks", 4)
TEXTS = [f"Number {i} sat on the mat, and number {i + 1} on the log, and so did all who came after." for i in range(60)]


@pytest.fixture(scope="module")
def models(make_model, tmp_path_factory):
    """A folder with documents and three models, the first with a card: `memory`, `paper` and `twin`."""
    root = tmp_path_factory.mktemp("models")
    (root / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenizer = train_tokenizer(TEXTS, 280)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    kinds = {"memory": {}, "paper": {"latent_reader": "paper"}, "twin": {"num_latents": 0}}
    for name, overrides in kinds.items():
        model = make_model(vocab_size=len(tokenizer), max_position_embeddings=32, **ids | overrides)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    write_model_card(root / "memory", make_model(), name="memory")
    return root


@pytest.fixture(scope="module")
def reported(run, models):
    """A memory beside the paper's model and the twin: its folder, and what was printed."""
    zero_shot = ("--zero_shot", DATA, "--documents", 2) if DATA.is_dir() else ()
    names = [models / name for name in ("memory", "paper", "twin")]
    files = ("--files", models / "docs.jsonl", "--num_samples", 2)
    result = run(EVALUATE, "--model", *names, *files, *SMALL, *zero_shot)
    return models / "memory", result.stdout


def test_writes_a_report_of_tables_and_pictures(reported):
    folder, printed = reported
    text = (folder / "report" / "README.md").read_text(encoding="utf-8")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[:2] == ["## Likelihood", "## Thinking"] and "## Rebuilding a text" in titles
    assert "## Rebuilding a text, layer by layer" not in titles  # of a memory there are none
    assert re.search(r"\| nats a token +\| memory +\| paper +\| twin +\|", text)
    measured = {line.split("|")[1].strip(): line.split("|")[2:5] for line in text.splitlines() if line.startswith("| ")}
    for name, has in (("prediction", (1, 0, 0)), ("iw-2", (0, 1, 0)), ("no_latents", (1, 1, 1)), ("prefix", (1, 1, 0))):
        assert tuple(cell.strip() != "–" for cell in measured[name]) == has
    assert "NOT a bound" in text and "± standard error over documents" in text and re.search(r"\d documents", text)
    assert str(folder) not in text  # models go by their names
    for line in text.splitlines():
        if line.startswith("!["):
            picture = folder / "report" / line.split("(")[1].split(")")[0]
            assert picture.read_bytes().startswith(b"\x89PNG")
    assert (folder / "report" / "thinking.csv").is_file() and "The report is" in printed


@pytest.mark.skipif(not DATA.is_dir(), reason="the zero-shot corpora are not here")
def test_zero_shot_beside_published_rows(reported):
    text = (reported[0] / "report" / "README.md").read_text(encoding="utf-8")
    assert "Not measured: LM1B: there is no lm1b/" in text  # and the six others are there
    head = next(line for line in text.splitlines() if line.startswith("| model ") and "PTB" in line)
    assert [cell.strip() for cell in head.split("|")[3:-1]] == [
        "PTB", "WikiText", "LAMBADA", "AG News", "PubMed", "Arxiv",
    ]  # fmt: skip
    assert "LTM-Small, published" in text and "exact, by a memory of what came before" in text


def test_fills_the_card(reported):
    results = ModelCard.load(reported[0] / "README.md").data.eval_results
    kept = json.loads((reported[0] / "report" / "likelihood.json").read_text())["result"]["columns"]["memory"]
    of_text = {r.metric_type: r.metric_value for r in results if r.dataset_name == "docs.jsonl"}
    assert of_text["prediction"] == pytest.approx(kept["figures"]["prediction"][0]) and "bound" not in of_text
    assert not any("released" in result.metric_type for result in results)


def test_goes_on_where_it_was(run, reported):
    folder, _ = reported
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "report").glob("*.json")}
    (folder / "report" / "text.json").unlink()
    names = [folder.parent / name for name in ("memory", "paper", "twin")]
    files = ("--files", folder.parent / "docs.jsonl", "--num_samples", 2)
    run(EVALUATE, "--model", *names, *files, *OF_TEXT, "--only", "likelihood", "text")
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "report").glob("*.json")}
    assert [name for name in after if after[name] != before[name]] == ["text.json"]


def test_a_model_without_latents(run, models, tmp_path):
    result = run(
        EVALUATE, "--model", models / "twin", "--output_dir", tmp_path, "--judge", models / "memory", *SMALL,
        "--files", models / "docs.jsonl", "--only", "likelihood", "thinking", "text", "latents",
    )  # fmt: skip
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not measured: no model here takes inference steps." in text and "judge_perplexity" in text
    assert "Not measured: no model here has latents." in text
    assert "| no_latents" in text and "entropy" in text and "| bound" not in text
    assert "Thinking: Not measured" in result.stdout
