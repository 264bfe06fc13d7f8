"""A run's folder: which of its checkpoints are whole, which go, and that one run at a time writes there."""

import hashlib
import itertools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from .fingerprint import FINGERPRINT

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.get_logger(__name__)

# What begins with _ is never pushed to the Hub.
UNFINISHED = "_unfinished"  # where checkpoints are written: a run's own, by what its name ends with
LOCK = "_lock"
FILES = "files.json"  # bytes and SHA-256 of a checkpoint's files, by name; written last
EDITABLE = ".md"  # a card is a person's to change
WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", "global_step*")
# What training goes on from, as Trainer names it: alone, under FSDP, and under DeepSpeed (global_step…).
STATE = {
    "optimizer": ("optimizer*", "global_step*"),
    "scheduler": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*",),
}
MODEL_ALONE = "it holds a model alone (save_only_model)"
YES, NO = {"true", "last"}, {"false", "none", ""}


def checkpoints(folder: str | Path) -> list[Path]:
    """By step; nothing but folders named as checkpoints are."""
    found = {}
    for path in Path(folder).glob("checkpoint-*"):
        if path.is_dir() and (match := re.fullmatch(r"checkpoint-(0|[1-9]\d*)", path.name)):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


# ---------------------------------------------------------------- whole or not


def flaw(checkpoint: str | Path) -> str | None:
    """What makes a checkpoint unfit to resume from, in words; None if it is whole.

    Every file is read and compared with its checksum. Checkpoints of other trainers hold none: in these it is only seen
    that no file is missing or cut off.
    """
    checkpoint = Path(checkpoint)
    try:
        if not (checkpoint / TRAINER_STATE_NAME).is_file():
            return f"it has no {TRAINER_STATE_NAME}"
        listed = (checkpoint / FILES).is_file()
        for name in (TRAINER_STATE_NAME, FILES) if listed else sorted(checkpoint.rglob("*.json")):
            try:
                json.loads((checkpoint / name).read_text(encoding="utf-8"))
            except ValueError:
                return f"its {Path(name).name} is cut off or garbled"
        if not listed:
            ours = (checkpoint / FINGERPRINT).is_file()
            return f"it has no {FILES}" if ours else missing(checkpoint) or _cut(checkpoint)
        return _altered(checkpoint) or (missing(checkpoint) and MODEL_ALONE)
    except OSError as error:
        return f"it cannot be read: {error}"


def missing(checkpoint: Path, state: bool = True) -> str | None:
    """What a checkpoint lacks, in words. state: whether training is to go on from it."""
    for what, patterns in {"weights": WEIGHTS, **(STATE if state else {})}.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"it has no {what}"
    for index in checkpoint.glob("*.index.json"):
        for shard in set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()):
            if not (checkpoint / shard).is_file():
                return f"it has no {shard}"
    return None


def _altered(checkpoint: Path) -> str | None:
    listed = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
    for name, (size, _) in listed.items():
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
        if (checkpoint / name).stat().st_size != size:
            return f"its {name} has {(checkpoint / name).stat().st_size} bytes, not {size}"
    found = _entries(checkpoint, listed)
    return next((f"its {name} is garbled" for name in listed if found[name] != listed[name]), None)


def _cut(checkpoint: Path) -> str | None:
    files = (file for file in sorted(checkpoint.rglob("*")) if not opens(file))
    return next((f"its {file.relative_to(checkpoint)} is cut off" for file in files), None)


def opens(file: Path) -> bool:
    """Whether a file of tensors is there to its end."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return True
        except SafetensorError:
            return False
    return file.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(file)  # as torch.save writes them


def _entries(checkpoint: Path, names) -> dict[str, list]:
    """Bytes and SHA-256 of files, by name."""

    def entry(name):
        digest = hashlib.sha256()
        with open(checkpoint / name, "rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
            return [file.tell(), digest.hexdigest()]

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def latest_whole_checkpoint(folder: str | Path) -> str | None:
    """The latest checkpoint in a folder that can be resumed from, or None.

    Torn ones after it are renamed to torn-checkpoint-…, with a warning, so that nothing takes them for the latest.
    Raises ValueError if the latest holds a model alone.
    """
    for path in reversed(checkpoints(folder)):
        reason = flaw(path)
        if reason is None:
            return str(path)
        if reason == MODEL_ALONE:
            raise ValueError(f"Cannot resume from {path}: {reason}.")
        logger.warning(f"The checkpoint {path} is torn ({reason}): skipped, and renamed to {set_aside(path, 'torn')}.")
    return None


# ---------------------------------------------------------------- coming and going


def publish(staged: Path, final: Path) -> None:
    """Rename a written checkpoint to its name: from then on it is there as a whole, also after a power cut."""
    names = [file.relative_to(staged).as_posix() for file in sorted(staged.rglob("*")) if file.is_file()]
    entries = _entries(staged, [name for name in names if not name.endswith(EDITABLE)])
    (staged / FILES).write_text(json.dumps(entries, indent=2), encoding="utf-8")
    for path in [*staged.rglob("*"), staged]:
        _sync(path)
    if final.is_dir():  # of a run that was resumed from before
        final.rename(staged.parent / f"replaced-{final.name}")
    staged.rename(final)
    _sync(final.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(folder: Path, limit: int | None, keep: set[str], bin: Path) -> None:
    """Delete the first checkpoints by step, as many as are above the limit, but never one whose name is to be kept.

    bin: a folder beside them, where they are moved first: none that is half deleted bears a checkpoint's name.
    """
    found = [path for path in checkpoints(folder) if not path.is_symlink()]
    others = [path for path in found if path.name not in keep]
    for path in others[: max(0, len(found) - limit)] if limit and limit > 0 else []:
        delete(path, bin)


def delete(checkpoint: Path, bin: Path) -> None:
    bin.mkdir(exist_ok=True)
    checkpoint.rename(bin / checkpoint.name)
    shutil.rmtree(bin, ignore_errors=True)


def set_aside(checkpoint: Path, word: str) -> str:
    """Rename a checkpoint so that nothing takes it for one; the new name."""
    names = (f"{word}-{checkpoint.name}{end}" for end in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
    name = next(name for name in names if not (checkpoint.parent / name).exists())
    checkpoint.rename(checkpoint.parent / name)
    return name


# ---------------------------------------------------------------- whose folder it is


def check_run(args) -> None:
    """Raise a ValueError or OSError, in one sentence, if a run with these training arguments cannot work in its folder.

    That is where `output_dir` cannot be a folder or not be written to, where another run writes there now, where it
    holds a model or checkpoints and the run neither resumes (`resume_from_checkpoint`) nor overwrites
    (`overwrite_output_dir`), and where the checkpoint to resume from is not whole. Nothing is written.
    """
    folder = Path(args.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"output_dir {args.output_dir} cannot be a folder: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir {args.output_dir} cannot be written to.")
    if args.process_index == 0 and (folder / LOCK).exists():
        with locked(folder):
            pass
    choice = resume_choice(args.resume_from_checkpoint)
    if choice is True:
        choice = next(reversed(checkpoints(folder)), None)
    elif choice is not None:
        check_whole(choice)
    check_free(folder, choice, args.overwrite_output_dir)


def resume_choice(value: str | bool | None) -> Path | bool | None:
    """The path of a checkpoint; True for the latest whole one; None to start anew."""
    word = str(value).lower()
    return True if word in YES else None if word in NO else Path(value)


def check_whole(checkpoint: Path) -> None:
    if reason := flaw(checkpoint):
        raise ValueError(f"Cannot resume from {checkpoint}: {reason}. The latest whole checkpoint: 'last'.")


def check_free(folder: Path, resumed: str | Path | None, overwrite: bool) -> None:
    """Raise a ValueError if a run would write over another's results."""
    if overwrite or (resumed is not None and Path(resumed).resolve().parent == folder.resolve()):
        return
    held = [path.name for path in checkpoints(folder)][-1:]
    held = held or [path.name for pattern in WEIGHTS if "/" not in pattern for path in folder.glob(pattern)]
    if held:
        raise ValueError(
            f"output_dir {folder} holds {held[0]} of an earlier run: take another folder, go on from a checkpoint in "
            "it with resume_from_checkpoint (its path, or 'last'), or lose it with overwrite_output_dir."
        )


_held = set()  # descriptors of locks


def _let_go() -> None:
    """A data loader's process must not hold a lock beyond the end of the one that it was forked from."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """No other run writes to a folder inside. The lock is the operating system's: it ends with the process.

    Gives True, or False where there are no locks, as on some file systems: these let everybody in.
    Raises OSError if another run writes there.
    """
    descriptor = None if fcntl is None else _lock(folder / LOCK)
    if descriptor is None:
        yield False
        return
    _held.add(descriptor)
    try:
        yield True
    finally:
        _held.discard(descriptor)
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise OSError(f"Another run is writing to {path.parent}: take another output_dir, or wait.") from None
            return None
        os.close(descriptor)  # of a run that ended just now, and took its file away
