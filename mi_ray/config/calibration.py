"""The configuration of jobs/calibrate.py."""

from typing import Annotated

from pydantic import Field, model_validator

from mi_ray.config.generation import ModelConfig, PromptsConfig, SamplerConfig
from mi_ray.config.paths import LocalOrUri, SharedPath
from mi_ray.config.section import METRIC_NAMES, Positive, Section, check_band


class CalibrationConfig(Section):
    """Find the band of log SNR in which a model's contrastive score ranks the candidates of a prompt best."""

    prompts: PromptsConfig
    model: ModelConfig = ModelConfig()
    sampler: SamplerConfig = SamplerConfig()
    out: SharedPath = Field(
        "calibration.yaml", validate_default=True, description="file to write; the pipeline takes it by --config"
    )
    candidates_per_prompt: Annotated[int, Field(ge=2)] = Field(8, description="pool size")
    neighbours: Positive = Field(6, description="other prompts of the file that each candidate is held against")
    levels: Annotated[int, Field(ge=2)] = Field(16, description="steps of the grid of log SNR; each is probed twice")
    log_snr_min: float = Field(-5.4, description="lower end of the range searched")
    log_snr_max: float = Field(2.0, description="upper end")
    alignment: str | None = Field(
        None, min_length=1, description=f"metric whose first column labels the candidates too: {METRIC_NAMES}"
    )
    pool: SharedPath | None = Field(
        None, description="folder to write the candidates' images to, with pool.jsonl: for a metric of your own"
    )
    labels: LocalOrUri | None = Field(
        None, description="that metric, higher is better: .jsonl or .parquet with prompt_id, candidate_index, label"
    )
    use_labels: bool = Field(False, description="choose the band by the labels instead of without them")
    batch_size: Positive = Field(64, description="candidates in one denoiser batch")
    threads: Positive = Field(2, description="CPU threads")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of candidates and probes")

    @model_validator(mode="after")
    def _consistent(self):
        check_band(self.log_snr_min, self.log_snr_max)
        if self.alignment and self.labels:
            raise ValueError("alignment and labels both label the candidates; give one of them")
        if self.pool and self.labels:
            raise ValueError("pool is written first, and labels of it are given without it; leave one out")
        if self.use_labels and not (self.alignment or self.labels):
            raise ValueError("use_labels needs labels: set alignment or labels, or leave it out")
        return self
