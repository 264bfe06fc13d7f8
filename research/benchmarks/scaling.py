"""What a training step costs on several processes: tokens per second, and how much of the model is gathered for it.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --device cuda --processes 1 2 8 --preset ltm-large --block-size 1024 \\
        --batch-size 64 --bf16 --rounds 3 --output scaling.json

runs LTMTrainer in one process ("single") and with each launch file of examples/configs/ (DDP, FSDP2, ZeRO-2, ZeRO-3),
where parameters are sharded with `gather_during_inference` auto and never. The model is newly initialised and the token
ids are random (seeded): the cost does not depend on what they are.

- step: the fast loop, the slow step, clipping and the optimiser, as Trainer runs them; not reading data, not logging.
  Milliseconds are medians on the first process, warm-up left out, with the lowest and highest median of the rounds. The
  two ways to gather take turns step by step; the modes take turns in `--rounds`, a new start of all their processes.
- tokens/s: of all processes together. Each has a batch of its own, so that more of them make a larger batch.
- all-gathers: calls of a step, and what a process has received after them, its own part included: MiB, and as a
  multiple of all parameters. Counted in the last warm-up step. One call is Trainer's count of the tokens it has seen.
  Reductions of gradients are not in it.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from launch import MODES, AllGathers, launch, shard_on_cpu
from train_step import at_least, processor_name
from transformers import TrainerCallback, set_seed

from ltm_hf import PRESETS, LTMForCausalLM, preset_config
from ltm_hf.training import LTMTrainer, LTMTrainingArguments

GATHERS = {"fsdp2": ("auto", "never"), "zero3": ("auto", "never")}  # the modes that shard parameters


# ------------------------------------------------------------------ in each process


class Stopwatch(TrainerCallback):
    """Steps take turns with the ways to gather. Times each, but counts the all-gathers of the last warm-up steps."""

    def __init__(self, ways, warmup):
        self.ways, self.warmup = ways, warmup
        self.milliseconds = {way: [] for way in ways}
        self.gathers = {way: AllGathers() for way in ways}

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


def work(options) -> None:
    """Train in this process, one of `--processes`; the first writes what it measured to --output."""
    mode, (processes,), ways = options.worker, options.processes, GATHERS.get(options.worker, ("auto",))
    if options.device == "cpu":
        shard_on_cpu(mode)
    steps = len(ways) * (options.warmup + options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        args = LTMTrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=options.batch_size,
            bf16=options.bf16,
            seed=options.seed,
            use_cpu=options.device == "cpu" and mode in ("single", "ddp"),
            dataloader_pin_memory=options.device == "cuda",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        if args.world_size != processes:
            raise RuntimeError(f"{mode} was to run {processes} processes and runs {args.world_size}.")
        set_seed(options.seed)
        config = preset_config(options.preset, **overrides(options))
        shape = (steps * args.train_batch_size * processes, options.block_size or config.max_position_embeddings)
        rows = Dataset.from_dict({"input_ids": torch.randint(config.vocab_size, shape).tolist()})
        watch = Stopwatch(ways, options.warmup)
        model = LTMForCausalLM(config)
        parameters = model.num_parameters()
        LTMTrainer(model, args, train_dataset=rows, callbacks=[watch]).train()
        found = {
            way: {
                "milliseconds": watch.milliseconds[way],
                "all_gathers": watch.gathers[way].calls,
                "gathered_bytes": watch.gathers[way].bytes,
                "gathered_models": watch.gathers[way].elements / parameters,
            }
            for way in ways
        }
        if args.process_index == 0:
            options.output.write_text(json.dumps({"parameters": parameters, "block_size": shape[1], "ways": found}))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def overrides(options) -> dict:
    given = {"num_inference_steps": options.num_inference_steps, "max_position_embeddings": options.block_size}
    return {name: value for name, value in given.items() if value is not None}


# ------------------------------------------------------------------ from outside


def environment(device: str) -> dict:
    versions = {}
    for package in ("torch", "transformers", "accelerate", "deepspeed"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{processor_name()}, {cores} cores, no GPU"
    return {"date": datetime.date.today().isoformat(), "hardware": hardware, "cores": cores, **versions}


def benchmark(options, where: dict) -> dict:
    """Launches each mode in turn; says on stderr which."""
    cases = [
        (mode, processes)
        for mode in options.modes
        for processes in ([1] if mode == "single" else options.processes)
        if where["deepspeed"] or not mode.startswith("zero")
    ]
    found = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for mode, processes in cases:
                print(f"round {number + 1} of {options.rounds}: {mode}, {processes} process(es)", file=sys.stderr)
                output = Path(folder, f"{mode}-{processes}-{number}.json")
                arguments = [*options.given, "--worker", mode, "--processes", processes, "--output", output]
                ran = launch(mode, processes, __file__, *arguments, device=options.device)
                if ran.returncode != 0 or not output.is_file():
                    raise SystemExit(f"{ran.stderr[-5000:]}\n{mode} failed with {processes} process(es); see above.")
                found[mode, processes].append(json.loads(output.read_text()))
    (first, *_), *_ = found.values()
    rows = []
    for (mode, processes), rounds in found.items():
        for way in rounds[0]["ways"]:
            ways = [one["ways"][way] for one in rounds]
            medians = [statistics.median(one["milliseconds"]) for one in ways]
            milliseconds = statistics.median(value for one in ways for value in one["milliseconds"])
            tokens = processes * options.batch_size * first["block_size"]
            rows.append(
                {
                    "mode": mode,
                    "processes": processes,
                    "gather_during_inference": way if mode in GATHERS else None,
                    "milliseconds": milliseconds,
                    "milliseconds_range": [min(medians), max(medians)],
                    "tokens_per_second": 1000 * tokens / milliseconds,
                    **{name: value for name, value in ways[0].items() if name != "milliseconds"},
                }
            )
    config = preset_config(options.preset, **overrides(options))
    return {
        "settings": {
            "preset": options.preset,
            "parameters": first["parameters"],
            "device": options.device,
            "precision": "bf16" if options.bf16 else "float32",
            "optimizer": config.inference_optimizer,
            "num_inference_steps": config.num_inference_steps,
            "batch_size": options.batch_size,
            "block_size": first["block_size"],
            "warmup": options.warmup,
            "repeats": options.repeats,
            "rounds": options.rounds,
            "seed": options.seed,
        },
        "environment": where,
        "rows": rows,
    }


def report(result: dict) -> str:
    settings, where = result["settings"], result["environment"]
    packages = ", ".join(f"{name} {where[name]}" for name in ("torch", "transformers", "accelerate", "deepspeed"))
    lines = [
        f"{settings['preset']} ({settings['parameters']:,} parameters), {settings['batch_size']} x "
        f"{settings['block_size']} random tokens a process, {settings['num_inference_steps']} inference steps "
        f"({settings['optimizer']}), {settings['precision']}",
        f"{where['hardware']}; {packages}; {where['date']}",
    ]
    if settings["device"] == "cpu":
        lines.append(
            f"Processes of one thread each share the {where['cores']} core(s) of this machine, with whatever else runs "
            "there: tokens/s tells what a mode costs, not how it scales."
        )
    lines += [
        "",
        "| mode | processes | gather_during_inference | ms a step | tokens/s | all-gathers a step | MiB "
        "| times the parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        low, high = row["milliseconds_range"]
        lines.append(
            f"| {row['mode']} | {row['processes']} | {row['gather_during_inference'] or '–'} "
            f"| {row['milliseconds']:.0f} ({low:.0f} to {high:.0f}) | {row['tokens_per_second']:,.0f} "
            f"| {row['all_gathers']} | {row['gathered_bytes'] / 2**20:.1f} | {row['gathered_models']:.2f} |"
        )
    return "\n".join(lines)


def parse(arguments=None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    parser.add_argument("--processes", nargs="+", type=at_least(1), default=[1, 2], help="default 1 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--preset", choices=PRESETS, default="ltm-tiny-natural")
    parser.add_argument("--batch-size", type=at_least(1), default=2, help="sequences of a process; default 2")
    parser.add_argument("--block-size", type=at_least(2), help="tokens of a sequence; default: the preset's most")
    parser.add_argument("--num-inference-steps", type=at_least(0), help="default: the preset's")
    parser.add_argument("--bf16", action="store_true", help="mixed precision; default float32")
    parser.add_argument("--rounds", type=at_least(1), default=1, help="starts of each mode; default 1")
    parser.add_argument("--repeats", type=at_least(1), default=8, help="timed steps of a start; default 8")
    parser.add_argument("--warmup", type=at_least(1), default=2, help="steps before them; default 2")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.given = sys.argv[1:] if arguments is None else list(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}.")
    if options.device == "cuda" and max(options.processes) > torch.cuda.device_count():
        parser.error(f"--processes: there are {torch.cuda.device_count()} GPUs for {max(options.processes)} processes.")
    return options


def main() -> None:
    options = parse()
    if options.worker:
        return work(options)
    where = environment(options.device)
    if not where["deepspeed"] and any(mode.startswith("zero") for mode in options.modes):
        print('zero2 and zero3 are left out: DeepSpeed is not installed (pip install "ltm_hf[deepspeed]").')
    result = benchmark(options, where)
    print(report(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
