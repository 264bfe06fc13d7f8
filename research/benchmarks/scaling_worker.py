"""What each process of scaling.py runs: `scaling_worker.py SETTINGS.json OUTPUT.json`.

A script for accelerate and torchrun, which start it by its path. The first process writes what it measured.
"""

import json
import runpy
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from ltm_hf import LTMForCausalLM, preset_config
from ltm_hf.training import LTMTrainer, LTMTrainingArguments

# Modes on a CPU, and the counting of all-gathers, are those of the tests.
launching = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "tests" / "training" / "launching.py")))


class Stopwatch(TrainerCallback):
    """Steps take turns with the ways to gather. Times each, but counts the all-gathers of the last warm-up steps."""

    def __init__(self, ways, warmup):
        self.ways, self.warmup = ways, warmup
        self.milliseconds = {way: [] for way in ways}
        self.gathers = {way: launching.AllGathers() for way in ways}

    def _now(self, args):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.turn, index = divmod(state.global_step, len(self.ways))
        self.way = args.gather_during_inference = self.ways[index]
        if self.turn == self.warmup - 1:
            self.gathers[self.way].__enter__()
        self.start = self._now(args)

    def on_step_end(self, args, state, control, **kwargs):
        if self.turn >= self.warmup:
            self.milliseconds[self.way].append(self._now(args) - self.start)
        elif self.turn == self.warmup - 1:
            self.gathers[self.way].__exit__(None, None, None)


def train(given: SimpleNamespace, folder: str) -> tuple[LTMTrainingArguments, dict]:
    """Training arguments, and what this process measured. Raises RuntimeError in another number of processes."""
    steps = len(given.ways) * (given.warmup + given.repeats)
    args = LTMTrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=given.batch_size,
        bf16=given.bf16,
        seed=given.seed,
        use_cpu=given.device == "cpu" and given.mode in ("single", "ddp"),
        dataloader_pin_memory=given.device == "cuda",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if args.world_size != given.processes:
        raise RuntimeError(f"{given.mode} was to run {given.processes} processes and runs {args.world_size}.")
    set_seed(given.seed)
    config = preset_config(given.preset, **given.config_overrides)
    shape = (steps * args.train_batch_size * given.processes, config.max_position_embeddings)
    rows = Dataset.from_dict({"input_ids": torch.randint(config.vocab_size, shape).tolist()})
    watch, model = Stopwatch(given.ways, given.warmup), LTMForCausalLM(config)
    parameters = model.num_parameters()
    LTMTrainer(model, args, train_dataset=rows, callbacks=[watch]).train()
    ways = {
        way: {
            "milliseconds": watch.milliseconds[way],
            "all_gathers": gathers.calls,
            "gathered_bytes": gathers.bytes,
            "gathered_models": gathers.elements / parameters,
        }
        for way, gathers in watch.gathers.items()
    }
    return args, {"parameters": parameters, "block_size": shape[1], "ways": ways}


def main(settings: str, output: str) -> None:
    given = SimpleNamespace(**json.loads(Path(settings).read_text()))
    if given.device == "cpu":
        launching.shard_on_cpu(given.mode)
    with tempfile.TemporaryDirectory() as folder:
        args, found = train(given, folder)
    if args.process_index == 0:
        Path(output).write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
