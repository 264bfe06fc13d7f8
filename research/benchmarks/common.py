"""What the benchmarks share: their options, and what is said of where a figure comes from."""

import datetime
import json
import platform
import resource
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import torch
import transformers

from ltm_hf import PRESETS, LTMConfig, cli, preset_config

ROOT = Path(__file__).parents[2]


def parser(description: str) -> cli.Parser:
    """With the options of all benchmarks."""
    found = cli.Parser(description=description)
    found.add_argument("--device", type=cli.device, default=cli.DEVICE, help="default: cuda where there is one")
    found.add_argument("--threads", type=cli.positive_int, help="of the CPU; default: torch's. 1 where others compute")
    found.add_argument("--seed", type=cli.seed, default=0, help="default 0")
    found.add_argument("--output", type=cli.file, help="JSON file to write the same figures to")
    return found


def add_timing(options: cli.Parser, repeats: int = 7) -> None:
    options.add_argument("--repeats", type=cli.positive_int, default=repeats, help=f"default {repeats}")
    options.add_argument("--warmup", type=cli.positive_int, default=2, help="repeats left out before; default 2")


def add_preset(options: cli.Parser, default: str) -> None:
    options.add_argument("--preset", choices=PRESETS, default=default, help=f"default {default}")
    options.add_argument("--config_overrides", type=_fields, default={}, help="fields of LTMConfig as JSON")


def _fields(text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ArgumentTypeError(f"must be a JSON object of fields, got {text!r}")
    return found


def config_of(args) -> LTMConfig:
    return preset_config(args.preset, **args.config_overrides)


def begin(args) -> None:
    """Threads and seed as asked for; the device as torch has it."""
    args.device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.set_seed(args.seed)


def environment(device: torch.device) -> dict[str, str]:
    cpu = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def in_words(where: dict[str, str]) -> str:
    return f"{where['hardware']}; torch {where['torch']}, transformers {where['transformers']}; {where['date']}"


def write(args, result: dict) -> None:
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of cells, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def relative_difference(pairs) -> float:
    """The largest |a - b| / |a| of pairs of tensors."""
    return max(float((a - b).norm() / a.norm().clamp(min=1e-12)) for a, b in pairs)


def peak_of_this_process() -> int:
    """Bytes, Python and torch included."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss begins at the peak of the process that started this one
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
