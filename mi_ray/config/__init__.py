"""What a user may set: every field of every job, its default, its source, and what is refused.

This room imports nothing else of the package and must not know how a field is used.
"""

from mi_ray.config.finetune import BETA, FinetuneConfig, MethodName, OnlineConfig
from mi_ray.config.generation import (
    MODEL,
    POINTWISE_SCORES,
    TRAJECTORY_SCORES,
    GenerateConfig,
    ModelConfig,
    PromptsConfig,
    PruneConfig,
    SamplerConfig,
    ScoreConfig,
    ScoreName,
    SelectConfig,
)
from mi_ray.config.paths import pinned, without_revision
from mi_ray.config.run import EvaluationConfig, ResourcesConfig, RunConfig

__all__ = [
    "BETA",
    "MODEL",
    "POINTWISE_SCORES",
    "TRAJECTORY_SCORES",
    "EvaluationConfig",
    "FinetuneConfig",
    "GenerateConfig",
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
    "pinned",
    "without_revision",
]
