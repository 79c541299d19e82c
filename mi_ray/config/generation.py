"""The configuration of what is generated: prompts, model, sampler, scores, pools, pruning, selection."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from mi_ray.config.section import Positive, Section, Share, check_band

TRAJECTORY_SCORES = ("mitune", "mitune_eq2", "asd", "trajectory_banded")
POINTWISE_SCORES = ("pmi", "pmi_orthogonal", "pmi_contrastive", "pmi_negatives")
ScoreName = Literal[
    "mitune", "mitune_eq2", "asd", "trajectory_banded", "pmi", "pmi_orthogonal", "pmi_contrastive", "pmi_negatives"
]
Control = Literal["random", "oracle"]


MODEL = (
    "a shipped model (shapes), a diffusers folder or a hub id; owner/name@revision pins it to a branch, tag or commit"
)


def without_revision(path: str) -> str:
    """A hub id without the revision that it is pinned to; any other model as it is."""
    name, _, revision = path.partition("@")
    return name if revision and name.count("/") == 1 and not Path(path).is_dir() else path


def pinned(path: str, commit: str | None) -> str:
    """A hub id, pinned to a commit, which without_revision takes off; any other model, which has none, as it is."""
    return f"{without_revision(path)}@{commit}" if commit else path


class PromptsConfig(Section):
    """The prompts to align the model with."""

    file: str = Field(
        description="prompts: .txt (one a line), .jsonl or .parquet (columns prompt, category); local, s3:// or gs://"
    )
    limit: Positive | None = Field(None, description="take the first so many")
    duplicates: Literal["error", "drop"] = Field("error", description="what to do with a repeated prompt")
    overlong: Literal["error", "skip", "truncate"] = Field(
        "error", description="what to do with a prompt longer than the text encoder reads"
    )
    broken: Literal["error", "skip"] = Field(
        "error", description="what to do with a line that holds no prompt or is no text"
    )


HEIGHT = "of the images in pixels, a multiple of what the model needs; none: the model's own height"
WIDTH = "likewise; none: the model's own width"


class ModelConfig(Section):
    """The model to align."""

    path: str = Field("shapes", description=MODEL)
    height: Positive | None = Field(None, description=HEIGHT)
    width: Positive | None = Field(None, description=WIDTH)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="of the denoiser; auto: float16 on a GPU, float32 without. Solver and scores are fp32"
    )
    kernel: Literal["auto", "eager", "triton"] = Field(
        "auto", description="of the solver step; triton: fused, needs a CUDA GPU; auto: triton where it can run"
    )
    channels_last: bool = Field(False, description="memory layout of the UNet; faster convolutions on tensor cores")
    compile: Literal["default", "cuda-graphs"] | None = Field(
        None, description="torch.compile of the denoiser, minutes at the start; partial batches are filled up"
    )

    @property
    def size(self) -> tuple[int | None, int | None]:
        """Height and width in pixels; None: the model's own."""
        return self.height, self.width

    @model_serializer(mode="wrap")
    def _without_unset_size(self, serialize: SerializerFunctionWrapHandler) -> dict:
        """A height or width that is not set is left out: it changes no hash of a run at the model's own size."""
        values = serialize(self)
        return {name: value for name, value in values.items() if value is not None or name not in ("height", "width")}


class SamplerConfig(Section):
    """How candidates are sampled. Default: the paper's (DDPM, 100 steps, guidance 7.5)."""

    solver: Literal["ddpm", "ddim", "dpm++2m", "dpm++2m-sde"] = Field(
        "ddpm", description="DDPM, DDIM, DPM-Solver++(2M) or its stochastic form: DDPM's in a fifth of the steps"
    )
    num_inference_steps: Positive = Field(100, description="denoising steps")  # MI-TUNE's released code
    guidance_scale: float = Field(7.5, gt=1, description="above 1: the score needs both branches")  # released code
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = Field(
        None, description="as diffusers names it; default: what the model's scheduler says"
    )
    guidance_interval: tuple[float, float] | None = Field(
        None, description="of log SNR: guided only there, elsewhere one evaluation instead of two; none: everywhere"
    )  # Kynkaanniemi et al. 2024, arXiv 2404.07724

    @model_validator(mode="after")
    def _interval(self):
        if self.guidance_interval and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is (lower, upper), and {self.guidance_interval} is none; swap them")
        return self


class ScoreConfig(Section):
    """Which scores each candidate gets. On-trajectory ones are free; pointwise ones cost denoiser evaluations."""

    names: tuple[ScoreName, ...] = Field(("mitune", "mitune_eq2"), description="columns score_<name>, in nats")
    log_snr_min: float = Field(-5.0, description="lower end of the band of the pmi scores and trajectory_banded")
    log_snr_max: float = Field(-1.7, description="upper end of the band")  # METHOD: layout is decided below -1.7
    banded: Literal["mitune", "mitune_eq2", "asd"] = Field(
        "mitune", description="the on-trajectory score that trajectory_banded restricts to the band"
    )
    num_samples: Positive = Field(12, description="noise draws a candidate, pointwise scores")
    sampling: Literal["band", "logistic"] = Field(
        "band", description="where in the band the pmi scores probe: evenly, or most about logistic_loc"
    )
    logistic_loc: float = Field(1.0, description="log SNR probed most")  # this and the next two: ITD's, for SD2.1
    logistic_scale: float = Field(2.0, gt=0, description="spread of log SNR about it")
    logistic_clip: float = Field(3.0, gt=0, description="nothing beyond so many scales from it counts, band or not")
    levels: Literal["midpoints", "jittered", "random"] = Field(
        "midpoints",
        description="log SNRs at the centres of equal strata, at a random place in each (unbiased), or independent",
    )
    antithetic: bool = Field(False, description="use each noise twice, also mirrored; num_samples counts both")
    neighbours: Positive = Field(5, description="pmi_contrastive: other prompts nearest in the text encoder's space")
    negatives: str = Field(
        "auto",
        pattern="^(auto|shapes|text|spacy(:.+)?)$",
        description="pmi_negatives: who changes the prompt in one thing: shapes, text, spacy, spacy:MODEL; auto: shapes"
        " for its prompts, else text",
    )
    max_negatives: Positive = Field(8, description="pmi_negatives: so many changed prompts at most, one branch each")
    shortlist: Positive | None = Field(
        None, description="so many neighbours or negatives, a candidate's likeliest, meet all noise draws; none: all do"
    )
    shortlist_samples: Positive = Field(3, description="noise draws by which they are found: all others meet no more")

    @model_validator(mode="after")
    def _band(self):
        check_band(self.log_snr_min, self.log_snr_max)
        faults = []
        low, high = self.probed_band
        if low >= high:
            faults.append(
                f"logistic_loc {self.logistic_loc} with its clip reaches nothing of the band {self.log_snr_min} to"
                f" {self.log_snr_max}; move it or the band"
            )
        drawn = {"num_samples": self.num_samples} | (
            {"shortlist_samples": self.shortlist_samples} if self.shortlist else {}
        )
        faults += [
            f"{name} is {count}, and antithetic samples come in pairs; make it even"
            for name, count in drawn.items()
            if self.antithetic and count % 2
        ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def probed_band(self) -> tuple[float, float]:
        """The log SNRs over which the pmi scores integrate."""
        if self.sampling == "band":
            return self.log_snr_min, self.log_snr_max
        reach = self.logistic_clip * self.logistic_scale
        return max(self.log_snr_min, self.logistic_loc - reach), min(self.log_snr_max, self.logistic_loc + reach)


class GenerateConfig(Section):
    """The pool of candidates."""

    candidates_per_prompt: Annotated[int, Field(ge=2)] = Field(50, description="pool size")  # MI-TUNE section 4
    prompts_per_shard: Positive = Field(8, description="prompts in one atomically written file")
    alignment: Literal["oracle"] | None = Field(
        None, description="measure every candidate too (decodes all of them); oracle: shapes prompts only"
    )
    preview_prompts: Annotated[int, Field(ge=0)] = Field(
        12, description="prompts all of whose candidates are decoded and kept as images for the report"
    )


class PruneConfig(Section):
    """Successive halving: candidates that score low on the way are not sampled to the end. Off unless `by` is set."""

    by: ScoreName | None = Field(
        None, description="score of the curves so far, or (pmi, pmi_contrastive) of the clean latents predicted so far"
    )
    # METHOD: after a fifth of the steps the contrastive score ranks nearly as well as at the end
    after: tuple[Share, ...] = Field((0.2,), description="shares of the sampling steps after which a pool is cut")
    keep: tuple[Share, ...] = Field((0.25,), description="share of the whole pool that goes on after each cut")
    num_samples: Positive = Field(6, description="noise draws a candidate at a cut, pointwise scores")

    @model_validator(mode="after")
    def _schedule(self):
        faults = []
        if not self.after or len(self.after) != len(self.keep):
            faults.append(f"after has {len(self.after)} cuts and keep {len(self.keep)}; give one share of each a cut")
        if any(a >= b for a, b in zip((0, *self.after), (*self.after, 1), strict=True)):
            faults.append(f"after is {self.after}; the shares must lie between 0 and 1 and rise")
        if any(a <= b for a, b in zip((1, *self.keep), (*self.keep, 0), strict=True)):
            faults.append(f"keep is {self.keep}; the shares must lie between 0 and 1 and fall")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def cuts(self, steps: int, pool: int) -> dict[int, int]:
        """{after so many of the steps: how many of the pool's candidates go on}; none if off."""
        if self.by is None:
            return {}
        after = [min(max(1, round(share * steps)), steps) for share in self.after]
        keep = [math.ceil(share * pool - 1e-9) for share in self.keep]
        return {step: count for step, count in zip(after, keep, strict=True) if step < steps and count < pool}

    def candidate_steps(self, steps: int, pool: int) -> int:
        """Steps that the candidates of one prompt take together."""
        cuts = self.cuts(steps, pool)
        bounds, counts = [0, *cuts, steps], [pool, *cuts.values()]
        return sum(count * (end - start) for count, start, end in zip(counts, bounds, bounds[1:], strict=False))


class SelectConfig(Section):
    """Which candidates are kept."""

    by: ScoreName | Control = Field("mitune", description="a score, or a control: random, oracle")
    top_k: Positive = Field(1, description="kept per prompt, at most")  # MI-TUNE: 1
    min_score: float | None = Field(
        None, description="keep only what reaches this value of the score, in nats; none: the best, however bad"
    )
    balance: bool = Field(False, description="weigh every prompt alike, however many of its candidates are kept")
