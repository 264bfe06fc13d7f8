"""What a model's prior costs its bound, and what a narrower one would save: latents spanned by what texts differ in.

    python examples/benchmarks/prior_directions.py outputs/headroom/mixed-8/memory/42 --files mixed.jsonl

Directions are principal ones of what two halves of a training block have in common in the gradient of -log p(x|z) at
z = 0: the rest of it, which they do not share, is noise. z = Σ u_k b_k then has a prior u ~ N(0, I), in which each b_k
is as long as texts vary along it, or a share of that (variance). Nothing of the decoder learns. Prints a Markdown table
of held-out blocks, nats a token: -log p(x|z) at z = 0, at a sample of the prior, at the posterior's mean (natural
gradient, step size 1) and at samples of it with noise that no fit has seen, the KL, and the bound.
"""

import argparse

import torch
from train_step import environment
from transformers import AutoModelForCausalLM

from ltm_hf.evaluation.figures import markdown_rows
from ltm_hf.posterior_ltm import IGNORED, negative_log_likelihood
from ltm_hf.study import Setting
from ltm_hf.study.cell import prepare


def gradients(model, input_ids: torch.Tensor, scored: slice, batch_size: int = 16) -> torch.Tensor:
    """(B, L·N·D) of -log p of these tokens at z = 0."""
    found = []
    for rows in input_ids.split(batch_size):
        labels = torch.full_like(rows, IGNORED)
        labels[:, scored] = rows[:, scored]
        latents = torch.zeros(len(rows), *model.config.latent_shape, requires_grad=True)
        nll = negative_log_likelihood(model, rows, latents, labels=labels).sum()
        found.append(torch.autograd.grad(nll, latents)[0].flatten(1))
    return torch.cat(found)


def shared_directions(first: torch.Tensor, second: torch.Tensor, count: int) -> torch.Tensor:
    """(L·N·D, count) b_k, from the (B, L·N·D) gradients of two halves.

    With noise F = E[g²] - s along a direction, of g = first + second with the shared variance s = 4 E[first·second], a
    latent that moves g by F a unit has s = F²τ²: its prior's standard deviation τ is √s / F.
    """
    mean = (first + second).mean(dim=0) / 2
    first, second = first - mean, second - mean
    product = first.T @ second / len(first)
    directions = torch.linalg.eigh(product + product.T).eigenvectors.flip(1)[:, :count]
    first, second = first @ directions, second @ directions
    shared = 4 * (first * second).mean(dim=0)
    noise = ((first + second) ** 2).mean(dim=0) - shared
    return directions * shared.clamp(min=0).sqrt() / noise


class Spanned:
    """The decoder reads Σ u_k b_k, with u the first coordinates of what it is given. The basis may change."""

    def __init__(self, model):
        self.basis = None
        model.get_decoder().register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, decoder, args, kwargs):
        latents = kwargs.get("latents")
        if self.basis is not None and latents is not None:
            given = latents.flatten(1)[:, : self.basis.shape[1]]
            kwargs["latents"] = (given @ self.basis.T).view_as(latents)
        return args, kwargs


def row(model, input_ids: torch.Tensor, steps: int, num_particles: int) -> list[str]:
    """The table's figures."""
    tokens = input_ids[:, 1:].numel()

    def nll(latents):
        with torch.no_grad():
            return negative_log_likelihood(model, input_ids, latents).sum().item() / tokens

    posterior = model.infer_posterior(
        input_ids, num_inference_steps=steps, inference_optimizer="natural", inference_learning_rate=1.0
    )
    prior = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    sampled = sum(nll(posterior.sample(seed)) for seed in range(num_particles)) / num_particles
    kl = posterior.kl_divergence().sum().item() / tokens
    values = nll(torch.zeros_like(prior)), nll(prior), nll(posterior.mean), sampled, kl, sampled + kl
    return [f"{value:.4f}" for value in values]


def main():
    parser = argparse.ArgumentParser(description="What a prior along the directions that texts differ in saves.")
    parser.add_argument("model")
    parser.add_argument("--files", help="the corpus it learned from; default: presidents' messages")
    parser.add_argument("--training_blocks", type=int, default=8000)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--directions", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--num_particles", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval().requires_grad_(False)
    length = model.config.max_position_embeddings
    corpus = {"name_or_files": args.files} if args.files else {}
    data = prepare(Setting(corpus=corpus, tokenizer=args.model), length, args.blocks)
    full = data.train.filter(lambda row: len(row["input_ids"]) == length).shuffle(seed=0)
    train = torch.tensor(full.select(range(min(args.training_blocks, len(full))))["input_ids"])
    held_out = torch.tensor([block["input_ids"] for block in data.blocks])

    halves = [gradients(model, train, part) for part in (slice(None, length // 2), slice(length // 2, None))]
    basis, prior = shared_directions(*halves, max(args.directions)), Spanned(model)
    rows = [["prior", "at 0", "at a sample of the prior", "at the mean", "at samples", "kl", "bound"]]
    rows.append(["the model's", *row(model, held_out, args.steps, args.num_particles)])
    for count in args.directions:
        for share in args.shares:
            prior.basis = basis[:, :count] * share**0.5
            rows.append([f"{count} directions, {share:g}", *row(model, held_out, args.steps, args.num_particles)])
    about = ", ".join(f"{name} {value}" for name, value in environment(model.device).items())
    print(f"\n{about}\n{len(train):,} training blocks, {len(held_out)} held out, {args.steps} steps\n")
    print(markdown_rows(rows))


if __name__ == "__main__":
    main()
