"""The configuration of a run."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mi_ray.config.finetune import FinetuneConfig
from mi_ray.config.generation import (
    POINTWISE_SCORES,
    TRAJECTORY_SCORES,
    Control,
    GenerateConfig,
    ModelConfig,
    PromptsConfig,
    PruneConfig,
    SamplerConfig,
    ScoreConfig,
    SelectConfig,
    without_revision,
)
from mi_ray.config.section import Positive, Section, config_hash


class EvaluationConfig(Section):
    """Base and tuned model on the same held-out prompts and seeds. Defaults: the paper's, 10 images, DDIM 50."""

    file: str | None = Field(
        None, description="held-out prompts, with columns category and split if you like; none: a share of prompts.file"
    )
    limit: Positive | None = Field(None, description="take the first so many")
    holdout_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="without evaluation.file: this share of prompts.file is kept from training"
    )
    images_per_prompt: Annotated[int, Field(ge=2)] = Field(10, description="each with its own seed")
    sampler: SamplerConfig = SamplerConfig(solver="ddim", num_inference_steps=50)
    alignment: Literal["oracle"] | None = Field(None, description="oracle: shapes prompts only")
    controls: tuple[Control, ...] = Field((), description="also fine-tune and evaluate on these selections")
    pmi: bool = Field(True, description="score the images with pmi")


def _pair(value: object) -> object:
    """One number stands for (number, number)."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return (value, value) if isinstance(value, (int, str)) else value


class ResourcesConfig(Section):
    """Where and how fast; nothing here changes a result beyond floating-point tolerance."""

    num_actors: Annotated[tuple[Positive, Positive], BeforeValidator(_pair)] = Field(
        (1, 1), description="least,most generating actors; one number: so many, always"
    )
    cpus_per_actor: Annotated[float, Field(ge=0)] = Field(1, description="and its threads")
    gpus_per_actor: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        0.0, description="0.5: two actors share a GPU; auto: found by a trial when the run starts"
    )
    batch_size: Positive | Literal["auto"] = Field(
        64,
        description="candidates of the model's own size in one denoiser batch (twice that with guidance); with another"
        " model.height or width as many as have the same latent tokens; auto: found by a trial",
    )
    shard_timeout_s: float | None = Field(
        None,
        gt=0,
        description="an actor that takes longer over a shard is ended, and the shard given to another; none: one that"
        " does not call the model for an hour",
    )
    lease_s: float = Field(
        40, gt=0, description="a driver on another machine not heard of for so long is taken for dead; one here at once"
    )
    train_workers: Annotated[tuple[Positive, Positive], BeforeValidator(_pair)] = Field(
        (1, 1),
        description="data-parallel workers of the fine-tuning; least,most: as many as the cluster has room for",
    )
    train_cpus: Annotated[float, Field(ge=0)] = Field(1, description="per worker")
    train_gpus: Annotated[float, Field(ge=0)] = Field(0, description="per worker: 0 or 1")
    price_per_gpu_hour: float | None = Field(None, ge=0, description="in any currency: --dry-run then tells the cost")

    @model_validator(mode="after")
    def _order(self):
        if self.num_actors[0] > self.num_actors[1]:
            raise ValueError(f"num_actors is (least, most), and {self.num_actors} has them the wrong way round")
        if self.train_workers[0] > self.train_workers[1]:
            raise ValueError(f"train_workers is (least, most), and {self.train_workers} has them the wrong way round")
        return self


class RunConfig(Section):
    """Align a text-to-image model with its prompts: generate, score, select, fine-tune, evaluate, report."""

    run_dir: str = Field(min_length=1, description="folder of the run: local, s3:// or gs://; given again, it goes on")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the whole run")
    rounds: Positive = Field(1, description="each generates with the adapter so far")
    prompts: PromptsConfig
    model: ModelConfig = ModelConfig()
    sampler: SamplerConfig = SamplerConfig()
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = ScoreConfig()
    prune: PruneConfig = PruneConfig()
    select: SelectConfig = SelectConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _consistent(self):
        faults = []
        if self.select.by in (*TRAJECTORY_SCORES, *POINTWISE_SCORES) and self.select.by not in self.score.names:
            faults.append(f"select.by is {self.select.by!r}, which score.names lacks: add it there")
        by_oracle = self.select.by == "oracle" or "oracle" in self.evaluation.controls
        if by_oracle and self.generate.alignment != "oracle":
            faults.append("selection by the oracle needs generate.alignment: oracle")
        if self.select.top_k >= self.generate.candidates_per_prompt:
            faults.append(
                f"select.top_k is {self.select.top_k}, which leaves nothing to choose from"
                f" {self.generate.candidates_per_prompt} candidates: lower it or raise generate.candidates_per_prompt"
            )
        faults += self._speed_faults(by_oracle)
        if self.finetune.baseline and self.finetune.adapter == "dora":
            faults.append("finetune.baseline subtracts updates, and DoRA's do not add up: set finetune.adapter: lora")
        if self.finetune.gradient_accumulation < self.resources.train_workers[1]:
            faults.append(
                f"finetune.gradient_accumulation is {self.finetune.gradient_accumulation}, which leaves some of"
                f" {self.resources.train_workers[1]} workers without a batch: raise it or lower"
                " resources.train_workers"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _speed_faults(self, by_oracle: bool) -> list[str]:
        """What pruning and the guidance interval forbid."""
        faults = []
        cuts = self.prune.cuts(self.sampler.num_inference_steps, self.generate.candidates_per_prompt)
        if cuts and by_oracle:
            faults.append("selection by the oracle needs every candidate: set prune.by to none")
        if cuts and min(cuts.values()) < self.select.top_k:
            faults.append(
                f"prune.keep leaves {min(cuts.values())} candidates of a prompt, fewer than select.top_k,"
                f" {self.select.top_k}: raise prune.keep"
            )
        for option, chosen, other in (("kernel", "triton", "auto"), ("compile", "cuda-graphs", "default")):
            if getattr(self.model, option) == chosen and not self.resources.gpus_per_actor:
                faults.append(
                    f"model.{option} is {chosen}, which needs a CUDA GPU, and resources.gpus_per_actor is 0:"
                    f" give the actors a GPU, or take {other}"
                )
        interval, score = self.sampler.guidance_interval, self.score
        named = {*score.names, self.prune.by} & set(TRAJECTORY_SCORES) if interval else set()
        if "trajectory_banded" in named and interval[0] <= score.log_snr_min and score.log_snr_max <= interval[1]:
            named.remove("trajectory_banded")  # its band is guided
        faults += [
            f"{name} needs both branches wherever it looks, and sampler.guidance_interval is {interval}: take the score"
            " out of score.names and prune.by, or set the interval to none (trajectory_banded: or widen it to the band)"
            for name in sorted(named)
        ]
        return faults

    def results_config(self) -> dict:
        """What the results depend on: everything but where the run lies, what it runs on and how fast."""
        speed = {"model": {"kernel", "channels_last", "compile"}, "finetune": {"activation_checkpointing"}}
        reading = {"prompts": {"broken"}}  # a run that starts at all reads the same prompts either way
        results = self.model_dump(mode="json", exclude={"run_dir": True, "resources": True, **speed, **reading})
        results["model"]["path"] = without_revision(self.model.path)  # run.json holds the commit
        return results

    def hash(self) -> str:
        """Hash of `results_config`, 12 hexadecimal digits."""
        return config_hash(self.results_config())
