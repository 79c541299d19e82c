"""The configuration of generation: prompts, model, sampler, scores, candidates, pruning and selection."""

import math
from typing import Annotated, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from mi_ray.config.guidance import GuidanceConfig, GuidanceMethod
from mi_ray.config.metrics import METRIC_NAMES, MetricName, MetricNames
from mi_ray.config.paths import LocalOrUri, ModelPath
from mi_ray.config.section import Positive, Section, Share, check_band

TRAJECTORY_SCORES = ("mitune", "mitune_eq2", "asd", "trajectory_banded")
FLOW_SCORES = ("rfmi", "rfmi_guided", "flow_difference")  # of flow models, in place of the mitune ones
ON_TRAJECTORY = (*TRAJECTORY_SCORES, *FLOW_SCORES)
STOCHASTIC = ("ddpm", "dpm++2m-sde")  # solvers that add noise at their steps
POINTWISE_SCORES = ("pmi", "pmi_orthogonal", "pmi_contrastive", "pmi_negatives")
ScoreName = Literal[
    "mitune",
    "mitune_eq2",
    "asd",
    "trajectory_banded",
    "rfmi",
    "rfmi_guided",
    "flow_difference",
    "pmi",
    "pmi_orthogonal",
    "pmi_contrastive",
    "pmi_negatives",
]

Dtype = Literal["auto", "fast", "float32", "float16", "bfloat16"]
MODEL = "the embedded model (shapes), a diffusers folder or a hub id; owner/name@revision pins a branch, tag or commit"


class PromptsConfig(Section):
    """The prompts to fine-tune on."""

    file: LocalOrUri = Field(
        description="prompt file: .txt (one prompt a line), or .jsonl, .json, .csv, .tsv or .parquet (columns prompt,"
        " category); local, s3:// or gs://"
    )
    column: str | None = Field(
        None, description="column or key of the prompt; none: the first of prompt, caption, text, txt that has a value"
    )
    limit: Positive | None = Field(None, description="number of prompts to use, from the start of the file; none: all")
    duplicates: Literal["error", "drop"] = Field(
        "error", description="repeated prompts: error: refuse the file; drop: keep the first"
    )
    overlong: Literal["error", "skip", "truncate"] = Field(
        "error",
        description="prompts longer than the text encoder reads: error: refuse the file; skip: leave out; truncate:"
        " cut",
    )
    broken: Literal["error", "skip"] = Field(
        "error", description="lines without a prompt or that are not text: error: refuse the file; skip: leave out"
    )


HEIGHT = "height of the images in pixels; it must be divisible as the model needs; none: the model's own height"
WIDTH = "width of the images in pixels; it must be divisible as the model needs; none: the model's own width"


class ModelConfig(Section):
    """The model to fine-tune."""

    path: ModelPath = Field("shapes", description=MODEL)
    height: Positive | None = Field(None, description=HEIGHT)
    width: Positive | None = Field(None, description=WIDTH)
    dtype: Dtype = Field(
        "auto",
        description="dtype of the denoiser; auto: on a GPU float16 for Stable Diffusion 1, 2 and XL and bfloat16 for"
        " other models, on a CPU float32. fast: as auto, but bfloat16 on a CPU with Intel AMX, which is about twice as"
        " fast. Solver and scores always use float32",
    )
    kernel: Literal["auto", "eager", "triton"] = Field(
        "auto",
        description="kernel of the solver step; triton: fused, needs a CUDA GPU; auto: triton if it can run, else"
        " eager",
    )
    channels_last: bool = Field(
        False, description="use the channels-last memory layout in a UNet: faster convolutions on tensor cores"
    )
    compile: Literal["auto", "blocks", "default", "cuda-graphs"] | None = Field(
        "auto",
        description="the part of the denoiser that torch.compile compiles; partial batches are padded. blocks: the"
        " repeated blocks; auto: blocks on a GPU, nothing on a CPU; default: the whole network, which takes minutes at"
        " the start; cuda-graphs: the same with CUDA graphs; none: nothing",
    )

    quantize: Literal["bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8", "torchao-fp8"] | None = Field(
        None,
        description="quantised weights of the frozen model under the adapter: less memory in fine-tuning. Generation"
        " and scores use the weights as they are. Needs the extra `quantize` of the package; none: not quantised",
    )

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(height, width) in pixels. None: the model's own."""
        return self.height, self.width

    @model_serializer(mode="wrap")
    def _without_unset(self, serialize: SerializerFunctionWrapHandler) -> dict:
        """Leave out height, width and quantize if they are not set: then the hash of runs without them is stable."""
        values, later = serialize(self), ("height", "width", "quantize")
        return {name: value for name, value in values.items() if value is not None or name not in later}


class PruneConfig(Section):
    """Successive halving: candidates with a low score are dropped during sampling. It is off if `by` is none."""

    by: ScoreName | None = Field(
        None,
        description="score that ranks the candidates: an on-trajectory score of the steps so far, or a pmi score of the"
        " predicted clean latents; none: no pruning",
    )
    # Measured on the embedded model: after a fifth of the steps the contrastive score ranks nearly as at the end.
    after: tuple[Share, ...] = Field(
        (0.2,), description="shares of the sampling steps after which candidates are dropped"
    )
    keep: tuple[Share, ...] = Field(
        (0.25,), description="share of all candidates of a prompt that is kept after each cut"
    )
    num_samples: Positive = Field(6, description="number of noise samples per candidate at a cut, for pointwise scores")

    @model_validator(mode="after")
    def _schedule(self):
        faults = []
        if not self.after or len(self.after) != len(self.keep):
            faults.append(
                f"after has {len(self.after)} values and keep has {len(self.keep)}; give one of each for every cut"
            )
        if any(a >= b for a, b in zip((0, *self.after), (*self.after, 1), strict=True)):
            faults.append(f"after is {self.after}; give shares between 0 and 1 in rising order")
        if any(a <= b for a, b in zip((1, *self.keep), (*self.keep, 0), strict=True)):
            faults.append(f"keep is {self.keep}; give shares between 0 and 1 in falling order")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def cuts(self, steps: int, pool: int) -> dict[int, int]:
        """{number of steps before a cut: number of candidates kept after it}; empty if pruning is off."""
        if self.by is None:
            return {}
        after = [min(max(1, round(share * steps)), steps) for share in self.after]
        keep = [math.ceil(share * pool - 1e-9) for share in self.keep]
        return {step: count for step, count in zip(after, keep, strict=True) if step < steps and count < pool}

    def candidate_steps(self, steps: int, pool: int) -> int:
        """Total number of sampling steps of all candidates of one prompt."""
        cuts = self.cuts(steps, pool)
        bounds, counts = [0, *cuts, steps], [pool, *cuts.values()]
        return sum(count * (end - start) for count, start, end in zip(counts, bounds, bounds[1:], strict=False))


class BestOfConfig(Section):
    """Best-of-N: of several candidates for each image, the one with the best score is used. It is off by default."""

    candidates: Annotated[int, Field(ge=2)] | None = Field(
        None, description="number of candidates of which the best is used; none: no best-of-N"
    )
    by: ScoreName = Field(
        "pmi_negatives", description="score that finds the best candidate, with the settings of the section score"
    )
    prune: PruneConfig = PruneConfig()

    @model_validator(mode="after")
    def _pool(self):
        if self.prune.by and not self.candidates:
            raise ValueError("prune.by is set, but candidates is none; set candidates, or prune.by: none")
        return self

    @property
    def scores(self) -> set[str]:
        """The names of the scores that choose the best candidate; empty without best-of-N."""
        return {self.by, self.prune.by} - {None} if self.candidates else set()

    def candidate_steps(self, steps: int) -> int:
        """Total number of sampling steps for one image."""
        return self.prune.candidate_steps(steps, self.candidates) if self.candidates else steps


class SamplerConfig(Section):
    """How candidates are sampled. Defaults: the paper's (DDPM, 100 steps, guidance_scale 7.5)."""

    solver: Literal["ddpm", "ddim", "dpm++2m", "dpm++2m-sde"] = Field(
        "ddpm",
        description="DDPM, DDIM (of a flow model: Euler), DPM-Solver++(2M), or its stochastic form (sde): samples like"
        " DDPM in a fifth of the steps",
    )
    num_inference_steps: Positive = Field(100, description="number of denoising steps")  # MI-TUNE's released code
    guidance_scale: float = Field(
        7.5,
        ge=1,
        description="scale w of classifier-free guidance, unconditional + w (conditional - unconditional); 1: no"
        " guidance, half the evaluations, no on-trajectory scores",
    )  # 7.5: released code
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = Field(
        None, description="spacing of the timesteps, as in diffusers; none: that of the model's scheduler"
    )
    guidance_interval: tuple[float, float] | None = Field(
        None,
        description="(lower, upper) log SNR of the steps with guidance; other steps cost one evaluation instead of"
        " two; none: guidance at all steps",
    )  # Kynkaanniemi et al. 2024, arXiv 2404.07724
    guidance_method: GuidanceMethod | None = Field(
        None,
        description="method that changes the steps with guidance: attend-and-excite, structured (structured diffusion"
        " guidance), semantic (semantic-aware guidance), perturbed-attention, cfg-zero-star, contrastive (away from"
        " hard negatives of the prompt); none: classifier-free guidance alone",
    )
    guidance_settings: GuidanceConfig = GuidanceConfig()
    best_of: BestOfConfig = BestOfConfig()

    @property
    def branches(self) -> int:
        """Number of predictions per step: 1 without guidance, 2 with guidance."""
        return 1 if self.guidance_scale == 1 else 2

    @property
    def evaluations(self) -> float:
        """Denoiser evaluations per step and candidate; see `GuidanceConfig.extra_evaluations`."""
        return self.branches + self.guidance_settings.extra_evaluations(self.guidance_method)

    @model_validator(mode="after")
    def _guided(self):
        faults = []
        if self.guidance_interval and self.guidance_interval[0] >= self.guidance_interval[1]:
            faults.append(f"guidance_interval is {self.guidance_interval}, but it must be (lower, upper); swap them")
        if self.guidance_method and self.branches == 1:
            faults.append(
                f"guidance_method is {self.guidance_method}, but it needs guidance and guidance_scale is 1: raise"
                " guidance_scale, or set guidance_method to none"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @model_serializer(mode="wrap")
    def _without_unset_methods(self, serialize: SerializerFunctionWrapHandler) -> dict:
        """Leave out what is not used: then the hash of runs without a method or best-of-N is stable."""
        values = serialize(self)
        unused = set() if self.guidance_method else {"guidance_method", "guidance_settings"}
        unused |= set() if self.best_of.candidates else {"best_of"}
        return {name: value for name, value in values.items() if name not in unused}


class ScoreConfig(Section):
    """The scores of each candidate. On-trajectory scores are free. Pointwise (pmi) scores cost denoiser evaluations."""

    names: tuple[ScoreName, ...] = Field(
        ("mitune", "mitune_eq2"),
        description="scores to compute, in nats (asd: no unit); each one fills the column score_<name>",
    )
    log_snr_min: float = Field(
        -5.0, description="lower end of the log SNR band of the pmi scores and of trajectory_banded"
    )
    log_snr_max: float = Field(
        -1.7, description="upper end of this log SNR band"
    )  # measured on the embedded model: below -1.7 the layout is decided
    banded: Literal["mitune", "mitune_eq2", "asd", "rfmi", "rfmi_guided", "flow_difference"] = Field(
        "mitune", description="on-trajectory score that trajectory_banded computes within the band"
    )
    num_samples: Positive = Field(12, description="number of noise samples per candidate, for pointwise scores")
    sampling: Literal["band", "logistic"] = Field(
        "band", description="log SNRs of the pmi scores: band: evenly in the band; logistic: mostly near logistic_loc"
    )
    logistic_loc: float = Field(
        1.0, description="mean of the logistic distribution, log SNR"
    )  # this and the next two: ITD's, for SD2.1
    logistic_scale: float = Field(2.0, gt=0, description="scale of the logistic distribution, log SNR")
    logistic_clip: float = Field(
        3.0,
        gt=0,
        description="log SNRs farther than this many scales from logistic_loc are not used, even if in the band",
    )
    levels: Literal["midpoints", "jittered", "random"] = Field(
        "midpoints",
        description="log SNRs: midpoints: centres of equal strata; jittered: a random place in each stratum"
        " (unbiased); random: independent",
    )
    antithetic: bool = Field(
        False, description="use each noise sample twice, as it is and with the sign changed; num_samples counts both"
    )
    neighbours: Positive = Field(
        5, description="pmi_contrastive: number of other prompts, the nearest in the text encoder's space"
    )
    negatives: str = Field(
        "auto",
        pattern="^(auto|shapes|text|spacy(:.+)?)$",
        description="pmi_negatives: method that changes one thing in a prompt: shapes (its grammar), text (a lexicon),"
        " spacy, spacy:MODEL; auto: shapes for prompts of the shapes grammar, else text",
    )
    max_negatives: Positive = Field(
        8,
        description="pmi_negatives: maximum number of hard negatives (changed prompts); each costs one evaluation per"
        " noise sample",
    )
    shortlist: Positive | None = Field(
        None,
        description="number of neighbours or hard negatives per candidate that are evaluated with every noise sample:"
        " the most likely ones; none: all of them",
    )
    shortlist_samples: Positive = Field(
        3,
        description="number of noise samples that choose the shortlist; neighbours and negatives outside it are"
        " evaluated with these only",
    )

    @model_validator(mode="after")
    def _band(self):
        check_band(self.log_snr_min, self.log_snr_max)
        faults = [] if self.names else ["names is empty, but the report shows a score: give at least one"]
        low, high = self.probed_band
        if low >= high:
            faults.append(
                f"logistic_loc is {self.logistic_loc}, and no log SNR within its clip lies in the band"
                f" {self.log_snr_min} to {self.log_snr_max}; change logistic_loc or the band"
            )
        drawn = {"num_samples": self.num_samples} | (
            {"shortlist_samples": self.shortlist_samples} if self.shortlist else {}
        )
        faults += [
            f"{name} is {count}, but antithetic samples come in pairs; use an even number"
            for name, count in drawn.items()
            if self.antithetic and count % 2
        ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def probed_band(self) -> tuple[float, float]:
        """The log SNR range over which the pmi scores integrate."""
        if self.sampling == "band":
            return self.log_snr_min, self.log_snr_max
        reach = self.logistic_clip * self.logistic_scale
        return max(self.log_snr_min, self.logistic_loc - reach), min(self.log_snr_max, self.logistic_loc + reach)


class GenerateConfig(Section):
    """The candidates of each prompt."""

    candidates_per_prompt: Annotated[int, Field(ge=2)] = Field(
        50, description="number of candidates per prompt"
    )  # MI-TUNE section 4
    prompts_per_shard: Positive = Field(8, description="number of prompts in one shard (one file, written atomically)")
    alignment: MetricNames = Field(
        (), description=f"metrics measured on every candidate (decodes all of them); one name or a list: {METRIC_NAMES}"
    )
    preview_prompts: Annotated[int, Field(ge=0)] = Field(
        12, description="number of prompts whose candidates are all stored as images, for the report"
    )


class SelectConfig(Section):
    """The selection of candidates for fine-tuning."""

    by: MetricName = Field(
        "mitune",
        description="score or metric that ranks the candidates: one of score.names or of generate.alignment, or random",
    )
    top_k: Positive = Field(1, description="maximum number of kept candidates per prompt")  # MI-TUNE: 1
    min_score: float | None = Field(
        None,
        description="lowest score of a kept candidate, if select.by is a score; none: keep the best, with any score",
    )
    balance: bool = Field(
        False, description="true: every prompt has the same total weight, whatever the number of its kept candidates"
    )
