"""Which rows a run reads: on any number of processes, before and after a resume, none twice and none lost."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import transformers
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from packaging import version
from torch.utils.data import BatchSampler

from ltm_hf.training import LTMTrainer, LTMTrainingArguments
from ltm_hf.training.order import RowSampler

SCRIPT = Path(__file__).with_name("run_to_kill.py")


def read(num_rows, first_row, steps, world, batch, accumulation):
    """The rows of some steps from a place on, as accelerate deals them out to processes and Trainer to steps."""
    rows_a_step, found = world * batch * accumulation, []
    while steps:
        sampler = BatchSampler(RowSampler(num_rows, rows_a_step, 7, lambda length: first_row), batch, drop_last=False)  # noqa: B023
        shares = [list(BatchSamplerShard(sampler, world, rank)) for rank in range(world)]
        count = min(steps * accumulation, len(shares[0]))
        found += [row for batches in list(zip(*shares, strict=True))[:count] for rows in batches for row in rows]
        first_row += count * world * batch
        steps -= count // accumulation
    return found


@pytest.mark.parametrize("seed", range(8))
def test_one_order_whatever_the_processes(seed):
    chance = random.Random(seed)
    num_rows = chance.randint(1, 60)
    found = []
    for _ in range(6):
        found += read(num_rows, len(found), chance.randint(1, 9), *(chance.randint(1, 4) for _ in range(3)))
    assert found == read(num_rows, 0, len(found), 1, 1, 1)
    for begin in range(0, len(found) - num_rows + 1, num_rows):
        assert sorted(found[begin : begin + num_rows]) == list(range(num_rows))


class Recording(LTMTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.rows += [row[0] - 3 for row in inputs["input_ids"].tolist()]
        return super().training_step(model, inputs, *args, **kwargs)


def rows_of(folder, make_model, checkpoint=None, save_steps=30, **arguments):
    args = LTMTrainingArguments(
        output_dir=str(folder), max_steps=30, warmup_steps=0, save_steps=save_steps, report_to="none", use_cpu=True,
        disable_tqdm=True, num_inference_steps=0, **arguments,
    )  # fmt: skip
    trainer = Recording(
        make_model(), args, train_dataset=Dataset.from_dict({"input_ids": [[3 + i] * 4 for i in range(11)]})
    )
    trainer.rows = []
    trainer.train(checkpoint)
    return trainer.rows


def test_another_batch_size_goes_on_in_the_same_order(tmp_path, make_model):
    """Under Trainer: from step 4 on batches of 3 x 2, from step 9 on of 5."""
    whole = rows_of(tmp_path / "1", make_model, save_steps=4, per_device_train_batch_size=2)
    assert sorted(whole[:11]) == sorted(whole[11:22]) == list(range(11)) and whole[:11] != whole[11:22]
    first = whole[:8]
    then = rows_of(
        tmp_path / "2", make_model, f"{tmp_path}/1/checkpoint-4", save_steps=9,
        per_device_train_batch_size=3, gradient_accumulation_steps=2,
    )[:30]  # fmt: skip
    last = rows_of(tmp_path / "3", make_model, f"{tmp_path}/2/checkpoint-9", per_device_train_batch_size=5)
    found = first + then + last
    assert found[:60] == whole
    assert all(sorted(found[i : i + 11]) == list(range(11)) for i in range(0, len(found) - 10, 11))


def test_sequential_rows_and_another_seed(tmp_path, make_model):
    ordered = rows_of(tmp_path, make_model, train_sampling_strategy="sequential", per_device_train_batch_size=2)
    assert ordered == [i % 11 for i in range(60)]
    orders = [
        rows_of(tmp_path / str(run), make_model, data_seed=seed, per_device_train_batch_size=2)
        for run, seed in enumerate((1, 1, 2))
    ]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.distributed
@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="5.17 cannot load an optimiser on several CPU processes",
)
@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
def test_one_process_then_two_then_one(tmp_path, start_run, streaming):
    """Also: a loss that is infinite on one process alone is skipped on both, which stay the same."""
    found, num_rows = [], 200 if streaming else 52
    for stop_at, world in ((5, 1), (10, 2), (15, 1)):
        record = tmp_path / str(stop_at)
        arguments = dict(rows=num_rows, streaming=streaming, stop_at=stop_at, record=str(record), poison=7)
        if world == 1:
            process = start_run(tmp_path / "run", **arguments)
            process.join(120)
            assert process.exitcode == 0
        else:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            subprocess.run([*torchrun, SCRIPT, tmp_path / "run", json.dumps(arguments)], check=True, timeout=300)
        records = [json.loads(path.read_text()) for path in sorted(record.iterdir())]
        assert len(records) == world and all(process["world"] == world for process in records)
        assert len({process["weights"] for process in records}) == 1
        for step in range(stop_at - 4, stop_at + 1):
            found += [row for process in records for row in process["rows"][str(step)]]
    assert len(found) == 5 * 6 + 5 * 12 + 5 * 6
    if streaming:
        assert sorted(found) == list(range(120))  # one pass, not at its end
    else:
        assert set(Counter(found[: 2 * num_rows]).values()) == {2} and len(set(found[2 * num_rows :])) == 120 - 104
    history = json.loads((tmp_path / "run" / "checkpoint-15" / "trainer_state.json").read_text())["log_history"]
    assert [entry.get("skipped_steps", 0) for entry in history if "loss" in entry] == [0, 0, 1, 1, 1]
