"""Calibration of a model's scores: one small pool, probed over the whole range of noise, judged band by band."""

import json
import math
from dataclasses import asdict
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import torch
import yaml
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from mi_ray import storage
from mi_ray.alignment.oracle import check_image_size, foreign_prompts
from mi_ray.config import ModelConfig, PromptsConfig, SamplerConfig, ScoreConfig, pinned
from mi_ray.config.section import ConfigError, Positive, Section, check_band, collecting, config_hash
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser, load_denoiser
from mi_ray.diffusion.folders import check_model, load_schedule, load_sizes, load_tokenizer, model_commit
from mi_ray.information.calibration import Band, judge_bands
from mi_ray.information.pointwise import denoising_errors
from mi_ray.information.probes import draw_probes
from mi_ray.inputs.prompts import read_prompts
from mi_ray.runs import folder as run_folder
from mi_ray.scoring.images import encode_png, measured
from mi_ray.scoring.machine import take_cpus
from mi_ray.scoring.sampler import Sampler, batch_at_size, derived_seed
from mi_ray.scoring.scorer import Scorer, known_band
from mi_ray.scoring.work import Work

PROMPTS_AT_A_TIME = 8
_LABEL = ("prompt_id", "candidate_index", "label")


class CalibrationConfig(Section):
    """Find the band of log SNR in which a model's contrastive score ranks the candidates of a prompt best."""

    prompts: PromptsConfig
    model: ModelConfig = ModelConfig()
    sampler: SamplerConfig = SamplerConfig()
    out: str = Field("calibration.yaml", min_length=1, description="file to write; the pipeline takes it by --config")
    candidates_per_prompt: Annotated[int, Field(ge=2)] = Field(8, description="pool size")
    neighbours: Positive = Field(6, description="other prompts of the file that each candidate is held against")
    levels: Annotated[int, Field(ge=2)] = Field(16, description="steps of the grid of log SNR; each is probed twice")
    log_snr_min: float = Field(-5.4, description="lower end of the range searched")
    log_snr_max: float = Field(2.0, description="upper end")
    alignment: Literal["oracle"] | None = Field(None, description="label the candidates too: shapes prompts only")
    pool: str | None = Field(
        None,
        min_length=1,
        description="folder to write the candidates' images to, with pool.jsonl: for a metric of your own",
    )
    labels: str | None = Field(
        None,
        min_length=1,
        description="that metric, higher is better: .jsonl or .parquet with prompt_id, candidate_index, label",
    )
    use_labels: bool = Field(False, description="choose the band by the labels instead of without them")
    batch_size: Positive = Field(64, description="candidates of the model's own size in one denoiser batch")
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


def calibrate(config: CalibrationConfig, dry_run: bool = False):
    """Find the band of log SNR and write it to config.out, as a YAML file that the pipeline takes by --config.

    Raises:
        ConfigError: what was given will not do.
    """
    config, prompts, given = _checked(config)
    probes = config.levels * 2 * (1 + min(config.neighbours, len(prompts) - 1))
    candidates = len(prompts) * config.candidates_per_prompt
    total = candidates * (2 * config.sampler.num_inference_steps + probes)
    print(f"{candidates} candidates of {len(prompts)} prompts, {total:,} denoiser evaluations")
    if dry_run:
        return
    for field, uri in (("out", config.out.rpartition("/")[0] or "."), ("pool", config.pool)):
        try:
            if uri:
                run_folder.check_writable(uri)
        except (OSError, ValueError) as error:
            raise ConfigError([f"{field}: {uri!r} cannot be written ({error}); give another --{field}"]) from error
    ids = prompts["prompt_id"].to_pylist()
    errors, index, labels = _probed_pool(config, prompts["prompt"].to_pylist(), ids)
    if given is not None:
        places = [(prompt_id, c) for prompt_id in ids for c in range(config.candidates_per_prompt)]
        labels = torch.tensor([given.get(place, math.nan) for place in places], dtype=torch.float64)
    edges = torch.linspace(config.log_snr_min, config.log_snr_max, config.levels + 1)
    try:
        bands = judge_bands(errors, edges, index, labels)
    except ValueError as error:  # labels do not differ within any prompt
        if config.use_labels:
            message = "use_labels: no prompt has candidates with different labels; give more, or leave it out"
            raise ConfigError([message]) from error
        print("no prompt has candidates with different labels: they say nothing and are left out")
        labels, bands = None, judge_bands(errors, edges, index)
    chosen = {"label_free": max(bands, key=lambda band: band.label_free)}
    if labels is not None:
        chosen["labelled"] = max(bands, key=lambda band: band.auc)
    for name, band in chosen.items():
        print(f"{name.replace('_', '-'):<11} {_said(band)}")
    if labels is not None:
        share = 100 * chosen["label_free"].auc / max(chosen["labelled"].auc, 1e-9)
        print(f"without labels {share:.0f} % of the AUC that labels find")
    band = chosen["labelled" if config.use_labels else "label_free"]
    storage.write_bytes(config.out, _as_yaml(config, band, len(prompts)).encode())
    storage.write_json(config.out + ".bands.json", [asdict(band) for band in bands])
    print(f"give the pipeline --config {config.out}; all bands are in {config.out}.bands.json")


def _checked(config: CalibrationConfig) -> tuple[CalibrationConfig, pa.Table, dict[tuple[str, int], float] | None]:
    """The config with its range cut to the model's noise, the prompts, and the labels of a file by prompt_id and
    candidate_index, when they and the model will do."""
    given, faults, labels = config.prompts, [], None
    with collecting(faults, "model.path"):
        check_model(config.model.path)
        path = pinned(config.model.path, model_commit(config.model.path))
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
        tokenizer = load_tokenizer(config.model.path)
        sizes = load_sizes(config.model.path)
        faults += [f"model.{fault}" for fault in sizes.faults(*config.model.size)]
        with collecting(faults, "log_snr_max"):
            low, high = known_band(config.log_snr_min, config.log_snr_max, load_schedule(config.model.path))
    if faults:
        raise ConfigError(faults)
    prompts, _ = read_prompts(
        given.file,
        limit=given.limit,
        duplicates=given.duplicates,
        overlong=given.overlong,
        broken=given.broken,
        token_count=lambda prompt: len(tokenizer(prompt).input_ids),
        max_tokens=tokenizer.model_max_length,
    )
    if len(prompts) < 2:
        faults.append(f"prompts.file: {config.prompts.file!r} holds one prompt only; each is held against others")
    if config.alignment and (foreign := foreign_prompts(prompts["prompt"].to_pylist())):
        faults.append(
            f"alignment: the oracle reads only prompts of the shapes grammar, not {foreign[0]!r}; leave it out"
        )
    if config.alignment:
        with collecting(faults, "alignment"):
            check_image_size(sizes.image(*config.model.size))
    if config.labels:
        with collecting(faults, "labels"):
            labels = _read_labels(config.labels, _digest(config))
            ids = {*prompts["prompt_id"].to_pylist()}
            by_prompt: dict[str, set[float]] = {}
            for (prompt_id, candidate), label in labels.items():
                if prompt_id in ids and candidate < config.candidates_per_prompt and not math.isnan(label):
                    by_prompt.setdefault(prompt_id, set()).add(label)
            if not by_prompt:
                raise ValueError(f"{config.labels!r} labels none of these prompts' candidates; label those of --pool")
            if config.use_labels and all(len(found) == 1 for found in by_prompt.values()):
                raise ValueError(f"{config.labels!r} tells no candidate of a prompt from another; give more labels")
    if faults:
        raise ConfigError(faults)
    return config.model_copy(update={"log_snr_min": low, "log_snr_max": high}), prompts, labels


def _digest(config: CalibrationConfig) -> str:
    """Tells the images of one pool from another's."""
    return config_hash(
        config.model_dump(
            mode="json", include={"model": {"path", "dtype", "height", "width"}, "sampler": True, "seed": True}
        )
    )


def _read_labels(uri: str, digest: str) -> dict[tuple[str, int], float]:
    """{(prompt_id, candidate_index): label}, NaN where there is none.

    Raises:
        ValueError: the file cannot be read, lacks something, or is of another pool.
    """
    try:
        if not storage.exists(uri):
            raise ValueError("it does not exist")
        rows = storage.read_lines(uri) if uri.endswith(".jsonl") else storage.read_table(uri).to_pylist()
        places = [(str(row["prompt_id"]), int(row["candidate_index"])) for row in rows]
        labels = [math.nan if row.get("label") is None else float(row["label"]) for row in rows]
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{uri!r} will not do ({reason}); give rows of {', '.join(_LABEL)}") from error
    if any(row.get("pool", digest) != digest for row in rows):
        raise ValueError(f"{uri!r} labels another pool: model, sampler and seed must be those of --pool")
    return dict(zip(places, labels, strict=True))


@torch.inference_mode()
def _probed_pool(config: CalibrationConfig, prompts: list[str], ids: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
    """errors (N, 1 + J, levels, 2), prompt_index (N,) and, where alignment is measured, exact (N,) of 0 and 1."""
    take_cpus(config.threads)
    denoiser = load_denoiser(config.model.path, config.model.dtype, size=config.model.size)
    batch_size = batch_at_size(denoiser, config.batch_size)
    sampler = Sampler(denoiser, config.sampler, batch_size)
    score = ScoreConfig(names=("pmi_contrastive",), neighbours=config.neighbours)
    scorer = Scorer(denoiser, score, batch_size, config.seed, prompts)
    each = config.candidates_per_prompt
    errors, exact, written = [], [], []
    for start in tqdm(range(0, len(prompts), PROMPTS_AT_A_TIME), unit=" prompts", unit_scale=PROMPTS_AT_A_TIME):
        some = slice(start, start + PROMPTS_AT_A_TIME)
        conditioning = denoiser.encode_prompts(prompts[some])
        seeds = [[derived_seed(config.seed, "calibration", i, c) for c in range(each)] for i in ids[some]]
        latents = sampler(conditioning, seeds, Work()).latents
        nearest = scorer.neighbours(prompts[some], conditioning)
        texts = Conditioning.cat([conditioning, scorer.pool_conditioning.rows(nearest.flatten())])
        own, others = torch.arange(len(texts)).split([len(conditioning), nearest.numel()])
        branches = torch.cat([own[:, None], others.view_as(nearest)], 1)
        errors.append(_halves(config, denoiser, latents, texts, branches, ids[some]))
        repeated = [prompt for prompt in prompts[some] for _ in range(each)]
        images = denoiser.decode(latents) if config.alignment or config.pool else None
        if config.alignment:
            exact += measured(images, repeated, config.alignment)["exact"]
        if config.pool:
            places = [(prompt_id, c) for prompt_id in ids[some] for c in range(each)]
            written += _write_images(config.pool, images, repeated, places)
    if config.pool:
        lines = "".join(json.dumps(line | {"pool": _digest(config)}) + "\n" for line in written)
        storage.write_bytes(storage.join(config.pool, "pool.jsonl"), lines.encode())
        print(f"{len(written)} images and pool.jsonl are in {config.pool}: add `label` to its lines and give --labels")
    index = torch.arange(len(prompts)).repeat_interleave(each)
    return torch.cat(errors), index, torch.tensor(exact) if exact else None


def _write_images(folder: str, images: np.ndarray, prompts: list[str], places: list[tuple[str, int]]) -> list[dict]:
    """Write some candidates' images; their lines of pool.jsonl."""
    lines = []
    for image, prompt, (prompt_id, candidate) in zip(images, prompts, places, strict=True):
        name = f"{prompt_id}-{candidate}.png"
        storage.write_bytes(storage.join(folder, name), encode_png(image)["bytes"])
        lines.append({"image": name, "prompt": prompt, "prompt_id": prompt_id, "candidate_index": candidate})
    return lines


def _halves(
    config: CalibrationConfig,
    denoiser: Denoiser,
    latents: Tensor,
    conditioning: Conditioning,
    branches: Tensor,
    ids: list[str],
) -> Tensor:
    """Errors at the middle of every level, from two independent draws: (n, 1 + J, levels, 2) on the CPU.

    Args:
        conditioning, branches: as `denoising_errors` takes them, branches (P, 1 + J) with the prompt itself first.
    """
    index = torch.arange(len(ids)).repeat_interleave(len(latents) // len(ids))
    halves = []
    for half in range(2):
        seeds = [derived_seed(config.seed, f"calibration-half-{half}", i) for i in ids]
        probes = draw_probes(seeds, config.levels, config.log_snr_min, config.log_snr_max, denoiser.latent_shape)
        errors = denoising_errors(
            denoiser.predict_epsilon,
            denoiser.schedule,
            latents,
            index,
            conditioning,
            branches,
            probes,
            2 * batch_at_size(denoiser, config.batch_size),
        )
        halves.append(errors.cpu())
    return torch.stack(halves, -1)


def _said(band: Band) -> str:
    auc = "" if band.auc is None else f", AUC {band.auc:.3f}"
    return (
        f"log SNR {band.log_snr_min:.2f} to {band.log_snr_max:.2f}: own prompt wins {100 * band.contrast:.1f} %,"
        f" {band.label_free:.3f} by both halves{auc}"
    )


def _as_yaml(config: CalibrationConfig, band: Band, prompts: int) -> str:
    head = f"# Calibrated on {config.model.path} with {prompts} prompts of {config.prompts.file}: {_said(band)}\n"
    values = {"log_snr_min": round(band.log_snr_min, 3), "log_snr_max": round(band.log_snr_max, 3)}
    return head + yaml.safe_dump({"score": values})
