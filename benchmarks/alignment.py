"""Alignment methods on one model: python benchmarks/alignment.py [--training '[nft]'] [--run-dir DIR] [--smoke]

Every method samples the same prompts with the same image seeds, at the guidance scale where the base model is best:
inference-time methods, best-of-N, and models fine-tuned by each method with each training seed. The table has the mean
of the first metric and its paired difference to the base model, by split and category, with PMI, image quality,
diversity and effective guidance, and the cost in denoiser evaluations and seconds. A method may act like a higher
guidance scale. For this reason the base model at the effective guidance times the scale is a row of its own.

The results are files in one folder. The same command continues an interrupted run; a finished part is not repeated.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from alignment_page import write_page
from gates import ROOT, Benchmark, Findings, Gate, LocalPath, main
from guidance import finished_run
from pydantic import Field, PositiveInt
from tqdm import tqdm

from mi_ray import storage
from mi_ray.alignment.encoder import load_encoder
from mi_ray.alignment.metric import Column, check_prompts, load_metrics, measure, reference_of
from mi_ray.config import GUIDANCE_METHODS, GuidanceMethod, MethodName, RunConfig, SamplerConfig
from mi_ray.config.command_line import load_config
from mi_ray.config.section import ConfigError, config_hash
from mi_ray.diffusion.denoisers import PipelineDenoiser, load_denoiser
from mi_ray.guidance.methods import family_fault
from mi_ray.inputs.images import encode_png
from mi_ray.inputs.prompts import read_prompts
from mi_ray.inputs.shard_plan import with_details
from mi_ray.report.columns import PMI
from mi_ray.report.columns import scale as scale_of
from mi_ray.report.guidance import SCALE, best_scale
from mi_ray.report.statistics import cosine_diversity, diversity, kernel_distance, paired_difference, prompt_mean
from mi_ray.scoring.best_of import sampler_of
from mi_ray.scoring.sampler import Sampler, batch_at_size, derived_seed
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work

CONFIGS = ROOT / "jobs" / "configs"
PROMPTS_AT_A_TIME, PROBED_PROMPTS, PROBED_STEPS = 15, 30, 4
SEEDS_OF_A_CLAIM = 3
BASE = "base"
BEST_OF = {
    "best-of-4": {"candidates": 4, "by": "pmi_negatives"},
    "best-of-8, pruned": {
        "candidates": 8,
        "by": "pmi_negatives",
        "prune": {"by": "pmi_negatives", "after": [0.25], "keep": [0.25], "num_samples": 3},
    },
}
SMOKE = {
    "prompts": 3, "images_per_prompt": 2, "steps": 3, "guidance_scales": (2.0, 4.0), "training_seeds": (0,)
}  # fmt: skip
# Flags of a smoke training: a few rows, the same code.
SMOKE_ONLINE = (
    "--online.updates 1 --online.prompts-per-update 2 --online.validate-every 1 --online.validation-prompts 0"
)
SMOKE_ROUNDS = "--prompts.limit 2 --generate.candidates-per-prompt 4 --select.top-k 2 --finetune.steps 2"


@dataclass(frozen=True)
class Arm:
    """One row: a model and a sampler."""

    name: str
    settings: SamplerConfig
    adapter: str | None = None  # local folder; None: the base model
    seed: int | None = None  # of the training

    @property
    def key(self) -> str:
        """Name of its folder."""
        of_seed = "" if self.seed is None else f"-seed-{self.seed}"
        return f"{self.name}{of_seed}-at-{self.settings.guidance_scale:g}".replace(", ", "-").replace(" ", "-")


class AlignmentBenchmark(Benchmark):
    """Which method makes the images of a model follow their prompts best, and what does it cost?"""

    config: LocalPath = Field(CONFIGS / "shapes.yaml", description="config of the model, the prompts and the trainings")
    rounds_config: LocalPath = Field(
        CONFIGS / "shapes-paper.yaml", description="config of the trainings of `supervised`, which has rounds"
    )
    flags: str = Field(
        "", description="further flags of the config and of all trainings, such as '--evaluation.file FILE'"
    )
    run_dir: LocalPath = Field(ROOT / "runs" / "alignment", description="folder of all results")
    methods: tuple[GuidanceMethod, ...] = Field(GUIDANCE_METHODS, description="inference-time methods")
    best_of: bool = Field(True, description="best-of-N by pmi_negatives, with and without pruning")
    training: tuple[MethodName, ...] = Field(get_args(MethodName), description="fine-tuning methods; []: none")
    training_seeds: tuple[int, ...] = Field((0, 1, 2), description="seeds of each training; three for a claim")
    guidance_scale: float | None = Field(
        None, gt=1, description="scale of the comparison; none: the best of guidance_scales for the base model"
    )
    guidance_scales: tuple[float, ...] = Field((1.5, 2.5, 4.0, 6.0), description="scales of the base model's curve")
    curves: bool = Field(False, description="sample every method at all guidance scales, not only the base model")
    prompts: PositiveInt = Field(360, description="number of evaluation prompts, evenly spaced in the file")
    images_per_prompt: PositiveInt = Field(4, description="number of image seeds per prompt, the same for all rows")
    steps: PositiveInt | None = Field(None, description="number of sampling steps; none: that of the config")
    batch_size: PositiveInt = Field(64, description="number of candidates in one denoiser batch")

    def answer(self) -> Findings:
        if self.smoke:
            return self.model_copy(update=SMOKE | {"smoke": False})._answer(smoke=True)
        return self._answer(smoke=False)

    def _answer(self, smoke: bool) -> Findings:
        self._check_folder()
        scale, frames = self.guidance_scale, {}
        for each in self.guidance_scales:
            arm = Arm(BASE, self._sampler(each))
            frames[arm] = self._draw(arm)
        if scale is None:
            curve = [{SCALE: a.settings.guidance_scale, **prompt_mean(f, self.column.name)} for a, f in frames.items()]
            scale = best_scale(curve, self.column)
        arms = [arm for at in (self.guidance_scales if self.curves else (scale,)) for arm in self._arms(at)]
        arms += [arm for at in (self.guidance_scales if self.curves else (scale,)) for arm in self._trained(at, smoke)]
        base = Arm(BASE, self._sampler(scale))
        frames |= {arm: self._draw(arm) for arm in (base, *arms) if arm not in frames}
        gammas = {arm: self._gamma(arm, frames[base]) for arm in frames if arm.settings.guidance_scale == scale}
        for wanted in sorted({round(4 * gamma * scale) / 4 for gamma in gammas.values()} - {scale}):
            if wanted > 1:
                arm = Arm(BASE, self._sampler(wanted))
                frames |= {} if arm in frames else {arm: self._draw(arm)}
        rows = [self._row(name, of_name, frames, base, gammas) for name, of_name in _grouped(frames).items()]
        write_page(self.run_dir / "index.html", rows, frames, base, self.column, sys.argv)
        seeds = min((row["training_seeds"] for row in rows if row["training_seeds"]), default=None)
        gates = {} if seeds is None else {"training_seeds_of_a_claim": Gate(seeds, minimum=SEEDS_OF_A_CLAIM)}
        return Findings(rows, gates)

    # ------------------------------------------------------------------------------------------ what is compared
    @cached_property
    def run(self) -> RunConfig:
        place = ["--config", str(self.config), "--run-dir", str(self.run_dir / "unused")]
        try:
            config, _ = load_config([*place, *shlex.split(self.flags)])
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if not config.evaluation.alignment or not config.evaluation.file:
            raise ValueError("config: set evaluation.file and evaluation.alignment; their prompts and metric are used")
        return config

    @cached_property
    def metrics(self):
        return load_metrics(self.run.evaluation.alignment)

    @property
    def column(self) -> Column:
        """The first column of the first metric, the headline."""
        return next(iter(self.metrics.values())).columns[0]

    @cached_property
    def table(self):
        """The evaluation prompts."""
        table, _ = read_prompts(self.run.evaluation.file, field="config", duplicates="drop")
        places = np.linspace(0, len(table) - 1, min(self.prompts, len(table))).round().astype(int)
        check_prompts(self.metrics, with_details(table.take(places)))
        return table.take(places)

    @cached_property
    def base(self) -> PipelineDenoiser:
        denoiser = load_denoiser(self.run.model.path, self.run.model.dtype, size=self.run.model.size)
        denoiser.specialise(channels_last=self.run.model.channels_last, compiled=None, rows=())
        faults = [fault for method in self.methods if (fault := family_fault(method, denoiser.family))]
        if faults:
            raise ValueError("\n".join(f"--methods: {fault}" for fault in faults))
        return denoiser

    def _check_folder(self):
        """Store the settings of the images; refuse a folder with images of others."""
        settings = {
            "run": self.run.results_config(),
            **{name: getattr(self, name) for name in ("prompts", "images_per_prompt", "steps")},
        }
        file, found = str(self.run_dir / "settings.json"), config_hash(settings)
        if storage.exists(file) and storage.read_json(file)["hash"] != found:
            raise ValueError(f"--run-dir: {self.run_dir} has images of other settings; give another folder")
        storage.write_json(file, {"hash": found, "settings": settings})

    def _sampler(self, scale: float, **updates) -> SamplerConfig:
        own = self.run.evaluation.sampler.model_dump() | {"guidance_scale": scale}
        if self.steps:
            own["num_inference_steps"] = self.steps
        return SamplerConfig.model_validate(own | updates)

    def _arms(self, scale: float) -> list[Arm]:
        arms = [Arm(method, self._sampler(scale, guidance_method=method)) for method in self.methods]
        if self.best_of:
            arms += [Arm(name, self._sampler(scale, best_of=settings)) for name, settings in BEST_OF.items()]
        return arms

    def _trained(self, scale: float, smoke: bool) -> list[Arm]:
        arms = []
        for method in self.training:
            for seed in self.training_seeds:
                folder = str(self.run_dir / "training" / f"{method}-{seed}")
                rounds = method == "supervised"
                command = ["--config", self.rounds_config if rounds else self.config, "--run-dir", folder]
                command += ["--seed", str(seed), "--evaluation.controls", "none", *shlex.split(self.flags)]
                command += [] if rounds else ["--finetune.method", method]
                command += (SMOKE_ROUNDS if rounds else SMOKE_ONLINE).split() if smoke else []
                done = subprocess.run([sys.executable, "jobs/finetune.py", *map(str, command)], cwd=ROOT)
                if done.returncode:
                    raise ValueError(f"the training {folder} ended with exit status {done.returncode}")
                arms.append(Arm(method, self._sampler(scale), finished_run(folder)[1]["tuned"], seed))
        return arms

    # ------------------------------------------------------------------------------------------ images
    @torch.no_grad()
    def _draw(self, arm: Arm) -> pd.DataFrame:
        """The images of an arm, one row each; parts that exist are read."""
        drawing, sampler, parts = None, None, []
        for start in tqdm(range(0, len(self.table), PROMPTS_AT_A_TIME), desc=arm.key, leave=False):
            file = str(self.run_dir / "images" / arm.key / f"part-{start:05}.parquet")
            if not storage.exists(file):
                if sampler is None:
                    drawing = self._model(arm)
                    size = batch_at_size(drawing, self.batch_size)
                    sampler = sampler_of(self.run, arm.settings, drawing, self.base, size)
                rows = self._rows(sampler, self.table.slice(start, PROMPTS_AT_A_TIME))
                storage.write_table(file, pa.Table.from_pandas(rows))
            parts.append(pd.read_parquet(file))
        return pd.concat(parts, ignore_index=True)

    def _model(self, arm: Arm) -> PipelineDenoiser:
        if arm.adapter is None:
            return self.base
        model = self.run.model
        return load_denoiser(model.path, model.dtype, adapter=arm.adapter, beside=self.base, size=model.size)

    @cached_property
    def scorer(self) -> Scorer:
        only_pmi = self.run.score.model_copy(update={"names": ("pmi",)})
        return Scorer(self.base, only_pmi, batch_at_size(self.base, self.batch_size), self.run.seed, [])

    def _rows(self, sampler, table) -> pd.DataFrame:
        """Images of some prompts with their measurements. The cost is per image and without the measurements: on a CPU
        the process's CPU time, which other processes on the machine do not change."""
        prompts, ids, each = table["prompt"].to_pylist(), table["prompt_id"].to_pylist(), self.images_per_prompt
        seeds = [[derived_seed(self.run.seed, "evaluation", i, k) for k in range(each)] for i in ids]
        conditioning, work, count = self.base.encode_prompts(prompts), Work(), len(ids) * each
        clock = time.process_time if self.base.device.type == "cpu" else time.perf_counter
        began = clock()
        sampled = sampler(conditioning, seeds, work, prompts=prompts)
        seconds = clock() - began
        index = torch.arange(len(prompts)).repeat_interleave(each)
        images = self.base.decode(sampled.latents)
        features = load_encoder(self.run.evaluation.encoder, self.base.encode_images).features(images)
        columns = {name: np.repeat(table[name].to_pylist(), each) for name in ("prompt_id", "prompt", "category")}
        splits = table["split"].to_pylist() if "split" in table.column_names else [None] * len(ids)
        columns |= {
            "split": np.repeat(splits, each),
            "seed": [seed for of_prompt in seeds for seed in of_prompt],
            **measure(self.metrics, images, [prompt for prompt in with_details(table) for _ in range(each)]),
            PMI.name: self.scorer(prompts, conditioning, index, sampled, Work())["score_pmi"],
            "evaluations": [(work.denoiser_evaluations + work.score_evaluations) / count] * count,
            "seconds": [seconds / count] * count,
            "features": list(features),
            "latents": list(sampled.latents.cpu().numpy().reshape(count, -1)),
            "image": [encode_png(image)["bytes"] for image in images],
        }
        return pd.DataFrame(columns)

    # ------------------------------------------------------------------------------------------ results
    @torch.no_grad()
    def _gamma(self, arm: Arm, base_images: pd.DataFrame) -> float:
        """The effective guidance of an arm relative to its guidance scale, on noised images of the base model.

        gamma = <(g - u) / w, c - u> / ||c - u||^2, summed over images and noise levels: g is the prediction that the
        solver follows, and c and u are the base model's predictions. Of a fine-tuned model g = u + w (its prediction
        - u). Best-of-N has 1, and Attend-and-Excite too, which changes the latents and not the prediction.
        """
        settings, some = arm.settings, base_images.groupby("prompt_id", sort=False).head(1).head(PROBED_PROMPTS)
        model, base, scale = self._model(arm), self.base, arm.settings.guidance_scale
        if settings.guidance_method in (None, "attend-and-excite") and arm.adapter is None:
            return 1.0
        sampler, prompts = Sampler(model, settings, self.batch_size), some["prompt"].tolist()
        conditioning = base.encode_prompts(prompts)
        guide = sampler.guide_of(prompts, conditioning) if sampler.guide_of else None
        clean = torch.from_numpy(np.stack(some["latents"])).view(-1, *base.latent_shape).to(base.device)
        generator, along, squared = torch.Generator().manual_seed(0), 0.0, 0.0
        for step in np.linspace(0, len(sampler.plan.timesteps) - 1, PROBED_STEPS + 2)[1:-1].round().astype(int):
            alpha, sigma = sampler.plan.coefficients[step, 4:].tolist()
            x_t = alpha * clean + sigma * torch.randn(clean.shape, generator=generator).to(clean.device)
            level = sampler.plan.timesteps[step].to(base.device).expand(len(x_t))
            c = base.predict(x_t, level, conditioning).float()
            u = base.predict(x_t, level, sampler.null.expand(len(x_t))).float()
            if guide:
                own, null = guide.predictions(int(step), x_t)
                followed = guide.combined(int(step), null + scale * (own - null), own, null).float()
            else:
                followed = u + scale * (model.predict(x_t, level, conditioning).float() - u)
            along += ((followed - u) / scale * (c - u)).sum().item()
            squared += (c - u).square().sum().item()
        return along / squared

    def _row(self, name: str, arms: list[Arm], frames: dict[Arm, pd.DataFrame], base: Arm, gammas: dict) -> dict:
        """The results of a method, over all its training seeds: means, and paired differences to the base model."""
        images, reference, column = pd.concat([frames[arm] for arm in arms]), frames[base], self.column
        seeds, times = [arm.seed for arm in arms if arm.seed is not None], scale_of(column)
        row = {"method": name, SCALE: arms[0].settings.guidance_scale, "training_seeds": len(seeds)}
        row |= {"evaluations": images["evaluations"].mean(), "seconds": images["seconds"].mean()}
        row[column.name] = times * prompt_mean(images, column.name)["value"]
        groups = {"gain": images} | {f"gain_{k}": f for key in ("split", "category") for k, f in images.groupby(key)}
        for label, some in groups.items() if arms[0] != base else ():
            if found := paired_difference(some, reference, column.name):
                half = None if found["high"] is None else times * (found["high"] - found["low"]) / 2
                row |= {label: times * found["difference"], f"{label}_half": half}
        if len(seeds) > 1:  # the gain of each training
            each = [paired_difference(frames[arm], reference, column.name)["difference"] for arm in arms]
            row |= {"lowest_gain_of_a_seed": times * min(each), "highest_gain_of_a_seed": times * max(each)}
        row[PMI.name] = prompt_mean(images, PMI.name)["value"]
        row["gamma"] = float(np.mean([gammas[arm] for arm in arms])) if arms[0] in gammas else None
        row |= self._quality([frames[arm] for arm in arms], reference)
        return row

    def _quality(self, frames: list[pd.DataFrame], base: pd.DataFrame) -> dict:
        """Kernel distance to real images, or to those of the base model, and diversity in per cent of the base model's;
        means over the frames. As in the report."""
        named, own = bool(self.run.evaluation.encoder), np.stack(base["features"])
        real = own if self.real_features is None else self.real_features

        def spread(images: pd.DataFrame) -> float | None:
            features, ids = np.stack(images["features"]), images["prompt_id"].to_numpy()
            return cosine_diversity(features, ids) if named else diversity(features, ids, own)

        distances = [kernel_distance(np.stack(images["features"]), real, standard=not named) for images in frames]
        spreads, whole = [spread(images) for images in frames], spread(base)
        found = {"kernel_distance": _mean(distances), "diversity": _mean(spreads)}
        return found | {"diversity": 100 * found["diversity"] / whole if whole and found["diversity"] else None}

    @cached_property
    def real_features(self) -> np.ndarray | None:
        """Features of real images of the prompts, if the first metric has them."""
        draw = reference_of(self.metrics)
        if draw is None:
            return None
        prompts, ids = self.table["prompt"].to_pylist(), self.table["prompt_id"].to_pylist()
        images = [
            draw(prompt, derived_seed(self.run.seed, "evaluation", i, k))
            for prompt, i in zip(prompts, ids, strict=True)
            for k in range(self.images_per_prompt)
        ]
        return load_encoder(self.run.evaluation.encoder, self.base.encode_images).features(np.stack(images))


def _grouped(frames: dict[Arm, pd.DataFrame]) -> dict[str, list[Arm]]:
    """The arms of each row: those that differ in the training seed only."""
    groups: dict[str, list[Arm]] = {}
    for arm in frames:
        groups.setdefault(f"{arm.name} at {arm.settings.guidance_scale:g}", []).append(arm)
    return groups


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


if __name__ == "__main__":
    main(AlignmentBenchmark)
