"""The configuration of jobs/calibrate.py."""

from typing import Annotated

from pydantic import Field, model_validator

from mi_ray.config.generation import ModelConfig, PromptsConfig, SamplerConfig
from mi_ray.config.metrics import METRIC_NAMES, MetricName
from mi_ray.config.paths import LocalOrUri, SharedPath
from mi_ray.config.section import Positive, Section, check_band


class CalibrationConfig(Section):
    """Find the log SNR band in which the contrastive score of a model ranks the candidates of a prompt best."""

    prompts: PromptsConfig
    model: ModelConfig = ModelConfig()
    sampler: SamplerConfig = SamplerConfig()
    out: SharedPath = Field(
        "calibration.yaml", validate_default=True, description="output file; pass it to the pipeline with --config"
    )
    candidates_per_prompt: Annotated[int, Field(ge=2)] = Field(8, description="number of candidates per prompt")
    neighbours: Positive = Field(6, description="number of other prompts that each candidate is compared with")
    levels: Annotated[int, Field(ge=2)] = Field(
        16, description="number of log SNR levels in the grid; each one is evaluated with two noise samples"
    )
    log_snr_min: float = Field(-5.4, description="lower end of the searched log SNR range")
    log_snr_max: float = Field(2.0, description="upper end of the searched log SNR range")
    alignment: MetricName | None = Field(
        None,
        min_length=1,
        description=f"metric whose first column labels the candidates; none: no labels from a metric: {METRIC_NAMES}",
    )
    pool: SharedPath | None = Field(
        None,
        description="output folder for the candidates' images and pool.jsonl, so that you can label them; none: not"
        " written",
    )
    labels: LocalOrUri | None = Field(
        None, description="your labels, higher is better: .jsonl or .parquet with prompt_id, candidate_index, label"
    )
    use_labels: bool = Field(False, description="true: choose the band with the labels; false: without them")
    batch_size: Positive = Field(64, description="number of candidates in one denoiser batch")
    threads: Positive = Field(2, description="number of CPU threads")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="random seed of the candidates and of the noise samples")

    @model_validator(mode="after")
    def _consistent(self):
        check_band(self.log_snr_min, self.log_snr_max)
        if self.sampler.best_of.candidates:
            raise ValueError("sampler.best_of is set, but a calibration needs all candidates; set candidates to none")
        if self.alignment and self.labels:
            raise ValueError(
                "alignment and labels are both set, and only one can label the candidates; remove one of them"
            )
        if self.pool and self.labels:
            raise ValueError(
                "pool and labels are both set, but pool.jsonl is written in one run and labels are read in a later run;"
                " remove one"
            )
        if self.use_labels and not (self.alignment or self.labels):
            raise ValueError(
                "use_labels is true, but there are no labels; set alignment or labels, or remove use_labels"
            )
        return self
