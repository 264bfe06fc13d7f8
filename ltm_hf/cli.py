"""What the commands share: options are checked before any work, and a user's mistake ends in one sentence."""

import math
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import HfArgumentParser

# What a mistake of the user's raises, here and in the libraries. Anything else is a bug, and keeps its traceback.
_MISTAKES = (
    ValueError, OSError, ImportError, FloatingPointError, HTTPError, SafetensorError, StrictDataclassError,
    yaml.YAMLError,
)  # fmt: skip


@contextmanager
def one_sentence():
    """Around a command, as a decorator or by `with`: its user's mistakes end in one sentence and exit status 2.

    `python -X dev` (PYTHONDEVMODE=1) shows the traceback of these too.
    """
    try:
        yield
    except Exception as error:
        if sys.flags.dev_mode or not _is_mistake(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {sentence(error)}", file=sys.stderr)
        sys.exit(2)


def _is_mistake(error: Exception) -> bool:
    if isinstance(error, _MISTAKES):
        return True
    from datasets.exceptions import DatasetsError  # a second, which most commands need not wait for

    return isinstance(error, DatasetsError)


def sentence(error: Exception) -> str:
    """What an error says, in one line: the libraries' advice that follows is left out."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{str(error.filename)!r}: {error.strerror}."
    if not isinstance(error, (ValueError, OSError)) and isinstance(error.__cause__, _MISTAKES):
        return sentence(error.__cause__)  # as of "An error occurred while generating the dataset"
    said = ""
    for line in str(error).splitlines():
        said = f"{said} {line.strip()}".strip()
        if said.endswith((".", "!", "?")):
            break
    return said or type(error).__name__


# ------------------------------------------------------------------ options


class Parser(ArgumentParser):
    """As argparse's, but that an error is a ValueError, without the usage."""

    def error(self, message):
        raise ValueError(message)

    def parse_args(self, args=None, namespace=None):
        options, rest = self.parse_known_args(args, namespace)
        if rest and not rest[0].startswith("-"):
            raise ValueError(f"There is no place for {rest[0]!r} in this command.")
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            raise ValueError(f"There is no option {rest[0]!r}{nearest(rest[0].split('=')[0], known)}")
        return options


class DataclassParser(Parser, HfArgumentParser):
    """As transformers', of dataclasses."""


def given(parser: Parser, arguments: Sequence[str] | None = None) -> set[str]:
    """The names of the options that the command line has. Raises ValueError for an empty one, which would say nothing,
    unless an empty text can be meant (`prompt`) or the library knows it (`resume_from_checkpoint`).
    """
    missing = object()
    options = parser.parse_args(arguments, Namespace(**{action.dest: missing for action in parser._actions}))
    found = {name: value for name, value in vars(options).items() if value is not missing}
    for name, value in found.items():
        if value in ("", [""]) and name not in ("prompt", "resume_from_checkpoint"):
            raise ValueError(f"--{name} is empty: leave it out.")
    return set(found)


def nearest(name: str, known: Iterable[str]) -> str:
    """How a sentence on an unknown name ends: with the known one that is most like it, where one is."""
    found = get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else "."


def refuse_idle(given: set[str], *rules: tuple[object, str, Iterable[str]]) -> None:
    """Raise ValueError for an option that was given and would do nothing.

    rules: whether one holds; when that is, as in "without --streaming"; the options that then do nothing.
    """
    for holds, when, names in rules:
        for name in sorted(names):
            if holds and name in given:
                raise ValueError(f"--{name} does nothing {when}: leave it out.")


def idle_in_corpora(args) -> tuple:
    """The rules of `refuse_idle` for the options that name a corpus."""
    return (
        (args.files, "with --files", ("dataset_name", "corpus")),
        (args.dataset_name, "with --dataset_name", ("corpus",)),
        (not args.dataset_name, "without --dataset_name", ("dataset_config_name",)),
    )


def idle_in_training(args) -> tuple:
    """The rules of `refuse_idle` for `TrainingArguments`."""
    hub = ("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision")
    return (
        (args.max_steps > 0, "with --max_steps", ("num_train_epochs",)),
        (args.save_strategy == "no", "with --save_strategy no", ("save_steps", "save_total_limit", "save_only_model")),
        (args.eval_strategy == "no", "with --eval_strategy no", ("eval_steps", "eval_delay", "eval_on_start")),
        (args.logging_strategy == "no", "with --logging_strategy no", ("logging_steps", "logging_first_step")),
        (not args.push_to_hub, "without --push_to_hub", hub),
        (True, "here", ("do_train", "do_eval", "do_predict")),
    )


def idle_without_latents(config) -> tuple:
    """The rules of `refuse_idle` for the options of training that say how a model thinks."""
    steps = (
        "objective",
        "infer_from",
        "learn_through_errors",
        "num_inference_steps",
        "num_inference_steps_min",
        "kl_annealing_steps",
    )
    rates = ("inference_learning_rate", "inference_learning_rate_end")
    return ((not config.num_latents, "with a model without latents", (*steps, *rates)),)


# ------------------------------------------------------------------ values of options


def _number(kind: type, fits: Callable, words: str) -> Callable[[str], int | float]:
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise ArgumentTypeError(f"must be {words}, got {text!r}")
        return value

    return convert


def _integer(least: int, bits: int = 31) -> Callable[[str], int]:
    return _number(int, lambda value: least <= value < 2**bits, f"an integer of {least} or more, below 2**{bits}")


positive_int, count = _integer(1), _integer(0)
block = _integer(2)  # begin-of-text and a token
vocabulary = _integer(258)  # 256 bytes and two special tokens
seed, port = _integer(0, bits=32), _integer(0, bits=16)
temperature = _number(float, lambda value: 1e-3 <= value <= 1e3, "a number from 0.001 to 1000")  # else no longer finite
share = _number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
fraction = _number(float, lambda value: 0 < value < 1, "a number between 0 and 1")


def at_least(least: int, **values: int | None) -> None:
    """The same for fields of a dataclass, where argparse has no type: None, or an integer of `least` or more."""
    for name, value in values.items():
        if value is not None and not least <= value < 2**31:
            raise ValueError(f"--{name} must be {least} or more, below 2**31, got {value}.")


def device(text: str) -> str:
    """The name of a device that is there."""
    try:
        torch.ones(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError):  # torch's, of no such kind, driver or number
        raise ArgumentTypeError(f"there is no device {text!r} here") from None
    return text


def folder(text: str | Path) -> Path:
    """A folder that is there, or can be made."""
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ArgumentTypeError(f"{str(there)!r} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArgumentTypeError(f"nothing can be written in {str(there)!r}")
    return path


def file(text: str) -> Path:
    """A file that can be written, in a folder that is there or can be made."""
    if Path(text).is_dir():
        raise ArgumentTypeError(f"{text!r} is a folder")
    return folder(Path(text).parent) / Path(text).name


def new_folder(text: str) -> Path:
    """A folder with nothing in it, or one that can be made."""
    path = folder(text)
    if path.is_dir() and any(path.iterdir()):
        raise ArgumentTypeError(f"{text!r} is not empty")
    return path


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where a command runs unless it is told
