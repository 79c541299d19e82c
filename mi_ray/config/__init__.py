"""What a user may set: every field of every job, its default, its source, and what is refused.

This room imports nothing else of the package and must not know how a field is used.
"""

from mi_ray.config.finetune import FinetuneConfig
from mi_ray.config.generation import (
    HEIGHT,
    MODEL,
    POINTWISE_SCORES,
    TRAJECTORY_SCORES,
    WIDTH,
    Control,
    GenerateConfig,
    ModelConfig,
    PromptsConfig,
    PruneConfig,
    SamplerConfig,
    ScoreConfig,
    ScoreName,
    SelectConfig,
    pinned,
    without_revision,
)
from mi_ray.config.run import EvaluationConfig, ResourcesConfig, RunConfig

__all__ = [
    "HEIGHT",
    "MODEL",
    "POINTWISE_SCORES",
    "TRAJECTORY_SCORES",
    "WIDTH",
    "Control",
    "EvaluationConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "ModelConfig",
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
