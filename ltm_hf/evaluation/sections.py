"""The sections of a report on one or several models: what is computed, under which settings, and how it is shown.

A setting that cannot work is refused with a ValueError, and a local file or folder that is not there with a
FileNotFoundError, before anything is written: a report of before stays as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import document_blocks, prefix_blocks
from ..data.documents import check_prefix_length
from ..data.files import is_hub_name, local_files
from ..data.numbers import check_at_least
from ..loading import load_causal_lm
from . import gsm8k as gsm8k_module
from . import latent_plots, rebuilding, representations, text, usage
from .likelihood import Likelihood, chosen, default_figures, evaluate_documents, fitting_block_size, markdown_table
from .report import Report, fingerprint, likelihood_from_json, likelihood_to_json, one_line
from .sampling import check_room
from .thinking import plot_thinking, takes_steps, thinking_curve, thinking_table, write_thinking_csv
from .zero_shot import ZERO_SHOT, load_zero_shot, plot_zero_shot, zero_shot_table


@dataclass(frozen=True)
class Subject:
    """A model to report on, by its name on the Hub or that of its folder."""

    name: str
    model: object
    tokenizer: object

    @classmethod
    def load(cls, name: str, device: str | torch.device = "cpu", trust_remote_code: bool = False) -> "Subject":
        """Any causal LM. trust_remote_code, errors: as of `load_causal_lm`."""
        model, tokenizer = load_causal_lm(name, device, trust_remote_code)
        return cls(Path(name).resolve().name if Path(name).is_dir() else name, model, tokenizer)

    @property
    def has_latents(self) -> bool:
        return bool(getattr(self.model.config, "num_latents", 0))

    @property
    def has_bound(self) -> bool:
        return "bound" in default_figures(self.model)

    @property
    def key(self) -> dict:
        return {"model": self.name, "weights": fingerprint(self.model)}


def shared_block_size(subjects: Sequence[Subject], block_size: int | None = None) -> int:
    """As `fitting_block_size`."""
    return fitting_block_size([subject.model for subject in subjects], block_size)


_LEAST = {
    "batch_size": 1, "block_size": 2, "max_new_tokens": 1, "n": 1, "num_blocks": 1, "num_documents": 1,
    "num_inference_steps": 0, "num_neighbours": 1, "num_particles": 1, "num_samples": 0, "problems": 1,
    "prompt_tokens": 1, "samples": 1, "shots": 0, "steps": 0,
}  # fmt: skip


def check_settings(**settings) -> None:
    """Raise a ValueError for a setting of sections that cannot work, of any model and text. None is a default."""
    for name, least in _LEAST.items():
        given = settings.get(name)
        for number in given if name == "steps" and given is not None else [given]:
            if number is not None:
                check_at_least(least, **{name: number})
    if settings.get("steps") is not None:
        check_at_least(1, **{"steps (how many there are)": len(settings["steps"])})
    if settings.get("block_size") is not None:
        check_prefix_length(settings.get("prefix_length"), settings["block_size"])


# ------------------------------------------------------------------ likelihood


def _measured(subjects: Sequence[Subject], texts, block_size, num_samples: int = 0, **settings) -> tuple[dict, list]:
    """Likelihoods by model, for JSON, and what could not be had. num_samples: of those with a bound."""
    columns, notes = {}, []
    for subject in subjects:
        samples = num_samples if subject.has_bound else 0
        likelihood, missing = evaluate_documents(
            subject.model, subject.tokenizer, texts, block_size, num_samples=samples, **settings
        )
        columns[subject.name] = likelihood_to_json(likelihood)
        notes += [note for note in missing if note not in notes]
    return columns, notes


def likelihood_section(
    report: Report, subjects: Sequence[Subject], texts: Sequence[str], source: str, block_size: int, **settings
) -> dict[str, Likelihood]:
    """Every figure of every model on the same documents. settings: of `evaluate_documents`. Returns them by model."""
    check_settings(block_size=shared_block_size(subjects, block_size), **settings)

    def compute():
        columns, notes = _measured(subjects, texts, block_size, **settings)
        first = [subject.tokenizer(texts[0][:1000])["input_ids"] for subject in subjects]
        return {"columns": columns, "notes": notes, "same_tokens": all(ids == first[0] for ids in first)}

    def show(result, folder):
        columns = {name: likelihood_from_json(values) for name, values in result["columns"].items()}
        counts = next(iter(columns.values()))
        tables = [markdown_table(columns, unit) for unit in ("nats a token", "perplexity", "bits per byte")]
        about = (
            f"{source}: {counts.num_documents} documents, {counts.num_blocks} blocks of at most {block_size} tokens, "
            f"{counts.num_tokens:,} tokens; ± standard error over documents."
        )
        if not result["same_tokens"]:
            about += (
                " The models' tokenizers differ: compare bits per byte. Their blocks are drawn from the same documents "
                "and are not the same passages, unless all are read."
            )
        return "\n\n".join([about, *tables, *result["notes"]])

    key = {"models": [subject.key for subject in subjects], "texts": fingerprint(texts), "block_size": block_size}
    result = report.section("likelihood", "Likelihood", key | settings, compute, show)
    return {name: likelihood_from_json(values) for name, values in result["columns"].items()} if result else {}


def thinking_section(
    report: Report, subjects: Sequence[Subject], texts: Sequence[str], block_size: int, num_blocks: int, **settings
) -> None:
    """Thinking curves of the models that take inference steps. settings: of `thinking_curve`."""
    check_settings(block_size=shared_block_size(subjects, block_size), num_blocks=num_blocks, **settings)

    def compute():
        return {
            subject.name: thinking_curve(
                subject.model,
                chosen(document_blocks(texts, subject.tokenizer, block_size), num_blocks),
                prefix_blocks=chosen(prefix_blocks(texts, subject.tokenizer, block_size), num_blocks),
                **settings,
            )
            for subject in subjects
            if takes_steps(subject.model)
        }

    def show(result, folder):
        plot_thinking(result, folder / "thinking.png")
        write_thinking_csv(result, folder / "thinking.csv")
        return (
            "![Loss against inference steps](thinking.png)\n\nSaved: the same blocks' loss without latents, less this. "
            f"± standard error over documents; also in thinking.csv.\n\n{thinking_table(result)}"
        )

    can_think = any(takes_steps(subject.model) for subject in subjects)
    if _has_any(report, "thinking", "Thinking", can_think, "takes inference steps"):
        key = {"models": [subject.key for subject in subjects], "texts": fingerprint(texts), "block_size": block_size}
        report.section("thinking", "Thinking", key | {"num_blocks": num_blocks} | settings, compute, show)


def zero_shot_section(
    report: Report,
    subjects: Sequence[Subject],
    folder: str | Path | None,
    num_documents: int | None,
    block_size: int,
    **settings,
) -> dict[str, Likelihood]:
    """The paper's seven corpora, each kept as it is done. Returns the first model's figures by corpus."""
    check_settings(block_size=shared_block_size(subjects, block_size), num_documents=num_documents, **settings)
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    found, sources, refused = {}, {}, []
    for name in ZERO_SHOT:

        def compute(name=name):
            texts, source = load_zero_shot(name, folder, num_documents, settings.get("seed", 0))
            columns, _ = _measured(subjects, texts, block_size, **settings)
            return {"columns": columns, "source": source}

        key = {"models": [subject.key for subject in subjects], "folder": folder, "num_documents": num_documents,
               "block_size": block_size} | settings  # fmt: skip
        try:
            result = report.kept(f"zero_shot_{name.lower().replace(' ', '_')}", key, compute)
        except (ValueError, OSError) as error:
            refused.append(one_line(error))
            continue
        found[name] = {model: likelihood_from_json(values) for model, values in result["columns"].items()}
        sources[name] = result["source"]

    def compute_all():
        if not found:
            raise ValueError(" ".join(refused))
        return {"refused": refused, "sources": sources}

    def show(result, folder):
        by_model = {s.name: {name: columns[s.name] for name, columns in found.items()} for s in subjects}
        plot_zero_shot(by_model, folder / "zero_shot.png")
        counts = [next(iter(columns.values())) for columns in found.values()]
        documents = "; ".join(
            f"{name}: {result['sources'][name]}, {likelihood.num_documents} documents in {likelihood.num_blocks} blocks"
            for name, likelihood in zip(found, counts, strict=True)
        )
        missing = f"\n\nNot measured: {' '.join(result['refused'])}" if result["refused"] else ""
        return f"{documents}.{missing}\n\n![Zero-shot perplexities](zero_shot.png)\n\n{zero_shot_table(by_model)}"

    report.section("zero_shot", "Zero-shot", {"found": sources, "refused": refused}, compute_all, show)
    return {name: columns[subjects[0].name] for name, columns in found.items()}


# ------------------------------------------------------------------ text


def text_section(report: Report, subject: Subject, texts: Sequence[str], **settings) -> None:
    """What the model writes. settings: of `text_figures`; references are passages of the documents."""
    check_settings(**settings)
    check_room(subject.model, [settings.get("prompt_tokens") or 1], settings["max_new_tokens"])
    length = settings["max_new_tokens"] + (settings.get("prompt_tokens") or 0) + 1

    def compute():
        passages = chosen(document_blocks(texts, subject.tokenizer, length), settings["n"])
        references = [subject.tokenizer.decode(row["input_ids"][1:]) for row in passages]
        return text.text_figures(subject.model, subject.tokenizer, references, **settings)

    def show(result, folder):
        return text.text_table(result) + "\n\n" + text.text_examples(result)

    report.section("text", "Text", subject.key | {"texts": fingerprint(texts)} | settings, compute, show)


def gsm8k_section(report: Report, subjects: Sequence[Subject], data: str, **settings) -> None:
    """GSM8K. settings: of `evaluate_gsm8k`; each model's texts are kept problem by problem."""
    check_settings(**settings)
    if not Path(data).expanduser().is_dir() and not is_hub_name(data):
        raise FileNotFoundError(f"There is no folder {data!r}.")

    def compute():
        dataset = gsm8k_module.load_gsm8k(data)
        return {
            subject.name: gsm8k_module.evaluate_gsm8k(
                subject.model, subject.tokenizer, dataset,
                record=report.folder / f"gsm8k_{fingerprint(subject.model)}.jsonl", **settings,
            )
            for subject in subjects
        }  # fmt: skip

    key = {"models": [subject.key for subject in subjects], "data": data}
    shown = {name: value for name, value in settings.items() if name != "batch_size"}
    report.section("gsm8k", "GSM8K", key | shown, compute, lambda result, _: gsm8k_module.gsm8k_table(result))


# ------------------------------------------------------------------ what the latents know


def latents_sections(
    report: Report, subject: Subject, texts: Sequence[str], block_size: int, num_blocks: int, **settings
) -> None:
    """Reconstruction, layer by layer where layers read, interpolation, what each latent carries, and who reads it."""
    check_settings(block_size=shared_block_size([subject], block_size), num_blocks=num_blocks, **settings)
    if not _has_any(report, "latents", "What the latents know", subject.has_latents):
        return
    model, tokenizer = subject.model, subject.tokenizer
    blocks = chosen(document_blocks(texts, tokenizer, block_size), num_blocks)
    passages = [tokenizer.decode(row["input_ids"][1:]) for row in blocks]
    pairs = list(zip(passages[::2], passages[1::2], strict=False))
    by_layer = {"progressive_inclusion": ("Rebuilding a text, layer by layer", rebuilding, (model, blocks))}
    studies = {
        **({} if model.config.has_memory else by_layer),
        "reconstruction": ("Rebuilding a text", rebuilding, (model, tokenizer, blocks)),
        "interpolation": ("Between two thoughts", rebuilding, (model, tokenizer, pairs)),
        "latent_usage": ("What each latent carries", usage, (model, blocks)),
        "latent_reading": ("Which tokens read which latents", usage, (model, tokenizer, blocks)),
    }
    key = subject.key | {"texts": fingerprint(texts), "block_size": block_size, "num_blocks": num_blocks} | settings
    for name, (title, module, arguments) in studies.items():

        def compute(name=name, module=module, arguments=arguments):
            return getattr(module, name)(*arguments, **settings)

        def show(result, folder, name=name, module=module, title=title):
            markdown = getattr(module, f"{name}_markdown")(result)
            plot = getattr(latent_plots, f"plot_{name}", None)
            if plot is None:
                return markdown
            plot(result, folder / f"{name}.png")
            return f"![{title}]({name}.png)\n\n{markdown}"

        report.section(name, title, key, compute, show)


def topic_section(report: Report, subject: Subject, name_or_file: str, **settings) -> None:
    """Whether topics can be read from posterior means. settings: of `topic_probe`."""
    check_settings(**settings)
    local_files(name_or_file)  # raises where there is none
    if not _has_any(report, "topic", "Topics", subject.has_latents):
        return

    def compute():
        labelled = representations.load_labelled_texts(name_or_file, seed=settings.get("seed", 0))
        return representations.topic_probe(subject.model, subject.tokenizer, labelled, **settings)

    key = subject.key | {"data": name_or_file} | settings

    def show(result, folder):
        latent_plots.plot_topic_probe(result, folder / "topic.png")
        return f"![What can be read from posterior means](topic.png)\n\n{representations.topic_probe_markdown(result)}"

    report.section("topic", "Topics", key, compute, show)


# ------------------------------------------------------------------ shared


def _has_any(report: Report, name: str, title: str, found: bool, what: str = "has latents") -> bool:
    """Whether a model has what a section needs; where none has, the section says so."""
    if not found:

        def refuse():
            raise ValueError(f"no model here {what}.")

        report.section(name, title, {}, refuse, lambda result, folder: "")
    return found
