"""A report: sections that are computed once, kept as JSON, and written together as one Markdown file."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .likelihood import Likelihood


class Report:
    """A folder with `README.md`, a JSON file for each section, and the pictures that sections draw.

    A section whose JSON is there, made with the same settings, is not computed again: a report that was stopped goes on
    where it was, and one of other settings starts anew, section by section.
    """

    def __init__(self, folder: str | Path, title: str, introduction: str = ""):
        self.folder, self.title, self.introduction = Path(folder), title, introduction
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sections: list[str] = []

    def section(
        self,
        name: str,
        title: str,
        settings: dict,
        compute: Callable[[], dict],
        show: Callable[[dict, Path], str],
    ) -> dict | None:
        """Add a section, and write the report as it now is. Returns what was computed, or None where it could not be.

        settings: what the result depends on. compute: the result, of what JSON knows; NaN becomes null.
        show: Markdown of the result, given the report's folder to draw pictures into.

        What cannot be had, a ValueError, OSError or ImportError, becomes the section's one sentence.
        """
        path = self.folder / f"{name}.json"
        settings = _jsonable(settings)
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        try:
            if kept.get("settings") != settings:
                kept = {"settings": settings, "result": _jsonable(compute())}
                _write(path, json.dumps(kept, indent=1, allow_nan=False))
            result, text = kept["result"], show(kept["result"], self.folder)
        except (ValueError, OSError, ImportError) as error:
            result, text = None, f"Not measured: {' '.join(str(error).split())}"
            print(f"{title}: {text}")
        self._sections.append(f"## {title}\n\n{text.strip()}\n")
        parts = [
            f"# {self.title}\n",
            *([self.introduction.strip() + "\n"] if self.introduction else []),
            *self._sections,
        ]
        _write(self.folder / "README.md", "\n".join(parts))
        return result


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


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
