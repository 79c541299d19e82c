"""Architecture of the embedded flow model, a small Stable Diffusion 3 for the scenes and captions of `shapes`.

It shares the autoencoder with the embedded model. Without a T5 encoder, the stock pipeline appends `T5_TOKENS` zero
embeddings to every prompt, so the transformer must be trained with them.
"""

import math

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from mi_ray.shapes.model import EMBEDDING_SIZE, LATENT_CHANNELS, text_config
from mi_ray.shapes.scenes import IMAGE_SIZE

SECOND_EMBEDDING_SIZE = 32  # of text_encoder_2, which the pipeline class requires
T5_TOKENS = 256  # of the stock pipeline
_WIDTH = 128  # of the transformer
_JOINT = EMBEDDING_SIZE + SECOND_EMBEDDING_SIZE


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """text_encoder, with the layers of the text encoder of `shapes`, and text_encoder_2, a smaller one."""
    configs = text_config(tokenizer), text_config(tokenizer, SECOND_EMBEDDING_SIZE, layers=2)
    return tuple(CLIPTextModelWithProjection(config) for config in configs)


def build_transformer() -> SD3Transformer2DModel:
    """3.5 M parameters. A latent pixel is a token."""
    return SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 8,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=_WIDTH // 32,
        joint_attention_dim=_JOINT,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=_JOINT,
        pos_embed_max_size=2 * IMAGE_SIZE // 8,
        qk_norm="rms_norm",
    )


def build_pipeline(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModelWithProjection,
    text_encoder_2: CLIPTextModelWithProjection,
    transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        vae=vae,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        tokenizer_2=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_3=None,
        text_encoder_3=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def encode(
    text_encoder: CLIPTextModelWithProjection, text_encoder_2: CLIPTextModelWithProjection, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """What the stock pipeline's `encode_prompt` gives, but with one zero embedding instead of `T5_TOKENS`.

    Args:
        ids: (n, MAX_TOKENS) long, padded.

    Returns:
        Embeddings (n, MAX_TOKENS + 1, d) and pooled embeddings (n, d), d = 160.
    """
    outputs = [encoder(ids, output_hidden_states=True) for encoder in (text_encoder, text_encoder_2)]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    zero = embeds.new_zeros(len(ids), 1, embeds.shape[-1])
    return torch.cat([embeds, zero], dim=1), torch.cat([output.text_embeds for output in outputs], dim=-1)


class RepeatedTokenAttention:
    """Joint attention of an SD3Transformer2DModel in which the last text token stands for `count` equal ones.

    Text tokens have no positions, so equal tokens stay equal in every layer. Attention to `count` equal keys is
    attention to one of them with log(count) added to its logit: the result is the same, in less time.
    """

    def __init__(self, count: int):
        self.count = count

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (n, i, d) and text tokens (n, t, d) -> both after attention."""

        def heads(tokens: Tensor, project: nn.Linear, norm: nn.Module | None = None) -> Tensor:
            split = project(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        image, text = hidden_states, encoder_hidden_states
        query = heads(image, attn.to_q, attn.norm_q), heads(text, attn.add_q_proj, attn.norm_added_q)
        key = heads(image, attn.to_k, attn.norm_k), heads(text, attn.add_k_proj, attn.norm_added_k)
        value = heads(image, attn.to_v), heads(text, attn.add_v_proj)
        query, key, value = (torch.cat(parts, dim=2) for parts in (query, key, value))
        logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        bias = logits.new_zeros(logits.shape[-1])
        bias[-1] = math.log(self.count)
        # By hand: on a CPU, the fused attention with a mask has a slower backward pass in bfloat16.
        mixed = ((logits + bias).softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        image, text = mixed.split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)
