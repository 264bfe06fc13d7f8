"""Posteriors and the prior of latents, and the noise that they are sampled with.

Shapes: B batch, L layers, N latents a layer, D hidden. Nats are summed over a sequence, never averaged over a batch.
"""

import math
import operator
import os
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .configuration_ltm import whole_number

# ------------------------------------------------------------------ noise, keyed by what it is for

_GOLDEN = 0x9E3779B97F4A7C15
FIT, START, SAMPLE, SCORE = range(4)  # the uses of noise: no two share a draw


def _signed(number: int) -> int:
    """A Python integer modulo 2⁶⁴, as int64."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit."""

    def shift(x, n):  # logical, where int64's own is arithmetic
        return (x >> n) & ((1 << (64 - n)) - 1)

    bits = (bits ^ shift(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ shift(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ shift(bits, 31)


def sequence_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B,) int64 keys that depend on a sequence's unmasked tokens and their order, and on nothing else."""
    positions = attention_mask.long().cumsum(dim=-1)
    return (_mix(input_ids.long() + positions * _signed(_GOLDEN)) * attention_mask.long()).sum(dim=-1)


def mixed(keys: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Keys of their own for each of several uses, which the words (int64) number."""
    return _mix(keys + (words + 1) * _signed(_GOLDEN))


def keyed_normal(keys: torch.Tensor, shape: tuple[int, ...], *words: int) -> torch.Tensor:
    """(B, *shape) float32 standard normal noise; row b is a function of keys[b] and the words alone.

    Counter-based (SplitMix64, then Box-Muller): the same on every device, in every batch, whatever the state of
    torch's generators.
    """
    for word in words:
        keys = _mix(keys + _signed((word + 1) * _GOLDEN))
    size = math.prod(shape)
    counters = torch.arange((size + 1) // 2, device=keys.device) * _signed(_GOLDEN)
    bits = _mix(keys[:, None] + counters)
    radius = (-2 * torch.log((((bits >> 32) & 0xFFFFFFFF).float() + 1) * 2.0**-32).clamp(max=0)).sqrt()
    angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :size].reshape(-1, *shape)


def _drawn_seed(seed: int | None) -> int:
    """`seed`, or one from torch's global generator, so that `torch.manual_seed` governs unseeded samples."""
    return int(torch.randint(2**62, ())) if seed is None else whole_number("seed", seed)


# ------------------------------------------------------------------ the posterior

_FILE = "latent_posterior.safetensors"


def kl_terms(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """(B, L, N, D) nats: KL(N(mean, exp(log_variance)) || N(0, 1)) of each channel, which sum to the sequence's."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """(B,) nats: KL(N(mean, exp(log_variance)) || N(0, I)) of each sequence."""
    return kl_terms(mean, log_variance).flatten(start_dim=1).sum(dim=1)


@dataclass(eq=False)
class LatentPosterior:
    """q(z|x) = N(mean, diag exp(log_variance)) of a batch of sequences.

    mean, log_variance: (B, L, N, D), float32. A log-variance of -inf makes a point of it, as Langevin dynamics do: all
        samples are the mean, and the KL is infinite.
    elbo_trace: (T, B), the ELBO in nats at each inference step, with the noise of that step, or None. For "fixed"
        noise this is the objective of the fit and not a bound; score with `elbo`, whose noise no fit has seen. Nor is
        that of "lbfgs", at the mean. Of Langevin dynamics it is log p(x, z), less the prior's constant; of a memory
        log p(x): first as it was read, each token given those before it, then given each step's mean.
    keys: (B,) int64, what identifies the sequences to the noise; None numbers the rows.
    num_non_finite: sequences whose objective turned non-finite, and which kept their best finite posterior.
    """

    mean: torch.Tensor
    log_variance: torch.Tensor
    elbo_trace: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    num_non_finite: int = 0

    def __post_init__(self):
        if self.mean.shape != self.log_variance.shape:
            raise ValueError(
                "mean and log_variance must have one shape, "
                f"got {tuple(self.mean.shape)} and {tuple(self.log_variance.shape)}."
            )
        if self.keys is None:
            self.keys = torch.arange(len(self.mean), device=self.mean.device)

    def __len__(self) -> int:
        return len(self.mean)

    def __eq__(self, other) -> bool:
        """Whether both are the same distribution of the same sequences."""
        if not isinstance(other, LatentPosterior):
            return NotImplemented
        return all(torch.equal(getattr(self, x), getattr(other, x)) for x in ("mean", "log_variance", "keys"))

    def __getitem__(self, rows) -> "LatentPosterior":
        """The posterior of some of the sequences: an index, a slice, or a list, an array or a tensor of rows."""
        try:
            rows = [operator.index(rows)]  # one row stays a batch
        except TypeError:
            rows = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=self.mean.device)
        trace = None if self.elbo_trace is None else self.elbo_trace[:, rows]
        return LatentPosterior(self.mean[rows], self.log_variance[rows], trace, self.keys[rows])

    def lerp(self, other: "LatentPosterior", weight: float) -> "LatentPosterior":
        """Between two thoughts: means and log-variances on the line from this one (0) to the other (1).

        Where one of them is a point, so is what lies between. Raises ValueError for posteriors of different shapes.
        """
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"Both posteriors must have one shape, got {tuple(self.mean.shape)} and {tuple(other.mean.shape)}."
            )
        log_variance = self.log_variance.lerp(other.log_variance, weight)
        point = self.log_variance.isneginf() | other.log_variance.isneginf()  # on a line from -inf there is NaN
        return LatentPosterior(
            self.mean.lerp(other.mean, weight), log_variance.masked_fill(point, -torch.inf), keys=self.keys
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `latent_posterior.safetensors` to the folder, which is made if need be."""
        os.makedirs(folder, exist_ok=True)
        tensors = {"mean": self.mean, "log_variance": self.log_variance, "keys": self.keys}
        if self.elbo_trace is not None:
            tensors["elbo_trace"] = self.elbo_trace
        # Copies: safetensors refuses tensors that share memory.
        save_file({name: x.detach().clone().contiguous() for name, x in tensors.items()}, os.path.join(folder, _FILE))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "LatentPosterior":
        """What `save_pretrained` wrote, on the CPU.

        Raises FileNotFoundError if the folder has none, ValueError if the file is torn or holds something else.
        """
        path = os.path.join(folder, _FILE)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no {_FILE} in {os.fspath(folder)!r}.")
        try:
            posterior = cls(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path} holds no posterior: {error}.") from error
        check_posterior(posterior)
        return posterior

    def reparameterize(self, epsilon: torch.Tensor) -> torch.Tensor:
        """z = mean + std·ε."""
        return self.mean + (0.5 * self.log_variance).exp() * epsilon

    def sample(self, seed: int | None = None) -> torch.Tensor:
        """(B, L, N, D) latents drawn from q. `seed=None` draws one from torch's global generator."""
        return self.reparameterize(keyed_normal(self.keys, self.mean.shape[1:], _drawn_seed(seed), SAMPLE))

    def scoring_sample(self, number: int, seed: int | None = None) -> torch.Tensor:
        """(B, L, N, D) latents drawn from q to score it: sample 0, 1, …, with noise that no fit has seen."""
        return self.reparameterize(keyed_normal(self.keys, self.mean.shape[1:], seed or 0, SCORE, number))

    def kl_divergence(self) -> torch.Tensor:
        """(B,) nats: KL(q || N(0, I)) of each sequence."""
        return kl_divergence(self.mean, self.log_variance)


def sample_prior(model, batch_size: int, seed: int | None = None) -> torch.Tensor:
    """(batch_size, L, N, D) float32 latents from N(0, I). `seed=None` draws one from torch's global generator."""
    if not model.config.num_latents:
        raise ValueError("This model was built with num_latents=0: it has no latents to draw.")
    device = "cpu" if model.device.type == "meta" else model.device  # all weights are offloaded
    keys = torch.arange(whole_number("batch_size", batch_size, least=1), device=device)
    return keyed_normal(keys, model.config.latent_shape, _drawn_seed(seed), SAMPLE)


def check_posterior(posterior, batch_size: int | None = None, name: str = "posterior") -> None:
    """Refuse, with a ValueError, what is no posterior, holds NaN, or is of another number of sequences.

    By what it holds and not by its class, of which a checkpoint's own code has another.
    """
    mean, log_variance = getattr(posterior, "mean", None), getattr(posterior, "log_variance", None)
    if not (torch.is_tensor(mean) and torch.is_tensor(log_variance)):
        raise ValueError(f"{name} must be a LatentPosterior, got {type(posterior).__name__}.")
    if not (mean.isfinite().all() and (log_variance < torch.inf).all()):
        raise ValueError(f"{name} holds numbers that are not finite.")
    if batch_size not in (None, len(mean)):
        raise ValueError(f"{name} is of {len(mean)} sequences, where there are {batch_size}.")


__all__ = ["LatentPosterior", "sample_prior"]
