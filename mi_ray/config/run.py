"""The configuration of a run."""

from typing import Annotated

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from mi_ray.config.finetune import FinetuneConfig, OnlineConfig
from mi_ray.config.generation import (
    ON_TRAJECTORY,
    POINTWISE_SCORES,
    STOCHASTIC,
    GenerateConfig,
    ModelConfig,
    PromptsConfig,
    PruneConfig,
    SamplerConfig,
    ScoreConfig,
    SelectConfig,
)
from mi_ray.config.guidance import OTHER_CONDITIONAL, READS_ATTENTION
from mi_ray.config.metrics import METRIC_NAMES, MetricName, MetricNames
from mi_ray.config.paths import LocalOrUri, ModelPath, SharedPath, hashed_fields, without_revision
from mi_ray.config.resources import ResourcesConfig
from mi_ray.config.section import Positive, Section, config_hash


def _several(value: object) -> object:
    """A single number means a list with this number."""
    return (value,) if isinstance(value, (int, float, str)) else value


class EvaluationConfig(Section):
    """Base and tuned model on the same held-out prompts and seeds. The paper's defaults: 10 images, DDIM, 50 steps."""

    file: LocalOrUri | None = Field(
        None,
        description="file of held-out prompts (columns category and split are optional); none: a share of prompts.file",
    )
    limit: Positive | None = Field(None, description="number of prompts to use, from the start of the file; none: all")
    holdout_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of prompts.file that is held out from training, if evaluation.file is none"
    )
    images_per_prompt: Annotated[int, Field(ge=2)] = Field(
        10, description="number of images per prompt; each has its own seed"
    )
    sampler: SamplerConfig = SamplerConfig(solver="ddim", num_inference_steps=50)
    guidance_scales: Annotated[tuple[Annotated[float, Field(ge=1)], ...], BeforeValidator(_several)] = Field(
        (),
        description="further guidance scales at which every model is evaluated, besides that of evaluation.sampler; 1:"
        " no guidance, half the cost; none: no further ones",
    )
    alignment: MetricNames = Field(
        (),
        description="metrics measured on every image; the report's headline is the first; one name or a list:"
        f" {METRIC_NAMES}",
    )
    controls: tuple[MetricName, ...] = Field(
        (),
        description="controls that are trained and evaluated too: random, or metrics of generate.alignment, in place of"
        " select.by (in an online run: of online.rewards)",
    )
    pmi: bool = Field(True, description="compute the pmi score of every image, at every guidance scale")
    encoder: ModelPath | None = Field(
        None,
        description="image encoder of transformers for the kernel distance and the diversity, such as"
        " facebook/dinov2-base: a local folder or a hub id; none: the autoencoder of the model",
    )

    @model_validator(mode="after")
    def _guided(self):
        method = self.sampler.guidance_method
        if method and 1 in self.guidance_scales:
            raise ValueError(
                f"guidance_scales has 1, but sampler.guidance_method is {method}, which needs guidance: remove 1, or"
                " set the method to none"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unset_encoder(self, serialize: SerializerFunctionWrapHandler) -> dict:
        """Leave out the encoder if it is not set: then the hash of other runs is stable."""
        values = serialize(self)
        return {name: value for name, value in values.items() if value is not None or name != "encoder"}

    @property
    def samplers(self) -> dict[float, SamplerConfig]:
        """The sampler at each guidance scale, in rising order."""
        scales = sorted({*self.guidance_scales, self.sampler.guidance_scale})
        return {scale: self.sampler.model_copy(update={"guidance_scale": scale}) for scale in scales}


class RunConfig(Section):
    """Make a text-to-image model follow its prompts better: generate, score, select, fine-tune, evaluate, report."""

    run_dir: SharedPath = Field(
        description="folder of the run: local, s3:// or gs://; the same command with the same folder continues the run"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="random seed of the whole run")
    rounds: Positive = Field(1, description="number of rounds; each one generates with the adapter of the round before")
    prompts: PromptsConfig
    model: ModelConfig = ModelConfig()
    sampler: SamplerConfig = SamplerConfig()
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = ScoreConfig()
    prune: PruneConfig = PruneConfig()
    select: SelectConfig = SelectConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    online: OnlineConfig = OnlineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _consistent(self):
        faults = []
        if self.select.by in (*ON_TRAJECTORY, *POINTWISE_SCORES) and self.select.by not in self.score.names:
            faults.append(f"select.by is {self.select.by!r}, but this score is not computed: add it to score.names")
        faults += self._control_faults()
        if self.select.top_k >= self.generate.candidates_per_prompt:
            faults.append(
                f"select.top_k is {self.select.top_k}, but there are only {self.generate.candidates_per_prompt}"
                " candidates per prompt, so nothing is left out: lower it or raise generate.candidates_per_prompt"
            )
        faults += self._speed_faults()
        if self.finetune.baseline and self.finetune.new_dora:
            faults.append(
                "finetune.baseline is set and finetune.adapter is dora, but updates of DoRA cannot be subtracted: set"
                " finetune.adapter: lora"
            )
        faults += self._online_faults()
        if not self.online.updates and self.finetune.gradient_accumulation < self.resources.train_workers[1]:
            faults.append(
                f"finetune.gradient_accumulation is {self.finetune.gradient_accumulation}, so some of the"
                f" {self.resources.train_workers[1]} workers get no batch: raise it or lower resources.train_workers"
            )
        faults += self._memory_faults()
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _memory_faults(self) -> list[str]:
        """Settings that quantised or sharded training does not allow."""
        tuning, (least, most), faults = self.finetune, self.resources.train_workers, []
        of_bitsandbytes = bool(self.model.quantize) and self.model.quantize.startswith("bitsandbytes")
        if of_bitsandbytes and not self.resources.train_gpus:
            faults.append(
                f"model.quantize is {self.model.quantize}, but it needs a GPU and resources.train_gpus is 0: set it to"
                " 1, or quantise with torchao"
            )
        for option, value in (("model.quantize", self.model.quantize), ("finetune.shard", tuning.shard)):
            if value and tuning.new_dora:
                faults.append(
                    f"{option} is {value} and finetune.adapter is dora, but DoRA needs the whole weights: set"
                    " finetune.adapter: lora"
                )
        if tuning.shard is None:
            return faults
        if least != most:
            faults.append(
                f"finetune.shard is {tuning.shard}, but resources.train_workers is ({least}, {most}): shards need a"
                " fixed number of workers; set one number"
            )
        elif not self.online.updates and tuning.gradient_accumulation % most:
            faults.append(
                f"finetune.shard is {tuning.shard}, but finetune.gradient_accumulation, {tuning.gradient_accumulation},"
                f" is not a multiple of the {most} workers: all must run the same number of batches; change one of them"
            )
        if of_bitsandbytes:
            faults.append(
                f"finetune.shard is {tuning.shard} and model.quantize is {self.model.quantize}, but weights of"
                " bitsandbytes cannot be divided: set one of them to none"
            )
        return faults

    def _online_faults(self) -> list[str]:
        """Settings that online training needs or does not allow."""
        tuning, faults = self.finetune, []
        if not self.online.updates:
            if tuning.method != "supervised":
                faults.append(
                    f"finetune.method is {tuning.method}, but this method needs online training: set online.updates, or"
                    " finetune.method: supervised"
                )
            return faults
        if tuning.method == "supervised":
            faults.append(
                "finetune.method is supervised, but online.updates needs a method that also learns from bad candidates:"
                " set finetune.method: nft"
            )
        if tuning.method == "dpok":
            faults += self._dpok_faults()
        if self.rounds > 1:
            faults.append(
                f"rounds is {self.rounds}, but an online run has no rounds: set rounds: 1, or online.updates: 0"
            )
        if tuning.baseline:
            faults.append("finetune.baseline is set, but an online run does not use it: remove it")
        if tuning.timestep_density != "uniform":
            faults.append(
                f"finetune.timestep_density is {tuning.timestep_density}, but an online run draws its timesteps"
                " uniformly: set uniform"
            )
        if tuning.prompt_dropout:
            faults.append(
                "finetune.prompt_dropout is set, but an online run does not use it: remove it (see online.held_share)"
            )
        if "pmi_contrastive" in self.score.names:
            faults.append(
                "score.names has pmi_contrastive, but an online run has no list of prompts to compare with: use"
                " pmi_negatives"
            )
        if self.prune.by:
            faults.append(
                f"prune.by is {self.prune.by}, but an online update uses all its candidates: set prune.by to none"
            )
        return faults

    def _dpok_faults(self) -> list[str]:
        """Settings with which the likelihood ratio of DPOK is not defined, or is not 1 before the first step."""
        online, anchored, faults = self.online, self.finetune.anchor_guidance, []
        if self.sampler.solver not in STOCHASTIC:
            faults.append(
                f"sampler.solver is {self.sampler.solver}, but finetune.method dpok needs the probability of a sampling"
                f" step, and this solver adds no noise: use {' or '.join(STOCHASTIC)}"
            )
        if online.lag:
            faults.append(
                f"online.lag is {online.lag}, but finetune.method dpok needs candidates of the current policy: set"
                " online.lag: 0"
            )
        if any(online.decay):
            faults.append(
                f"online.decay is {online.decay}, but finetune.method dpok samples with the trained weights, not with"
                " an average: set online.decay: [0, 0, 0]"
            )
        if anchored != 1:
            faults.append(
                f"finetune.anchor_guidance is {anchored}, but the anchor of finetune.method dpok has the guidance of"
                " the sampler: set finetune.anchor_guidance: 1"
            )
        return faults

    def _control_faults(self) -> list[str]:
        """Faults of select.by and evaluation.controls: names that are no score, no measured metric and not random."""
        controls = ("random", *self.generate.alignment)
        known = (*ON_TRAJECTORY, *POINTWISE_SCORES, *controls)
        faults = []
        if self.select.by not in known:
            faults.append(
                f"select.by is {self.select.by!r}, but this is not random, not a score and not a measured metric: take"
                f" one of {', '.join(known)}, or add it to generate.alignment if it is a metric"
            )
        faults += [
            f"evaluation.controls has {name!r}, but this is not random and not a measured metric: take one of"
            f" {', '.join(controls)}, or add it to generate.alignment if it is a metric"
            for name in self.evaluation.controls
            if name not in controls
        ]
        return faults

    def _speed_faults(self) -> list[str]:
        """Settings that pruning, the guidance interval or a missing GPU do not allow."""
        faults = []
        cuts = self.prune.cuts(self.sampler.num_inference_steps, self.generate.candidates_per_prompt)
        measured = {self.select.by, *self.evaluation.controls} & set(self.generate.alignment)
        faults += [
            f"prune.by is {self.prune.by}, but selection by {name} needs every candidate measured: set prune.by to none"
            for name in (sorted(measured) if cuts else ())
        ]
        if cuts and min(cuts.values()) < self.select.top_k:
            faults.append(
                f"prune.keep leaves {min(cuts.values())} candidates per prompt, fewer than select.top_k,"
                f" {self.select.top_k}: raise prune.keep"
            )
        for option, chosen, other in (("kernel", "triton", "auto"), ("compile", "cuda-graphs", "default")):
            if getattr(self.model, option) == chosen and not self.resources.gpus_per_actor:
                faults.append(
                    f"model.{option} is {chosen}, but it needs a CUDA GPU and resources.gpus_per_actor is 0: raise"
                    f" resources.gpus_per_actor, or set model.{option}: {other}"
                )
        faults += self._sampler_faults("sampler", self.sampler, self.candidate_scores)
        for sampler in self.evaluation.samplers.values():
            found = self._sampler_faults("evaluation.sampler", sampler, sampler.best_of.scores)
            faults += [fault for fault in found if fault not in faults]
        if self.sampler.best_of.candidates and self.prune.by:
            faults.append(
                f"prune.by is {self.prune.by} and sampler.best_of is set, but a pool is cut by one of them only: set"
                " prune.by to none, or use sampler.best_of.prune"
            )
        if "pmi_contrastive" in self.evaluation.sampler.best_of.scores:
            faults.append(
                "evaluation.sampler.best_of uses pmi_contrastive, but an evaluation has no list of prompts to compare"
                " with: use pmi_negatives"
            )
        if self.sampler.best_of.candidates and self.online.updates:
            faults.append(
                "sampler.best_of is set, but an online update learns from all its candidates: set"
                " sampler.best_of.candidates to none"
            )
        return faults

    def _sampler_faults(self, field: str, sampler: SamplerConfig, asked: set[str]) -> list[str]:
        """Settings of a sampler that do not allow the scores `asked` of it, or a compiled network."""
        interval, score, faults = sampler.guidance_interval, self.score, []
        places = f"score.names, prune.by and {field}.best_of" if sampler.best_of.scores else "score.names and prune.by"
        recorded = asked & set(ON_TRAJECTORY)
        named = set(recorded) if interval else set()
        if "trajectory_banded" in named and interval[0] <= score.log_snr_min and score.log_snr_max <= interval[1]:
            named.remove("trajectory_banded")  # all steps in its band have guidance
        faults += [
            f"{field}.guidance_interval is {interval}, but {name} needs both branches at all its steps: remove {name}"
            f" from {places}, or set the interval to none"
            + (", or widen it to the band" if name == "trajectory_banded" else "")
            for name in sorted(named)
        ]
        faults += [
            f"{field}.guidance_scale is 1, but {name} needs both branches: remove {name} from {places}, or raise"
            f" {field}.guidance_scale"
            for name in sorted(recorded if sampler.branches == 1 else ())
        ]
        method = sampler.guidance_method
        if method in OTHER_CONDITIONAL:
            faults += [
                f"{field}.guidance_method is {method}, but {name} needs the model's own prediction for the prompt,"
                f" which this method replaces: remove {name} from {places}, or take another method"
                for name in sorted(recorded)
            ]
        banded = score.banded if "trajectory_banded" in recorded else None
        if method and "rfmi_guided" in {*recorded, banded}:
            faults.append(
                f"{field}.guidance_method is {method}, but rfmi_guided assumes classifier-free guidance: remove it from"
                f" {places}, or set the method to none"
            )
        if method in READS_ATTENTION and self.model.compile not in (None, "auto"):
            faults.append(
                f"{field}.guidance_method is {method}, but it reads the attention layers and model.compile is"
                f" {self.model.compile}: set model.compile to auto or none"
            )
        return faults

    @property
    def candidate_scores(self) -> set[str]:
        """The names of all scores of candidates: score.names, and those of pruning and best-of-N."""
        return {*self.score.names, self.prune.by, *self.sampler.best_of.scores} - {None}

    @property
    def update_prompts(self) -> int:
        """Number of prompts in one update of an online run: online.prompts_per_update, rounded up to whole shards."""
        per_shard = self.generate.prompts_per_shard
        return -(-self.online.prompts_per_update // per_shard) * per_shard

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics of candidates and of the evaluation."""
        return tuple(dict.fromkeys([*self.generate.alignment, *self.evaluation.alignment]))

    def results_config(self) -> dict:
        """The fields that the results depend on: all except run_dir, resources and speed options."""
        speed = {"model": {"kernel", "channels_last", "compile"}, "finetune": {"activation_checkpointing", "shard"}}
        reading = {"prompts": {"broken"}}  # a run that starts reads the same prompts with either value
        results = self.model_dump(mode="json", exclude={"run_dir": True, "resources": True, **speed, **reading})
        results["model"]["path"] = without_revision(self.model.path)  # run.json holds the commit
        if self.finetune.timestep_density == "uniform":  # the hash of runs that began before this option stays
            del results["finetune"]["timestep_density"]
        return results

    def hash(self) -> str:
        """Hash of the `hashed_fields` of `results_config`, 12 hexadecimal digits."""
        return config_hash(hashed_fields(self.results_config()))
