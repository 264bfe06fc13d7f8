"""The report of a checkpoint as a person makes it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

EVALUATE = Path(__file__).parents[2] / "examples" / "evaluate.py"
DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
OF_TEXT = ("--device", "cpu", "--blocks", 4, "--num_samples", 2, "--texts", 2, "--max_new_tokens", 4)
SMALL = (*OF_TEXT, "--steps", 0, 2, "--thinking_blocks", 4)


@pytest.fixture(scope="module")
def reported(run, trained, tmp_path_factory):
    """A model beside its twin: the model's folder, and what was printed."""
    folder = tmp_path_factory.mktemp("models") / "ltm-tiny"
    shutil.copytree(trained[0], folder)
    zero_shot = ("--zero_shot", DATA, "--documents", 2) if DATA.is_dir() else ()
    result = run(EVALUATE, "--model", folder, folder / "twin", *SMALL, *zero_shot)
    return folder, result.stdout


def test_writes_a_report_of_tables_and_pictures(reported):
    folder, printed = reported
    text = (folder / "report" / "README.md").read_text(encoding="utf-8")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[:2] == ["## Likelihood", "## Thinking"] and "## Rebuilding a text, layer by layer" in titles
    assert "| nats a token" in text and "| ltm-tiny" in text and "| twin" in text
    assert "NOT a bound" in text and "± standard error over documents" in text and re.search(r"\d documents", text)
    assert str(folder.parent) not in text  # models go by their names
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
    assert "LTM-Small, published" in text


def test_fills_the_card(reported):
    results = ModelCard.load(reported[0] / "README.md").data.eval_results
    kept = json.loads((reported[0] / "report" / "likelihood.json").read_text())["result"]["columns"]["ltm-tiny"]
    of_text = {r.metric_type: r.metric_value for r in results if r.dataset_name == "presidents' messages (sotu)"}
    assert of_text["bound"] == pytest.approx(kept["figures"]["bound"][0]) and "iw-2" in of_text
    assert not any("released" in result.metric_type for result in results)


def test_goes_on_where_it_was(run, reported):
    folder, _ = reported
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "report").glob("*.json")}
    (folder / "report" / "text.json").unlink()
    run(EVALUATE, "--model", folder, folder / "twin", *OF_TEXT, "--only", "likelihood", "text")
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "report").glob("*.json")}
    assert [name for name in after if after[name] != before[name]] == ["text.json"]


def test_a_model_without_latents(run, reported, tmp_path):
    result = run(
        EVALUATE, "--model", reported[0] / "twin", "--output_dir", tmp_path, "--judge", reported[0], *SMALL,
        "--only", "likelihood", "thinking", "text",
    )  # fmt: skip
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not measured: no model here has latents." in text and "judge_perplexity" in text
    assert "| no_latents" in text and "entropy" in text and "| bound" not in text
    assert "Thinking: Not measured" in result.stdout
