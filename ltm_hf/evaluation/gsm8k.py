"""GSM8K (Cobbe et al. 2021): questions of grade school mathematics, few-shot or zero-shot, for any causal LM.

    python -m ltm_hf.evaluation.gsm8k outputs/ltm-small --shots 5 --samples 5 --problems 100
    python -m ltm_hf.evaluation.gsm8k gpt2 --shots 5 --samples 5 --problems 100
    python -m ltm_hf.evaluation.gsm8k outputs/finetuned --shots 0 --chat --greedy      # after examples/finetune.py

prints a Markdown table, writes it as JSON, and every text as a line of JSON beside it: a run that is killed goes on.
Examples come from the train split (the released script takes them from the test split). An LTM infers its latents from
the prompt, examples included.
"""

import json
import math
import os
import random
import re
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from tqdm.auto import tqdm

from .. import cli
from ..data import prompt_inputs
from ..data.files import file_type, read_rows, visible
from ..data.numbers import check_at_least
from ..loading import load_causal_lm
from .figures import cell, figure, markdown_rows
from .report import fingerprint
from .sampling import MULTINOMIAL, Decoding, check_inference, check_room, complete_texts, context_length

NEXT_QUESTION = "\nQuestion:"  # where a few-shot answer ends

DESCRIPTIONS = {
    "pass@": "chance that one of so many answers after #### is right; unbiased (Chen et al. 2021)",
    "answered": "share of the texts that give an answer after ####",
    "substring_pass@": "the released script's match, the right number anywhere in the text; NOT accuracy",
    "shots": "examples in the prompt, fewer than asked for where they do not fit the model's context",
    "too_long": "share of the problems that do not fit the context even alone; they count as wrong",
}

_COLUMNS = ("question", "answer")

# As openai/grade-school-math reads answers, and with a currency sign.
_ANSWER = re.compile(r"#### *(?P<sign>-?\$?|\$-)(?P<number>[0-9][0-9,]*(\.[0-9]+)?|\.[0-9]+)")


# ------------------------------------------------------------------ what is asked


def load_gsm8k(name_or_folder: str | Path = "openai/gsm8k") -> DatasetDict:
    """The splits `train` and `test` of the Hub's data set, or of a folder with json or parquet files train* and test*.

    Raises ValueError if a split or a column is missing, and for what is wrong in a file, by its line.
    """
    folder = Path(name_or_folder).expanduser()
    dataset = _local(folder) if folder.is_dir() else load_dataset(str(name_or_folder), "main")
    for split in ("train", "test"):
        if split not in dataset or not set(_COLUMNS) <= set(dataset[split].column_names):
            raise ValueError(f"{str(name_or_folder)!r} has no split {split} with the columns question and answer.")
    return dataset


def _local(folder: Path) -> DatasetDict:
    splits = DatasetDict()
    for split in ("train", "test"):
        rows = []
        for file in visible(folder, f"{split}*"):
            for place, row in read_rows(str(file)) if file_type(file) in ("json", "parquet") else ():
                if not all(isinstance(row.get(name), str) for name in _COLUMNS):
                    raise ValueError(f"{place}: question and answer must be text, there are {', '.join(row)}.")
                rows.append({name: row[name] for name in _COLUMNS})
        if rows:
            splits[split] = Dataset.from_list(rows)
    return splits


def choose_examples(dataset: DatasetDict, shots: int, seed: int = 0) -> list[dict]:
    """`shots` rows of the train split, drawn once for all problems; none whose question is in the test split too.

    Raises ValueError for a negative number and for more than there are.
    """
    asked = set(dataset["test"]["question"])
    rows = [row for row, question in enumerate(dataset["train"]["question"]) if question not in asked]
    if shots not in range(len(rows) + 1):
        raise ValueError(f"shots must lie between 0 and the {len(rows)} rows of the train split, got {shots}.")
    return [dataset["train"][row] for row in random.Random(seed).sample(rows, shots)]


def encode_problem(tokenizer, question: str, examples: Sequence[dict] = (), chat: bool = False) -> list[int]:
    """Token ids of a prompt: examples and question as text, or as the turns of a conversation (chat template)."""
    if not chat:
        shown = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples)
        prompt = f"{shown}Question: {question}\nAnswer:"
    else:
        prompt = []
        for row in examples:
            prompt.append({"role": "user", "content": row["question"]})
            prompt.append({"role": "assistant", "content": row["answer"]})
        prompt.append({"role": "user", "content": question})
    return prompt_inputs({"prompt": prompt}, tokenizer)["input_ids"][0].tolist()


def fit_problem(model, tokenizer, question, examples, max_new_tokens, chat=False) -> tuple[list[int] | None, int]:
    """The prompt with as many of the last examples as leave room for the answer, and their number; None if none do."""
    limit = context_length(model)
    for first in range(len(examples) + 1):
        prompt = encode_problem(tokenizer, question, examples[first:], chat)
        if limit is None or len(prompt) + max_new_tokens <= limit:
            return prompt, len(examples) - first
    return None, 0


# ------------------------------------------------------------------ what is right


def extract_answer(text: str) -> Decimal | None:
    """The number after the first `####`, as the data set writes answers; None if there is none.

    Commas and a currency sign are dropped, and so is a unit or a full stop that follows.
    """
    found = _ANSWER.search(text)
    if found is None:
        return None
    number = Decimal(found["number"].replace(",", ""))
    return -number if "-" in found["sign"] else number


def substring_match(text: str, answer: Decimal) -> bool:
    """The released script's test: the digits of the right number anywhere in the text, also within others."""
    return f"{answer:f}" in text.replace(",", "")


def pass_at_k(n: int, correct: int, k: int) -> float:
    """1 - C(n - correct, k) / C(n, k): the unbiased chance that one of k is right, of n samples (Chen et al. 2021).

    Raises ValueError unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= correct <= n, got n={n}, correct={correct}, k={k}.")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


# ------------------------------------------------------------------ a run


def evaluate_gsm8k(
    model,
    tokenizer,
    dataset: DatasetDict,
    *,
    shots: int = 5,
    samples: int = 5,
    problems: int | None = None,
    decoding: Decoding = MULTINOMIAL,
    chat: bool = False,
    max_new_tokens: int = 256,
    num_inference_steps: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    record: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Accuracy on the first `problems` of the test split (default all), with standard errors over problems.

    shots: examples of the train split; 0 for a model that was fine-tuned on it.
    samples: texts for each problem; pass@1 and pass@samples are reported. Greedy search writes one.
    chat: ask as a conversation, in the form that examples/finetune.py trains on, instead of `Question:` and `Answer:`.
    record: file that each problem's texts are appended to as a line of JSON. A run with the same settings goes on from
        it, with the same result as one that was not stopped, also with more problems than before.

    Returns a dict for JSON: `settings`, and `figures`, each {"value", "error", "n"}; see `DESCRIPTIONS`.
    Raises ValueError, before any computation, for numbers out of range, weights that are not finite, an answer to score
    by that has no number, a tokenizer without a chat template where one is asked for, and a record of other settings,
    weights or questions.
    """
    check_at_least(1, samples=samples, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_inference(model, num_inference_steps)
    test, problems = dataset["test"], len(dataset["test"]) if problems is None else problems
    _check_run(tokenizer, test, samples, problems, decoding, chat)
    examples = choose_examples(dataset, shots, seed)
    check_room(model, [1], max_new_tokens)
    settings = {
        "model": model.config._name_or_path, "shots": shots, "samples": samples, "decoding": asdict(decoding),
        "chat": chat, "max_new_tokens": max_new_tokens, "num_inference_steps": num_inference_steps, "seed": seed,
        # A folder that was trained again keeps its name.
        "weights": fingerprint(model),
        "questions": fingerprint([row["answer"] for row in examples] + test["question"][:]),
    }  # fmt: skip
    done = {} if record is None else _read_record(Path(record), settings)
    todo = [problem for problem in range(problems) if problem not in done]
    at_once = max(1, batch_size // samples)
    with tqdm(total=problems, initial=problems - len(todo), desc="GSM8K", unit="problem", disable=not progress) as bar:
        for start in range(0, len(todo), at_once):
            chosen = todo[start : start + at_once]
            lines = _answer(model, tokenizer, test, chosen, examples, settings, decoding, batch_size)
            done |= {line["problem"]: line for line in lines}
            if record is not None:
                with open(record, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            bar.update(len(chosen))
    lines = [done[problem] for problem in range(problems)]
    return {"settings": settings | {"problems": problems}, "figures": _figures(lines, samples)}


def _check_run(tokenizer, test, samples: int, problems: int, decoding: Decoding, chat: bool) -> None:
    if samples > 1 and not decoding.do_sample:
        raise ValueError(f"Greedy search writes the same text each time: ask for 1 sample, not {samples}.")
    if chat and tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template: evaluate without chat.")
    if problems not in range(1, len(test) + 1):
        raise ValueError(f"problems must lie between 1 and the {len(test)} of the test split, got {problems}.")
    for problem in range(problems):
        if extract_answer(test[problem]["answer"]) is None:
            raise ValueError(f"The answer to problem {problem} of the test split has no number after ####.")


def _answer(model, tokenizer, test, chosen, examples, settings, decoding, batch_size) -> list[dict]:
    """A line of the record for each of the chosen problems. A problem's own number keys its noise."""
    chat, max_new_tokens = settings["chat"], settings["max_new_tokens"]
    fitted = {
        problem: fit_problem(model, tokenizer, test[problem]["question"], examples, max_new_tokens, chat)
        for problem in chosen
    }
    prompts = {problem: prompt for problem, (prompt, _) in fitted.items() if prompt is not None}
    texts = complete_texts(
        model,
        tokenizer,
        list(prompts.values()),
        max_new_tokens,
        decoding,
        num_samples=settings["samples"],
        num_inference_steps=settings["num_inference_steps"],
        stop_strings=None if chat else [NEXT_QUESTION],
        keys=list(prompts),
        batch_size=batch_size,
        seed=settings["seed"],
        progress=False,
    )
    texts = dict(zip(prompts, texts, strict=True))
    return [
        {
            "problem": problem,
            "answer": str(extract_answer(test[problem]["answer"])),
            "shots": fitted[problem][1],
            "texts": [text.text.split(NEXT_QUESTION)[0] for text in texts.get(problem, [])],
        }
        for problem in chosen
    ]


def _read_record(path: Path, settings: dict) -> dict[int, dict]:
    """The lines of a run that goes on, by problem, without a torn last one. A new file begins with the settings."""
    whole = path.read_bytes() if path.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    if not whole:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return {}
    head, *lines = map(json.loads, whole.splitlines())  # bytes: texts hold other separators of lines, as U+2028
    other = [name for name in settings if head.get("settings", {}).get(name) != settings[name]]
    if other:
        raise ValueError(f"{str(path)!r} holds a run with another {', '.join(other)}: take another file or remove it.")
    os.truncate(path, len(whole))
    return {line["problem"]: line for line in lines}


def _figures(lines: list[dict], samples: int) -> dict[str, dict]:
    right, matched, answered = [], [], []
    for line in lines:
        answer, extracted = Decimal(line["answer"]), [extract_answer(text) for text in line["texts"]]
        right.append(sum(given == answer for given in extracted))
        matched.append(sum(substring_match(text, answer) for text in line["texts"]))
        answered.append(sum(given is not None for given in extracted) / samples)
    ks = sorted({1, samples})
    return {
        **{f"pass@{k}": figure([pass_at_k(samples, count, k) for count in right]) for k in ks},
        "answered": figure(answered),
        **{f"substring_pass@{k}": figure([pass_at_k(samples, count, k) for count in matched]) for k in ks},
        "shots": figure([line["shots"] for line in lines]),
        "too_long": figure([not line["texts"] for line in lines]),
    }


def gsm8k_table(results: dict[str, dict]) -> str:
    """Of what `evaluate_gsm8k` returns for models by name: a Markdown table, a column for each."""
    names = dict.fromkeys(name for result in results.values() for name in result["figures"])
    rows = [["GSM8K", *results, "what it is"]]
    counts = [str(result["settings"]["problems"]) for result in results.values()]
    rows.append(["problems", *counts, "of the test split"])
    for name in names:
        cells = [cell(result["figures"].get(name)) for result in results.values()]
        rows.append([name, *cells, DESCRIPTIONS[re.sub(r"[0-9]+$", "", name)]])
    return (
        f"{markdown_rows(rows)}\n\nValue ± standard error over problems. A share of 0 or 1 shows no spread: "
        "it is still compatible with one that is 3 / problems away (95 %)."
    )


# ------------------------------------------------------------------ on the command line


@cli.one_sentence()
def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    record = options.output.with_suffix(".jsonl")
    if record == options.output:
        raise ValueError("--output is for the figures: the .jsonl of that name holds the texts.")
    decoding = Decoding(not options.greedy, options.temperature, top_p=options.top_p)
    dataset = load_gsm8k(options.data)
    model, tokenizer = load_causal_lm(options.model, options.device, options.trust_remote_code)
    if options.num_inference_steps is not None and not getattr(model.config, "num_latents", 0):
        raise ValueError("--num_inference_steps does nothing with a model without latents: leave it out.")
    result = evaluate_gsm8k(
        model,
        tokenizer,
        dataset,
        shots=options.shots,
        samples=1 if options.greedy else options.samples,
        problems=options.problems,
        decoding=decoding,
        chat=options.chat,
        max_new_tokens=options.max_new_tokens,
        num_inference_steps=options.num_inference_steps,
        batch_size=options.batch_size,
        seed=options.seed,
        record=record,
    )
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(gsm8k_table({options.model: result}))


def _parse(arguments):
    parser = cli.Parser(description="Few-shot or zero-shot GSM8K of any causal LM.")
    add = parser.add_argument
    add("model", help="folder of a checkpoint, or its name on the Hub")
    add("--data", default="openai/gsm8k", help="folder with train and test files, or a Hub name")
    add("--shots", type=cli.count, default=5, help="examples of the train split in the prompt; default 5")
    add("--samples", type=cli.positive_int, default=5, help="texts for each problem; default 5")
    add("--problems", type=cli.positive_int, help="so many, from the first of the test split; default all")
    add("--chat", action="store_true", help="ask by the chat template, as examples/finetune.py trains")
    add("--greedy", action="store_true", help="the likeliest token each time, one text a problem")
    add("--temperature", type=cli.temperature, default=1.0)
    add("--top_p", type=cli.share)
    add("--max_new_tokens", type=cli.positive_int, default=256)
    add("--num_inference_steps", type=cli.count, help="how long an LTM thinks; default its own")
    add("--batch_size", type=cli.positive_int, default=32, help="texts written together; default 32")
    add("--device", type=cli.device, default=cli.DEVICE)
    add("--trust_remote_code", action="store_true", help="run the Python that comes with the model if need be")
    add("--seed", type=cli.seed, default=0)
    add("--output", type=cli.file, default=Path("gsm8k.json"), help="figures; texts go to the same .jsonl")
    named, options = cli.given(parser, arguments), parser.parse_args(arguments)
    cli.refuse_idle(named, (options.greedy, "with --greedy", ("samples", "temperature", "top_p")))
    return options


if __name__ == "__main__":
    main()
