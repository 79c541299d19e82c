"""The configuration of jobs/rescore.py."""

from pydantic import Field, field_validator

from mi_ray.config.generation import ON_TRAJECTORY, TRAJECTORY_SCORES, ScoreConfig, ScoreName
from mi_ray.config.paths import SharedPath
from mi_ray.config.section import Section


class TrajectoryScoreConfig(ScoreConfig):
    """The scores to compute."""

    names: tuple[ScoreName, ...] = Field(TRAJECTORY_SCORES, description="on-trajectory scores, columns score_<name>")

    @field_validator("names")
    @classmethod
    def _on_trajectory(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if others := [name for name in names if name not in ON_TRAJECTORY]:
            raise ValueError(
                f"{', '.join(others)} cannot be computed from stored curves; use one or more of"
                f" {', '.join(ON_TRAJECTORY)}"
            )
        return names


class RescoreConfig(Section):
    """Compute other on-trajectory scores of the stored candidates of a run in rounds, and compare them with the run's
    selection."""

    run_dir: SharedPath = Field(description="folder of a run, local or remote; tables are written to its rescored/")
    score: TrajectoryScoreConfig = TrajectoryScoreConfig()
