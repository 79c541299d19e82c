"""SANA: a linear-attention transformer on latents of a deep-compression autoencoder."""

import inspect

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Config, Family, own_size
from mi_ray.diffusion.flows import FlowTimes
from mi_ray.diffusion.sizes import Sizes

_TEXT_LENGTH = 300  # the pipeline's default


def _sizes(transformer: Config, vae: Config) -> Sizes:
    blocks = vae.get("encoder_block_out_channels", (128, 256, 512, 512, 1024, 1024))
    scale = 2 ** (len(blocks) - 1)
    multiple = max(32, scale * transformer.get("patch_size", 1))
    return own_size(transformer.get("sample_size"), scale, multiple, default=32)


def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """The pipeline puts an instruction before the prompt."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return _encoded(pipeline, prompts, parameters["complex_human_instruction"].default)


def _encode_null(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """No instruction comes before the empty prompt."""
    return _encoded(pipeline, [""], None)


def _encoded(pipeline: DiffusionPipeline, prompts: list[str], instruction: list[str] | None) -> dict[str, Tensor]:
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        device=pipeline.text_encoder.device,
        max_sequence_length=_TEXT_LENGTH,
        complex_human_instruction=instruction,
    )
    return {"embeds": embeds, "mask": mask}


def _prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    velocity = transformer(
        x_t,
        encoder_hidden_states=conditioning["embeds"],
        encoder_attention_mask=conditioning["mask"],
        timestep=timesteps * transformer.config.timestep_scale,
        return_dict=False,
    )[0]
    return velocity[:, : x_t.shape[1]].contiguous()  # of a learned sigma, the first half of the channels


SANA = Family(
    title="SANA",
    network="transformer",
    parts={
        "transformer": ("SanaTransformer2DModel",),
        "vae": ("AutoencoderDC",),
        "text_encoder": (),
        "tokenizer": (),
    },
    sizes=_sizes,
    channels=lambda transformer: transformer.get("in_channels", 32),
    latent_channels=lambda vae: vae.get("latent_channels", 32),
    encode=_encode,
    conditioning=lambda transformer, length: {"embeds": (length, transformer["caption_channels"]), "mask": (length,)},
    encode_null=_encode_null,
    predict=_prediction,
    text_limit=_TEXT_LENGTH,
    flow=FlowTimes(),
    comfyui=None,  # ComfyUI has no such model
)
