"""The model families that can be sampled, scored and fine-tuned, by the pipeline class that model_index.json names."""

from mi_ray.diffusion.families.cogview4 import COGVIEW_4
from mi_ray.diffusion.families.family import Family, Predict
from mi_ray.diffusion.families.flux import CHROMA_1, FLUX_1
from mi_ray.diffusion.families.flux2 import FLUX_2_KLEIN
from mi_ray.diffusion.families.krea2 import KREA_2
from mi_ray.diffusion.families.lumina2 import LUMINA_2
from mi_ray.diffusion.families.pixart import PIXART_SIGMA
from mi_ray.diffusion.families.qwen_image import QWEN_IMAGE
from mi_ray.diffusion.families.sana import SANA
from mi_ray.diffusion.families.stable_diffusion import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, unet_prediction
from mi_ray.diffusion.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from mi_ray.diffusion.families.z_image import Z_IMAGE

__all__ = ["FAMILIES", "Family", "Predict", "unet_prediction"]

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
    "FluxPipeline": FLUX_1,
    "ChromaPipeline": CHROMA_1,
    "Flux2KleinPipeline": FLUX_2_KLEIN,
    "QwenImagePipeline": QWEN_IMAGE,
    "Krea2Pipeline": KREA_2,
    "ZImagePipeline": Z_IMAGE,
    "SanaPipeline": SANA,
    "Lumina2Pipeline": LUMINA_2,
    "CogView4Pipeline": COGVIEW_4,
    "PixArtSigmaPipeline": PIXART_SIGMA,
}
