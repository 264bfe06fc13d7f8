"""A report: sections that are computed once, kept as JSON, and written together as one Markdown file."""

import json
import math
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .likelihood import Likelihood


class Report:
    """A folder with `README.md`, a JSON file for each section, and the pictures that sections draw.

    A section whose JSON is there, made with the same settings, is not computed again: a report that was stopped goes on
    where it was, and one of other settings starts anew, section by section. A `README.md` of before stays until there
    is something to put in its place.
    """

    def __init__(self, folder: str | Path, title: str, introduction: str = ""):
        self.folder, self.title, self.introduction = Path(folder), title, introduction
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sections: list[str] = []
        self._found = not (self.folder / "README.md").exists()  # anything worth writing

    def kept(self, name: str, settings: dict, compute: Callable[[], dict]) -> dict:
        """As the function, in `name`.json."""
        return kept(self.folder / f"{name}.json", settings, compute)

    def section(
        self, name: str, title: str, settings: dict, compute: Callable[[], dict], show: Callable[[dict, Path], str]
    ) -> dict | None:
        """Add a section, and write the report as it now is. Returns what was computed, or None where it could not be.

        compute: as for `kept`. show: Markdown of the result, given the report's folder to draw pictures into.
        What cannot be had, a ValueError, OSError or ImportError, becomes the section's one sentence.
        """
        try:
            result = self.kept(name, settings, compute)
            text = show(result, self.folder)
        except (ValueError, OSError, ImportError) as error:
            result, text = None, f"Not measured: {one_line(error)}"
            print(f"{title}: {text}")
        self._sections.append(f"## {title}\n\n{text.strip()}\n")
        self._found |= result is not None
        if self._found:
            self._write()
        return result

    def _write(self) -> None:
        head = [f"# {self.title}\n", *([self.introduction.strip() + "\n"] if self.introduction else [])]
        write_whole(self.folder / "README.md", "\n".join([*head, *self._sections]))


def kept(path: Path, settings: dict, compute: Callable[[], dict] | None = None) -> dict | None:
    """The result in a JSON file if it was made with these settings; else computed, of what JSON knows, and kept.

    settings: what the result depends on. NaN and infinity become null. Without `compute`, None where there is nothing.
    Raises ValueError for a file that is something else.
    """
    settings = _jsonable(settings)
    found = _read(path) if path.is_file() else {}
    if found.get("settings") != settings:
        if compute is None:
            return None
        found = {"settings": settings, "result": _jsonable(compute())}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(found, indent=1, allow_nan=False))
    return found["result"]


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is cut or altered, delete it: {one_line(error)}") from None
    if not isinstance(found, dict) or not {"settings", "result"} <= found.keys():
        raise ValueError(f"{str(path)!r} is no result that was kept with its settings: delete it.")
    return found


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def fingerprint(given) -> int:
    """Of texts, or of a model's weights (the first of each tensor): a folder that was trained again keeps its name."""
    if hasattr(given, "parameters"):
        parts = (parameter.detach().flatten()[:64].float().cpu().numpy().tobytes() for parameter in given.parameters())
    else:
        parts = (text.encode() for text in given)
    found = 0
    for part in parts:
        found = zlib.crc32(part, found)
    return found


def likelihood_to_json(likelihood: Likelihood) -> dict:
    return asdict(likelihood)


def likelihood_from_json(values: dict) -> Likelihood:
    """What `likelihood_to_json` gave, after JSON has made lists of pairs and null of NaN."""

    def pairs(figures):
        return {name: tuple(math.nan if x is None else x for x in pair) for name, pair in figures.items()}

    return Likelihood(**values | {name: pairs(values[name]) for name in ("figures", "bits_per_byte")})


def _jsonable(value):
    """With strings for keys, lists for tuples, and None for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
