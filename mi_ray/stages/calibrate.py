"""Calibration of a model's scores: evaluate one small pool at all noise levels and compare bands of log SNR."""

import math
from dataclasses import asdict

import pyarrow as pa
import torch
import yaml

from mi_ray import storage
from mi_ray.alignment.metric import check_image_size, check_prompts, load_metrics
from mi_ray.config import pinned
from mi_ray.config.calibration import CalibrationConfig
from mi_ray.config.section import ConfigError, collecting, config_hash
from mi_ray.diffusion.folders import check_model, load_schedule, load_sizes, load_tokenizer, model_commit
from mi_ray.information.calibration import Band, judge_bands
from mi_ray.inputs.labels import PoolImages, read_labels
from mi_ray.inputs.prompts import read_prompts
from mi_ray.runs import folder as run_folder
from mi_ray.scoring.calibration import probed_pool
from mi_ray.scoring.scorer import known_band


def calibrate(config: CalibrationConfig, dry_run: bool = False):
    """Find the best band of log SNR and write it to config.out, a YAML file for the pipeline's --config.

    Raises:
        ConfigError: a setting or an input file is wrong.
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
    pool = PoolImages(config.pool, _digest(config)) if config.pool else None
    errors, index, labels = probed_pool(config, prompts["prompt"].to_pylist(), ids, pool)
    if pool:
        pool.finish()
    if given is not None:
        places = [(prompt_id, c) for prompt_id in ids for c in range(config.candidates_per_prompt)]
        labels = torch.tensor([given.get(place, math.nan) for place in places], dtype=torch.float64)
    edges = torch.linspace(config.log_snr_min, config.log_snr_max, config.levels + 1)
    try:
        bands = judge_bands(errors, edges, index, labels)
    except ValueError as error:  # labels do not differ within any prompt
        if config.use_labels:
            message = (
                "use_labels: no prompt has candidates with different labels, so bands cannot be compared; give more"
                " labels, or leave out use_labels"
            )
            raise ConfigError([message]) from error
        print("the labels are ignored: no prompt has candidates with different labels")
        labels, bands = None, judge_bands(errors, edges, index)
    chosen = {"label_free": max(bands, key=lambda band: band.label_free)}
    if labels is not None:
        chosen["labelled"] = max(bands, key=lambda band: band.auc)
    for name, band in chosen.items():
        print(f"{name.replace('_', '-'):<11} {_summary(band)}")
    if labels is not None:
        share = 100 * chosen["label_free"].auc / max(chosen["labelled"].auc, 1e-9)
        print(f"the label-free band reaches {share:.0f} % of the AUC of the band chosen by labels")
    band = chosen["labelled" if config.use_labels else "label_free"]
    storage.write_bytes(config.out, _as_yaml(config, band, len(prompts)).encode())
    storage.write_json(config.out + ".bands.json", [asdict(band) for band in bands])
    print(f"run the pipeline with --config {config.out}; all bands are in {config.out}.bands.json")


def _checked(config: CalibrationConfig) -> tuple[CalibrationConfig, pa.Table, dict[tuple[str, int], float] | None]:
    """Check the model, the prompts and the labels.

    Returns:
        The config with its band limited to the model's noise levels, the prompts, and the labels of a file by
        (prompt_id, candidate_index) or None.

    Raises:
        ConfigError: one of them is wrong.
    """
    given, faults, labels = config.prompts, [], None
    with collecting(faults, "model.path"):
        check_model(config.model.path)
        path = pinned(config.model.path, model_commit(config.model.path))
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
        tokenizer = load_tokenizer(config.model.path)
        sizes = load_sizes(config.model.path)
        faults += [f"model.{fault}" for fault in sizes.faults(*config.model.size)]
        with collecting(faults, "log_snr_max"):
            schedule = load_schedule(config.model.path, config.model.size)
            low, high = known_band(config.log_snr_min, config.log_snr_max, schedule)
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
        column=given.column,
    )
    if len(prompts) < 2:
        faults.append(
            f"prompts.file: {config.prompts.file!r} holds only one prompt, but each prompt is compared with others;"
            " give two or more"
        )
    with collecting(faults, "alignment"):
        metrics = load_metrics([config.alignment] if config.alignment else [])
        check_prompts(metrics, prompts["prompt"].to_pylist())
        check_image_size(metrics, sizes.image(*config.model.size))
    if config.labels:
        with collecting(faults, "labels"):
            labels = read_labels(config.labels, _digest(config))
            ids = {*prompts["prompt_id"].to_pylist()}
            by_prompt: dict[str, set[float]] = {}
            for (prompt_id, candidate), label in labels.items():
                if prompt_id in ids and candidate < config.candidates_per_prompt and not math.isnan(label):
                    by_prompt.setdefault(prompt_id, set()).add(label)
            if not by_prompt:
                raise ValueError(
                    f"{config.labels!r} has no label for a candidate of these prompts; label the images of --pool"
                )
            if config.use_labels and all(len(found) == 1 for found in by_prompt.values()):
                raise ValueError(
                    f"{config.labels!r} has the same label for all candidates of each prompt, so bands cannot be"
                    " compared; give more labels"
                )
    if faults:
        raise ConfigError(faults)
    return config.model_copy(update={"log_snr_min": low, "log_snr_max": high}), prompts, labels


def _digest(config: CalibrationConfig) -> str:
    """A hash of the settings that determine the images of a pool."""
    fields = {"model": {"path", "dtype", "height", "width"}, "sampler": True, "seed": True}
    results = config.model_dump(mode="json", include=fields)
    if config.model.path.startswith("/"):  # independent of the location of the folder
        results["model"]["path"] = model_commit(config.model.path)
    return config_hash(results)


def _summary(band: Band) -> str:
    auc = "" if band.auc is None else f", AUC {band.auc:.3f}"
    return (
        f"log SNR {band.log_snr_min:.2f} to {band.log_snr_max:.2f}: own prompt scores higher than"
        f" {100 * band.contrast:.1f} % of neighbours, label-free measure {band.label_free:.3f}{auc}"
    )


def _as_yaml(config: CalibrationConfig, band: Band, prompts: int) -> str:
    head = f"# Calibrated on {config.model.path} with {prompts} prompts of {config.prompts.file}: {_summary(band)}\n"
    values = {"log_snr_min": round(band.log_snr_min, 3), "log_snr_max": round(band.log_snr_max, 3)}
    return head + yaml.safe_dump({"score": values})
