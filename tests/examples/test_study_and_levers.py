"""examples/study.py and examples/levers.py: whole runs of a tiny grid, and that levers do what their names say."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from ltm_hf import infer_posterior
from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.flops import count_parameters
from ltm_hf.posterior_ltm import INFERENCE_OPTIMIZERS, negative_log_likelihood
from ltm_hf.study import Study
from ltm_hf.training import LTMTrainingArguments

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def levers():
    """The script as a module; what it registers is taken back."""
    before, choices = dict(INFERENCE_OPTIMIZERS), dict(InferenceSettings.CHOICES)
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("levers")
    sys.path.remove(str(EXAMPLES))
    for name in ("levers", "study"):
        del sys.modules[name]
    INFERENCE_OPTIMIZERS.clear()
    INFERENCE_OPTIMIZERS.update(before)
    InferenceSettings.CHOICES.update(choices)


@pytest.fixture
def model(make_model):
    return make_model(inference_learning_rate=0.05)


@pytest.fixture
def trainer_of(tmp_path):
    def make(trainer, model, rows, **settings):
        given = dict(max_steps=1, per_device_train_batch_size=len(rows), warmup_steps=0, learning_rate=1e-2)
        given |= dict(save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
        arguments = LTMTrainingArguments(output_dir=str(tmp_path), **given | settings)
        return trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows.tolist()}))

    return make


def tiny(name, tmp_path):
    """A grid of the examples, with three steps of training on short letters."""
    given = yaml.safe_load((EXAMPLES / "studies" / name).read_text())
    given.pop("shared", None)
    lines = [f"{word} " * 12 for word in ("one", "two", "three", "four", "five", "six") * 7]
    (tmp_path / "texts.jsonl").write_text("\n".join(f'{{"text": "{line}"}}' for line in lines))
    setting = next(iter(given["settings"].values()))
    setting |= {"corpus": {"name_or_files": str(tmp_path / "texts.jsonl")}, "tokenizer": 258}
    setting["config"] |= {
        "max_position_embeddings": 16,
        "hidden_size": 32,
        "intermediate_size": 32,
        "sliding_window": 4,
    }
    given |= {"settings": {"tiny": setting}, "seeds": [1]}
    quick = {"max_steps": 2, "warmup_steps": 0, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    given |= {"training": quick, "scoring": {"blocks": 2, "steps": [1], "at": 2, "importance_samples": 2}}
    (tmp_path / name).write_text(yaml.safe_dump(given, sort_keys=False))
    return tmp_path / name


def test_study(run, tmp_path):
    grid, folder = tiny("presidents.yaml", tmp_path), tmp_path / "outputs"
    names = ["natural-2", "natural-1-4", "natural-2-lbfgs", "adamw-16", "twin-equal", "twin-flops"]
    said = run(EXAMPLES / "study.py", grid, "--output_dir", folder, "--models", *names).stdout
    for name in names:
        assert f"| {name} " in said and (folder / "tiny" / name / "1" / "scores.json").exists()
    assert "equal training FLOPs" in said and "| full-equal " not in said
    assert (folder / "README.md").read_text().strip() and (folder / "study.png").stat().st_size > 10_000
    failed = run(EXAMPLES / "study.py", grid, "--output_dir", folder, "--models", "nobody", check=False)
    assert failed.returncode == 2 and "'nobody' is none of the models: natural-2" in failed.stderr


def test_study_of_the_memory(run, tmp_path):
    grid, folder = tiny("memory.yaml", tmp_path), tmp_path / "outputs"
    names = ["memory", "memory-natural", "twin-equal", "full-equal", "twin-flops"]
    said = run(EXAMPLES / "study.py", grid, "--output_dir", folder, "--models", *names).stdout
    for name in names:
        assert f"| {name} " in said and (folder / "tiny" / name / "1" / "scores.json").exists()
    paths = [folder / "tiny" / name / "1" / "scores.json" for name in names[:2]]
    scores = [json.loads(path.read_text())["result"] for path in paths]
    assert len({json.dumps(score["bound@2"]) for score in scores}) == 2  # of the same weights
    assert scores[0]["exact"] == scores[1]["exact"] and "reinfer" in scores[0]


def test_every_lever(run, tmp_path):
    grid = tiny("levers.yaml", tmp_path)
    said = run(EXAMPLES / "levers.py", grid, "--output_dir", tmp_path / "outputs").stdout
    for name in yaml.safe_load(grid.read_text())["models"]:
        assert f"| {name} " in said


@pytest.mark.parametrize("path", sorted((EXAMPLES / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_every_grid_can_be_run(levers, path):
    """Fields, models and levers are there; equal parameters are equal within a percent, at the size that it names."""
    study = Study.from_yaml(path)
    assert {model.lever for model in study.models.values()} <= {None, *levers.LEVERS}
    for setting in study.settings:
        for name, model in study.models.items():
            if model.parameters_of is not None:
                pair = (count_parameters(study.config(setting, which)) for which in (name, model.parameters_of))
                assert next(pair) == pytest.approx(next(pair), rel=0.01)


def losses(model, ids, latents):
    return negative_log_likelihood(model, ids, latents).tolist()


def test_gates(levers, model, ids, make_noise):
    latents = make_noise(3, *model.config.latent_shape)
    levers.gate(model, start=0.0)
    assert losses(model, ids, latents) == pytest.approx(losses(model, ids, None))
    results = []
    for of, tanh, start in (("channel", False, 0.3), ("head", False, 0.3), ("all", False, 0.3), ("all", True, 0.3096)):
        levers.gate(model, of=of, tanh=tanh, start=start)
        results.append(losses(model, ids, latents))
        learned = sum(layer.cross_attention_gate.weight.numel() for layer in model.model.layers)
        assert learned == {"channel": 64, "head": 8, "all": 2}[of]
    assert results[1] == pytest.approx(results[0]) and results[2] == pytest.approx(results[0])
    assert results[3] == pytest.approx(results[0], rel=1e-3) and results[0] != losses(model, ids, None)


@pytest.mark.parametrize("name", ["norm", "narrow", "shared", "first-layer", "last-layer"])
def test_what_the_decoder_reads_of_latents(levers, model, ids, make_noise, name):
    """Changes that the lever is blind to change nothing; others do."""
    latents = make_noise(3, *model.config.latent_shape)
    levers.LEVERS[name].change(model)
    unseen, seen = latents.clone(), latents.clone()
    if name == "norm":
        unseen, seen = 3 * latents, latents.flip(-1)
    elif name == "narrow":
        unseen[..., 8:], seen[..., :8] = 7.0, 7.0
    else:
        one, other = (0, 1) if name != "last-layer" else (1, 0)
        unseen[:, other], seen[:, one] = 7.0, 7.0
    before = losses(model, ids, latents)
    assert losses(model, ids, unseen) == pytest.approx(before, rel=1e-5)
    assert losses(model, ids, seen) != pytest.approx(before, rel=1e-3)


def test_learned_priors(levers, make_model, ids, make_noise):
    """They begin where there is none, and then are what their names say."""
    plain = make_model()
    latents = make_noise(3, *plain.config.latent_shape)
    diagonal, hierarchical, full = make_model(), make_model(), make_model()
    levers.LEVERS["diagonal-prior"].change(diagonal)
    levers.LEVERS["hierarchical-prior"].change(hierarchical)
    levers.LEVERS["variational-at-last"].change(full)
    for model in (diagonal, hierarchical, full):
        assert losses(model, ids, latents) == pytest.approx(losses(plain, ids, latents), rel=1e-5)
    with torch.no_grad():
        diagonal.model.of_latents.shift.fill_(0.5)
        diagonal.model.of_latents.scale.fill_(2.0)
        hierarchical.model.of_latents.maps[0].weight.copy_(torch.eye(32))
        full.model.of_latents[0].scale.fill_(2.0)
        full.model.of_latents[1].weight.copy_(torch.eye(32).flip(0))
    summed = torch.stack((latents[:, 0], latents[:, 0] + latents[:, 1]), dim=1)
    assert losses(diagonal, ids, latents) == pytest.approx(losses(plain, ids, 0.5 + 2 * latents), rel=1e-5)
    assert losses(hierarchical, ids, latents) == pytest.approx(losses(plain, ids, summed), rel=1e-5)
    assert losses(full, ids, latents) == pytest.approx(losses(plain, ids, 2 * latents.flip(-1)), rel=1e-5)
    assert losses(plain, ids, summed) != pytest.approx(losses(plain, ids, latents), rel=1e-3)


def test_two_samples(levers, model, ids):
    posterior = infer_posterior(model, ids)
    first, second = levers.TwoSamples._samples(None, posterior, 3)
    mirrored = levers.AntitheticSamples._samples(None, posterior, 3)
    assert not torch.equal(first, second) and torch.equal(first, mirrored[0])
    torch.testing.assert_close((mirrored[0] + mirrored[1]) / 2, posterior.mean)


def test_gates_learn_faster(levers, model, ids, trainer_of):
    trainer = trainer_of(levers.GateRate, model, ids)
    groups = trainer.create_optimizer().param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(1e-1 if "cross_attention_gate" in name else 1e-2)


def test_averaged_weights(levers, make_model, ids, trainer_of):
    """After one step: 0.99 of the start and 0.01 of what Trainer alone gives."""
    start, plain, averaged = (make_model() for _ in range(3))
    for trainer, model in ((levers.LTMTrainer, plain), (levers.Averaged, averaged)):
        trainer_of(trainer, model, ids).train()
    for one, two, three in zip(start.parameters(), plain.parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(three, one.lerp(two, 0.01))


def test_continuation_learns_what_follows_prefixes(levers, model, ids, trainer_of, monkeypatch):
    seen = []

    def recorded(decoder, input_ids, attention_mask=None, labels=None, **kwargs):
        seen.append(input_ids.shape[1])
        return infer_posterior(decoder, input_ids, attention_mask, labels, **kwargs)

    monkeypatch.setattr("ltm_hf.training.trainer.infer_posterior", recorded)
    trainer = trainer_of(levers.Continuation, model, ids, max_steps=6)
    trainer.train()
    assert seen[::2] == [12, 12, 12] and all(3 <= length < 9 for length in seen[1::2])
    assert trainer.args.infer_from == "labels"


def test_the_bound_at_last(levers, make_model, ids, trainer_of):
    """Of the last of three steps: a sample about the mean that one step of size 1 gives, and what that mean costs."""
    model = make_model(latent_embedding_std=1.0, num_inference_steps=1)
    expected = infer_posterior(model, ids, inference_optimizer="map", inference_learning_rate=1.0)
    settings = dict(max_steps=3, learning_rate=1e-30, slow_gradient="unrolled", logging_steps=1)
    trainer = trainer_of(levers.BoundAtLast, model, ids, **settings)
    trainer.train()
    first, _, last = (entry for entry in trainer.state.log_history if "bound" in entry)
    assert first["bound"] == first["loss"] and last["bound"] == pytest.approx(last["loss"] + last["kl"], abs=1e-3)
    tokens = ids[:, 1:].numel()
    assert last["kl"] * tokens == pytest.approx(expected.kl_divergence().sum().item(), rel=1e-3)
    order = [ids.tolist().index(row) for row in trainer._last_batch["input_ids"].tolist()]
    noise = trainer._last_batch["latents"] - expected.mean[order]
    assert noise.mean().abs() < 0.2 and abs(noise.std() - 1) < 0.2


def test_variational_at_last(levers, make_model, ids, trainer_of):
    """Of the last of three steps: a sample of the posterior that the configuration's inference finds."""
    model = make_model(latent_embedding_std=1.0, num_inference_steps=3)
    seen, drawn = [], []

    class Recorded(levers.VariationalAtLast):
        def _drawn(self, config, seed):
            drawn.append(super()._drawn(config, seed))
            return drawn[-1]

        def _samples(self, posterior, seed):
            seen.append((posterior, seed))
            return super()._samples(posterior, seed)

    settings = dict(max_steps=3, learning_rate=1e-30, slow_gradient="unrolled", logging_steps=1)
    trainer = trainer_of(Recorded, model, ids, **settings)
    trainer.train()
    first, _, last = (entry for entry in trainer.state.log_history if "bound" in entry)
    assert first["bound"] == first["loss"] and last["bound"] == pytest.approx(last["loss"] + last["kl"], abs=1e-3)
    assert [steps["num_inference_steps"] for steps in drawn] == [1, 1, 3]
    assert [steps["inference_learning_rate"] for steps in drawn[:2]] == [1.0, 1.0]
    ((posterior, seed),) = seen  # of the last step alone
    expected = infer_posterior(model, trainer._last_batch["input_ids"], seed=seed)
    torch.testing.assert_close(posterior.mean, expected.mean)
    assert torch.equal(trainer._last_batch["latents"], posterior.sample(seed))


@pytest.mark.parametrize("name", ["tempered", "free-bits"])
def test_weaker_priors_cost_more(levers, model, ids, name):
    plain, weaker = (infer_posterior(model, ids, inference_optimizer=opt).kl_divergence() for opt in ("natural", name))
    assert (weaker > plain).all()
