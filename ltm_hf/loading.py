"""A causal LM and its tokenizer for a command to use: whole, and fit for each other."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_causal_lm(
    name: str, device: str | torch.device = "cpu", trust_remote_code: bool = False, auto=AutoModelForCausalLM, **kwargs
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any causal LM of transformers, in evaluation mode, and its tokenizer.

    name: a folder, or a name on the Hub. trust_remote_code: run the Python that comes with the model, where neither
        transformers nor this package has its class.
    auto: the class that loads it; kwargs: of its `from_pretrained`.

    Raises OSError or ValueError where there is no such model, and for weights that are cut off, missing, of other
    shapes than the configuration says or not finite, and for a tokenizer with more entries than the model.
    """
    tokenizer = load_own_tokenizer(name, trust_remote_code)
    try:
        model, loading = auto.from_pretrained(
            name,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be named below
            **kwargs,
        )
    except SafetensorError as error:
        raise ValueError(f"The weights of {name!r} cannot be read: {error}.") from None
    problems = {
        "lacks the tensor": loading["missing_keys"],
        "has another shape than its configuration says of": [names[0] for names in loading["mismatched_keys"]],
        "is not finite in": (key for key, tensor in model.named_parameters() if _is_broken(tensor.data)),
    }
    for problem, names in problems.items():
        if (first := min(names, default=None)) is not None:
            raise ValueError(f"The model {name!r} {problem} {first}.")
    check_vocabulary(model, tokenizer)
    return model.to(device).eval(), tokenizer


def load_own_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises OSError or ValueError where there is no such model, or none that can be read."""
    if (
        not name or not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)
    ):  # nor can it be one of the Hub
        raise OSError(f"There is no folder {name!r}.")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError:
        raise
    except Exception as error:  # whatever a broken file makes the libraries say
        raise ValueError(f"The tokenizer of {name!r} cannot be read: {error}") from error


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where the tokenizer has entries, but for padding, that the model has no embedding of."""
    rows = model.get_input_embeddings().weight.shape[0]
    last = max((number for token, number in tokenizer.get_vocab().items() if token != tokenizer.pad_token), default=0)
    if last >= rows:
        raise ValueError(f"The tokenizer has {last + 1} entries and the model {rows}: it is another model's.")


def _is_broken(tensor: torch.Tensor) -> bool:
    plain = type(tensor) is torch.Tensor and not tensor.is_meta  # neither quantised nor offloaded
    return plain and tensor.is_floating_point() and not tensor.isfinite().all()
