"""One cell of a study: a model trained in a setting with a seed, and its score on held-out documents."""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from ltm_hf import LTMForCausalLM
from ltm_hf.data import document_blocks, load_corpus, load_tokenizer, pack, prefix_blocks, train_tokenizer
from ltm_hf.evaluation import score_blocks
from ltm_hf.evaluation.likelihood import chosen
from ltm_hf.training import LTMTrainer

from .grid import Scoring, Setting, Study


@dataclass(frozen=True)
class Data:
    """What a setting's models learn from, and held-out blocks to score: for all tokens and, with prefixes, for what
    follows them. Every block is full, and of one document."""

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


def train_cell(study: Study, setting: str, model: str, seed: int, data: Data, folder: Path) -> dict:
    """Train, and keep the model in the folder, as a checkpoint that loads anywhere.

    Returns, for JSON: `parameters`, `flops` (a token of training), `steps`, `tokens` (that it learned from), `seconds`
    (a step).
    """
    set_seed(seed)
    decoder = LTMForCausalLM(study.config(setting, model, **data.facts))
    arguments = study.arguments(setting, model, folder, seed, **data.facts)
    trainer = LTMTrainer(decoder, arguments, train_dataset=data.train, processing_class=data.tokenizer)
    start = time.perf_counter()
    trainer.train()
    seconds, steps = time.perf_counter() - start, trainer.state.global_step
    trainer.save_model()
    return {
        "parameters": decoder.num_parameters(),
        "flops": study.flops(setting, model, arguments, **data.facts),
        "steps": steps,
        "tokens": steps * arguments.train_batch_size * decoder.config.max_position_embeddings,
        "seconds": seconds / max(1, steps),
    }


def score_cell(study: Study, setting: str, model: str, seed: int, data: Data, folder: Path) -> dict:
    """The scores of the model that `train_cell` left in the folder; it infers as this one is configured to."""
    config = study.config(setting, model, **data.facts)
    return score_model(LTMForCausalLM.from_pretrained(folder, config=config), data, study.scoring)


def score_model(model, data: Data, scoring: Scoring) -> dict[str, dict[str, list]]:
    """Nats of each held-out block by figure, with its `tokens` and its `documents`, to be compared block by block.

    Exact, whatever the model: `loss` of all tokens and `second` of second halves, each from what comes before it, and
    `no_latents` and `prefix_no_latents` of the decoder alone. Of one with latents also, by the number of inference
    steps, `prefix@T`: second halves, latents from the first ones. `bound`: with fresh noise; where latents are fitted
    to a whole text it is NLL + KL, also as `bound@T`, with `kl` and the importance-weighted `iw`.
    """
    wanted, scores = defaultdict(dict), {}
    for name, figure, steps in _figures(model.config, scoring):
        wanted[figure.startswith("prefix"), steps][name] = figure
    for (follows, steps), names in wanted.items():  # which share what inference finds
        blocks, figures = data.following if follows else data.blocks, tuple(dict.fromkeys(names.values()))
        found = score_blocks(model, blocks, scoring.batch_size, steps, progress=False, figures=figures)
        for name, figure in names.items():
            columns = {"nats": found.nats[figure], "tokens": found.tokens(figure), "documents": found.documents}
            scores[name] = {column: values.tolist() for column, values in columns.items()}
    return scores


def _figures(config, scoring: Scoring) -> Iterator[tuple[str, str, int | None]]:
    """What is scored of a model: the study's name for it, evaluation's, and the inference steps, None for its own."""
    yield from ((name, name, None) for name in ("no_latents", "prefix_no_latents"))
    if not config.num_latents:
        yield from (("loss", "no_latents", None), ("second", "prefix_no_latents", None))
        return
    yield from ((f"prefix@{steps}", "prefix", steps) for steps in scoring.all_steps)
    if config.has_memory:
        yield from (("loss", "prediction", None), ("second", "prefix_prediction", None))
        yield "bound", "prediction_sampled", None
        return
    yield from (("loss", f"reinfer-{scoring.reinfer_every}", None), ("second", "prefix", scoring.at))
    yield from ((f"bound@{steps}", "bound", steps) for steps in scoring.all_steps)
    yield from (("bound", "bound", scoring.at), ("kl", "kl", scoring.at))
    yield "iw", f"iw-{scoring.importance_samples}", scoring.at
