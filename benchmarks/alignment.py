"""Alignment methods on one model: python benchmarks/alignment.py [--training '[nft]'] [--run-dir DIR] [--smoke]

Every method samples the same prompts with the same image seeds, at the guidance scale where the base model is best:
inference-time methods, best-of-N, and models fine-tuned by each method with each training seed. The table has the mean
of the first metric and its paired difference to the base model, by split and category, with PMI, image quality,
diversity and effective guidance, and the cost in denoiser evaluations and seconds. A method may act like a higher
guidance scale. For this reason the base model at the effective guidance times the scale is a row of its own.

The settings of every method are chosen on validation prompts that are not in the table, with at most three settings
each: of inference-time methods their own setting, of fine-tuning methods the learning rate with the first training
seed. The guidance scale of the comparison is chosen there, too.

The results are files in one folder. The same command continues an interrupted run; a finished part is not repeated.
"""

import shlex
import sys
import time
from functools import cached_property
from typing import get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from alignment_methods import (
    BASE,
    MI_TUNE,
    ROUNDS,
    TRIED_RATES,
    Arm,
    TrainedMethod,
    Training,
    best_of_arms,
    effective_guidance,
    guidance_arms,
    rate_flags,
)
from alignment_page import write_page
from alignment_rows import table_rows
from gates import ROOT, Benchmark, Findings, Gate, LocalPath, main, metric_details
from pydantic import Field, NonNegativeInt, PositiveInt
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
from mi_ray.report.guidance import SCALE
from mi_ray.report.statistics import prompt_mean
from mi_ray.scoring.best_of import sampler_of
from mi_ray.scoring.sampler import batch_at_size, derived_seed
from mi_ray.scoring.scorer import Scorer
from mi_ray.scoring.work import Work
from mi_ray.training.start import local_start

CONFIGS = ROOT / "jobs" / "configs"
PROMPTS_AT_A_TIME, PROBED_PROMPTS = 15, 30
SEEDS_OF_A_CLAIM = 3
SMOKE = {"prompts": 3, "validation_prompts": 2, "images_per_prompt": 2, "steps": 3}
SMOKE |= {"guidance_scales": (2.0, 4.0), "training_seeds": (0,)}
# Flags of a smoke training: a few rows, the same code.
SMOKE_ONLINE = (
    "--online.updates 1 --online.prompts-per-update 2 --online.validate-every 1 --online.validation-prompts 0"
)
SMOKE_ROUNDS = "--prompts.limit 2 --generate.candidates-per-prompt 4 --select.top-k 2 --finetune.steps 2"


class AlignmentBenchmark(Benchmark):
    """Which method makes the images of a model follow their prompts best, and what does it cost?"""

    config: LocalPath = Field(CONFIGS / "shapes.yaml", description="config of the model, the prompts and the trainings")
    rounds_config: LocalPath = Field(
        CONFIGS / "shapes-paper.yaml",
        description="config of the trainings with rounds, `supervised` and `mi-tune`, for the same model",
    )
    flags: str = Field(
        "", description="further flags of the config and of all trainings, such as '--evaluation.file FILE'"
    )
    run_dir: LocalPath = Field(ROOT / "runs" / "alignment", description="folder of all results")
    methods: tuple[GuidanceMethod, ...] = Field(GUIDANCE_METHODS, description="inference-time methods")
    best_of: bool = Field(True, description="best-of-N by pmi_negatives, with and without pruning")
    training: tuple[TrainedMethod, ...] = Field(
        (*get_args(MethodName), "mi-tune"),
        description="fine-tuning methods; `mi-tune` is `supervised` on the best image of each prompt by the score"
        " `mitune`; []: none",
    )
    training_seeds: tuple[int, ...] = Field((0, 1, 2), description="seeds of each training; three for a claim")
    guidance_scale: float | None = Field(
        None, gt=1, description="scale of the comparison; none: the best of guidance_scales for the base model"
    )
    guidance_scales: tuple[float, ...] = Field((1.5, 2.5, 4.0, 6.0), description="scales of the base model's curve")
    curves: bool = Field(False, description="sample every method at all guidance scales, not only the base model")
    updates: PositiveInt | None = Field(None, description="updates of each online training; none: those of the config")
    validation_prompts: NonNegativeInt = Field(
        60,
        description="evaluation prompts, evenly spaced in the file, on which settings and guidance scale are chosen;"
        " they are not in the table; 0: all settings as published or configured",
    )
    prompts: PositiveInt = Field(300, description="number of the other evaluation prompts, evenly spaced")
    images_per_prompt: PositiveInt = Field(4, description="number of image seeds per prompt, the same for all rows")
    steps: PositiveInt | None = Field(None, description="number of sampling steps; none: that of the config")
    batch_size: PositiveInt = Field(64, description="number of candidates in one denoiser batch")

    def answer(self) -> Findings:
        if self.smoke:
            return self.model_copy(update=SMOKE | {"smoke": False})._answer(smoke=True)
        return self._answer(smoke=False)

    def _answer(self, smoke: bool) -> Findings:
        self._check_trainings(smoke)
        self._check_folder()
        scale = self.guidance_scale or self._best_scale()
        base, arms = Arm(BASE, self._sampler(scale)), self._arms(scale)
        trained = self._trained(scale, smoke)
        frames = {arm: self._draw(arm) for arm in (base.at(each) for each in self.guidance_scales)}
        for at in dict.fromkeys((*self.guidance_scales, scale)) if self.curves else (scale,):
            frames |= {arm.at(at): self._draw(arm.at(at)) for arm in (base, *arms, *trained)}
        gammas = {arm: self._gamma(arm, frames[base]) for arm in frames if arm.settings.guidance_scale == scale}
        for wanted in sorted({round(4 * gamma * scale) / 4 for gamma in gammas.values()} - {scale}):
            if wanted > 1:
                frames |= {base.at(wanted): self._draw(base.at(wanted))}
        rows = table_rows(frames, base, gammas, self.column, self.real_features, bool(self.run.evaluation.encoder))
        write_page(self.run_dir / "index.html", rows, frames, base, self.column, sys.argv, self.tried)
        seeds = min((row["training_seeds"] for row in rows if row["training_seeds"]), default=None)
        gates = {} if seeds is None else {"training_seeds_of_a_claim": Gate(seeds, minimum=SEEDS_OF_A_CLAIM)}
        return Findings(rows, gates, {"tried": self.tried, "metrics": metric_details(self.metrics)})

    # ------------------------------------------------------------------------------------------ what is compared
    @cached_property
    def run(self) -> RunConfig:
        place = ["--config", str(self.config), "--run-dir", str(self.run_dir / "base")]
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
    def validation_table(self) -> pa.Table:
        """The prompts on which settings are chosen."""
        return _spaced(self.prompt_table, self.validation_prompts)[0]

    @cached_property
    def table(self) -> pa.Table:
        """The prompts of the comparison."""
        return _spaced(_spaced(self.prompt_table, self.validation_prompts)[1], self.prompts)[0]

    @cached_property
    def prompt_table(self) -> pa.Table:
        """All evaluation prompts."""
        table, _ = read_prompts(self.run.evaluation.file, field="config", duplicates="drop")
        if len(table) <= self.validation_prompts:
            raise ValueError(
                f"--validation-prompts: {self.run.evaluation.file} has {len(table)} prompts; set aside fewer than those"
            )
        check_prompts(self.metrics, with_details(table))
        return table

    @cached_property
    def base(self) -> PipelineDenoiser:
        """The model before the trainings, with the adapter that they start from."""
        model, start = self.run.model, local_start(self.run)
        denoiser = load_denoiser(model.path, model.dtype, adapter=start, size=model.size)
        denoiser.specialise(channels_last=model.channels_last, compiled=None, rows=())
        faults = [fault for method in self.methods if (fault := family_fault(method, denoiser.family))]
        if faults:
            raise ValueError("\n".join(f"--methods: {fault}" for fault in faults))
        return denoiser

    def _check_trainings(self, smoke: bool):
        """Refuse flags and configs of trainings with faults, and trainings of another model, before anything starts."""
        for method in self.training:
            model = self._training(method, 0, 1.0, smoke)[1].settings().model.path
            if model != self.run.model.path:
                raise ValueError(
                    f"--rounds-config: {self.rounds_config} trains {model!r}, but --config has {self.run.model.path!r};"
                    f" give a config of this model, or leave {' and '.join(ROUNDS)} out of --training"
                )

    def _check_folder(self):
        """Store the settings of the images and the models of the metrics; refuse a folder with images of others."""
        names = ("validation_prompts", "prompts", "images_per_prompt", "steps", "updates")
        settings = {"run": self.run.results_config(), **{name: getattr(self, name) for name in names}}
        settings["metrics"] = metric_details(self.metrics)
        file, found = str(self.run_dir / "settings.json"), config_hash(settings)
        if storage.exists(file) and storage.read_json(file)["hash"] != found:
            raise ValueError(f"--run-dir: {self.run_dir} has images of other settings; give another folder")
        storage.write_json(file, {"hash": found, "settings": settings})

    def _sampler(self, scale: float) -> SamplerConfig:
        own = self.run.evaluation.sampler.model_dump() | {"guidance_scale": scale}
        if self.steps:
            own["num_inference_steps"] = self.steps
        return SamplerConfig.model_validate(own)

    # ------------------------------------------------------------------------------------------ choices
    @cached_property
    def tried(self) -> list[dict]:
        """The settings that were tried, with their means on the validation prompts."""
        return []

    def _best_scale(self) -> float:
        return self._chosen([Arm(BASE, self._sampler(each)) for each in self.guidance_scales]).settings.guidance_scale

    def _chosen(self, arms: list[Arm]) -> Arm:
        """The arm with the best mean on the validation prompts, of equal ones the first. Without validation prompts, on
        the prompts of the comparison: only the guidance scale is chosen then."""
        if len(arms) == 1:
            return arms[0]
        column, draw = self.column, self._draw_validation if self.validation_prompts else self._draw
        means = [prompt_mean(draw(arm), column.name)["value"] for arm in arms]
        best = max(range(len(arms)), key=lambda number: (column.sign * means[number], -number))
        for number, (arm, value) in enumerate(zip(arms, means, strict=True)):
            row = {"method": arm.name, SCALE: arm.settings.guidance_scale, "settings": arm.variant}
            self.tried.append(row | {column.name: scale_of(column) * value, "chosen": number == best})
        return arms[best]

    def _arms(self, scale: float) -> list[Arm]:
        sampler = self._sampler(scale)
        chosen = [self._chosen(guidance_arms(m, sampler, tried=self.validation_prompts > 0)) for m in self.methods]
        return chosen + (best_of_arms(sampler) if self.best_of else [])

    def _trained(self, scale: float, smoke: bool) -> list[Arm]:
        """The trainings of all methods: the first seed with each learning rate, the others with the best one."""
        if not self.training:
            return []
        (first, *others), tune = self.training_seeds, self.validation_prompts and not smoke
        factors, sampler = TRIED_RATES if tune else (1.0,), self._sampler(scale)

        def arm(method: TrainedMethod, seed: int, factor: float) -> Arm:
            variant, training = self._training(method, seed, factor, smoke)
            return Arm(method, sampler, training.run(), seed, variant, training.run_dir)

        arms, chosen = [], {}
        for method in self.training:
            tried = {arm(method, first, factor): factor for factor in factors}
            arms.append(self._chosen(list(tried)))
            chosen[method] = tried[arms[-1]]
        return arms + [arm(method, seed, chosen[method]) for seed in others for method in self.training]

    def _training(self, method: TrainedMethod, seed: int, factor: float, smoke: bool) -> tuple[str, Training]:
        """The training of a method with a multiple of its config's learning rate, and the name of this variant."""
        rounds = method in ROUNDS
        config = self.rounds_config if rounds else self.config
        own = []
        if not rounds:
            own += ["--online.updates", str(self.updates)] if self.updates else []
            # dpok trains on candidates of the current weights, not of an average or of an earlier policy.
            own += ["--online.decay", "[0, 0, 0]", "--online.lag", "0"] if method == "dpok" else []
        if smoke:
            own += (SMOKE_ROUNDS if rounds else SMOKE_ONLINE).split()
        own += shlex.split(MI_TUNE) if method == "mi-tune" else ["--finetune.method", method]
        flags = ["--seed", str(seed), "--evaluation.controls", "none", *shlex.split(self.flags), *own]
        training = Training(str(self.run_dir / "training" / f"{method}-{seed}"), config, tuple(flags))
        variant, of_rate = rate_flags(factor, training.settings().finetune.learning_rate)
        run_dir = "-".join([training.run_dir, *variant.split()])
        return variant, Training(run_dir, config, (*flags, *of_rate))

    # ------------------------------------------------------------------------------------------ images
    def _draw(self, arm: Arm) -> pd.DataFrame:
        return self._drawn(arm, "images", self.table)

    def _draw_validation(self, arm: Arm) -> pd.DataFrame:
        return self._drawn(arm, "validation", self.validation_table)

    @torch.no_grad()
    def _drawn(self, arm: Arm, folder: str, table: pa.Table) -> pd.DataFrame:
        """The images of an arm for some prompts, one row each; parts that exist are read."""
        drawing, sampler, parts = None, None, []
        for start in tqdm(range(0, len(table), PROMPTS_AT_A_TIME), desc=arm.key, leave=False):
            file = str(self.run_dir / folder / arm.key / f"part-{start:05}.parquet")
            if not storage.exists(file):
                if sampler is None:
                    drawing = self._model(arm)
                    size = batch_at_size(drawing, self.batch_size)
                    sampler = sampler_of(self.run, arm.settings, drawing, self.base, size)
                rows = self._rows(sampler, table.slice(start, PROMPTS_AT_A_TIME))
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
    def _gamma(self, arm: Arm, base_images: pd.DataFrame) -> float:
        some = base_images.groupby("prompt_id", sort=False).head(1).head(PROBED_PROMPTS)
        return effective_guidance(arm, self._model(arm), self.base, some, self.batch_size)

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


def _spaced(table: pa.Table, count: int) -> tuple[pa.Table, pa.Table]:
    """At most `count` evenly spaced rows, and the others."""
    places = np.linspace(0, len(table) - 1, min(count, len(table))).round().astype(int)
    return table.take(places), table.take(np.setdiff1d(np.arange(len(table)), places))


if __name__ == "__main__":
    main(AlignmentBenchmark)
