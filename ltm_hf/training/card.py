"""Model cards: what a run was, what its figures mean and how to load it, as the README.md beside a checkpoint."""

import copy
import math
import os
import re
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_ltm import READERS, InferenceSettings
from ..costs.flops import count_parameters, paper_training_flops, training_flops
from ..evaluation import Likelihood, markdown_table
from ..evaluation.figures import with_error
from ..methods_ltm import method_of
from .objectives import objective_of

TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"  # in a wheel the folder lies inside the package,
if not TEMPLATE.is_file():
    TEMPLATE = Path(__file__).parents[2] / "model_cards" / "template.md"  # in a clone beside it


def write_model_card(
    folder: str | Path,
    model,
    *,
    name: str,
    license: str | None = "apache-2.0",
    language: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    dataset_name: str | list[str] | None = None,
    dataset_license: str | None = None,
    base_model: str | None = None,
    training_arguments=None,
    num_training_steps: int | None = None,
    num_training_tokens: int | None = None,
    block_size: int | None = None,
    hardware: str | None = None,
    likelihood: Likelihood | dict[str, Likelihood] | None = None,
    num_inference_steps: int | None = None,
) -> ModelCard:
    """Write `folder/README.md`, the model card of an `LTMForCausalLM`. What is None, the card calls not recorded.

    Of a file or folder on this machine the metadata, which the Hub shows, has the last part of the name alone.

    name: best the model's repository on the Hub: the card shows how to load it by this name.
    license, language, tags: metadata of the Hub; the license is that of the weights.
    dataset_name, dataset_license: training data, `owner/name` for a data set of the Hub, or any words.
    base_model: model of the Hub, `owner/name`, that training started from; any other name is left out.
    training_arguments: the run's `LTMTrainingArguments`.
    num_training_steps, num_training_tokens: optimiser steps made, and tokens read in them.
    block_size: tokens of a training sequence; where it is None, FLOPs are given for the model's longest.
    hardware: in words, such as "8 x NVIDIA H100".
    likelihood: figures on held-out text of the training data, or of several data sets by name. Those of the released
        protocol stand apart from the others, and are no part of the metadata.
    num_inference_steps: inference steps that `likelihood` was measured with; default: the model's.

    Raises ValueError for an empty name.
    """
    if not name:
        raise ValueError("name must not be empty: it is the card's title, and what the model is loaded by.")
    config = model.config
    names = dataset_name if isinstance(dataset_name, list) else [dataset_name] if dataset_name else []
    dataset_name = ", ".join(_public(name) for name in names) or None
    if isinstance(likelihood, Likelihood):
        likelihood = {dataset_name or "unknown data": likelihood}
    honest, released = _apart(likelihood or {})
    on_hub = _is_on_hub(dataset_name)
    base_model = base_model if _is_on_hub(base_model) else None
    metadata = ModelCardData(
        license=license,
        language=language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ltm", "custom_code", *([tags] if isinstance(tags, str) else tags or [])],
        base_model=base_model,
        datasets=[dataset_name] if on_hub else None,
        **_measured(honest, name),
    )
    training = _training(
        dataset_name, on_hub, dataset_license, num_training_steps, num_training_tokens, block_size, hardware, base_model
    )
    sequence_length = block_size or config.max_position_embeddings
    card = ModelCard.from_template(
        metadata,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        config=config,
        architecture=_architecture(config),
        inference=_inference(config),
        training=training | _recipe(config, training_arguments),
        sequence_length=sequence_length,
        cost=_cost(config, training_arguments, sequence_length, num_training_tokens),
        figures=markdown_table(honest) if honest else None,
        measured={data: (figures, _in_words(_perplexity(figures))) for data, figures in honest.items()},
        measured_steps=config.num_inference_steps if num_inference_steps is None else num_inference_steps,
        released={data: _in_words(perplexity) for data, perplexity in released.items()},
    )
    card.save(Path(folder) / "README.md")
    return card


def add_to_model_index(folder: str | Path, likelihood: dict[str, Likelihood]) -> None:
    """Put figures, by data set, into the metadata of the card in a folder, in place of what it had of these data sets.

    Figures of the released protocol are left out. Raises FileNotFoundError if there is no card.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"There is no model card in {str(folder)!r}.")
    card = ModelCard.load(path)
    honest, _ = _apart(likelihood)
    kept = [result for result in card.data.eval_results or [] if result.dataset_name not in honest]
    card.data.eval_results = [*kept, *_results(honest)]
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    card.save(path)


# ---------------------------------------------------------------- figures


def _measured(honest: dict[str, Likelihood], name: str) -> dict:
    """What the metadata says of figures, where there are some."""
    results = _results(honest)
    return dict(metrics=["perplexity"], model_name=_public(name), eval_results=results) if results else {}


def _results(honest: dict[str, Likelihood]) -> list[EvalResult]:
    return [
        EvalResult("text-generation", data, data, metric, value, task_name="Text generation", metric_name=description)
        for data, figures in honest.items()
        for metric, value, description in _metrics(figures)
    ]


def _apart(likelihoods: dict[str, Likelihood]) -> tuple[dict[str, Likelihood], dict[str, float]]:
    """The figures without those of the released protocol, and the perplexities under that protocol, by data."""
    honest, released = {}, {}
    for data, likelihood in ((_public(data), likelihood) for data, likelihood in likelihoods.items()):
        figures = {name: figure for name, figure in likelihood.figures.items() if name != "released"}
        if figures:
            honest[data] = Likelihood(figures, likelihood.num_tokens, likelihood.num_blocks)
        if "released" in likelihood:
            released[data] = likelihood.perplexity("released")
    return honest, released


def _perplexity(likelihood: Likelihood) -> float | None:
    """A bound with latents, unless they are from the prompt alone; exact for a model that has none."""
    name = next((name for name in ("bound", "prediction", "from_prompt", "no_latents") if name in likelihood), None)
    return name and likelihood.perplexity(name)


def _in_words(perplexity: float | None) -> str | None:
    return None if perplexity is None else with_error(perplexity, None, 2)


def _metrics(likelihood: Likelihood) -> list[tuple[str, float, str]]:
    """(type, value, name) of what the metadata lists; JSON, and so the Hub, has no infinity."""
    kind = "perplexity bound, exp(NLL + KL)" if "bound" in likelihood else "perplexity"
    metrics = [("perplexity", _perplexity(likelihood), kind)]
    metrics += [(name, nats, f"{name} (nats a token)") for name, (nats, _) in likelihood.figures.items()]
    return [metric for metric in metrics if metric[1] is not None and math.isfinite(metric[1])]


# ---------------------------------------------------------------- facts, a label and a value each


def _architecture(config) -> dict[str, str]:
    facts = {
        "parameters": _count(count_parameters(config)),
        "layers": _count(config.num_hidden_layers),
        "hidden size": _count(config.hidden_size),
        "feed-forward size": _count(config.intermediate_size),
        "attention heads": f"{config.num_attention_heads} ({config.num_key_value_heads} of keys and values)",
        "attention window": f"{config.sliding_window:,} tokens" if config.sliding_window else "none: full attention",
        "longest sequence": f"{config.max_position_embeddings:,} tokens",
        "vocabulary": _count(config.vocab_size),
    }
    if config.num_latents:
        facts["latent vectors"] = _count(config.num_latents)
        facts["read by"] = READERS[config.latent_reader]
        if config.has_memory:
            facts["tokens that read the same memory"] = _count(config.latent_chunk)
        else:
            facts["layers that read latents"] = ", ".join(str(layer + 1) for layer in config.reading_layers)
        facts["gate on what is read"] = "no" if config.latent_gate_init is None else "yes"
    return facts


def _inference(config) -> dict[str, object]:
    """The settings that the configuration's method goes by and that are set."""
    settings, method = asdict(InferenceSettings.of(config)), method_of(config)
    settings["inference_learning_rate"] = settings["inference_learning_rate"] or method.default_step_size
    settings["inference_lr_schedule"] = settings["inference_lr_schedule"] or method.default_schedule
    names = ("num_inference_steps", "inference_kl_weight") if config.has_memory else method.settings
    known = {name: settings[name] for name in ("inference_method", *names)}
    return {f"`{name}`": value for name, value in known.items() if value is not None}


def _training(
    dataset_name, on_hub, dataset_license, num_steps, num_tokens, block_size, hardware, base_model
) -> dict[str, str | None]:
    facts = {
        "data": f"[{dataset_name}](https://huggingface.co/datasets/{dataset_name})" if on_hub else dataset_name,
        "license of the data": dataset_license,
        "optimiser steps": _count(num_steps),
        "tokens": _count(num_tokens),
        "tokens of a sequence": _count(block_size),
        "hardware": hardware,
    }
    return facts | ({"started from": base_model} if base_model else {})


def _recipe(config, arguments) -> dict[str, str]:
    if arguments is None:
        return {"recipe": None}
    schedule, optimizer = (getattr(value, "value", value) for value in (arguments.lr_scheduler_type, arguments.optim))
    warmup, rate = arguments.warmup_steps, f"{arguments.learning_rate:g}"
    if arguments.slow_optimizer == "muon":
        optimizer = f"Muon for the layers' matrices, {optimizer} for the rest"
        rate += f" (Muon {arguments.muon_learning_rate:g})"
    facts = {
        "batch": f"{arguments.per_device_train_batch_size} sequences a device, "
        f"gradients accumulated over {arguments.gradient_accumulation_steps}",
        "optimiser": f"{optimizer}, betas ({arguments.adam_beta1:g}, {arguments.adam_beta2:g}), weight decay "
        f"{arguments.weight_decay:g} on matrices, gradients clipped to norm {arguments.max_grad_norm:g}",
        "learning rate": f"{rate}, {schedule}, warm-up over "
        + (f"{warmup:g} steps" if warmup >= 1 else f"{warmup:.0%} of the steps"),
        "mixed precision": "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "no",
        "seed": str(arguments.seed),
    }
    objective = objective_of(config, arguments)
    return facts | {"learns from": objective.description} | objective.facts()


def _cost(config, arguments, sequence_length: int, num_tokens: int | None) -> dict[str, str | None]:
    """FLOPs of training as the run's arguments say, or as the configuration does where there are none."""
    trained, passes = copy.deepcopy(config), 1
    least = most = config.num_inference_steps
    if arguments is not None:
        least, most = arguments.inference_steps(config)
    trained.num_inference_steps = most
    flops = training_flops(trained, sequence_length)
    steps = (least + most) / 2 if flops.fast_step else 0
    training = flops.step(steps)
    if arguments is not None:
        objective = objective_of(config, arguments)
        training, passes = objective.flops(flops, steps), objective.passes(steps)
    facts = {"forward": _flops(flops.forward)}
    if steps:
        facts["inference step"] = f"{_flops(flops.fast_step)}, {flops.fast_step / flops.forward:.1f} times a forward"
        facts[f"training step: {steps:g} of inference, {passes:g} of learning"] = _flops(training)
        paper = paper_training_flops(trained, sequence_length) * (steps + 1) / (most + 1)
        facts["training step in the paper's account"] = _flops(paper)
    else:
        facts["training step"] = _flops(training)
    whole = None if num_tokens is None or arguments is None else _flops(training * num_tokens)
    return facts | {"whole run (not a token)": whole}


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def _flops(number: float) -> str:
    thousands = min(6, int(math.log10(number) // 3))
    return f"{number / 1000**thousands:.2f} {' kMGTPE'[thousands]}".strip()


def _is_on_hub(name: str | None) -> bool:
    """Whether a name has the form that the Hub takes for an id; files can have it too."""
    return name is not None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not os.path.exists(name)


def _public(name: str) -> str:
    """A name without the path to it, if it is one on this machine."""
    local = name.startswith(("/", "./", "../", "~")) or "\\" in name or os.path.exists(name)
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or "local data" if local else name


def remove_local_base(folder: str | Path) -> None:
    """From the card of another library in a folder, if there is one: the path of a base model on this machine."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        return
    card = ModelCard.load(path)
    base = card.data.base_model
    if not isinstance(base, str) or _is_on_hub(base) or _public(base) == base:
        return
    card.data.base_model = None
    card.data.tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")] or None
    card.text = card.text.replace(base, _public(base))
    card.save(path)
