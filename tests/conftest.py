import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from ltm_hf import LTMConfig, LTMForCausalLM, LTMModel

PAD, BOS, EOS = 0, 1, 2

torch.set_num_threads(1)  # models are tiny, and more threads only wait for each other

# The Python files that a checkpoint takes along.
FILES = [
    "attention_ltm.py",
    "cache_ltm.py",
    "configuration_ltm.py",
    "decoder_ltm.py",
    "encoder_ltm.py",
    "generation_ltm.py",
    "grid_ltm.py",
    "inference_ltm.py",
    "layers_ltm.py",
    "likelihood_ltm.py",
    "losses_ltm.py",
    "memory_ltm.py",
    "methods_ltm.py",
    "modeling_ltm.py",
    "posterior_ltm.py",
    "sharded_ltm.py",
]

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
    latent_gate_init=0.5,
    initializer_range=0.3,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
CONFIGS = {
    "memory": dict(latent_reader="memory", latent_chunk=3),
    "paper": dict(latent_reader="paper", num_inference_steps=2),
}
READ = 2.0  # how strongly a memory reads; it starts with 0.07


class LTMModelTester:
    """A tiny model and inputs for it, in the shape that transformers' common model tests ask for."""

    config_class, base_model_class, causal_lm_class = LTMConfig, LTMModel, LTMForCausalLM
    all_model_classes = (LTMModel, LTMForCausalLM)
    pipeline_model_mapping = {"feature-extraction": LTMModel, "text-generation": LTMForCausalLM}
    is_training = True

    def __init__(self, parent=None, batch_size=3, seq_length=12, **overrides):
        self.parent, self.batch_size, self.seq_length = parent, batch_size, seq_length
        self.arguments = TINY | CONFIGS[overrides.get("latent_reader", "memory")] | overrides
        vars(self).update(self.arguments)

    def get_config(self, **overrides):
        reader = CONFIGS[overrides["latent_reader"]] if "latent_reader" in overrides else {}
        return LTMConfig(**self.arguments | reader | overrides)

    def make_model(self, model_class=LTMForCausalLM, **overrides):
        """In eval mode, and the same at each call with the same overrides of its configuration."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(self.get_config(**overrides)).eval()
        if model.config.has_memory:
            torch.nn.init.constant_(model.base_model.reader.scales.log_read, math.log(READ))
        return model

    def prepare_config_and_inputs(self):
        """Row i begins with i tokens of padding."""
        config, generator = self.get_config(), torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.seq_length)
        mask = torch.ones(shape, dtype=torch.long).triu()
        ids = torch.randint(EOS + 1, self.vocab_size, shape, generator=generator).masked_fill(mask == 0, PAD)
        latents = torch.randn((self.batch_size, *config.latent_shape), generator=generator)
        return config, ids, mask, latents if config.num_latents else None

    def prepare_config_and_inputs_for_common(self):
        config, ids, mask, latents = self.prepare_config_and_inputs()
        inputs = {"input_ids": ids, "attention_mask": mask}
        return config, inputs if latents is None else inputs | {"latents": latents}

    def create_and_check_model(self, config, ids, mask, latents):
        model = self.base_model_class(config).eval()
        states = model(ids, attention_mask=mask, latents=latents).last_hidden_state
        assert states.shape == (self.batch_size, self.seq_length, self.hidden_size)


@pytest.fixture(scope="session")
def make_tester():
    """`LTMModelTester`: tests cannot import from this file."""
    return LTMModelTester


@pytest.fixture(scope="session")
def make_model():
    """A tiny model in eval mode, the same at each call with the same overrides of its configuration.

    It has a memory, unless told `latent_reader="paper"`.
    """
    return LTMModelTester().make_model


@pytest.fixture(params=CONFIGS)
def reader(request):
    """ "memory", then "paper"."""
    return request.param


@pytest.fixture
def model(make_model, reader):
    return make_model(latent_reader=reader)


@pytest.fixture
def paper_model(make_model):
    return make_model(latent_reader="paper")


@pytest.fixture
def memory_model(make_model):
    return make_model(latent_reader="memory")


@pytest.fixture(scope="session")
def make_encoder(make_model):
    """A model with an encoder whose head has left zero, so that its posteriors differ from the prior."""

    def make(**overrides):
        model = make_model(latent_reader="paper", inference_method="amortized", **overrides)
        with torch.no_grad():
            weight = model.encoder.head.weight
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        return model

    return make


@pytest.fixture(scope="session")
def make_thinker(make_model, make_encoder):
    """A tiny model for a way to infer: "memory", or one of the paper's reader by the method's name."""

    def make(way, **overrides):
        if way == "memory":
            return make_model(**overrides)
        if way == "amortized":
            return make_encoder(**overrides)
        return make_model(latent_reader="paper", inference_method=way, **overrides)

    return make


@pytest.fixture(params=["memory", "natural", "adamw", "lbfgs", "langevin", "amortized"])
def way(request):
    """Each way to infer, for `make_thinker`."""
    return request.param


@pytest.fixture
def thinker(make_thinker, way):
    return make_thinker(way)


@pytest.fixture(scope="session")
def travelling_files():
    """Names of the Python files that a checkpoint takes along."""
    return FILES


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


@pytest.fixture(scope="session")
def chat_folder(make_model, tmp_path_factory):
    """A tiny model with a tokenizer that has a chat template. It writes letters, spaces and full stops only."""
    from ltm_hf.data import train_tokenizer  # imports datasets, which most tests do not need

    tokenizer = train_tokenizer(["The people of Spain. user: hello assistant: hello there"] * 4, 280)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=128, **ids)
    plain = set("abcdefghijklmnopqrstuvwxyz .")
    others = [index for index in range(len(tokenizer)) if not plain.issuperset(tokenizer.decode(index))]
    model.generation_config.suppress_tokens = others
    folder = tmp_path_factory.mktemp("chat") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_folders(chat_folder, make_model, tmp_path_factory):
    """Two as `chat_folder`, by reader; the memory reads less strongly, so that it does not write spaces alone."""
    config = LTMConfig.from_pretrained(chat_folder)
    names = ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    folders = {}
    for reader in CONFIGS:
        model = make_model(latent_reader=reader, **{name: getattr(config, name) for name in names})
        model.generation_config = GenerationConfig.from_pretrained(chat_folder)
        if reader == "memory":
            torch.nn.init.constant_(model.model.reader.scales.log_read, math.log(0.5))
        folders[reader] = tmp_path_factory.mktemp("chat") / reader
        shutil.copytree(chat_folder, folders[reader], ignore=shutil.ignore_patterns("*.safetensors"))
        model.save_pretrained(folders[reader])
    return folders


class Quadratic(torch.nn.Module):
    """-log p(x|z) = |Wz - y|²/2 + constant whatever the text: p(z|x) is Gaussian, and the same for all chains.

    Token t is any of the first V - 1 with probability exp(-(w_t·z - y_t)²/2) / V each, else the last, which no text
    has.
    """

    VOCABULARY = 17  # few of 4,000 random texts are the same, and have the same noise

    def __init__(self, weights, targets):
        super().__init__()
        self.config = LTMConfig(
            vocab_size=self.VOCABULARY, hidden_size=weights.shape[1], num_hidden_layers=1, num_attention_heads=1,
            head_dim=2, num_latents=1, latent_reader="paper", bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.device = torch.device("cpu")
        self.weights, self.targets = torch.nn.Parameter(weights), targets

    def forward(self, input_ids=None, state=None, latents=None, until_latents=False, **kwargs):
        if until_latents:
            return input_ids
        errors = latents[:, 0, 0] @ self.weights.T - self.targets  # (B, S - 1)
        return SimpleNamespace(loss=0.5 * errors**2 + math.log(self.VOCABULARY))

    def texts(self, rows):
        shape = (rows, len(self.weights) + 1)
        return torch.randint(self.VOCABULARY - 1, shape, generator=torch.Generator().manual_seed(0))

    def precision(self):
        """Of p(z|x), and its product with the mean."""
        weights = self.weights.detach()
        return torch.eye(weights.shape[1]) + weights.T @ weights, weights.T @ self.targets


@pytest.fixture(scope="session")
def make_quadratic():
    return Quadratic
