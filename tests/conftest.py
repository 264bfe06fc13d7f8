import pytest
import torch

from ltm_hf import LTMConfig, LTMForCausalLM

PAD, BOS, EOS = 0, 1, 2

# Weights and gate are larger than a real model starts with, so that latents and distant tokens matter.
TINY = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    sliding_window=4,
    num_latents=4,
    cross_attention_gate_init=0.5,
    initializer_range=0.3,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)


@pytest.fixture(scope="session")
def make_model():
    """A tiny model in eval mode, the same at each call with the same overrides of its configuration."""

    def make(model_class=LTMForCausalLM, **overrides):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model_class(LTMConfig(**TINY | overrides)).eval()

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def make_ids():
    """Random token ids, none of them special."""

    def make(rows=3, length=12, seed=0):
        return torch.randint(EOS + 1, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def ids(make_ids):
    return make_ids()


@pytest.fixture(scope="session")
def make_noise():
    """Standard normal noise of a given shape."""

    def make(*shape, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def pad_rows():
    """One batch of rows of several lengths, and its mask. Padding holds `fill`."""

    def pad(rows, side, fill=PAD, extra=2):
        width = max(len(row) for row in rows) + extra
        batch, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            batch[index, place], mask[index, place] = row, 1
        return batch, mask

    return pad
