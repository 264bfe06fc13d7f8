"""Likelihood of held-out text: bounds with noise that no fit has seen; the published protocol by its own name.

Figures are sums in nats over a block's scored tokens, pooled over all tokens: total nats / tokens. Their standard
errors are over documents, which are what a corpus is a sample of.
"""

import math
import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..configuration_ltm import InferenceSettings
from ..data import collate_blocks, document_blocks, prefix_blocks
from ..data.documents import check_prefix_length
from ..data.numbers import check_at_least
from ..data.packing import blocks_of
from ..inference_ltm import infer_posterior
from ..likelihood_ltm import Text, elbo, negative_log_likelihood
from ..memory_ltm import prior_state, token_noise
from ..methods_ltm import method_of
from ..posterior_ltm import LatentPosterior, keyed_normal
from .figures import evaluating, markdown_rows, mean_and_error, ratio_and_error, with_error
from .sampling import context_length

DESCRIPTIONS = {
    "bound": "bound with fresh noise: NLL + KL at a sample that the fit has not seen; what an LTM may claim",
    "iw": "importance-weighted bound by so many samples of the posterior; never above `bound` on average",
    "nll": "NLL given latents fitted to the same text, without their cost: no bound",
    "kl": "what those latents cost; with nll, the bound",
    "prediction": "exact loss of a memory: each token given those before it; compare with an AR model's `no_latents`",
    "prediction_sampled": "loss of the same by a fresh sample for each token; bounds that of their mixture",
    "no_latents": "exact loss without latents",
    "prior": "NLL given latents drawn from the prior: thoughts about nothing",
    "from_prompt": "exact loss of the scored tokens, latents from the prompt before them only",
    "reinfer": "exact loss of a predictor that infers its latents from all before, anew after every so many tokens",
    "prefix": "exact loss of what follows a prefix, latents from that prefix only; compare with an AR model's",
    "prefix_prediction": "exact loss of the same tokens by a memory that learns from each; compare with an AR model's",
    "prefix_mixture": "exact loss of the same tokens by a mixture of so many samples of q(z | prefix)",
    "prefix_no_latents": "exact loss of the same tokens, without latents",
    "released": "log of the released protocol's perplexity: the fit's own noise, mean of exp over blocks; NOT a bound",
}
DEFAULT = ("bound", "nll", "kl", "no_latents", "prefix", "prefix_no_latents", "released")
MEMORY = ("prediction", "prediction_sampled", "no_latents", "prefix", "prefix_prediction", "prefix_no_latents")
EXACT = ("no_latents", "prefix_no_latents")  # the figures of a model without latents


def default_figures(model) -> tuple[str, ...]:
    """What is measured of a model unless somebody asks for more."""
    if not getattr(model.config, "num_latents", 0):
        return EXACT
    if model.config.has_memory:
        return MEMORY
    bounds = ("bound", "kl", "released")  # of which a posterior without variance has none
    return tuple(name for name in DEFAULT if method_of(model.config).has_variance or name not in bounds)


def no_text_yet(model, rows: int) -> dict:
    """What `negative_log_likelihood` is given beside so many texts: of a model with a memory, one of nothing."""
    if not getattr(model.config, "has_memory", False):
        return {}
    return {"latent_state": prior_state(model.config, rows, model.device)}


@dataclass(frozen=True)
class Likelihood:
    """Nats a token, each with its standard error. `released` is the log of a mean of perplexities.

    A figure is NaN or infinite where the model's losses are. A standard error that nobody measured is NaN, a count that
    nobody made None. bits_per_byte: of the UTF-8 text, where its size is known; nothing for the parts of a bound, or
    for `released`.
    """

    figures: dict[str, tuple[float, float]]
    num_tokens: int | None
    num_blocks: int | None
    num_documents: int | None = None
    bits_per_byte: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.figures[name][0]

    def __contains__(self, name: str) -> bool:
        return name in self.figures

    def perplexity(self, name: str) -> float:
        return math.inf if self[name] >= 700 else math.exp(self[name])  # the largest that a float holds is e⁷⁰⁹

    def __or__(self, other: "Likelihood") -> "Likelihood":
        """With the figures of another reading of the same documents; the counts are this one's."""
        figures, bits = self.figures | other.figures, self.bits_per_byte | other.bits_per_byte
        return Likelihood(_in_order(figures), self.num_tokens, self.num_blocks, self.num_documents, _in_order(bits))


def description(name: str) -> str:
    """What a figure is. The number of samples is part of a name, as in iw-64."""
    return DESCRIPTIONS[name.split("-")[0]]


def _in_order(figures: dict) -> dict:
    names = list(DESCRIPTIONS)
    return dict(sorted(figures.items(), key=lambda item: names.index(item[0].split("-")[0])))


def markdown_table(columns: dict[str, Likelihood], unit: str = "nats a token") -> str:
    """A Markdown table with a row for each figure, a column for each model, and, for nats, what each figure is.

    unit: "nats a token", "perplexity" or "bits per byte"; parts of a bound are given in nats only.
    """
    names = _in_order({name: None for likelihood in columns.values() for name in likelihood.figures})
    explained, digits = unit == "nats a token", 2 if unit == "perplexity" else 3
    rows = [[unit, *columns, *(["what it is"] if explained else [])]]
    for name in names:
        known = [_in_unit(likelihood, name, unit) for likelihood in columns.values()]
        cells = ["–" if pair is None else with_error(*pair, digits) for pair in known]
        if set(cells) != {"–"}:
            rows.append([name, *cells, *([description(name)] if explained else [])])
    return markdown_rows(rows)


def _in_unit(likelihood: Likelihood, name: str, unit: str) -> tuple[float, float] | None:
    """None for what was not measured, and for what has no such unit."""
    if unit == "bits per byte":
        return likelihood.bits_per_byte.get(name)
    if unit == "nats a token" or name not in likelihood:
        return likelihood.figures.get(name)
    if name in ("nll", "kl"):
        return None
    perplexity = likelihood.perplexity(name)
    return perplexity, perplexity * likelihood.figures[name][1]  # of a smooth function, to first order


# ------------------------------------------------------------------ estimates


def importance_weighted_bound(
    posterior: LatentPosterior,
    log_likelihood: Callable[[torch.Tensor], torch.Tensor],
    num_samples: int,
    seed: int = 0,
) -> torch.Tensor:
    """(B,) nats: log 1/K Σₖ p(x|zₖ) p(zₖ) / q(zₖ|x), zₖ ~ q (Burda et al. 2016, equation 8).

    On average at most log p(x), at least the ELBO, and nearer to log p(x) the more samples; holds one at a time.

    log_likelihood: from latents (B, L, N, D) to log p(x|z), (B,) nats. Raises ValueError for less than one sample.
    """
    check_at_least(1, num_samples=num_samples)
    precision = (-posterior.log_variance).exp()
    total = torch.full_like(posterior.kl_divergence(), -torch.inf)
    for number in range(num_samples):
        latents = posterior.scoring_sample(number, seed)
        squares = (latents - posterior.mean) ** 2 * precision - latents**2
        log_ratio = 0.5 * (squares + posterior.log_variance).flatten(start_dim=1).sum(dim=1)  # log p(z) - log q(z|x)
        total = torch.logaddexp(total, log_likelihood(latents) + log_ratio)
    return total - math.log(num_samples)


# ------------------------------------------------------------------ scores of blocks


def evaluate_likelihood(
    model,
    blocks,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    num_particles: int = 1,
    seed: int = 0,
    progress: bool = True,
    figures: Collection[str] | None = None,
    **inference,
) -> Likelihood:
    """Figures of `DESCRIPTIONS` on blocks of tokens; for a model without latents, or any causal LM, its exact losses.

    blocks: rows with `input_ids`, as from `ltm_hf.data.pack`; padded to the longest of their batch. With the columns of
        `document_blocks` and `prefix_blocks`, errors are over documents instead of blocks, bits per byte are known, and
        the prefix of each block is its own; else it is the first half.
    num_inference_steps: default the model's. num_particles: samples of z that the bound is averaged over.
    figures: names, with the number of samples where there is one: "iw-64"; default: `default_figures`.
    inference: other settings of `infer_posterior`, such as inference_method. By "langevin", bounds are infinite.

    Raises ValueError if there is no block or no token to score, for a row with padding or with labels of its own, an
    unknown figure, and numbers out of range.
    """
    return score_blocks(
        model, blocks, batch_size, num_inference_steps, num_particles, seed, progress, figures, **inference
    ).likelihood()


def score_blocks(
    model,
    blocks,
    batch_size: int = 16,
    num_inference_steps: int | None = None,
    num_particles: int = 1,
    seed: int = 0,
    progress: bool = True,
    figures: Collection[str] | None = None,
    **inference,
) -> "BlockScores":
    """What `evaluate_likelihood` pools, to be compared block by block; its arguments."""
    check_at_least(1, batch_size=batch_size, num_particles=num_particles)
    figures = _checked_figures(model, figures)
    if getattr(model.config, "num_latents", 0):
        InferenceSettings.of(model.config, num_inference_steps=num_inference_steps)
    rows = [blocks[index] for index in range(len(blocks))]
    _check_rows(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))  # little padding
    scores = {name: torch.zeros(len(rows), dtype=torch.float64) for name in figures}
    settings = {"num_inference_steps": num_inference_steps, "seed": seed, **inference}
    starts = tqdm(range(0, len(rows), batch_size), desc="Evaluating", disable=not progress, leave=False)
    with evaluating(model):
        for start in starts:
            indices = order[start : start + batch_size]
            batch = _Batch(model, [rows[index] for index in indices], settings, num_particles)
            for name in figures:
                scores[name][indices] = batch.score(name).double().cpu()
    return BlockScores(rows, scores)


def _checked_figures(model, figures: Collection[str] | None) -> Collection[str]:
    """Those of the model, of which one without latents has the exact ones alone, whatever is asked for."""
    if figures is None:
        return default_figures(model)
    single = set(DESCRIPTIONS) - {"iw", "reinfer", "prefix_mixture", "from_prompt"}
    for name in figures:
        if not re.fullmatch("|".join([*single, r"(iw|reinfer|prefix_mixture)-[1-9]\d*"]), name):
            known = ", ".join(dict.fromkeys((*DEFAULT, *MEMORY)))
            raise ValueError(
                f"There is no figure {name!r}; there are {known}, prior, iw-K, reinfer-K and prefix_mixture-K."
            )
    if not getattr(model.config, "num_latents", 0):
        return [name for name in EXACT if name in figures]
    others = {"released"} if model.config.has_memory else set(MEMORY) - set(DEFAULT)
    for name in figures:
        if name in others:
            raise ValueError(f"{name!r} is no figure of a model with latent_reader={model.config.latent_reader!r}.")
    return figures


def _check_rows(rows: list[dict]) -> None:
    """Raise a ValueError unless there are blocks, of which every token after the first is to be scored."""
    if not rows:
        raise ValueError("There is no block to evaluate on.")
    for number, row in enumerate(rows):
        if not len(row.get("input_ids", ())):
            raise ValueError(f"Block {number} has no token: a block is a row with input_ids.")
        for name, plain in (("attention_mask", [1] * len(row["input_ids"])), ("labels", list(row["input_ids"]))):
            if name in row and list(row[name]) != plain:
                raise ValueError(f"Block {number} has {name} of its own, but all of its tokens would be scored.")
    if max(len(row["input_ids"]) for row in rows) < 2:
        raise ValueError("There is no token to score: each block is a single one, which nothing comes before.")


def fitting_block_size(models: Sequence, block_size: int | None = None) -> int:
    """The longest block, of 1,024 tokens at most, that all models take. Raises ValueError for a longer one."""
    longest = min((length for length in map(context_length, models) if length), default=math.inf)
    block_size = min(1024, longest) if block_size is None else block_size
    check_at_least(2, block_size=block_size)
    if block_size > longest:
        raise ValueError(f"block_size is {block_size}, but a model takes no more than {longest} tokens.")
    return block_size


def evaluate_documents(
    model,
    tokenizer,
    texts: Sequence[str],
    block_size: int | None = None,
    num_blocks: int | None = None,
    prefix_length: int | None = None,
    num_samples: int = 0,
    seed: int = 0,
    **settings,
) -> tuple[Likelihood, list[str]]:
    """All figures on documents, and in words what could not be had.

    The bounds are of `document_blocks`; `prefix` is of `prefix_blocks`; `released` is of documents joined and cut into
    blocks, as that protocol has it.

    tokenizer: the model's. block_size: tokens, default what the model takes, 1,024 at most. num_blocks: so many blocks
    for each of these, drawn by the seed; default all. prefix_length: tokens; default half of a block.
    num_samples: of the importance-weighted bound, where the model has a bound; 0 for none.
    settings: as for `evaluate_likelihood`.

    Raises ValueError as `document_blocks` and `evaluate_likelihood` do, and for a block longer than the model takes.
    """
    block_size = fitting_block_size([model], block_size)
    check_prefix_length(prefix_length, block_size)
    check_at_least(1, num_blocks=1 if num_blocks is None else num_blocks)
    check_at_least(0, num_samples=num_samples)
    names, notes = default_figures(model), []
    after_prefix = [name for name in names if name.startswith("prefix")]
    figures = [name for name in names if name != "released" and name not in after_prefix]
    if "bound" in names:
        figures += ["prior", *([f"iw-{num_samples}"] if num_samples else [])]
    elif num_samples:
        raise ValueError("num_samples is of an importance-weighted bound, and this model has no bound.")

    def figures_of(blocks, names):
        return evaluate_likelihood(model, chosen(blocks, num_blocks, seed), figures=names, seed=seed, **settings)

    result = figures_of(document_blocks(texts, tokenizer, block_size), figures)
    following = prefix_blocks(texts, tokenizer, block_size, prefix_length)
    missing = len(texts) - (len(set(following["document"])) if len(following) else 0)
    if missing:
        notes.append(f"{missing} of {len(texts)} documents are too short to have anything after their prefix.")
    if len(following):
        result |= figures_of(following, after_prefix)
    if "released" in names:
        joined = list(blocks_of(Dataset.from_dict({"text": list(texts)}), tokenizer, block_size))
        if joined:
            result |= figures_of(joined, ("released",))
        else:
            notes.append(f"The documents together do not fill one block of {block_size} tokens: no released protocol.")
    return result, notes


def chosen(blocks, count: int | None, seed: int = 0) -> list[dict]:
    """So many of the blocks, drawn by the seed and in their order; all of them where there are no more, or for None."""
    check_at_least(1, count=1 if count is None else count)
    indices = range(len(blocks))
    if count is not None and count < len(blocks):
        indices = sorted(random.Random(seed).sample(indices, count))
    return [blocks[index] for index in indices]


class BlockScores:
    """Nats of each block by figure, (blocks,) each in `nats`, and of how many tokens and bytes of which document.

    Nats of a block that are not finite are so in every mean.
    """

    def __init__(self, rows: list[dict], nats: dict[str, torch.Tensor]):
        self.nats = nats
        self.documents = torch.tensor([row.get("document", index) for index, row in enumerate(rows)])
        self._rows = rows

    def tokens(self, name: str) -> torch.Tensor:
        """(blocks,) tokens that the figure is of."""
        return torch.tensor([len(row["input_ids"]) - _first(row, name) for row in self._rows], dtype=torch.float64)

    def bytes(self, name: str) -> torch.Tensor | None:
        """(blocks,) bytes of text that the figure is of, None if they are not known."""
        if "token_bytes" not in self._rows[0]:
            return None
        sizes = [sum(row["token_bytes"][_first(row, name) :]) for row in self._rows]
        return torch.tensor(sizes, dtype=torch.float64)

    def mean(self, name: str, minus: str | None = None) -> tuple[float, float]:
        """Nats a token over all blocks, and the standard error over documents; or what one figure is above another.

        Both of a difference must be of the same tokens.
        """
        nats = self.nats[name] if minus is None else self.nats[name] - self.nats[minus]
        return ratio_and_error(nats, self.tokens(name), self.documents)

    def likelihood(self) -> Likelihood:
        figures, bits = {}, {}
        for name, nats in self.nats.items():
            if not self.tokens(name).sum():
                continue  # nothing follows any prefix
            if name == "released":  # the mean of exponentials over blocks is the protocol's own
                mean, error = mean_and_error((nats / self.tokens(name)).exp())
                figures[name] = (math.log(mean), error / mean)
                continue
            figures[name] = self.mean(name)
            sizes = self.bytes(name)
            if sizes is not None and name not in ("nll", "kl"):
                bits[name] = ratio_and_error(nats / math.log(2), sizes, self.documents)
        if self.nats and not figures:
            raise ValueError("There is no token to score: nothing follows any prefix.")
        scored = sum(len(row["input_ids"]) - 1 for row in self._rows)
        documents = len(self.documents.unique()) if "document" in self._rows[0] else None
        return Likelihood(_in_order(figures), scored, len(self._rows), documents, _in_order(bits))


def _first(row: dict, name: str) -> int:
    """The position of the first token that a figure of a block scores."""
    return row.get("prefix_length", len(row["input_ids"]) // 2) if name.startswith("prefix") else 1


class _Batch:
    """Blocks padded on the right, and what several figures of them share, each made when first asked for."""

    def __init__(self, model, rows: list[dict], settings: dict, num_particles: int):
        self.model, self.settings, self.num_particles = model, settings, num_particles
        tensors = collate_blocks([{"input_ids": row["input_ids"]} for row in rows])
        self.text = Text.of(model, **{name: tensor.to(model.device) for name, tensor in tensors.items()})
        prefixes = torch.tensor([_first(row, "prefix") for row in rows], device=model.device)
        self.positions = torch.arange(self.text.input_ids.shape[1], device=model.device)
        self.is_prefix = self.positions < prefixes[:, None]
        self.after_prefix = self.text.scoring(self.positions + 1 >= prefixes[:, None])

    def score(self, name: str) -> torch.Tensor:
        """(B,) nats."""
        name, _, number = name.partition("-")
        return getattr(self, name)(*([int(number)] if number else []))

    @cached_property
    def posterior(self):
        return infer_posterior(self.model, self.text, **self.settings)

    @cached_property
    def estimate(self):
        options = {"num_particles": self.num_particles, "seed": self.settings["seed"]}
        return elbo(self.model, self.text, self.posterior, **options)

    def nll_given(self, latents=None, text=None):
        return negative_log_likelihood(self.model, self.text if text is None else text, latents)

    def bound(self):
        return -self.estimate.elbo

    def nll(self):
        return self.estimate.nll

    def kl(self):
        # Where a fit has lost its way, its posterior is the last good one, whose cost is no figure of the text.
        return self.estimate.kl.where(self.estimate.nll.isfinite(), math.nan)

    def iw(self, num_samples):
        seed = self.settings["seed"]
        return -importance_weighted_bound(self.posterior, lambda z: -self.nll_given(z), num_samples, seed)

    def no_latents(self):
        return self.nll_given()

    def prediction(self, text=None, noise=None):
        text, memory = self.text if text is None else text, no_text_yet(self.model, len(self.text.input_ids))
        return negative_log_likelihood(self.model, text, **memory, latent_noise=noise)

    def prediction_sampled(self):
        ids, mask, width = self.text.input_ids, self.text.mask, self.model.config.hidden_size
        return self.prediction(noise=token_noise(self.text.keys, ids.shape[1], mask, width, self.settings["seed"]))

    def prior(self):
        keys, shape = self.text.keys, self.model.config.latent_shape
        prior = LatentPosterior(*torch.zeros(2, len(keys), *shape, device=keys.device), keys=keys)
        return self.nll_given(prior.scoring_sample(0, self.settings["seed"]))

    @cached_property
    def of_prefix(self):
        width = int(self.is_prefix.sum(dim=1).max())
        prefix = Text.unchecked(self.text.input_ids[:, :width], self.is_prefix[:, :width].long())
        return infer_posterior(self.model, prefix, **self.settings)

    def prefix(self):
        return self.nll_given(self.of_prefix.mean, self.after_prefix)

    def prefix_prediction(self):
        return self.prediction(self.after_prefix)

    def reinfer(self, every):
        """As `generate(reinfer_every=K)` from the begin-of-text token reads this text; the first K tokens at z = 0."""
        ids, nats = self.text.input_ids, 0
        mask = torch.ones_like(ids) if self.text.mask is None else self.text.mask
        for start in range(1, ids.shape[1], every):
            before, stop = Text.unchecked(ids[:, :start], mask[:, :start]), start + every
            posterior = infer_posterior(self.model, before, **self.settings)
            chunk = Text.unchecked(ids[:, :stop], mask[:, :stop]).scoring(self.positions[:stop] + 1 >= start)
            nats += self.nll_given(posterior.mean, chunk)
        return nats

    def prefix_mixture(self, num_samples):
        samples = (self.of_prefix.scoring_sample(number, self.settings["seed"]) for number in range(num_samples))
        log_likelihoods = torch.stack([-self.nll_given(latents, self.after_prefix) for latents in samples])
        return math.log(num_samples) - log_likelihoods.logsumexp(dim=0)

    def prefix_no_latents(self):
        return self.nll_given(text=self.after_prefix)

    def released(self):
        noise = keyed_normal(self.text.keys, self.model.config.latent_shape, self.settings["seed"])
        fitted = infer_posterior(self.model, self.text, epsilon=noise, **self.settings)
        return -elbo(self.model, self.text, fitted, epsilon=noise).elbo
