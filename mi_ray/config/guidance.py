"""The configuration of guidance methods, which change a sampling step without training."""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from mi_ray.config.section import Positive, Section, Share

GuidanceMethod = Literal[
    "attend-and-excite", "structured", "semantic", "perturbed-attention", "cfg-zero-star", "contrastive"
]
GUIDANCE_METHODS: tuple[str, ...] = get_args(GuidanceMethod)
READS_ATTENTION = ("attend-and-excite", "structured", "semantic", "perturbed-attention")  # not of a compiled network
OTHER_CONDITIONAL = ("structured",)  # their conditional prediction is not that of the prompt alone
_PHRASES = "^(text|spacy(:.+)?)$"


class GuidanceConfig(Section):
    """Settings of sampler.guidance_method. Defaults: the published ones, at the published number of steps."""

    phrases: str = Field(
        "text",
        pattern=_PHRASES,
        description="attend-and-excite, structured: noun phrases by rules for English (text), or by spaCy (spacy,"
        " spacy:MODEL)",
    )
    # Chefer et al. 2023, arXiv 2301.13826; released code 163efdf: 25 of 50 steps, thresholds at steps 0, 10 and 20
    step_size: float = Field(
        20.0, gt=0, description="attend-and-excite: step size of the first gradient step on the latents"
    )
    altered_share: Share = Field(0.5, description="attend-and-excite: share of the steps with a gradient step")
    refine_at: tuple[Share, ...] = Field(
        (0.0, 0.2, 0.4),
        description="attend-and-excite: shares of the steps at which gradient steps are repeated; none: nowhere",
    )
    refine_until: tuple[Share, ...] = Field(
        (0.05, 0.5, 0.8), description="attend-and-excite: attention that every noun must reach, for each of refine_at"
    )
    refine_steps: Positive = Field(20, description="attend-and-excite: maximum number of repeated gradient steps")
    # Shen et al. 2024, arXiv 2404.05384; released code 4e5c9a7
    rate_min: float = Field(0.8, gt=0, description="semantic: lowest factor of the guidance scale of a region")
    rate_max: float = Field(3.0, gt=0, description="semantic: highest factor of the guidance scale of a region")
    scale_max: float = Field(15.0, gt=0, description="semantic: highest guidance scale of a region")
    # Ahn et al. 2024, arXiv 2403.17377; diffusers' StableDiffusionPAGPipeline
    perturbed_scale: float = Field(
        3.0, gt=0, description="perturbed-attention: scale of conditional minus perturbed prediction"
    )
    perturbed_layers: tuple[str, ...] = Field(
        (),
        description="perturbed-attention: parts of the names of the perturbed self-attention layers; none: the middle"
        " block of a UNet, the second block of PixArt-Sigma",
    )
    # Fan et al. 2025, arXiv 2503.18886
    zero_init_steps: Annotated[int, Field(ge=0)] = Field(
        1, description="cfg-zero-star: number of first steps with velocity zero, of a flow model only"
    )
    # measured on the embedded model; there is no published value
    contrastive_scale: float = Field(
        1.0, gt=0, description="contrastive: scale of conditional prediction minus mean prediction of hard negatives"
    )
    negatives: str = Field(
        "auto",
        pattern="^(auto|shapes|text|spacy(:.+)?)$",
        description="contrastive: method that makes hard negatives, as in score.negatives",
    )
    max_negatives: Positive = Field(
        6, description="contrastive: maximum number of hard negatives; each costs one evaluation per step"
    )

    @model_validator(mode="after")
    def _pairs(self):
        faults = []
        if len(self.refine_at) != len(self.refine_until):
            faults.append(
                f"refine_at has {len(self.refine_at)} values and refine_until has {len(self.refine_until)}; give one of"
                " each"
            )
        if self.rate_min > self.rate_max:
            faults.append(f"rate_min is {self.rate_min}, but it must not be above rate_max, {self.rate_max}; lower it")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def extra_evaluations(self, method: GuidanceMethod | None) -> float:
        """Denoiser evaluations of a method per step, besides conditional and unconditional.

        An upper bound for contrastive, and a lower bound for attend-and-excite, whose repeated steps depend on the
        images.
        """
        match method:
            case "attend-and-excite":
                return self.altered_share
            case "perturbed-attention":
                return 1
            case "contrastive":
                return self.max_negatives
        return 0
