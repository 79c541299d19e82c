"""PixArt-Sigma: a transformer on a variance-preserving schedule that also predicts a variance, which is not used."""

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Family, own_size, vae_scale

_TEXT_LENGTH = 300  # the pipeline's default


def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """Without the pipeline's cleaning of captions from web pages, which needs other packages."""
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        device=pipeline.text_encoder.device,
        max_sequence_length=_TEXT_LENGTH,
    )
    return {"embeds": embeds, "mask": mask}


def _prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    epsilon = transformer(
        x_t,
        encoder_hidden_states=conditioning["embeds"],
        encoder_attention_mask=conditioning["mask"],
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return epsilon[:, : x_t.shape[1]].contiguous()


PIXART_SIGMA = Family(
    title="PixArt-Sigma",
    network="transformer",
    parts={
        "transformer": ("PixArtTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": (),
    },
    sizes=lambda transformer, vae: own_size(
        transformer.get("sample_size"), vae_scale(vae), vae_scale(vae) * transformer.get("patch_size", 2)
    ),
    channels=lambda transformer: transformer.get("in_channels", 4),
    encode=_encode,
    conditioning=lambda transformer, length: {"embeds": (length, transformer["caption_channels"]), "mask": (length,)},
    predict=_prediction,
    text_limit=_TEXT_LENGTH,
)
