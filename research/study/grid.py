"""What a study is made of: settings x models x seeds, as a YAML file says it."""

import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError

from ltm_hf import LTMConfig
from ltm_hf.costs.flops import count_parameters
from ltm_hf.data import load_corpus
from ltm_hf.data.numbers import check_at_least
from ltm_hf.evaluation.report import one_line
from ltm_hf.training import LTMTrainingArguments
from ltm_hf.training.objectives import objective_of, step_flops


@dataclass(frozen=True, eq=False)  # each is itself alone, and hashable
class Setting:
    """What all models of a comparison share.

    corpus: arguments of `load_corpus`, `name_or_files` or `corpus` among them; none for Python's standard library.
    tokenizer: entries of a byte-level BPE that is trained on the corpus, or the name or folder of one.
    config: fields of `LTMConfig`: width, depth, window, and `max_position_embeddings`, which is the length of blocks.
    training: fields of `LTMTrainingArguments`, such as `max_steps`.
    """

    corpus: dict = field(default_factory=dict)
    tokenizer: int | str = 2048
    config: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        _check_types(self)
        if isinstance(self.tokenizer, int):
            check_at_least(258, tokenizer=self.tokenizer)
        known = inspect.signature(load_corpus).parameters.keys() - {"streaming"}
        _check_names(sorted(known), self.corpus, "corpus")


@dataclass(frozen=True)
class Model:
    """What one model has of its own, over the setting's.

    config, training: as in `Setting`.
    parameters_of: a model whose number of parameters this one gets, by the width of its feed-forward layers.
    flops_of: a model whose FLOPs of training this one gets, by the number of its steps.
    weights_of: a model that this one is after training; it differs in how it infers when it is scored.
    """

    config: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    parameters_of: str | None = None
    flops_of: str | None = None
    weights_of: str | None = None

    def __post_init__(self):
        _check_types(self)


@dataclass(frozen=True)
class Scoring:
    """How a trained model is scored, on held-out documents.

    blocks: so many of them, drawn. steps: inference steps at test time. at: those that a model stands for in the
    tables, with `importance_samples` for the weighted bound. reinfer_every: tokens after which latents are inferred
    anew where a model reads them in its layers, by as many steps as it trains with; a memory infers at each.
    """

    blocks: int = 128
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    at: int = 32
    importance_samples: int = 64
    reinfer_every: int = 32
    batch_size: int = 16

    def __post_init__(self):
        _check_types(self)
        for name, number in asdict(self).items():
            if name not in ("steps", "at"):
                check_at_least(1, **{name: number})
        for number in (*self.steps, self.at):
            check_at_least(0, **{"the number of steps": number})

    @property
    def all_steps(self) -> list[int]:
        return sorted({*self.steps, self.at})


@dataclass(frozen=True)
class Study:
    """A comparison: each model in each setting with each seed.

    reference: the model, without latents, that differences are from. training: as in `Setting`, of all settings.

    Names of settings and models are those of folders, and hold no more than letters, digits and `_-+.`.

    Raises ValueError for fields and models that are not there, and for values that cannot work.
    """

    settings: dict[str, Setting]
    models: dict[str, Model]
    reference: str
    seeds: tuple[int, ...] = (42,)
    training: dict = field(default_factory=dict)
    scoring: Scoring = field(default_factory=Scoring)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Study":
        """Raises OSError for a file that cannot be read, and ValueError, which names it, for what is wrong in it."""
        try:
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            return cls._of(given)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{path}: {one_line(error)}") from None

    @classmethod
    def _of(cls, given) -> "Study":
        """given: what YAML says."""
        given = dict(_mapping({} if given is None else given, "a study"))
        if missing := {"settings", "models", "reference"} - given.keys():
            raise ValueError(f"a study needs {', '.join(sorted(missing))}.")
        given.pop("shared", None)  # what other entries refer to by YAML's anchors
        _check_names([field.name for field in fields(cls)], given, "the study")
        for part, kind in (("settings", Setting), ("models", Model)):
            entries = _mapping(given[part], part).items()
            given[part] = {name: _built(kind, entry, f"{part}: {name}") for name, entry in entries}
        given["scoring"] = _built(Scoring, given.get("scoring"), "scoring")
        return cls(**_with_tuples(given))

    def __post_init__(self):
        for name in (*self.settings, *self.models):
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
                raise ValueError(f"{name!r} names a folder: it must be a string of letters, digits and '_-+.'.")
        _check_types(self)
        if not self.settings or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("A study needs settings, and seeds that differ.")
        for seed in self.seeds:
            check_at_least(0, seed=seed)
        if self.reference not in self.models:
            raise ValueError(f"The reference {self.reference!r} is none of the models: {', '.join(self.models)}.")
        for name, model in self.models.items():
            for other in _references(model):
                if other is not None and other not in self.models:
                    raise ValueError(f"{name}: there is no model {other!r}; there are {', '.join(self.models)}.")
                if other == name or (other and any(_references(self.models[other]))):
                    raise ValueError(f"{name}: {other} must not depend on a model itself.")
        for setting in self.settings:  # so that nothing fails hours later
            for model in self.models:
                config = self.config(setting, model)
                self.arguments(setting, model, "", seed=0)
                other = self.models[model].weights_of
                if other and count_parameters(config) != count_parameters(self.config(setting, other)):
                    raise ValueError(f"{model}: its config must be that of {other}, but for inference: weights_of.")
                if config.max_position_embeddings != self.block_size(setting):
                    raise ValueError(f"{model}: all models of a setting must have its max_position_embeddings.")
        if self.models[self.reference].config.get("num_latents") != 0:
            raise ValueError(f"The reference {self.reference!r} must have num_latents=0: its loss is exact.")

    def cells(self, only: dict[str, Collection] | None = None) -> Iterator[tuple[str, str, int]]:
        """(setting, model, seed): all of a seed before the next. only: names of "settings", "models" or "seeds".

        Raises ValueError for a name that is not there.
        """
        axes = {"seeds": self.seeds, "settings": tuple(self.settings), "models": tuple(self.models)}
        for axis, names in (only or {}).items():
            for name in names:
                if name not in axes[axis]:
                    raise ValueError(f"{name!r} is none of the {axis}: {', '.join(map(str, axes[axis]))}.")
            axes[axis] = tuple(name for name in axes[axis] if name in names)
        for seed in axes["seeds"]:
            for setting in axes["settings"]:
                for model in axes["models"]:
                    yield setting, model, seed

    def origin(self, setting: str, model: str) -> dict:
        """All that the training of a cell depends on, beside the seed."""
        about = self.models[model]
        others = [self.models[name] for name in (about.parameters_of, about.flops_of) if name]
        parts = {"setting": self.settings[setting], "model": about}
        return {name: asdict(part) for name, part in parts.items()} | {
            "others": [asdict(other) for other in others],
            "training": self.training,
        }

    def block_size(self, setting: str) -> int:
        """Tokens; of all models of a setting."""
        return self.config(setting, self.reference).max_position_embeddings

    def config(self, setting: str, model: str, **tokenizer) -> LTMConfig:
        """The configuration of a cell. tokenizer: `vocab_size` and the ids of special tokens, where they are known."""
        about, entries = self.models[model], self.settings[setting].tokenizer
        if not tokenizer:
            tokenizer = dict(vocab_size=entries if isinstance(entries, int) else 50258, bos_token_id=1, eos_token_id=0)
        given = self.settings[setting].config | about.config | tokenizer
        unknown = given.keys() - {field.name for field in fields(LTMConfig)} - {"rope_parameters"}
        if unknown:
            raise ValueError(f"{setting}, {model}: LTMConfig has no {', '.join(sorted(map(str, unknown)))}.")
        try:
            config = LTMConfig(**given)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"{setting}, {model}: {one_line(error)}") from None
        if about.parameters_of is None:
            return config
        missing = count_parameters(self.config(setting, about.parameters_of, **tokenizer)) - count_parameters(config)
        a_channel = 3 * config.num_hidden_layers * config.hidden_size
        return LTMConfig(**given | {"intermediate_size": config.intermediate_size + round(missing / a_channel)})

    def arguments(self, setting: str, model: str, folder: str | Path, seed: int, **tokenizer) -> LTMTrainingArguments:
        """The training arguments of a cell, which is trained in this folder. tokenizer: as for `config`."""
        about = self.models[model]
        given = _TRAINING | self.training | self.settings[setting].training | about.training
        where = f"{setting}, {model}: training"
        _check_names([field.name for field in fields(LTMTrainingArguments)], given, where)
        _check_numbers(given, where)
        try:
            arguments = LTMTrainingArguments(output_dir=str(folder), seed=seed, **given)
            objective_of(self.config(setting, model, **tokenizer), arguments)  # refuses what does not go together
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {one_line(error)}") from None
        if about.flops_of is not None:
            other = self.arguments(setting, about.flops_of, folder, seed, **tokenizer)
            ratio = self.flops(setting, about.flops_of, other, **tokenizer)
            ratio /= self.flops(setting, model, arguments, **tokenizer)
            arguments.max_steps = round(arguments.max_steps * ratio)
        return arguments

    def flops(self, setting: str, model: str, arguments: LTMTrainingArguments, **tokenizer) -> float:
        """FLOPs a token of training."""
        config = self.config(setting, model, **tokenizer)
        return step_flops(config, arguments, config.max_position_embeddings)


_TRAINING = {
    "per_device_train_batch_size": 16,
    "warmup_steps": 100,
    "logging_steps": 100,
    "save_strategy": "no",
    "overwrite_output_dir": True,  # of a cell that was not finished
    "report_to": "none",
    "dataloader_pin_memory": False,
}


def _references(model: Model) -> tuple[str | None, ...]:
    return model.parameters_of, model.flops_of, model.weights_of


# ------------------------------------------------------------------ what YAML says


def _mapping(given, what: str) -> dict:
    if not isinstance(given, dict):
        raise ValueError(f"{what} must be a mapping of names, not {repr(given)[:40]}.")
    return given


def _built(kind: type, given: dict | None, where: str):
    """A `Setting`, `Model` or `Scoring`; by its defaults where nothing is given."""
    given = _mapping({} if given is None else given, where)
    _check_names([field.name for field in fields(kind)], given, where)
    try:
        return kind(**_with_tuples(given))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _with_tuples(given: dict) -> dict:
    return {name: tuple(x) if name in ("seeds", "steps") and isinstance(x, list) else x for name, x in given.items()}


def _check_names(known: list[str], given: dict, where: str) -> None:
    unknown = given.keys() - set(known)
    if unknown:
        there = f"; there are {', '.join(known)}" if len(known) < 20 else " in LTMTrainingArguments"
        raise ValueError(f"{where}: there is no {', '.join(sorted(map(str, unknown)))}{there}.")


def _check_types(given) -> None:
    """Raise a ValueError for a field that is not what it is declared as."""
    for name, kind in get_type_hints(type(given)).items():
        try:
            type_validator(name, getattr(given, name), kind)
        except TypeError as error:
            raise ValueError(one_line(error)) from None


def _check_numbers(training: dict, where: str) -> None:
    """Raise a ValueError for what is no number where the default is one: transformers finds it out late."""
    for known in fields(LTMTrainingArguments):
        value, default = training.get(known.name, 0), known.default
        is_number = default is not MISSING and isinstance(default, Real)
        if is_number and not isinstance(value, Real):
            raise ValueError(f"{where}: {known.name} must be a number, not {value!r}; YAML writes 1.0e-3, not 1e-3.")
