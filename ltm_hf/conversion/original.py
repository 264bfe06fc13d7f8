"""Checkpoints of the authors' released code to `LTMForCausalLM`.

python -m ltm_hf.conversion.original WEIGHTS PARAMS_JSON OUTPUT_FOLDER
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import cli
from ..configuration_ltm import LTMConfig
from ..modeling_ltm import LTMForCausalLM

_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
_FEED_FORWARD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LAYER = {
    "attention_norm": "input_layernorm",
    "cross_attention_norm": "cross_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attention.{old}": f"self_attn.{new}" for old, new in _ATTENTION.items()},
    **{f"cross_attention.{old}": f"cross_attn.{new}" for old, new in _ATTENTION.items()},
    **{f"feed_forward.{old}": f"mlp.{new}" for old, new in _FEED_FORWARD.items()},
    **{f"feed_forward.{new}": f"mlp.{new}" for new in _FEED_FORWARD.values()},
}


def converted_name(name: str) -> str | None:
    """The name in `LTMForCausalLM` of a released checkpoint's tensor; None if there is none."""
    stem = name.replace("_orig_mod.", "").removesuffix(".weight")
    if stem in _TOP:
        return f"{_TOP[stem]}.weight"
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.weight"
    return None


def _halves_from_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder a query's or key's rows: released code rotates channels (2i, 2i+1), transformers (i, i + d/2)."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def convert_config(params: dict, intermediate_size: int, tie_word_embeddings: bool = True) -> LTMConfig:
    """The configuration of a released checkpoint's hyper-parameters, with the released code's inference settings."""
    for name in ("vocab_size", "dim", "n_layers", "n_heads", "max_seq_len", "window_size", "max_z_len"):
        if type(params.get(name)) is not int:
            raise ValueError(f"The hyper-parameter {name} must be an integer, got {params.get(name)!r}.")
    if not params.get("use_z_pos_emb", True):
        raise ValueError("use_z_pos_emb=false: latents without rotary positions are not supported.")
    return LTMConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=intermediate_size,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads"),
        max_position_embeddings=params["max_seq_len"],
        sliding_window=params["window_size"],
        num_latents=params["max_z_len"],
        latent_reader="paper",
        rms_norm_eps=params.get("norm_eps", 1e-5),
        rope_theta=params.get("rope_theta", 10000.0),
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=params["vocab_size"] - 1,
        eos_token_id=params["vocab_size"] - 2,
        latent_gate_init=None,
        num_inference_steps=params.get("num_steps", 16),
        inference_method="adamw",
        inference_learning_rate=params.get("fast_lr", 0.3),
        inference_lr_schedule="cosine",
        inference_noise="fixed",
    )


def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by their names in `LTMForCausalLM`. Raises ValueError where one has no place, or two have one."""
    renamed, left_over = {}, []
    for name, tensor in weights.items():
        new_name = converted_name(name)
        if new_name is None:
            left_over.append(name)
        elif new_name in renamed:
            raise ValueError(f"The checkpoint has two tensors for {new_name}; one is {name}.")
        else:
            renamed[new_name] = tensor
    if left_over:
        raise ValueError(f"The checkpoint has tensors without a place in the model: {', '.join(sorted(left_over))}.")
    return renamed


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A `.safetensors` file, or a `.pt` of tensors alone (`weights_only=True`), bare or under the key "model".

    Raises FileNotFoundError where there is none, ValueError for a file that holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path.name} is neither .safetensors nor .pt.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path.name} cannot be read: {error}.") from None
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file of another kind makes the unpickler raise
        raise ValueError(f"{path.name} cannot be read as tensors alone (weights_only=True): {error}") from error
    weights = weights.get("model", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"{path.name} is no dictionary of tensors.")
    return weights


def load_params(path: str | Path) -> dict:
    """The hyper-parameters of a checkpoint. Raises FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        params = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(params, dict):
        raise ValueError(f"{path} is no object of hyper-parameters (dim, n_layers, …).")
    return params


def convert(weights_path: str | Path, params_path: str | Path) -> LTMForCausalLM:
    """The released checkpoint as a float32 `LTMForCausalLM`.

    Raises ValueError for missing, left-over or misshapen tensors, and files of another kind, FileNotFoundError for
    missing ones.
    """
    params, weights = load_params(params_path), rename(load_weights(weights_path))

    # The two are one tensor in the released code; files without duplicates keep only one of them.
    tied_names = ("model.embed_tokens.weight", "lm_head.weight")
    embeddings = [weights[name] for name in tied_names if name in weights]
    tied = len(embeddings) < 2 or torch.equal(*embeddings)
    if len(embeddings) == 1:
        weights |= dict.fromkeys(tied_names, embeddings[0])

    up_proj = weights.get("model.layers.0.mlp.up_proj.weight")
    if up_proj is None or up_proj.ndim != 2:
        raise ValueError("The checkpoint lacks the feed-forward weights (feed_forward.w3 or feed_forward.up_proj).")
    model = LTMForCausalLM(convert_config(params, intermediate_size=up_proj.shape[0], tie_word_embeddings=tied)).float()

    expected = model.state_dict()
    if missing := sorted(set(expected) - set(weights)):
        raise ValueError(f"The checkpoint lacks tensors: {', '.join(missing)}.")
    if left_over := sorted(set(weights) - set(expected)):
        raise ValueError(f"The checkpoint has tensors without a place in the model: {', '.join(left_over)}.")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} should be {tuple(expected[name].shape)}, the checkpoint's is {tuple(tensor.shape)}."
            )
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = _halves_from_pairs(tensor, model.config.head_dim)
    model.load_state_dict(weights)
    return model


@cli.one_sentence()
def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(description="Convert a checkpoint of the authors' released code.")
    parser.add_argument("weights", help="a .safetensors or .pt file")
    parser.add_argument("params", help="a JSON file of hyper-parameters (dim, n_layers, window_size, max_z_len, …)")
    parser.add_argument("output", type=cli.new_folder, help="folder for the converted checkpoint")
    options = parser.parse_args(arguments)
    model = convert(options.weights, options.params)
    model.save_pretrained(options.output)
    print(f"{model.num_parameters():,} parameters written to {options.output}")


if __name__ == "__main__":
    main()
