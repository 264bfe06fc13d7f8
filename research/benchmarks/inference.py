"""The bound with fresh noise after so many gradients, for each candidate of an inference optimiser, on trained models.

    python examples/benchmarks/inference_steps.py outputs/ltm-tiny-natural
    python examples/benchmarks/inference_steps.py outputs/a outputs/b --files data/*.parquet --steps 1 2 4 8 16 32 64 \\
        128 --only natural AdamW --output steps.json

prints a Markdown table for each model, in nats a token. A column's number is the gradients of the likelihood that each
candidate took, as a measure of its cost; the best of a column is bold. Validation blocks are those of
examples/pretrain.py on the same files (default: its corpus). Bounds are scored with noise that no fit has seen, the
same for all candidates; the errors given are of differences from the first candidate, block by block.

Candidates are those of inference_optimizers.py, and "natural, fitted steps": ρ of the first two steps and a factor for
each layer, chosen on training blocks for the bound at T = 2. A read-out is the ridge regression of the posterior's mean
on the mean embeddings of the text's four quarters, fitted to training blocks and thought about for 16 steps.
"""

import argparse
import json
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from inference_optimizers import CANDIDATES, Candidate, NaturalVariant, inverse, natural
from torch.nn import functional as F
from train_step import at_least, environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from ltm_hf import LatentPosterior
from ltm_hf.configuration_ltm import InferenceSettings
from ltm_hf.data import collate_blocks, load_corpus, pack
from ltm_hf.data.packing import blocks_of
from ltm_hf.evaluation import score_blocks
from ltm_hf.evaluation.figures import markdown_rows, ratio_and_error, with_error
from ltm_hf.posterior_ltm import keyed_normal, negative_log_likelihood, register_inference_optimizer

FITTED = "natural, fitted steps"


class Recorder:
    """An optimiser, and its posterior after each of some numbers of steps."""

    def __init__(self, optimizer, at):
        self.optimizer, self.at, self.steps, self.kept = optimizer, at, 0, {}
        self.at_mean = getattr(optimizer, "at_mean", False)
        self._keep()

    def _keep(self):
        if self.steps in self.at:
            self.kept[self.steps] = (self.mean.clone(), self.log_variance.clone())

    @property
    def mean(self):
        return self.optimizer.mean

    @property
    def log_variance(self):
        return self.optimizer.log_variance

    def update(self, *args):
        self.optimizer.update(*args)
        self.steps += 1
        self._keep()


# ------------------------------------------------------------------ one candidate on one batch


def posteriors(model, input_ids, candidate: Candidate, steps: list[int], read_out=None) -> dict[int, LatentPosterior]:
    """The candidate's posterior after each number of gradients that it can take."""
    loops = {number // candidate.gradients: number for number in steps if number % candidate.gradients == 0}
    start = model.infer_posterior(input_ids, num_inference_steps=0, **candidate.settings)
    if candidate.start == "prior":
        start = LatentPosterior(torch.zeros_like(start.mean), torch.zeros_like(start.mean), keys=start.keys)
    elif candidate.start == "read-out":
        start = LatentPosterior(*read_out(input_ids), keys=start.keys)
    NaturalVariant.fisher = partial(squared_gradients, model, input_ids)
    found = {}
    for at in [list(loops)] if candidate.anytime else [[number] for number in loops]:
        recorder = None

        def make(*state, at=at):
            nonlocal recorder
            recorder = Recorder(candidate.optimizer(*state), at)
            return recorder

        register_inference_optimizer("candidate", make)
        settings = candidate.settings | {"inference_optimizer": "candidate"}
        epsilon = given_noise(candidate.noise, start, max(at))
        model.infer_posterior(
            input_ids, num_inference_steps=max(at), initial_posterior=start, epsilon=epsilon, **settings
        )
        for number, (mean, log_variance) in recorder.kept.items():
            found[loops[number]] = LatentPosterior(mean, log_variance, keys=start.keys)
    return found


def given_noise(kind: str, start: LatentPosterior, steps: int) -> torch.Tensor | None:
    """(T, B, L, N, D); None for the loop's own, fresh at each step."""
    if kind == "fresh" or not steps:
        return None
    if kind == "none":
        return torch.zeros_like(start.mean)
    pairs = [keyed_normal(start.keys, start.mean.shape[1:], step // 2) * (-1) ** step for step in range(steps)]
    return torch.stack(pairs)


def squared_gradients(model, input_ids, latents: torch.Tensor, step: int) -> torch.Tensor:
    """(B, L, N, D): g² at labels drawn from the model, on average the diagonal of the Fisher information."""
    with torch.enable_grad():
        latents = latents.detach().requires_grad_()
        logits = model(input_ids=input_ids, latents=latents, use_cache=False).logits[:, :-1].flatten(0, 1)
        generator = torch.Generator(input_ids.device).manual_seed(step)
        labels = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator).squeeze(1)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), latents)
    return gradient**2


# ------------------------------------------------------------------ what candidates learn from training blocks


def quarters(model, input_ids) -> torch.Tensor:
    """(B, 4 D + 1): the mean embedding of each quarter of the text, and 1."""
    embedded = model.get_input_embeddings()(input_ids).detach()
    means = torch.cat([quarter.mean(dim=1) for quarter in embedded.chunk(4, dim=1)], dim=1)
    return torch.cat((means, means.new_ones(len(means), 1)), dim=1)


def fit_read_out(model, batches):
    """From token ids to (mean, log_variance) of where to start.

    The variance is the posteriors' mean variance and what the regression leaves of the means, by channel.
    """
    thought = [model.infer_posterior(batch, num_inference_steps=16) for batch in batches]
    inputs = torch.cat([quarters(model, batch) for batch in batches]).double()
    means = torch.cat([posterior.mean for posterior in thought]).double()
    variance = torch.cat([posterior.log_variance.exp() for posterior in thought]).double().mean(dim=0)
    targets, held_out = means.flatten(start_dim=1), len(means) // 8

    def solve(inputs, targets, ridge):
        penalty = ridge * len(inputs) * torch.eye(inputs.shape[1]).double() * inputs.var(dim=0).mean()
        return torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ targets)

    def loss(ridge):  # on those held out
        weights = solve(inputs[held_out:], targets[held_out:], ridge)
        return (inputs[:held_out] @ weights - targets[:held_out]).square().mean(dim=0)

    ridge = min((10.0**power for power in range(-4, 4)), key=lambda ridge: loss(ridge).mean())
    weights = solve(inputs, targets, ridge)
    log_variance = (variance + loss(ridge).view_as(variance)).log().float()

    def read_out(input_ids):
        mean = (quarters(model, input_ids).double() @ weights).float().view(-1, *model.config.latent_shape)
        return mean, log_variance.expand_as(mean)

    return read_out


def fit_steps(model, batches) -> Candidate:
    """ρ of the first two steps and a factor for each layer, by coordinate descent of the bound at T = 2."""
    scalars = [0.5, 1 / 3] + [1.0] * model.config.num_hidden_layers

    def candidate(scalars):
        rates = [*scalars[:2], *map(inverse(0.5), range(2, 1024))]
        return natural(rates=rates.__getitem__, layers=scalars[2:])

    def loss(scalars):
        fitted = (posteriors(model, batch, candidate(scalars), [2])[2] for batch in batches)
        return sum(-model.elbo(*pair).elbo.sum().item() for pair in zip(batches, fitted, strict=True))

    best = loss(scalars)
    for factor in (2.0, 1.5, 1.25):
        for index in range(len(scalars)):
            for change in (factor, 1 / factor):
                while (
                    found := loss(tried := [*scalars[:index], scalars[index] * change, *scalars[index + 1 :]])
                ) < best:
                    scalars, best = tried, found
    print(f"fitted: ρ = {scalars[0]:.2f}, {scalars[1]:.2f}; layers × " + ", ".join(f"{x:.2f}" for x in scalars[2:]))
    return candidate(scalars)


# ------------------------------------------------------------------ the study


@torch.no_grad()
def study(model, batches, training, names: list[str], steps: list[int], num_particles: int) -> dict:
    """{candidate: {gradients: [nats of each block]}}, and the exact losses without latents as "no latents"."""
    nats = {"no latents": {0: torch.cat([negative_log_likelihood(model, batch) for batch in batches]).tolist()}}
    wants_read_out = any(name in CANDIDATES and CANDIDATES[name].start == "read-out" for name in names)
    read_out = fit_read_out(model, training) if wants_read_out else None
    for name in names:
        candidate = fit_steps(model, training[:2]) if name == FITTED else CANDIDATES[name]
        scores = {}
        for batch in batches:
            for number, posterior in posteriors(model, batch, candidate, steps, read_out).items():
                estimate = model.elbo(batch, posterior, num_particles=num_particles)
                scores.setdefault(number, []).extend((-estimate.elbo).tolist())
        nats[name] = scores
    return nats


def table(nats: dict, tokens: int, steps: list[int]) -> str:
    """Bounds in nats a token; where they are not finite, "diverged"."""

    def difference(scores, reference) -> tuple[float, float]:
        scores, reference = (torch.tensor(x, dtype=torch.float64) for x in (scores, reference))
        counts = torch.full_like(scores, tokens)
        return ratio_and_error(scores - reference, counts, torch.arange(len(scores)))

    zeros = [0.0] * len(nats["no latents"][0])
    rows, errors = {}, []
    first = next(name for name in nats if name != "no latents")
    for name, scores in nats.items():
        rows[name] = {number: difference(values, zeros)[0] for number, values in scores.items()}
        if name not in ("no latents", first):
            errors += [difference(values, nats[first][number])[1] for number, values in scores.items() if number]
    no_latents = rows.pop("no latents")[0]
    best = {number: min((row[number] for row in rows.values() if number in row), default=None) for number in steps}

    def cell(row, number):
        if number not in row:
            return "–"
        text = f"{row[number]:.4f}" if abs(row[number]) < 1e4 else "diverged"
        return f"**{text}**" if row[number] == best[number] else text

    cells = [["inference", *(f"{number}" for number in steps)]]
    cells += [[name, *(cell(row, number) for number in steps)] for name, row in rows.items()]
    errors = sorted(error for error in errors if error < 0.1) or [float("nan")]
    return (
        f"exact without latents {no_latents:.4f}; differences from the first row have standard errors of "
        f"{errors[0]:.4f} to {errors[-1]:.4f}, median {errors[len(errors) // 2]:.4f}\n\n{markdown_rows(cells)}"
    )


def prefix_table(model, batches, steps: list[int]) -> str:
    """The exact loss of second halves in nats a token, and what latents save of it, by the library's own optimisers."""
    blocks, rows = [{"input_ids": row} for batch in batches for row in batch.tolist()], []
    steps = [number for number in steps if number]
    figures = ["prefix", "prefix_no_latents"]
    for name in InferenceSettings.CHOICES["inference_optimizer"]:
        if name != "candidate":
            settings = dict(figures=figures, progress=False, inference_optimizer=name)
            scores = [score_blocks(model, blocks, num_inference_steps=number, **settings) for number in steps]
            saved = (with_error(*score.mean("prefix_no_latents", minus="prefix"), 4) for score in scores)
            rows.append([name, *(f"{score.mean('prefix')[0]:.4f}" for score in scores)])
            rows.append(["saved over no latents", *saved])
    return markdown_rows([["prefix loss", *map(str, steps)], *rows])


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("models", nargs="+", help="folders of checkpoints that examples/pretrain.py left")
    parser.add_argument("--files", nargs="+", help="the corpus that they learned from; default: examples/pretrain.py's")
    parser.add_argument("--steps", type=at_least(0), nargs="+", default=[0, 1, 2, 4, 8, 16, 32], help="gradients")
    parser.add_argument("--blocks", type=at_least(2), default=64, help="validation blocks; default 64")
    parser.add_argument("--training_blocks", type=at_least(64), default=1024, help="for what is fitted; default 1024")
    parser.add_argument("--num_particles", type=at_least(1), default=4, help="samples of a bound; default 4")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of candidates' names; default: all")
    parser.add_argument("--prefix", action="store_true", help="also the prefix loss, by the library's optimisers")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU; default: torch's. 1 where others compute too")
    parser.add_argument("--output", help="JSON file to write the nats of each block to")
    options = parser.parse_args()
    names = [name for name in (*CANDIDATES, FITTED) if name.startswith(tuple(options.only))]
    if not names:
        parser.error(f"--only: there is no such candidate; there are {', '.join((*CANDIDATES, FITTED))}.")
    if options.threads:
        torch.set_num_threads(options.threads)

    corpus, results = load_corpus(options.files), {}
    where = environment(torch.device("cpu"))
    print(", ".join(where.values()))
    for folder in options.models:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer, length = AutoTokenizer.from_pretrained(folder), model.config.max_position_embeddings
        validation = pack(corpus["validation"], tokenizer, length).shuffle(seed=0)
        training = islice(blocks_of(corpus["train"].shuffle(seed=0), tokenizer, length), options.training_blocks)
        batches, training = (
            [collate_blocks(blocks[start : start + 64])["input_ids"] for start in range(0, len(blocks), 64)]
            for blocks in (list(islice(validation, options.blocks)), list(training))
        )
        nats = study(model, batches, training, names, options.steps, options.num_particles)
        results[folder] = nats
        count = len(nats["no latents"][0])
        print(f"\n{Path(folder).name}: {count} blocks of {length} tokens, {options.num_particles} particles;")
        print(table(nats, length - 1, options.steps), flush=True)
        if options.prefix:
            print("\n" + prefix_table(model, batches, options.steps), flush=True)
        if options.output:
            settings = {name: value for name, value in vars(options).items() if name not in ("models", "output")}
            report = {"settings": settings, "environment": where, "nats": results}
            Path(options.output).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
