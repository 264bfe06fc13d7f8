"""What a training step costs on several processes: tokens per second, and how much of the model is gathered for it.

    python -m research.benchmarks.scaling
    python -m research.benchmarks.scaling --device cuda --processes 1 2 8 --preset ltm-large --batch_size 64 --bf16 \\
        --rounds 3 --output scaling.json

runs LTMTrainer in one process ("single") and with each launch file of examples/configs/ (DDP, FSDP2, ZeRO-2, ZeRO-3),
where parameters are sharded with `gather_during_inference` auto and never. The model is newly initialised and the token
ids are random (seeded), blocks as long as the model takes: the cost does not depend on what they are.

- step: inference, the slow step, clipping and the optimiser, as Trainer runs them; not reading data, not logging.
  Milliseconds are medians on the first process, warm-up left out, with the lowest and highest median of the rounds. The
  two ways to gather take turns step by step; the modes take turns in `--rounds`, a new start of all their processes.
- tokens/s: of all processes together. Each has a batch of its own, so that more of them make a larger batch.
- all-gathers: calls of a step, and what a process has received after them, its own part included: MiB, and as a
  multiple of all parameters. Counted in the last warm-up step. One call is Trainer's count of the tokens it has seen.
  Reductions of gradients are not in it.
"""

import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from ltm_hf import cli

from . import common
from .scaling_worker import launching

GATHERS = {"fsdp2": ("auto", "never"), "zero3": ("auto", "never")}  # the modes that shard parameters
WORKER = Path(__file__).with_name("scaling_worker.py")


def environment(device: torch.device) -> dict:
    found = common.environment(device)
    for package in ("accelerate", "deepspeed"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return found | {"cores": cores}


def measured(args, where: dict) -> dict[tuple[str, int], list[dict]]:
    """What each mode found in each round, by mode and processes. Says on stderr which is running."""
    cases = [
        (mode, processes)
        for mode in args.modes
        for processes in ([1] if mode == "single" else args.processes)
        if where["deepspeed"] or not mode.startswith("zero")
    ]
    names = ("preset", "config_overrides", "batch_size", "bf16", "repeats", "warmup", "seed")
    given = {name: getattr(args, name) for name in names} | {"device": args.device.type}
    found = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        settings, output = Path(folder, "settings.json"), Path(folder, "found.json")
        for number in range(args.rounds):
            for mode, processes in cases:
                print(f"round {number + 1} of {args.rounds}: {mode}, {processes} process(es)", file=sys.stderr)
                of_case = {"mode": mode, "processes": processes, "ways": GATHERS.get(mode, ("auto",))}
                settings.write_text(json.dumps(given | of_case))
                output.unlink(missing_ok=True)
                ran = launching.launch(mode, processes, WORKER, settings, output, device=args.device.type)
                if ran.returncode != 0 or not output.is_file():
                    raise SystemExit(f"{ran.stderr[-5000:]}\n{mode} failed with {processes} process(es); see above.")
                found[mode, processes].append(json.loads(output.read_text()))
    return found


def benchmark(args, where: dict) -> dict:
    found = measured(args, where)
    (first, *_), *_ = found.values()
    rows = []
    for (mode, processes), rounds in found.items():
        for way in rounds[0]["ways"]:
            ways = [one["ways"][way] for one in rounds]
            medians = [statistics.median(one["milliseconds"]) for one in ways]
            milliseconds = statistics.median(value for one in ways for value in one["milliseconds"])
            tokens = processes * args.batch_size * first["block_size"]
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
    config = common.config_of(args)
    settings = {
        "preset": args.preset,
        "parameters": first["parameters"],
        "device": args.device.type,
        "precision": "bf16" if args.bf16 else "float32",
        "inference_method": config.inference_method,
        "num_inference_steps": config.num_inference_steps,
        "batch_size": args.batch_size,
        "block_size": first["block_size"],
        "warmup": args.warmup,
        "repeats": args.repeats,
        "rounds": args.rounds,
        "seed": args.seed,
    }
    return {"settings": settings, "environment": where, "rows": rows}


def report(result: dict) -> str:
    settings, where = result["settings"], result["environment"]
    packages = ", ".join(f"{name} {where[name]}" for name in ("torch", "transformers", "accelerate", "deepspeed"))
    lines = [
        f"{settings['preset']} ({settings['parameters']:,} parameters), {settings['batch_size']} x "
        f"{settings['block_size']} random tokens a process, {settings['num_inference_steps']} inference steps "
        f"({settings['inference_method']}), {settings['precision']}",
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


def parse():
    modes, options = launching.MODES, common.parser("What a training step costs on several processes.")
    common.add_preset(options, "ltm-tiny-paper")
    common.add_timing(options, repeats=8)
    options.add_argument("--modes", nargs="+", choices=modes, default=modes, help="default: all")
    options.add_argument("--processes", nargs="+", type=cli.positive_int, default=[1, 2], help="default 1 2")
    options.add_argument("--batch_size", type=cli.positive_int, default=2, help="sequences of a process; default 2")
    options.add_argument("--bf16", action="store_true", help="mixed precision; default float32")
    options.add_argument("--rounds", type=cli.positive_int, default=1, help="starts of each mode; default 1")
    args = options.parse_args()
    if args.device == "cuda" and max(args.processes) > torch.cuda.device_count():
        raise ValueError(
            f"--processes: there are {torch.cuda.device_count()} GPUs for {max(args.processes)} processes."
        )
    return args


@cli.one_sentence()
def main() -> None:
    args = parse()
    common.begin(args)
    where = environment(args.device)
    if not where["deepspeed"] and any(mode.startswith("zero") for mode in args.modes):
        print('zero2 and zero3 are left out: DeepSpeed is not installed (pip install "ltm_hf[deepspeed]").')
    result = benchmark(args, where)
    print(report(result))
    common.write(args, result)


if __name__ == "__main__":
    main()
