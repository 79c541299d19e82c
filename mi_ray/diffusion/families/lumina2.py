"""Lumina-Image 2.0: the network is told the time 1 - s, and predicts x0 - epsilon."""

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.families.family import Family, own_size
from mi_ray.diffusion.flows import FlowTimes, evenly, linear_mu

_SCALE = 8  # of the autoencoder, as the pipeline has it
_TEXT_LENGTH = 256  # the pipeline's default, with its system prompt


def _encode(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """The pipeline puts a system prompt before the prompt."""
    device = pipeline.text_encoder.device
    embeds, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=device)
    return {"embeds": embeds, "mask": mask}


def _encode_null(pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]) -> dict[str, Tensor]:
    """No system prompt comes before the empty prompt."""
    _, _, embeds, mask = pipeline.encode_prompt([""], device=pipeline.text_encoder.device)
    return {"embeds": embeds, "mask": mask}


def _prediction(transformer: nn.Module, x_t: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    return -transformer(
        hidden_states=x_t,
        timestep=1 - timesteps / 1000,
        encoder_hidden_states=conditioning["embeds"],
        encoder_attention_mask=conditioning["mask"],
        return_dict=False,
    )[0]


def _to_conditional_norm(guided: Tensor, conditional: Tensor) -> Tensor:
    """Every row of pixels in every channel gets the norm of the conditional prediction, as the pipeline's default."""
    return guided * (conditional.float().norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


LUMINA_2 = Family(
    title="Lumina-Image 2.0",
    network="transformer",
    parts={
        "transformer": ("Lumina2Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": (),
        "tokenizer": (),
    },
    sizes=lambda transformer, vae: own_size(transformer.get("sample_size"), _SCALE, 2 * _SCALE),
    channels=lambda transformer: transformer.get("in_channels", 16),
    encode=_encode,
    encode_null=_encode_null,
    predict=_prediction,
    text_limit=_TEXT_LENGTH,
    # The pipeline takes the number of channels for the number of tokens; it matters only if the config shifts by size.
    flow=FlowTimes(sigmas=evenly, mu=linear_mu, tokens=lambda shape: shape[0]),
    rescale=_to_conditional_norm,
    comfyui=None,  # ComfyUI joins queries, keys and values in one layer
)
