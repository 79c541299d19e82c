"""The guidance methods by name, and the model families that each one works with."""

from functools import partial
from typing import NamedTuple

from mi_ray.config import GuidanceMethod
from mi_ray.diffusion.families.family import Family
from mi_ray.diffusion.families.pixart import PIXART_SIGMA
from mi_ray.diffusion.families.stable_diffusion import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from mi_ray.guidance.attend_and_excite import AttendAndExcite
from mi_ray.guidance.cfg_zero_star import CfgZeroStar
from mi_ray.guidance.contrastive import Contrastive
from mi_ray.guidance.guide import Guide, Setting
from mi_ray.guidance.perturbed_attention import PerturbedAttention
from mi_ray.guidance.semantic import Semantic
from mi_ray.guidance.structured import Structured


class Method(NamedTuple):
    guide: type[Guide]
    families: tuple[Family, ...] = ()  # those that it works with; empty: all


METHODS: dict[GuidanceMethod, Method] = {
    "attend-and-excite": Method(AttendAndExcite, (STABLE_DIFFUSION,)),
    "structured": Method(Structured, (STABLE_DIFFUSION,)),
    "semantic": Method(Semantic, (STABLE_DIFFUSION,)),
    "perturbed-attention": Method(PerturbedAttention, (STABLE_DIFFUSION, STABLE_DIFFUSION_XL, PIXART_SIGMA)),
    "cfg-zero-star": Method(CfgZeroStar),
    "contrastive": Method(Contrastive),
}


def guide_maker(method: GuidanceMethod, setting: Setting) -> partial[Guide]:
    """The function (prompts, conditioning) -> guide of these prompts.

    Raises:
        ValueError: the method does not work with the model.
    """
    if fault := family_fault(method, setting.denoiser.family):
        raise ValueError(fault)
    return partial(METHODS[method].guide.of_prompts, setting)


def family_fault(method: GuidanceMethod, family: Family) -> str | None:
    """Why a method does not work with a family; None: it does."""
    families = METHODS[method].families
    if not families or family in families:
        return None
    names = ", ".join(each.title for each in families)
    return (
        f"guidance_method {method} changes attention layers: it is implemented only for {names}, not for"
        f" {family.title}; take another method, such as contrastive, or none"
    )
