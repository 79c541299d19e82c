"""Krea 2: states of several layers of its text encoder, and the latents and autoencoder of Qwen-Image.

Its pipeline writes guidance as conditional + g (conditional - unconditional); our guidance_scale is 1 + g.
"""

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Config, Family, pack, unpack
from mi_ray.diffusion.families.qwen_image import QWEN_IMAGE
from mi_ray.diffusion.flows import FlowTimes, evenly, linear_mu

_TEXT_LENGTH = 512  # the pipeline's default
_DISTILLED_MU = 1.15  # the pipeline's, for few steps


def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    embeds, mask = pipeline.encode_prompt(
        prompts, device=pipeline.text_encoder.device, max_sequence_length=_TEXT_LENGTH
    )
    return {"embeds": embeds, "mask": mask}


def _shapes(transformer: Config, length: int) -> dict[str, tuple[int, ...]]:
    return {"embeds": (length, transformer["num_text_layers"], transformer["text_hidden_dim"]), "mask": (length,)}


def _prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    embeds, (height, width) = conditioning["embeds"], x_t.shape[2:]
    positions = x_t.new_zeros(embeds.shape[1] + height * width // 4, 3, dtype=timesteps.float().dtype)
    image = positions[embeds.shape[1] :].view(height // 2, width // 2, 3)  # text tokens are at the origin
    image[..., 1] = image.new_tensor(range(height // 2))[:, None]
    image[..., 2] = image.new_tensor(range(width // 2))
    velocity = transformer(
        hidden_states=pack(x_t),
        encoder_hidden_states=embeds,
        timestep=(timesteps / 1000).to(x_t.dtype),
        position_ids=positions,
        encoder_attention_mask=conditioning["mask"],
        return_dict=False,
    )[0]
    return unpack(velocity, x_t.shape)


def _mu(config: Config, tokens: int, steps: int) -> float:
    return _DISTILLED_MU if config["is_distilled"] else linear_mu(config, tokens, steps)


def _distilled(transformer: Config, index: Config) -> str | None:
    return "this Krea 2 is distilled for its steps" if index.get("is_distilled") else None


# Names of layers in the authors' code, which ComfyUI has, by their names in diffusers.
_ORIGINAL_NAMES = {
    "transformer_blocks.": "blocks.",
    "text_fusion.": "txtfusion.",
    ".ff.": ".mlp.",
    ".to_q": ".wq",
    ".to_k": ".wk",
    ".to_v": ".wv",
    ".to_out.0": ".wo",
    ".to_gate": ".gate",
    "img_in": "first",
    "final_layer.": "last.",
    "time_embed.linear_1": "tmlp.0",
    "time_embed.linear_2": "tmlp.2",
    "time_mod_proj": "tproj.1",
    "txt_in.linear_1": "txtmlp.1",
    "txt_in.linear_2": "txtmlp.3",
}


def _comfyui(layer: str) -> str:
    for ours, original in _ORIGINAL_NAMES.items():
        layer = layer.replace(ours, original)
    return f"diffusion_model.{layer}"


KREA_2 = Family(
    title="Krea 2",
    network="transformer",
    parts={
        "transformer": ("Krea2Transformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": (),
        "tokenizer": (),
    },
    sizes=QWEN_IMAGE.sizes,
    channels=QWEN_IMAGE.channels,
    latent_channels=QWEN_IMAGE.latent_channels,
    encode=_encode,
    conditioning=_shapes,
    predict=_prediction,
    text_limit=_TEXT_LENGTH,
    flow=FlowTimes(sigmas=evenly, mu=_mu, rounds=True),
    decode=QWEN_IMAGE.decode,
    encode_image=QWEN_IMAGE.encode_image,
    comfyui=_comfyui,
    distilled=_distilled,
)
