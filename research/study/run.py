"""A study run cell by cell, each kept as it is done."""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from ltm_hf.data.files import local_files
from ltm_hf.evaluation.report import kept, write_whole

from .cell import prepare, score_cell, train_cell
from .grid import Study
from .results import in_words, plot


def run_study(study: Study, folder: str | Path, only: dict[str, Collection] | None = None) -> str:
    """Train and score the cells that are not in the folder yet; write `README.md` after each, `study.png` at the end.

    The folder SETTING/MODEL/SEED has a cell's model, `training.json` and `scores.json`, each with what it depends on:
    a study that was stopped goes on where it was, and one that was changed runs again what the change touches. Tables
    and picture are of all cells that are there, whatever `only` says.

    only: names of "settings", "models" or "seeds".

    Returns the tables. Raises ValueError or OSError, before any training, for names and files that are not there.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file: name a folder for the study.")
    todo = list(study.cells(only))
    for setting in dict.fromkeys(setting for setting, _, _ in todo):
        if (files := study.settings[setting].corpus.get("name_or_files")) is not None:
            local_files(files)  # raises where one is missing
    for number, cell in enumerate(todo, start=1):
        print(f"Cell {number} of {len(todo)}: {', '.join(map(str, cell))}", flush=True)
        _cell(study, folder, *cell, compute=True)
        cells = {cell: found for cell in study.cells() if (found := _cell(study, folder, *cell))}
        words = in_words(study, cells)
        write_whole(folder / "README.md", f"# Study\n\n{words}\n![Losses against inference steps](study.png)\n")
    plot(study, cells, folder / "study.png")
    return words


def _cell(study: Study, folder: Path, setting: str, model: str, seed: int, compute: bool = False) -> dict | None:
    """What is kept of a cell; unless it is to be computed, None if any of it is missing."""
    learner = study.models[model].weights_of or model
    training = study.origin(setting, learner)
    scores = training | {"scored": asdict(study.models[model]), "scoring": asdict(study.scoring)}
    place = folder / setting / learner / str(seed)

    def work(function, name):
        data = prepare(study.settings[setting], study.block_size(setting), study.scoring.blocks)
        return function(study, setting, name, seed, data, place)

    facts = kept(place / "training.json", training, (lambda: work(train_cell, learner)) if compute else None)
    path = folder / setting / model / str(seed) / "scores.json"
    found = facts and kept(path, scores, (lambda: work(score_cell, model)) if compute else None)
    return found and facts | {"scores": found}
