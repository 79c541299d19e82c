"""The model families that can be sampled, scored and fine-tuned, by the pipeline class that model_index.json names."""

from mi_ray.diffusion.families.family import Family, Predict
from mi_ray.diffusion.families.stable_diffusion import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, unet_prediction
from mi_ray.diffusion.families.stable_diffusion_3 import STABLE_DIFFUSION_3

__all__ = ["FAMILIES", "Family", "Predict", "unet_prediction"]

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
}
