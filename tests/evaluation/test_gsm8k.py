"""GSM8K: what is asked, what counts as right, and runs that are stopped and go on."""

import json
from decimal import Decimal
from itertools import combinations
from math import comb, sqrt
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict

from ltm_hf.data import load_conversations, prompt_inputs, set_chat_template, train_tokenizer
from ltm_hf.evaluation import gsm8k
from ltm_hf.evaluation.gsm8k import (
    choose_examples,
    encode_problem,
    evaluate_gsm8k,
    extract_answer,
    fit_problem,
    gsm8k_table,
    load_gsm8k,
    main,
    pass_at_k,
    substring_match,
)
from ltm_hf.evaluation.sampling import GREEDY, WrittenText

REAL = Path(__file__).resolve().parents[3] / "shared/data/gsm8k"
QUIET = {"progress": False}


def rows(split, count):
    return [
        {"question": f"{split} {index}: the cat sat?", "answer": f"the dog\n#### {10 * (index + 1)}"}
        for index in range(count)
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def dataset():
    return DatasetDict(train=Dataset.from_list(rows("train", 6)), test=Dataset.from_list(rows("test", 5)))


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["the cat sat? the dog Question: Answer: #### train test"] * 5 + ["test 12345 67890: train"]
    return train_tokenizer(texts, 300)


@pytest.fixture
def model(make_model, tokenizer):
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return make_model(vocab_size=len(tokenizer), max_position_embeddings=128, **ids)


# ------------------------------------------------------------------ what is right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = <<3+4=7>>7\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### $18", "18"),
        ("#### 18.", "18"),
        ("#### 18. The end, 99.", "18"),
        ("#### -5", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 2.50", "2.5"),
        ("#### .5", "0.5"),
        ("#### 05", "5"),
        ("####7", "7"),
        ("#### 20 apples", "20"),
        ("#### 1 #### 2", "1"),
        ("the answer is 7", None),
        ("### 7", None),
        ("#### seven, or 7", None),
        ("####", None),
        ("#### --5", None),
        ("", None),
    ],
)
def test_strict_answers(text, answer):
    assert extract_answer(text) == (None if answer is None else Decimal(answer))


def test_the_released_match_is_fooled_where_the_strict_one_is_not():
    for text in ("18 eggs and no answer", "#### 218", "#### 180", "#### 3, not 18", "it is 1,800\n#### 5"):
        assert substring_match(text, Decimal(18)) and extract_answer(text) != 18
    assert substring_match("#### 18", Decimal(18)) and extract_answer("#### 18") == 18
    assert substring_match("it is 1,234", Decimal(1234)) and not substring_match("nothing", Decimal(18))


def test_pass_at_k_by_hand_and_by_enumeration():
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    assert pass_at_k(5, 3, 3) == 1  # n - c < k: one of any three is right
    assert pass_at_k(5, 0, 5) == 0 and pass_at_k(1, 1, 1) == 1
    for n, correct, k in [(6, 2, 3), (7, 1, 4), (4, 4, 1)]:
        hits = sum(min(chosen) < correct for chosen in combinations(range(n), k))
        assert pass_at_k(n, correct, k) == pytest.approx(hits / comb(n, k))
    for n, correct, k in [(5, 2, 0), (5, 2, 6), (5, 6, 1), (5, -1, 1)]:
        with pytest.raises(ValueError, match="1 <= k <= n"):
            pass_at_k(n, correct, k)


# ------------------------------------------------------------------ what is asked


def test_examples_are_of_the_train_split_only(dataset):
    train = set(dataset["train"]["question"])
    for seed in range(5):
        examples = choose_examples(dataset, 6, seed)
        assert {row["question"] for row in examples} == train  # each once
    assert choose_examples(dataset, 3, 1) == choose_examples(dataset, 3, 1) != choose_examples(dataset, 3, 2)
    assert choose_examples(dataset, 0) == []
    leaky = DatasetDict(train=Dataset.from_list(rows("train", 2) + rows("test", 3)), test=dataset["test"])
    assert {row["question"] for row in choose_examples(leaky, 2)} == {row["question"] for row in rows("train", 2)}
    for shots in (-1, 3):
        with pytest.raises(ValueError, match=f"between 0 and the 2 rows of the train split, got {shots}"):
            choose_examples(leaky, shots)


def test_prompt_as_text(tokenizer):
    examples = [{"question": "q1", "answer": "a1\n#### 1"}, {"question": "q2", "answer": "a2\n#### 2"}]
    ids = encode_problem(tokenizer, "q3", examples)
    assert ids[0] == tokenizer.bos_token_id
    expected = "Question: q1\nAnswer: a1\n#### 1\n\nQuestion: q2\nAnswer: a2\n#### 2\n\nQuestion: q3\nAnswer:"
    assert tokenizer.decode(ids[1:]) == expected


def test_chat_prompt_is_what_fine_tuning_shows(tokenizer, tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows("train", 4)))
    set_chat_template(tokenizer)
    row = load_conversations(tmp_path / "train.jsonl")["train"][0]
    question = row["prompt"][0]["content"]
    assert encode_problem(tokenizer, question, chat=True) == prompt_inputs(row, tokenizer)["input_ids"][0].tolist()
    shown = tokenizer.decode(encode_problem(tokenizer, question, [{"question": "q", "answer": "a"}], chat=True))
    assert shown.index("User:\nq") < shown.index("Assistant:\na") < shown.index(question)
    tokenizer.chat_template = None


def test_examples_that_do_not_fit_are_left_out_from_the_first(model, tokenizer, dataset):
    examples = choose_examples(dataset, 6)
    for room in (0, 1, 3, 6):
        fitting = encode_problem(tokenizer, "the cat?", examples[6 - room :])
        left = model.config.max_position_embeddings = len(fitting) + 10
        assert fit_problem(model, tokenizer, "the cat?", examples, 10) == (fitting, room), left
    model.config.max_position_embeddings = len(encode_problem(tokenizer, "the cat?")) + 9
    assert fit_problem(model, tokenizer, "the cat?", examples, 10) == (None, 0)


def test_prompts_hold_no_other_test_question(model, tokenizer, dataset, monkeypatch):
    asked = []

    def silent(model, tokenizer, prompts, *args, **options):
        asked.extend(prompts)
        return [[WrittenText("", [], True)] for _ in prompts]

    monkeypatch.setattr(gsm8k, "complete_texts", silent)
    model.config.max_position_embeddings = 10_000
    evaluate_gsm8k(model, tokenizer, dataset, shots=6, samples=1, **QUIET)
    for index, prompt in enumerate(map(tokenizer.decode, asked)):
        assert prompt.count("test ") == 1 and f"test {index}:" in prompt and prompt.count("train ") == 6
    assert len(asked) == 5


# ------------------------------------------------------------------ a run


def test_figures_of_known_texts(model, tokenizer, dataset, monkeypatch):
    """Right answers are 10, 20, 30, 40; of four problems 2, 0, 1 and 0 of 4 texts are right."""
    written = [
        ["#### 10", "#### $10.", "#### 11", "10"],
        ["20", "200", "#### 21", "no"],
        ["so\n#### 30\nQuestion: x\n#### 5", "#### 5\nQuestion: 30?", "no", "no"],
        ["no", "no", "no", "no"],
    ]
    monkeypatch.setattr(
        gsm8k,
        "complete_texts",
        lambda *args, keys, **options: [[WrittenText(text, [], True) for text in written[key]] for key in keys],
    )
    options = dict(shots=0, samples=4, problems=4, max_new_tokens=4, batch_size=8)
    result = evaluate_gsm8k(model, tokenizer, dataset, **options, **QUIET)
    figures = result["figures"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(figures) == [
        "pass@1", "pass@4", "answered", "substring_pass@1", "substring_pass@4", "shots", "too_long"
    ]  # fmt: skip
    mean, error = 0.75 / 4, sqrt(((0.5 - 0.1875) ** 2 + 2 * 0.1875**2 + (0.25 - 0.1875) ** 2) / 3 / 4)
    assert figures["pass@1"] == {"value": pytest.approx(mean), "error": pytest.approx(error), "n": 4}
    assert figures["pass@4"]["value"] == 0.5
    assert figures["answered"]["value"] == pytest.approx((3 + 1 + 2 + 0) / 16)
    assert figures["substring_pass@1"]["value"] == pytest.approx((3 + 2 + 1 + 0) / 16)  # 10 10 10; 20 200; 30
    assert figures["substring_pass@4"]["value"] == 0.75
    assert figures["too_long"]["value"] == figures["shots"]["value"] == 0

    table = gsm8k_table({"mine": result, "other": result})
    assert "0.1875 ± 0.12" in table and "NOT accuracy" in table and "| problems" in table
    assert len({len(line) for line in table.split("\n\n")[0].splitlines()}) == 1  # aligned


def test_a_question_that_does_not_fit_counts_as_wrong(model, tokenizer, dataset):
    long = DatasetDict(dataset)
    long["test"] = Dataset.from_list([{"question": "the cat " * 200, "answer": "#### 1"}, *rows("test", 1)])
    result = evaluate_gsm8k(model, tokenizer, long, shots=1, samples=2, max_new_tokens=4, **QUIET)
    assert result["figures"]["too_long"]["value"] == 0.5 and result["figures"]["pass@1"]["n"] == 2
    assert result["figures"]["shots"]["value"] == 0.5


RUN = dict(shots=1, samples=2, max_new_tokens=6, **QUIET)


def test_a_stopped_run_goes_on(model, tokenizer, dataset, tmp_path, monkeypatch):
    whole = evaluate_gsm8k(model, tokenizer, dataset, **RUN, batch_size=10, record=tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["problem"] for line in lines[1:]] == [0, 1, 2, 3, 4]

    asked, complete = [], gsm8k.complete_texts
    monkeypatch.setattr(
        gsm8k, "complete_texts", lambda *args, **given: (asked.extend(given["keys"]), complete(*args, **given))[1]
    )
    for kept, torn, left in [
        (3, lines[3][:20], [2, 3, 4]),
        (6, "", []),
        (1, "", [0, 1, 2, 3, 4]),
        (0, '{"se', [0, 1, 2, 3, 4]),
    ]:
        record = tmp_path / "deep" / f"{kept}.jsonl"
        record.parent.mkdir(exist_ok=True)
        record.write_text("".join(lines[:kept]) + torn)
        asked.clear()
        assert evaluate_gsm8k(model, tokenizer, dataset, **RUN, batch_size=3, record=record) == whole
        assert asked == left and record.read_text() == "".join(lines)
    asked.clear()
    record.write_text("".join(lines[:3]))
    part = evaluate_gsm8k(model, tokenizer, dataset, **RUN, problems=2, record=record)
    assert asked == [] and part["figures"]["pass@1"]["n"] == 2  # and more problems later
    assert evaluate_gsm8k(model, tokenizer, dataset, **RUN, record=record) == whole and asked == [2, 3, 4]


def test_a_record_holds_any_text(model, tokenizer, dataset, tmp_path, monkeypatch):
    odd = "#### 10\u2028\x85\x1c\x0b\r\n\ufffd\x00“é”"
    monkeypatch.setattr(gsm8k, "complete_texts", lambda *args, **options: [[WrittenText(odd, [], True)] * 2])
    options = dict(problems=1, record=tmp_path / "run.jsonl", **RUN)
    written = evaluate_gsm8k(model, tokenizer, dataset, **options)
    monkeypatch.setattr(gsm8k, "complete_texts", None)
    assert evaluate_gsm8k(model, tokenizer, dataset, **options) == written
    assert written["figures"]["pass@1"]["value"] == 1
    assert json.loads((tmp_path / "run.jsonl").read_bytes().split(b"\n")[1])["texts"] == [odd, odd]


def test_a_record_of_something_else_is_refused(model, tokenizer, dataset, tmp_path, monkeypatch):
    record = tmp_path / "run.jsonl"
    evaluate_gsm8k(model, tokenizer, dataset, **RUN, problems=1, record=record)
    before = record.read_text()
    monkeypatch.setattr(gsm8k, "complete_texts", None)
    for other, name in [
        ({"shots": 0}, "shots, questions"), ({"samples": 3}, "samples"), ({"seed": 1}, "seed"),
        ({"max_new_tokens": 7}, "max_new_tokens"), ({"num_inference_steps": 3}, "num_inference_steps"),
        ({"samples": 1, "decoding": GREEDY}, "samples, decoding"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"holds a run with another {name}"):
            evaluate_gsm8k(model, tokenizer, dataset, **RUN | other, record=record)
    with pytest.raises(ValueError, match="another questions"):
        other = DatasetDict(train=dataset["train"], test=Dataset.from_list(rows("quiz", 3)))
        evaluate_gsm8k(model, tokenizer, other, **RUN, record=record)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another weights"):
        evaluate_gsm8k(model, tokenizer, dataset, **RUN, record=record)
    assert record.read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples must be an integer of 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more"),
        ({"batch_size": 0}, "batch_size must be an integer of 1 or more"),
        ({"problems": 6}, "between 1 and the 5"),
        ({"problems": 0}, "between 1 and the 5"),
        ({"shots": 7}, "rows of the train split"),
        ({"decoding": GREEDY}, "ask for 1 sample, not 5"),
        ({"chat": True}, "no chat template"),
    ],
)
def test_bad_input_is_refused_before_any_computation(
    options, message, model, tokenizer, dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(gsm8k, "complete_texts", None)
    with pytest.raises(ValueError, match=message):
        evaluate_gsm8k(model, tokenizer, dataset, **options, record=tmp_path / "r.jsonl", **QUIET)
    assert not (tmp_path / "r.jsonl").exists()


# ------------------------------------------------------------------ files and command line


@pytest.fixture
def folders(model, tokenizer, tmp_path):
    """Of a model and of data, as the command line takes them."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, count in (("train", 6), ("test", 5)):
        lines = [json.dumps(row) for row in rows(split, count)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "model"), str(tmp_path / "data")


def test_command_line(folders, tmp_path, capsys):
    model, data = folders
    output = tmp_path / "results" / "gsm8k.json"
    arguments = [
        model,
        "--data",
        data,
        "--shots",
        "1",
        "--problems",
        "3",
        "--max_new_tokens",
        "5",
        "--output",
        str(output),
    ]
    main([*arguments, "--samples", "2"])
    printed, result = capsys.readouterr().out, json.loads(output.read_text())
    assert "pass@1" in printed and "pass@2" in printed and "NOT accuracy" in printed
    assert result["settings"]["shots"] == 1 and result["figures"]["pass@2"]["n"] == 3
    assert len(output.with_suffix(".jsonl").read_text().splitlines()) == 4
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--greedy"])
    assert stopped.value.code == 2 and "another samples, decoding" in capsys.readouterr().err
    main([*arguments[:-1], str(tmp_path / "greedy.json"), "--greedy"])
    assert json.loads((tmp_path / "greedy.json").read_text())["settings"]["samples"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{nowhere}", "--data", "{data}"], "nowhere"),
        (["{model}", "--data", "{data}", "--problems", "9"], "between 1 and the 5"),
        (["{model}", "--data", "{data}", "--temperature", "0"], "temperature"),
        (["{model}", "--data", "{data}", "--output", "{nowhere}.jsonl"], "holds the texts"),
    ],
)
def test_command_line_refuses_with_a_sentence(arguments, message, folders, tmp_path, capsys):
    names = {"model": folders[0], "data": folders[1], "nowhere": tmp_path / "nowhere"}
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(**names) for argument in arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_data_without_a_split_or_a_column_is_refused(folders, tmp_path):
    loaded = load_gsm8k(folders[1])
    assert loaded["test"][2] == rows("test", 3)[2] and len(loaded["train"]) == 6
    (Path(folders[1]) / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="no split train"):
        load_gsm8k(folders[1])


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data/gsm8k")
def test_every_answer_of_gsm8k_is_read():
    dataset = load_gsm8k(REAL)
    assert (len(dataset["train"]), len(dataset["test"])) == (7473, 1319)
    for split in dataset.values():
        answers = [extract_answer(answer) for answer in split["answer"]]
        given = [Decimal(answer.rpartition("####")[2].replace(",", "").strip()) for answer in split["answer"]]
        assert answers == given
    assert extract_answer(dataset["test"][0]["answer"]) == 18
    assert len(choose_examples(dataset, 8)) == 8
