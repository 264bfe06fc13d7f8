"""One cell of a study: a model trained in a setting with a seed, and its score on held-out documents."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from datasets import Dataset
from safetensors.torch import load_model, save_model
from transformers import PreTrainedTokenizerBase, set_seed

from ..data import document_blocks, load_corpus, load_tokenizer, pack, prefix_blocks, train_tokenizer
from ..evaluation import score_blocks
from ..evaluation.likelihood import chosen
from ..modeling_ltm import LTMForCausalLM
from ..training import LTMTrainer
from .grid import Scoring, Setting, Study

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Lever:
    """Something to try that neither `LTMConfig` nor the training arguments know.

    change: of a new model, in place, before it learns. trainer: how it learns; after `train()` its model is scored.
    """

    change: Callable[[LTMForCausalLM], None] = lambda model: None
    trainer: type[LTMTrainer] = LTMTrainer


@dataclass(frozen=True)
class Data:
    """What a setting's models learn from, and held-out blocks to score: for the bounds and, with prefixes, for
    prediction. Every block is full, and of one document."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    blocks: list[dict]
    following: list[dict]

    @property
    def facts(self) -> dict:
        """What a configuration takes from the tokenizer."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return {"vocab_size": len(self.tokenizer)} | {name: getattr(self.tokenizer, name) for name in names}


@lru_cache(maxsize=1)  # the cells of a setting follow each other
def prepare(setting: Setting, block_size: int, count: int) -> Data:
    """count: held-out blocks, drawn. Raises ValueError where no held-out document fills a block."""
    corpus = load_corpus(**setting.corpus)
    if isinstance(setting.tokenizer, int):
        tokenizer = train_tokenizer((row["text"] for row in corpus["train"]), setting.tokenizer)
    else:
        tokenizer = load_tokenizer(setting.tokenizer)
    train, texts = pack(corpus["train"], tokenizer, block_size, join=False), corpus["validation"]["text"]
    held_out = []
    for cut in (document_blocks, prefix_blocks):
        full = [row for row in cut(texts, tokenizer, block_size) if len(row["input_ids"]) == block_size]
        if not full:
            raise ValueError(f"No held-out document fills a block of {block_size} tokens: take a smaller block.")
        held_out.append(chosen(full, count))
    return Data(tokenizer, train, *held_out)


def train_cell(study: Study, setting: str, model: str, seed: int, data: Data, folder: Path, lever=Lever()) -> dict:
    """Train, and keep the model in the folder; as a checkpoint that loads anywhere, where no lever has changed it.

    Returns, for JSON: `parameters`, `flops` (a token of training), `steps`, `tokens` (that it learned from), `seconds`
    (a step).
    """
    decoder = _new_model(study, setting, model, seed, data, lever)
    arguments = study.arguments(setting, model, folder, seed, **data.facts)
    trainer = lever.trainer(decoder, arguments, train_dataset=data.train, processing_class=data.tokenizer)
    start = time.perf_counter()
    trainer.train()
    seconds, steps = time.perf_counter() - start, trainer.state.global_step
    folder.mkdir(parents=True, exist_ok=True)
    if study.models[model].lever is None:
        trainer.save_model()
    else:
        save_model(decoder, folder / WEIGHTS)
    return {
        "parameters": decoder.num_parameters(),
        "flops": study.flops(setting, model, arguments, **data.facts),
        "steps": steps,
        "tokens": steps * arguments.train_batch_size * decoder.config.max_position_embeddings,
        "seconds": seconds / max(1, steps),
    }


def score_cell(study: Study, setting: str, model: str, seed: int, data: Data, folder: Path, lever=Lever()) -> dict:
    """The scores of the model that `train_cell` left in the folder."""
    decoder = _new_model(study, setting, model, seed, data, lever)
    load_model(decoder, folder / WEIGHTS)
    return score_model(decoder, data, study.scoring)


def _new_model(study, setting, model, seed, data, lever) -> LTMForCausalLM:
    set_seed(seed)
    decoder = LTMForCausalLM(study.config(setting, model, **data.facts))
    lever.change(decoder)
    return decoder


def score_model(model, data: Data, scoring: Scoring) -> dict[str, dict[str, list]]:
    """Nats of each held-out block by figure, with its `tokens` and its `documents`, to be compared block by block.

    Figures: `exact` and `prefix_exact` of the decoder without latents; and by the number of inference steps, as in
    "bound@32": `bound`, `kl` (its second part) and `prefix`, after `scoring.at` steps `iw` and `mixture` as well.
    `reinfer` is by as many steps as the model trains with.
    """
    scores = {}

    def add(blocks, names: dict[str, str], steps: int | None = None):
        found = score_blocks(model, blocks, scoring.batch_size, steps, progress=False, figures=tuple(names.values()))
        for name, figure in names.items():
            columns = {"nats": found.nats[figure], "tokens": found.tokens(figure), "documents": found.documents}
            scores[name] = {column: values.tolist() for column, values in columns.items()}

    add(data.blocks, {"exact": "no_latents"})
    add(data.following, {"prefix_exact": "prefix_no_latents"})
    for steps in scoring.all_steps if model.config.num_latents else ():
        bounds, predictions = {f"bound@{steps}": "bound", f"kl@{steps}": "kl"}, {f"prefix@{steps}": "prefix"}
        if steps == scoring.at:
            bounds["iw"] = f"iw-{scoring.importance_samples}"
            predictions["mixture"] = f"prefix_mixture-{scoring.mixture_samples}"
        add(data.blocks, bounds, steps)
        add(data.following, predictions, steps)
    if model.config.num_latents:
        add(data.blocks, {"reinfer": f"reinfer-{scoring.reinfer_every}"})
    return scores
