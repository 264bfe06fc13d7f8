"""The study: what its cells share, how it goes on, and figures that can be worked out by hand."""

import json
import math
import re

import pytest
import yaml

from ltm_hf import LTMForCausalLM
from ltm_hf.costs.flops import count_parameters
from ltm_hf.evaluation import evaluate_likelihood
from ltm_hf.training import LTMTrainer
from research.study import Model, Scoring, Setting, Study, estimate, run_study
from research.study.cell import prepare, score_cell, train_cell

GRID = """
shared: &shape
  {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, sliding_window: 4,
   max_position_embeddings: 16, num_latents: 4, initializer_range: 0.2, latent_chunk: 4}
settings:
  letters:
    corpus: {name_or_files: FILES}
    tokenizer: 258
    config: *shape
training: {max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1.0e-2, warmup_steps: 0, use_cpu: true,
           disable_tqdm: true}
reference: twin
seeds: [1, 2]
scoring: {blocks: 5, steps: [1, 2], at: 2, importance_samples: 3, reinfer_every: 5}
models:
  memory: {}
  paper: &paper {config: {latent_reader: paper, num_inference_steps: 2}}
  paper-lbfgs: {weights_of: paper, config: {latent_reader: paper, num_inference_steps: 2, inference_method: lbfgs}}
  twin: {config: {num_latents: 0}, parameters_of: paper}
  full: {config: {num_latents: 0, sliding_window: null}, parameters_of: paper}
  longer: {config: {num_latents: 0}, flops_of: paper}
"""


PAPER = {"config": {"latent_reader": "paper"}}


@pytest.fixture(scope="module")
def grid(corpus, tmp_path_factory):
    """The YAML file."""
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(GRID.replace("FILES", str(corpus)))
    return path


@pytest.fixture(scope="module")
def study(grid):
    return Study.from_yaml(grid)


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    """Of a study that has been run."""
    folder = tmp_path_factory.mktemp("study")
    run_study(study, folder)
    return folder


def read(folder, model, seed, name):
    return json.loads((folder / "letters" / model / str(seed) / f"{name}.json").read_text())["result"]


def test_equal_parameters_and_equal_flops(study):
    reference = study.config("letters", "paper")
    for name in ("twin", "full"):
        config = study.config("letters", name)
        channel = 3 * config.num_hidden_layers * config.hidden_size
        assert abs(count_parameters(config) - count_parameters(reference)) <= channel / 2
        assert not config.num_latents and config.intermediate_size > reference.intermediate_size
    assert study.config("letters", "full").sliding_window is None
    paper, longer = (study.arguments("letters", name, "", 0) for name in ("paper", "longer"))
    cost, less = study.flops("letters", "paper", paper), study.flops("letters", "longer", longer)
    assert longer.max_steps == round(3 * cost / less) > paper.max_steps == 3


def test_cells_are_kept_and_what_they_are(study, folder):
    for model in ("memory", "paper", "twin", "full", "longer"):
        facts = read(folder, model, 1, "training")
        loaded = LTMForCausalLM.from_pretrained(folder / "letters" / model / "1")
        assert facts["parameters"] == loaded.num_parameters() == count_parameters(loaded.config)
        assert facts["tokens"] == facts["steps"] * 4 * 16
        assert facts["steps"] == study.arguments("letters", model, "", 1).max_steps
    assert not (folder / "letters" / "paper-lbfgs" / "1" / "training.json").exists()
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    words = (folder / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in words.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows].count("paper") == 2 + 3  # in both tables of costs, and its lines of thinking
    assert [row[0] for row in rows].count("memory") == 1 + 2  # whose bound does not go by steps
    assert "equal training FLOPs" in words and "longer" in [row[0] for row in rows]
    memory = dict(zip(rows[0], rows[2], strict=False))
    assert memory["model"] == "memory" and not memory["kl"] and not memory["iw"]
    assert float(memory["loss"]) == pytest.approx(value(folder, "memory", "loss", seeds=(1, 2)), abs=1e-4)


def value(folder, model, figure, seeds=(1,)):
    return estimate({seed: {"scores": read(folder, model, seed, "scores")} for seed in seeds}, figure).value


def test_scores_are_those_of_the_library(study, folder):
    """Of the models as kept, on held-out blocks, each full and of one document."""
    data = prepare(study.settings["letters"], 16, study.scoring.blocks)
    assert {len(row["input_ids"]) for row in [*data.blocks, *data.following, *data.train]} == {16}

    def found(model, figure, **options):
        loaded = LTMForCausalLM.from_pretrained(folder / "letters" / model.removesuffix("-lbfgs") / "1")
        blocks = data.following if figure.startswith("prefix") else data.blocks
        return evaluate_likelihood(loaded, blocks, figures=[figure], progress=False, **options)[figure]

    for model, method in (("paper", "natural"), ("paper-lbfgs", "lbfgs")):
        for steps in (1, 2):
            options = dict(num_inference_steps=steps, inference_method=method)
            for figure in ("bound", "prefix"):
                assert value(folder, model, f"{figure}@{steps}") == pytest.approx(
                    found(model, figure, **options), abs=1e-5
                )
        for name, figure in {
            "loss": "reinfer-5",
            "second": "prefix",
            "bound": "bound",
            "iw": "iw-3",
            "kl": "kl",
        }.items():
            assert value(folder, model, name) == pytest.approx(found(model, figure, inference_method=method), abs=1e-5)
    figures = {"loss": "prediction", "second": "prefix_prediction", "bound": "prediction_sampled"}
    for name, figure in figures.items():
        assert value(folder, "memory", name) == pytest.approx(found("memory", figure), abs=1e-5)
    assert value(folder, "memory", "prefix@2") == pytest.approx(
        found("memory", "prefix", num_inference_steps=2), abs=1e-5
    )
    for name, figure in {"loss": "no_latents", "second": "prefix_no_latents"}.items():
        assert (
            value(folder, "twin", name)
            == value(folder, "twin", figure)
            == pytest.approx(found("twin", figure), abs=1e-5)
        )


def test_same_tokens_in_the_same_order(study, tmp_path, monkeypatch):
    """Whatever the model; the longer run begins with them."""
    seen, step = {}, LTMTrainer.training_step

    def recorded(trainer, model, inputs, *args, **kwargs):
        seen.setdefault(trainer.args.output_dir.split("/")[-2], []).append(inputs["input_ids"].tolist())
        return step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LTMTrainer, "training_step", recorded)
    run_study(study, tmp_path, {"seeds": [1], "models": ["memory", "paper", "twin", "longer"]})
    assert seen["memory"] == seen["paper"] == seen["twin"] == seen["longer"][:3] and len(seen["longer"]) > 3


def test_goes_on_where_it_was(grid, study, folder, monkeypatch):
    """Nothing is done twice; a change runs again what it touches, and a new score needs no training."""
    done = []
    for function in (train_cell, score_cell):

        def spied(*args, function=function):
            done.append((function.__name__, args[2], args[3]))
            return function(*args)

        monkeypatch.setattr(f"research.study.run.{function.__name__}", spied)
    words = run_study(study, folder)
    assert not done and "paper-lbfgs" in words
    given = yaml.safe_load(grid.read_text())
    given["scoring"]["blocks"] = 4
    grid_too = grid.with_name("again.yaml")
    grid_too.write_text(yaml.safe_dump(given, sort_keys=False))
    run_study(Study.from_yaml(grid_too), folder, {"seeds": [2], "models": ["paper", "paper-lbfgs"]})
    assert done == [("score_cell", "paper", 2), ("score_cell", "paper-lbfgs", 2)]
    done.clear()
    given["models"]["twin"]["training"] = {"learning_rate": 1e-3}
    grid_too.write_text(yaml.safe_dump(given, sort_keys=False))
    run_study(Study.from_yaml(grid_too), folder, {"seeds": [2], "models": ["twin", "full"]})
    assert done == [("train_cell", "twin", 2), ("score_cell", "twin", 2), ("score_cell", "full", 2)]


def score(nats, documents=(0, 0, 1), tokens=(10.0, 10.0, 20.0)):
    return {"nats": nats, "documents": list(documents), "tokens": list(tokens)}


def test_estimates_by_hand():
    """40 tokens of two documents; two seeds."""
    cells = {1: {"scores": {"a": score([10, 20, 30])}}, 2: {"scores": {"a": score([14, 24, 42])}}}
    value, over_documents, over_seeds = estimate(cells, "a")
    assert value == pytest.approx((60 + 80) / 2 / 40)
    # Documents: (12 + 22)/20 and 36/20, means 1.7 and 1.8 about 1.75; ± half of their distance.
    assert over_documents == pytest.approx(0.05)
    assert over_seeds == pytest.approx((2.0 - 1.5) / 2)  # of 1.5 and 2.0
    other = {2: {"scores": {"b": score([4, 4, 2])}}, 3: {"scores": {"b": score([0, 0, 0])}}}
    value, _, over_seeds = estimate(cells, "a", other, "b")
    assert value == pytest.approx(70 / 40) and math.isnan(over_seeds)  # seed 2 alone has both
    assert str(estimate(cells, "a")) == "1.7500 ± 0.0500 ± 0.2500"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "nobody"}, "The reference 'nobody' is none of the models: memory"),
        ({"reference": "paper"}, "The reference 'paper' must have num_latents=0"),
        ({"models": {"paper": {"color": 1}, "twin": {}}}, "models: paper: there is no color; there are config"),
        ({"models": {"paper": {"config": {"width": 1}}}}, "letters, paper: LTMConfig has no width"),
        ({"models": {"paper": {"training": {"pace": 1}}}}, "training: there is no pace in LTMTrainingArguments"),
        ({"models": {"paper": {"parameters_of": "x"}}}, "paper: there is no model 'x'; there are paper, twin"),
        ({"models": {"paper": {"parameters_of": "paper"}}}, "paper: paper must not depend on a model itself"),
        (
            {"models": {"paper": {"config": {"latent_reader": "paper", "num_latents": 3}}}},
            "letters, paper: num_latents (3)",
        ),
        (
            {"models": {"paper": {"training": {"objective": "elbo"}}}},
            "letters, paper: training: objective='elbo' fits latents to a whole text, and a memory learns as it reads",
        ),
        (
            {"models": {"paper": PAPER | {"training": {"num_inference_steps_min": 9}}}},
            "letters, paper: training: num_inference_steps_min must be at most num_inference_steps",
        ),
        ({"models": {"paper": {"config": {"max_position_embeddings": 8}}}}, "all models of a setting must have its"),
        (
            {"models": {"paper": {"config": {"num_latents": 2}}, "again": {"weights_of": "paper"}}},
            "again: its config must be that of paper, but for inference",
        ),
        ({"colour": 1}, "the study: there is no colour; there are settings, models"),
        ({"settings": None}, "bad.yaml: settings must be a mapping of names, not None"),
        ({"settings": {}}, "A study needs settings"),
        ({"settings": {"a": [1]}}, "settings: a must be a mapping of names, not [1]"),
        ({"settings": {"../../escaped": {}}}, "'../../escaped' names a folder: it must be"),
        ({"settings": {"": {}}}, "'' names a folder"),
        ({"settings": {"..": {}}}, "'..' names a folder"),
        ({"settings": {1: {}}}, "1 names a folder: it must be a string"),
        ({"settings": {"a": {"corpus": "texts"}}}, "settings: a: Field 'corpus' expected dict, got str"),
        (
            {"settings": {"a": {"corpus": {"file": "x"}}}},
            "settings: a: corpus: there is no file; there are config_name",
        ),
        ({"settings": {"a": {"corpus": {"streaming": True}}}}, "there is no streaming"),
        ({"settings": {"a": {"tokenizer": 12}}}, "settings: a: tokenizer must be an integer of 258 or more, got 12"),
        (
            {"settings": {"a": {"config": {"hidden_size": "32"}}}},
            "a, memory: Validation error for field 'hidden_size'",
        ),
        ({"models": "paper"}, "models must be a mapping of names, not 'paper'"),
        ({"models": {"a/b": {}}}, "'a/b' names a folder"),
        (
            {"models": {"paper": {"training": {"learning_rate": "1e-3"}}}},
            "learning_rate must be a number, not '1e-3'",
        ),
        ({"models": {"paper": {"training": {"max_steps": None}}}}, "max_steps must be a number, not None"),
        ({"models": {"paper": {"parameters_of": 3}}}, "models: paper: Field 'parameters_of'"),
        ({"training": [1]}, "Field 'training' expected dict, got list"),
        ({"reference": ["twin"]}, "Field 'reference' expected str, got list"),
        ({"seeds": 42}, "Field 'seeds'"),
        ({"seeds": [1, 1]}, "seeds that differ"),
        ({"seeds": [-1]}, "seed must be an integer of 0 or more, got -1"),
        ({"scoring": [1]}, "scoring must be a mapping of names, not [1]"),
        ({"scoring": {"steps": 4}}, "scoring: Field 'steps'"),
        ({"scoring": {"steps": [1, -2]}}, "scoring: the number of steps must be an integer of 0 or more, got -2"),
        ({"scoring": {"blocks": 0}}, "scoring: blocks must be an integer of 1 or more, got 0"),
    ],
)
def test_bad_input_is_named(grid, change, message):
    given = yaml.safe_load(grid.read_text())
    models = change.get("models")
    if isinstance(models, dict):
        change = change | {"models": models | {"twin": {"config": {"num_latents": 0}}}}
    grid_too = grid.with_name("bad.yaml")
    grid_too.write_text(yaml.safe_dump(given | change, sort_keys=False))
    with pytest.raises(ValueError, match=re.escape(message)):
        Study.from_yaml(grid_too)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n- 2\n", "a study must be a mapping of names, not [1, 2]"),
        (b"settings: {a: [\n", "expected the node content"),
        (b"settings: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
        (b"settings: \xff\n", "'utf-8' codec can't decode"),
        (b"[" * 500, "recursion"),
    ],
)
def test_a_file_that_is_no_study_is_named(tmp_path, content, message):
    (tmp_path / "study.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=f"study.yaml: .*{re.escape(message)}"):
        Study.from_yaml(tmp_path / "study.yaml")


def test_nothing_is_begun_that_cannot_end(study, tmp_path, monkeypatch):
    monkeypatch.setattr("research.study.run.prepare", None)
    settings = {"letters": study.settings["letters"], "lost": Setting(corpus={"name_or_files": "no-such.jsonl"})}
    lost = Study(settings, {"twin": Model({"num_latents": 0})}, "twin", (1,), {"max_steps": 1})
    with pytest.raises(FileNotFoundError, match="no-such.jsonl"):
        run_study(lost, tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file' is a file: name a folder"):
        run_study(study, tmp_path / "file")
    kept = tmp_path / "letters" / "paper" / "1" / "training.json"
    kept.parent.mkdir(parents=True)
    for content in ('{"settings": {', "[1]", "{}"):
        kept.write_text(content)
        with pytest.raises(ValueError, match="paper/1/training.json' is"):
            run_study(study, tmp_path, {"models": ["paper"]})


def test_figures_that_are_not_finite_are_said_so(study):
    cells = {1: {"scores": {"a": score([10, None, 30])}}}
    assert str(estimate(cells, "a")) == "not finite"


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing")
    with pytest.raises(ValueError, match="empty.yaml: a study needs models, reference, settings"):
        Study.from_yaml(tmp_path / "empty.yaml")


def test_names_that_are_not_there(study, tmp_path):
    with pytest.raises(
        ValueError, match="'nobody' is none of the models: memory, paper, paper-lbfgs, twin, full, longer"
    ):
        run_study(study, tmp_path, {"models": ["nobody"]})
    short = Study({"letters": Setting()}, {"twin": Model({"num_latents": 0})}, "twin", scoring=Scoring(blocks=2))
    assert [*short.cells()] == [("letters", "twin", 42)]
