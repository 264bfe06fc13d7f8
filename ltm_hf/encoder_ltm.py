"""An encoder of latents, for the paper's ablation (section 5): q(z|x) in one pass, learned with the decoder."""

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.mistral.modeling_mistral import MistralRMSNorm, MistralRotaryEmbedding

from .configuration_ltm import LTMConfig
from .layers_ltm import LTMDecoderLayer


class LTMEncoder(nn.Module):
    """q(z|x) in one pass, as a VAE has it (`inference_method="amortized"`): an ablation, as deep as the decoder.

    A learned query for each latent, at the latent's rotary position, follows the tokens through layers of the decoder's
    kind without causal mask or window. A head turns each into mean and log-variance; it starts at zero, the prior.
    """

    def __init__(self, config: LTMConfig):
        super().__init__()
        self.config = config
        self.queries = nn.Embedding(config.num_latents, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(LTMDecoderLayer(config, index, reads_latents=False) for index in layers)
        for layer in self.layers:
            layer.self_attn.is_causal = False
        self.norm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.head.starts_at_zero = True  # for `_init_weights`
        self.rotary_emb = MistralRotaryEmbedding(config=config)

    def forward(self, inputs_embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token embeddings (B, S, D), of which those in mask (B, S) are read, to mean and log-variance (B, L, N, D)."""
        config, batch_size = self.config, len(inputs_embeds)
        latents = torch.arange(config.num_latents, device=inputs_embeds.device)
        queries = self.queries(latents).to(inputs_embeds).expand(batch_size, -1, -1)
        states = torch.cat((inputs_embeds, queries), dim=1)
        text_positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        latent_positions = latents % config.latents_per_layer * config.latent_position_stride
        positions = torch.cat((text_positions, latent_positions.expand(batch_size, -1)), dim=1)
        mask = torch.cat((mask, mask.new_ones(batch_size, config.num_latents)), dim=1)
        mask = create_bidirectional_mask(config=config, inputs_embeds=states, attention_mask=mask)
        position_embeddings = self.rotary_emb(states, position_ids=positions)
        for layer in self.layers:
            states = layer(states, None, None, attention_mask=mask, position_embeddings=position_embeddings)
        moments = self.head(self.norm(states[:, -config.num_latents :])).float()
        mean, log_variance = moments.view(batch_size, *config.latent_shape[:2], -1).chunk(2, dim=-1)
        return mean, log_variance
