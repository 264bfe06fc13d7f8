import json
import math

import pytest

from ltm_hf.evaluation.likelihood import Likelihood
from ltm_hf.evaluation.report import Report, likelihood_from_json, likelihood_to_json


def show(result, folder):
    return f"value {result['value']}"


def test_a_section_is_computed_once_for_its_settings(tmp_path):
    calls = []

    def compute():
        calls.append(len(calls))
        return {"value": len(calls)}

    for settings in ({"steps": (1, 2)}, {"steps": (1, 2)}, {"steps": (1, 4)}):
        assert Report(tmp_path, "T").section("one", "One", settings, compute, show)["value"] == len(calls)
    assert calls == [0, 1]
    text = (tmp_path / "README.md").read_text()
    assert text == "# T\n\n## One\n\nvalue 2\n"
    assert json.loads((tmp_path / "one.json").read_text())["settings"] == {"steps": [1, 4]}


def test_what_cannot_be_had_is_one_sentence_and_the_rest_is_written(tmp_path, capsys):
    def refuse():
        raise ValueError("Document 3\nhas no text.")

    report = Report(tmp_path, "T", "About this.")
    assert report.section("bad", "Bad", {}, refuse, show) is None
    report.section("good", "Good", {}, lambda: {"value": math.nan}, show)
    text = (tmp_path / "README.md").read_text()
    assert (
        "About this." in text and "## Bad\n\nNot measured: Document 3 has no text.\n" in text and "value None" in text
    )
    assert not (tmp_path / "bad.json").exists() and "Bad: Not measured" in capsys.readouterr().out
    with pytest.raises(KeyError):  # a mistake in the program is no sentence
        report.section("bug", "Bug", {}, lambda: {"x": 1}, show)


def test_a_report_of_before_stays_until_something_is_measured(tmp_path):
    def refuse():
        raise OSError("nowhere")

    (tmp_path / "README.md").write_text("of before")
    report = Report(tmp_path, "T")
    report.section("one", "One", {}, refuse, show)
    assert (tmp_path / "README.md").read_text() == "of before"
    report.section("two", "Two", {}, lambda: {"value": 2}, show)
    assert (tmp_path / "README.md").read_text() == "# T\n\n## One\n\nNot measured: nowhere\n\n## Two\n\nvalue 2\n"


def test_a_stopped_section_leaves_nothing_and_the_ones_before_it_stay(tmp_path):
    def stop():
        raise KeyboardInterrupt

    report = Report(tmp_path, "T")
    report.section("one", "One", {}, lambda: {"value": 1}, show)
    with pytest.raises(KeyboardInterrupt):
        report.section("two", "Two", {}, stop, show)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "one.json"]
    again = Report(tmp_path, "T")
    assert again.section("one", "One", {}, stop, show) == {"value": 1}


def test_a_likelihood_survives_json():
    likelihood = Likelihood({"bound": (2.0, math.nan), "kl": (0.5, 0.1)}, 10, 2, None, {"bound": (1.0, 0.25)})
    text = json.dumps(likelihood_to_json(likelihood)).replace("NaN", "null")
    back = likelihood_from_json(json.loads(text))
    assert back["bound"] == 2.0 and math.isnan(back.figures["bound"][1])
    assert back.figures["kl"] == (0.5, 0.1) and back.bits_per_byte == {"bound": (1.0, 0.25)} and back.num_blocks == 2
