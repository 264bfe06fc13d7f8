"""The memory reader against its equations, token by token in plain loops (see memory_ltm's docstring)."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from ltm_hf.losses_ltm import IGNORED, HeadPass
from ltm_hf.memory_ltm import Lesson, prior_state, relive, relive_through_errors, state_of, think

CHUNKS = pytest.mark.parametrize("chunk", [1, 3, 8])
LENGTH = 11  # a multiple of none but 1


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


class Naive:
    """The equations for one row of a text, in double precision, with autograd for each error."""

    def __init__(self, model):
        reader = model.model.reader
        parts = dict(
            reader_norm=reader.norm.weight, queries=reader.q_proj.weight, addresses=reader.addresses.weight,
            map=reader.map.weight, gate=reader.gate.weight, log_read=reader.scales.log_read,
            log_precision=reader.scales.log_precision, norm=model.model.norm.weight, head=model.lm_head.weight,
        )  # fmt: skip
        self.parameters = parts  # in single precision, the model's own
        self.doubles = {name: x.detach().double().requires_grad_() for name, x in parts.items()}
        vars(self).update(self.doubles)
        config = model.config
        self.chunk, self.kl_weight, self.eps = config.latent_chunk, config.inference_kl_weight, config.rms_norm_eps
        self.shape = config.num_attention_heads, config.num_latents, config.hidden_size // config.num_attention_heads

    def normed(self, x, weight):
        return weight * x / (x.square().mean() + self.eps).sqrt()

    def weights(self, hidden):
        """(H, N)"""
        heads, _, width = self.shape
        queries = (self.queries @ self.normed(hidden, self.reader_norm)).view(heads, width)
        return ((self.addresses @ queries[..., None])[..., 0] / math.sqrt(width)).softmax(dim=-1)

    def residual(self, hidden, read):
        return hidden + self.gate * (self.map @ read.flatten())

    def nats(self, residual, target):
        return -(self.head @ self.normed(residual, self.norm)).log_softmax(dim=-1)[target]

    def __call__(self, hidden, targets, writes=None, noise=None, start=None, through=False):
        """hidden (S, D); targets, writes (S,), of the token after each, -100 for none; noise (S, H, d).

        through: errors are part of the graph, and not constants.
        """
        heads, latents, length = *self.shape[:2], len(hidden)
        sigma, factor, kappa = self.log_read.exp()[:, None], self.log_precision.exp()[:, None], self.kl_weight
        mean, precision = torch.zeros(self.shape).double(), torch.ones(heads, latents).double()
        if start is not None:
            mean, precision = start
        moved, sharpened = torch.zeros_like(mean), torch.zeros_like(precision)
        residuals, nats = [], []
        for t in range(length):
            if t and t % self.chunk == 0:
                precision = precision + sharpened
                mean = mean + moved / precision[..., None]
                moved, sharpened = torch.zeros_like(mean), torch.zeros_like(precision)
            a = self.weights(hidden[t])
            read = (a[:, None] @ mean)[:, 0]
            if noise is not None:
                read = read + ((a.square() / precision).sum(dim=-1, keepdim=True)).sqrt() * noise[t]
            read = sigma * read
            residuals.append(self.residual(hidden[t], read))
            nats.append(self.nats(residuals[-1], targets[t]) if targets[t] >= 0 else residuals[-1].new_zeros(()))
            if targets[t] >= 0 and (writes is None or writes[t]):
                if through:
                    (error,) = torch.autograd.grad(nats[-1], read, create_graph=True)
                else:
                    at = read.detach().requires_grad_()
                    (error,) = torch.autograd.grad(self.nats(self.residual(hidden[t].detach(), at), targets[t]), at)
                moved = moved - sigma[..., None] / kappa * a[..., None] * error[:, None]
                squared = error.square().mean(dim=-1, keepdim=True)
                sharpened = sharpened + factor * sigma**2 / kappa * a.square() * squared
        return SimpleNamespace(
            residual=torch.stack(residuals), nats=torch.stack(nats), mean=mean, precision=precision, moved=moved,
            sharpened=sharpened,
        )  # fmt: skip


@pytest.fixture
def make_memory(make_model):
    """A model whose memory reads chunks of so many tokens, with scales that differ between heads."""

    def make(chunk=3, **overrides):
        model = make_model(latent_chunk=chunk, sliding_window=8, num_latents=6, **overrides)
        with torch.no_grad():
            model.model.reader.scales.log_read += torch.tensor([-0.3, 0.0, 0.1, -0.6])
            model.model.reader.scales.log_precision += torch.tensor([0.5, -0.5, 0.0, 1.0])
        return model

    return make


@pytest.fixture
def texts(make_ids, make_noise):
    """Hidden states (3, S, D) of three texts, and their tokens."""
    return make_noise(3, LENGTH, 32), make_ids(3, LENGTH)


def read_text(model, hidden, ids, mask=None, state=None, writes=None, noise=None, scored=None):
    """`think`, with the state after the text."""
    state = prior_state(model.config, len(ids)) if state is None else state
    lesson = Lesson.of(ids, mask, scored, writes)
    parts = model.model.reader, model.model.norm, HeadPass(model.lm_head)
    return think(*parts, hidden, lesson, state, noise=noise, keep=True)


def shifted(ids):
    return F.pad(ids[..., 1:], (0, 1), value=IGNORED)


def by_heads(noise):
    """(…, D) to (…, H, d)."""
    return noise.unflatten(-1, (4, 8))


def assert_state(state, row, expected):
    """A row of a memory's state is what the naive loop ends with."""
    for name in ("mean", "moved"):
        close(getattr(state, name)[row], getattr(expected, name))
    for name in ("precision", "sharpened"):
        close(getattr(state, name)[row, ..., 0], getattr(expected, name))


# ------------------------------------------------------------------ one text


@CHUNKS
@pytest.mark.parametrize("noisy", [False, True], ids=["mean", "sample"])
def test_reading_is_the_definition(make_memory, texts, make_noise, chunk, noisy):
    model, (hidden, ids) = make_memory(chunk), texts
    noise = make_noise(3, LENGTH, 32, seed=1) if noisy else None
    thought, naive = read_text(model, hidden, ids, noise=noise), Naive(model)
    for row in range(3):
        given = dict(noise=by_heads(noise[row]).double()) if noisy else {}
        expected = naive(hidden[row].double(), shifted(ids[row]), **given)
        close(thought.residual[row], expected.residual)
        close(thought.nats[row], expected.nats)
        assert_state(thought.state, row, expected)
    assert thought.state.count.tolist() == [LENGTH] * 3
    assert (thought.residual - hidden)[:, chunk:].abs().amax(dim=-1).min() > 0.05  # what is read matters


def test_tokens_that_may_not_write_and_that_are_not_scored(make_memory, texts):
    """A token that does not write leaves nothing; one that is not scored does, of what it was."""
    model, (hidden, ids) = make_memory(), texts
    writes = torch.arange(LENGTH).expand(3, -1) % 4 != 2
    scored = shifted(ids).masked_fill(torch.arange(LENGTH) < 5, IGNORED)
    thought, naive = read_text(model, hidden, ids, writes=writes, scored=scored), Naive(model)
    for row in range(3):
        expected = naive(hidden[row].double(), shifted(ids[row]), F.pad(writes[row, 1:], (0, 1)))
        assert_state(thought.state, row, expected)
        close(thought.residual[row], expected.residual)
    assert Lesson.of(ids, None, scored, writes).is_scored.sum(dim=1).tolist() == [LENGTH - 6] * 3


def test_a_start_that_is_a_posterior(make_memory, texts, make_noise):
    model, (hidden, ids) = make_memory(), texts
    start = make_noise(3, 4, 6, 9, seed=2)
    start[..., -1] = start[..., -1].exp()
    thought, naive = read_text(model, hidden, ids, state=start), Naive(model)
    for row in range(3):
        begin = start[row, ..., :-1].double(), start[row, ..., -1].double()
        assert_state(thought.state, row, naive(hidden[row].double(), shifted(ids[row]), start=begin))
    back = state_of(thought.state.posterior(), 4)  # a state holds a posterior, which is where another may start
    now = thought.state.committed()
    close(back, torch.cat((now.mean, now.precision), dim=-1))


# ------------------------------------------------------------------ padding


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_padding_adds_nothing_and_shifts_no_chunk(make_memory, texts, make_noise, side, chunk):
    """Rows of 11, 6, 1 and no tokens among padding of any content."""
    model, (hidden, ids) = make_memory(chunk), texts
    lengths, width = (LENGTH, 6, 1, 0), LENGTH + 5
    states, tokens = make_noise(4, width, 32, seed=3), torch.full((4, width), 9)
    noise, mask = make_noise(4, width, 32, seed=4), torch.zeros(4, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        first = {"left": width - length, "right": 0, "both": 3}[side]
        if length:
            states[row, first : first + length], tokens[row, first : first + length] = (
                hidden[row, :length],
                ids[row, :length],
            )
        mask[row, first : first + length] = 1
    thought = read_text(model, states, tokens, mask, noise=noise)
    for row in range(len(lengths) - 1):
        real = mask[row].bool()
        alone = read_text(model, states[row, real][None], tokens[row, real][None], noise=noise[row, real][None])
        close(thought.residual[row, real], alone.residual[0], 1e-5)
        close(thought.nats[row, real], alone.nats[0], 1e-5)
        assert not thought.nats[row, ~real].any()
        for field in ("mean", "precision", "moved", "sharpened", "count", "weights", "residual", "open"):
            close(getattr(thought.state, field)[row], getattr(alone.state, field)[0], 1e-5)
    assert not thought.state.open[3] and not thought.state.count[3] and not thought.state.committed().mean[3].any()


# ------------------------------------------------------------------ a text in pieces

CUTS = pytest.mark.parametrize("cuts", [(5,), (3, 6), (1, 2, 3, 4), tuple(range(1, LENGTH))], ids=str)


@CUTS
@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "left-padded"])
def test_a_text_in_pieces_is_the_text(make_memory, texts, make_noise, cuts, chunk, padded):
    """Cut anywhere, with noise and with tokens that do not write, each piece with the state that the last one left."""
    model, (hidden, ids) = make_memory(chunk), texts
    noise, writes = make_noise(3, LENGTH, 32, seed=1), torch.arange(LENGTH).expand(3, -1) % 4 != 1
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = mask[2, :7] = 0  # beyond some cuts
    whole = read_text(model, hidden, ids, mask, writes=writes, noise=noise)
    state, residuals = None, []
    for first, last in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        now = slice(first, last)
        given = dict(writes=writes[:, now], noise=noise[:, now])
        piece = read_text(model, hidden[:, now], ids[:, now], mask[:, :last], state, **given)
        state = piece.state
        residuals.append(piece.residual)
    real = mask.bool()
    close(torch.cat(residuals, dim=1)[real], whole.residual[real])
    for field in vars(state):
        close(getattr(state, field), getattr(whole.state, field))


# ------------------------------------------------------------------ with a graph


@CHUNKS
@pytest.mark.parametrize("noisy", [False, True], ids=["mean", "sample"])
def test_gradients_are_those_of_the_definition_with_errors_as_constants(make_memory, texts, make_noise, chunk, noisy):
    model, (hidden, ids) = make_memory(chunk, tie_word_embeddings=False), texts
    noise, direction = make_noise(3, LENGTH, 32, seed=1) if noisy else None, make_noise(3, LENGTH, 32, seed=2)
    thought, naive = read_text(model, hidden, ids, noise=noise), Naive(model)
    learned = hidden.clone().requires_grad_()
    residual = relive(model.model.reader, learned, thought, noise)
    close(residual, thought.residual)
    (residual * direction).sum().backward()
    doubles = hidden.double().requires_grad_()
    for row in range(3):
        given = dict(noise=by_heads(noise[row]).double()) if noisy else {}
        (naive(doubles[row], shifted(ids[row]), **given).residual * direction[row]).sum().backward()
    close(learned.grad, doubles.grad)
    for name, parameter in naive.parameters.items():
        if name in ("norm", "head"):
            assert parameter.grad is None and naive.doubles[name].grad is None
        else:
            scale = naive.doubles[name].grad.abs().max()
            close(parameter.grad / scale, naive.doubles[name].grad / scale)


@CHUNKS
@pytest.mark.parametrize("noisy", [False, True], ids=["mean", "sample"])
def test_gradients_through_the_errors(make_memory, texts, make_noise, chunk, noisy):
    """Those of the definition, where nothing is a constant; padding changes nothing of them."""
    model, (hidden, ids) = make_memory(chunk, tie_word_embeddings=False), texts
    noise, direction = make_noise(3, LENGTH, 32, seed=1) if noisy else None, make_noise(3, LENGTH, 32, seed=2)
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, -3:] = 0
    expected, naive = read_text(model, hidden, ids, mask, noise=noise).residual, Naive(model)
    learned, parts = hidden.clone().requires_grad_(), (model.model.reader, model.model.norm, model.lm_head)
    lesson, start = Lesson.of(ids, mask), prior_state(model.config, 3)
    residual = relive_through_errors(*parts, learned, lesson, start, noise)
    real = mask.bool()
    close(residual[real], expected[real])
    (residual * direction)[real].sum().backward()
    doubles = hidden.double().requires_grad_()
    for row in range(3):
        given = dict(noise=by_heads(noise[row][real[row]]).double()) if noisy else {}
        found = naive(doubles[row][real[row]], shifted(ids[row][real[row]]), through=True, **given)
        (found.residual * direction[row][real[row]]).sum().backward()
    close(learned.grad[real], doubles.grad[real], 1e-3)
    for name, parameter in naive.parameters.items():
        scale = naive.doubles[name].grad.abs().max()
        close(parameter.grad / scale, naive.doubles[name].grad / scale, 1e-3)


def test_gradients_of_a_piece_are_those_of_its_tokens_in_the_whole(make_memory, texts, make_noise):
    """What came before the piece is a constant."""
    model, (hidden, ids) = make_memory(4), texts
    mask, direction = torch.ones_like(ids), make_noise(3, LENGTH, 32, seed=2)
    mask[1, :4] = 0
    gradients = []
    for cut in (0, 6):
        state = read_text(model, hidden[:, :cut], ids[:, :cut], mask[:, :cut]).state if cut else None
        piece = hidden[:, cut:].clone().requires_grad_()
        thought = read_text(model, piece, ids[:, cut:], mask, state)
        residual = relive(model.model.reader, piece, thought)
        close(residual[mask[:, cut:].bool()], thought.residual[mask[:, cut:].bool()], 1e-5)
        (residual * direction[:, cut:])[:, 6 - cut :].sum().backward()
        gradients.append(piece.grad[:, 6 - cut :])
    close(*gradients)
    assert (gradients[0] - direction[:, 6:]).abs().max() > 0.1
