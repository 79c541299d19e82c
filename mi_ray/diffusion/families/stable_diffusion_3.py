"""Stable Diffusion 3 and 3.5: a transformer on a rectified flow (Esser et al. 2024, arXiv 2403.03206)."""

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Config, Family, own_size, vae_scale
from mi_ray.diffusion.flows import FlowTimes, linear_mu

_T5_LENGTH = 256  # the pipeline's default


def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    device = pipeline.text_encoder.device
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False)
    return {"embeds": embeds, "pooled": pooled}


def _prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    return transformer(
        hidden_states=x_t,
        timestep=timesteps,
        encoder_hidden_states=conditioning["embeds"],
        pooled_projections=conditioning["pooled"],
        return_dict=False,
    )[0]


def _shapes(transformer: Config, length: int) -> dict[str, tuple[int, ...]]:
    """The tokens of CLIP, then those of T5."""
    embeds = length + _T5_LENGTH, transformer["joint_attention_dim"]
    return {"embeds": embeds, "pooled": (transformer["pooled_projection_dim"],)}


STABLE_DIFFUSION_3 = Family(
    title="Stable Diffusion 3 and 3.5",
    network="transformer",
    parts={
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_3": (),
    },
    optional=("text_encoder_3", "tokenizer_3"),
    sizes=lambda transformer, vae: own_size(
        transformer.get("sample_size"), vae_scale(vae), vae_scale(vae) * transformer.get("patch_size", 2)
    ),
    channels=lambda transformer: transformer.get("in_channels", 16),
    encode=_encode,
    conditioning=_shapes,
    predict=_prediction,
    flow=FlowTimes(mu=linear_mu),
    unused={"image_encoder": None, "feature_extractor": None},
)
