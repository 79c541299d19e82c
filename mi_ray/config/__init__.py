"""The configuration of every job: all fields, their defaults with sources, and the checks of their values.

This room imports nothing else from the package. It must not know how a field is used.
"""

from mi_ray.config.finetune import BETA, FinetuneConfig, MethodName, OnlineConfig
from mi_ray.config.generation import (
    FLOW_SCORES,
    HEIGHT,
    MODEL,
    ON_TRAJECTORY,
    POINTWISE_SCORES,
    TRAJECTORY_SCORES,
    WIDTH,
    BestOfConfig,
    Dtype,
    GenerateConfig,
    ModelConfig,
    PromptsConfig,
    PruneConfig,
    SamplerConfig,
    ScoreConfig,
    ScoreName,
    SelectConfig,
)
from mi_ray.config.guidance import GUIDANCE_METHODS, GuidanceConfig, GuidanceMethod
from mi_ray.config.paths import folder_name, pinned, without_revision
from mi_ray.config.resources import ResourcesConfig
from mi_ray.config.run import EvaluationConfig, RunConfig

__all__ = [
    "BETA",
    "FLOW_SCORES",
    "GUIDANCE_METHODS",
    "HEIGHT",
    "MODEL",
    "ON_TRAJECTORY",
    "POINTWISE_SCORES",
    "TRAJECTORY_SCORES",
    "WIDTH",
    "BestOfConfig",
    "Dtype",
    "EvaluationConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "GuidanceConfig",
    "GuidanceMethod",
    "MethodName",
    "ModelConfig",
    "OnlineConfig",
    "PromptsConfig",
    "PruneConfig",
    "ResourcesConfig",
    "RunConfig",
    "SamplerConfig",
    "ScoreConfig",
    "ScoreName",
    "SelectConfig",
    "folder_name",
    "pinned",
    "without_revision",
]
