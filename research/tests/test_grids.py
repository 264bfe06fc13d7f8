"""The studies that are kept: each grid is sound at its own size, and every model of it runs at a tiny one."""

from pathlib import Path

import pytest
import yaml

from ltm_hf.costs.flops import count_parameters
from research.study import Study

GRIDS = sorted((Path(__file__).parents[1] / "studies").glob("*.yaml"))


@pytest.fixture(params=GRIDS, ids=lambda path: path.stem)
def grid(request):
    return request.param


def test_equal_parameters(grid):
    """Fields and models are there, and what is called equal is so within a percent, in every setting."""
    study = Study.from_yaml(grid)
    compared = 0
    for setting in study.settings:
        for name, model in study.models.items():
            if model.parameters_of is not None:
                pair = (count_parameters(study.config(setting, which)) for which in (name, model.parameters_of))
                assert next(pair) == pytest.approx(next(pair), rel=0.01), name
                compared += 1
    assert compared >= 2


def tiny(grid, corpus, place) -> Path:
    """Its first setting and all of its models, with two steps of training."""
    given = yaml.safe_load(grid.read_text())
    setting = next(iter(given["settings"].values()))
    sizes = dict(hidden_size=32, intermediate_size=256, sliding_window=8, max_position_embeddings=16)
    setting |= {"corpus": {"name_or_files": str(corpus)}, "tokenizer": 258, "training": {}}
    setting["config"] |= sizes
    quick = {"max_steps": 2, "warmup_steps": 0, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    scoring = {"blocks": 2, "steps": [1], "at": 1, "importance_samples": 2, "reinfer_every": 8}
    given |= {"settings": {"tiny": setting}, "seeds": [1], "training": quick, "scoring": scoring}
    place /= "tiny.yaml"
    place.write_text(yaml.safe_dump(given, sort_keys=False))
    return place


def test_every_model_runs(grid, corpus, tmp_path, run):
    path, folder = tiny(grid, corpus, tmp_path), tmp_path / "outputs"
    said = run("study.__main__", path, "--output_dir", folder)
    for name in yaml.safe_load(path.read_text())["models"]:
        assert f"| {name} " in said and (folder / "tiny" / name / "1" / "scores.json").exists()
    assert "not finite" not in said and f"cells are in {folder}" in said
    assert (folder / "README.md").read_text().strip() and (folder / "study.png").stat().st_size > 10_000


def test_bad_commands(tmp_path, corpus, refused):
    (tmp_path / "list.yaml").write_text("a: [")
    assert "No such file or directory" in refused("study.__main__", tmp_path / "nowhere.yaml")
    assert "while parsing" in refused("study.__main__", tmp_path / "list.yaml", "--output_dir", tmp_path / "out")
    path = tiny(GRIDS[0], corpus, tmp_path)
    assert "'nobody' is none of the models: " in refused("study.__main__", path, "--models", "nobody")
    assert not (tmp_path / "out").exists()
