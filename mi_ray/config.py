"""The configuration of a run."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mi_ray.section import Positive, Section, Share, check_band, config_hash

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


class ModelConfig(Section):
    """The model to align."""

    path: str = Field("shapes", description=MODEL)
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


class FinetuneConfig(Section):
    """LoRA/DoRA fine-tuning on the kept candidates. Defaults: MI-TUNE's released code for SD2.1."""

    adapter: Literal["lora", "dora"] = Field("lora", description="DoRA: Liu et al. 2024, arXiv 2402.09353")
    rank: Positive = Field(32, description="of the adapter's matrices")
    alpha: Positive = Field(32, description="the adapter is scaled by alpha / rank")
    target_modules: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), description="ends of the names of the layers that get an adapter"
    )
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW")
    lr_warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="optimiser steps of linear warm-up")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up; cosine: down to 0")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="save a moving average of the weights, less swayed by the last batches; none: the last",
    )
    baseline: Share = Field(
        0.0,
        description="how much is taken off of what learning from a random selection of the same pool does: learning"
        " from its own images changes a model whatever is chosen",
    )
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW")
    steps: Positive = Field(300, description="optimiser steps")
    batch_size: Positive = Field(8, description="rows in one batch of one worker")
    gradient_accumulation: Positive = Field(
        50, description="batches in one optimiser step, shared out among the workers"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient is clipped to this norm")
    min_snr_gamma: float | None = Field(None, gt=0, description="Hang et al. 2023, eq. 5; none: plain epsilon loss")
    log_snr_max: float | None = Field(
        None, description="train only at noise levels up to this log SNR, where a prompt decides; none: at all of them"
    )
    activation_checkpointing: bool = Field(
        False, description="activations are computed again in the backward pass: less memory, a third more time"
    )
    prompt_dropout: Share = Field(0.0, description="share of the rows that train without their prompt")
    checkpoint_every: Positive = Field(100, description="optimiser steps")
    max_failures: Annotated[int, Field(ge=-1)] = Field(
        3, description="restarts of the workers, beside those for preempted nodes; -1: no limit"
    )
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description="where losses go besides training.jsonl; the last two by extras"
    )


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
        64, description="candidates in one denoiser batch (twice that with guidance); auto: found by a trial"
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
