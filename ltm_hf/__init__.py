"""Latent Thought Models for Hugging Face transformers."""

from importlib.metadata import version

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_ltm import LTMConfig
from .conversion.backbone import from_pretrained_backbone
from .decoder_ltm import LTMModel
from .inference_ltm import infer_posterior
from .likelihood_ltm import ELBO, elbo
from .methods_ltm import InferenceMethod, register_inference_method
from .modeling_ltm import LTMForCausalLM
from .posterior_ltm import LatentPosterior, sample_prior
from .presets import PRESETS, preset_config

__version__ = version("ltm_hf")

# Installed: the Auto classes know "ltm". Saved: the code travels with the checkpoint (trust_remote_code=True).
AutoConfig.register("ltm", LTMConfig, exist_ok=True)
AutoModel.register(LTMConfig, LTMModel, exist_ok=True)
AutoModelForCausalLM.register(LTMConfig, LTMForCausalLM, exist_ok=True)
LTMConfig.register_for_auto_class()
LTMModel.register_for_auto_class("AutoModel")
LTMForCausalLM.register_for_auto_class("AutoModelForCausalLM")

# Here and not in the class: the model's file travels to the Hub, conversion does not.
LTMForCausalLM.from_pretrained_backbone = staticmethod(from_pretrained_backbone)

__all__ = [
    "ELBO",
    "PRESETS",
    "InferenceMethod",
    "LTMConfig",
    "LTMForCausalLM",
    "LTMModel",
    "LatentPosterior",
    "elbo",
    "infer_posterior",
    "preset_config",
    "register_inference_method",
    "sample_prior",
]
