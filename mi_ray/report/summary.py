"""The content of report.json, computed from a run folder."""

import math
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa

from mi_ray.alignment.metric import Column
from mi_ray.config import RunConfig, folder_name
from mi_ray.report.columns import PMI
from mi_ray.report.guidance import SCALE, at_scale, guidance_section
from mi_ray.report.online import arm_folders, online_folders, read_online
from mi_ray.report.pools import count_error, declared_in, numeric, present, read_pools, round_numbers
from mi_ray.report.statistics import (
    cosine_diversity,
    diversity,
    is_collapsed,
    kernel_distance,
    paired_difference,
    prompt_mean,
)
from mi_ray.storage import (
    ParquetRows,
    exists,
    iter_lines,
    join,
    list_names,
    list_tables,
    read_json,
    read_lines,
    read_table,
    read_tables,
)

REFERENCE = "reference"  # real images, evaluated like a model
STAGES = {"generate": "generate", "online": "generate", "evaluate": "evaluate"}  # {stage: stage that it counts for}
AMOUNTS = ("rows", "denoiser_evaluations", "score_evaluations")  # of a shard
QUALITY_IMAGES = 20_000  # number of images of a model that the quality measures use; more do not change them
CLOCK_SLACK_S = 1.0  # allowed difference between the measured duration of a stage and the times in events.jsonl


# ------------------------------------------------------------------------------------------ reading
def _events(run_dir: str) -> tuple[list[dict], dict[str, Counter]]:
    """Read events.jsonl. The many events of shards are only summed.

    Returns:
        All other events, and for generate (including the candidates of an online run) and evaluate the sums of rows,
        denoiser_evaluations and score_evaluations. The sums timed_<name> include only shards from sessions that
        finished the stage: a killed session has shards but no duration, which would give a too high throughput. Shards
        of the reference are left out, because no model generates them.
    """
    uri = join(run_dir, "events.jsonl")
    events = [event for event in iter_lines(uri) if event["event"] != "shard_written"]
    windows = {
        stage: [(e["time"] - e["seconds"] - CLOCK_SLACK_S, e["time"]) for e in _finished(events, stage)]
        for stage in STAGES.values()
    }
    work = {stage: Counter() for stage in windows}
    for event in iter_lines(uri):
        if event["event"] == "shard_written" and event["stage"] in STAGES and event["model"] != REFERENCE:
            amounts, stage = {name: event[name] for name in AMOUNTS}, STAGES[event["stage"]]
            work[stage].update(amounts)
            if any(start <= event["time"] <= end for start, end in windows[stage]):
                work[stage].update({f"timed_{name}": amount for name, amount in amounts.items()})
    return events, work


def _finished(events: list[dict], stage: str) -> list[dict]:
    """The stage_finished events of a stage and all its arms (evaluate: evaluate_base, ...)."""
    ended = [e for e in events if e["event"] == "stage_finished"]
    finished = [e for e in ended if STAGES.get(e["stage"].partition("_")[0]) == stage]
    return [e for e in finished if not e["stage"].endswith(REFERENCE)]


def models_of(config: RunConfig) -> list[str]:
    """The models that a run evaluates, without `REFERENCE`."""
    return list(dict.fromkeys(["base", "tuned", "random", *config.evaluation.controls]))


def pairs_of(config: RunConfig) -> list[tuple[str, str]]:
    """The pairs of models that are compared: (model, baseline)."""
    metrics = [control for control in config.evaluation.controls if control != "random"]
    pairs = [("tuned", "base"), ("tuned", "random"), ("random", "base")]
    return pairs + [pair for metric in metrics for pair in ((metric, "base"), ("tuned", metric))]


def declared(metrics: dict[str, list[dict]]) -> dict[str, list[Column]]:
    """The columns of each metric in a report."""
    return {name: [Column(**column) for column in columns] for name, columns in metrics.items()}


def read_evaluation(run_dir: str, model: str) -> pd.DataFrame | None:
    """The evaluation table of a model or `REFERENCE`, without images and features. None if it does not exist."""
    folder = join(run_dir, "evaluation", folder_name(model))
    if not (parts := list_tables(folder)):
        return None
    measured = ["score_pmi", *(c.name for columns in declared_in(folder).values() for c in columns)]
    # Runs of earlier versions have a single guidance scale and no column for it.
    scale = [SCALE] if SCALE in ParquetRows(join(folder, parts[0])).schema.names else []
    columns = ["prompt_id", "prompt", "category", "split", "seed", *scale, *measured, "error"]
    frame = numeric(read_tables(folder, columns).to_pandas(), [*scale, *measured])
    return frame.assign(**{SCALE: frame[SCALE].round(4) if scale else np.nan}).rename(columns={"score_pmi": PMI.name})


def read_features(run_dir: str, model: str, scale: float | None = None) -> tuple[np.ndarray, np.ndarray] | None:
    """Features (n, d) and prompt ids (n,) of a model's images, from the first parts with `QUALITY_IMAGES` images.

    Args:
        scale: guidance_scale of the images; None: all images.
    """
    folder, only = join(run_dir, "evaluation", folder_name(model)), [] if scale is None else [SCALE]
    features, ids = [], []
    for name in list_tables(folder):
        frame = read_table(join(folder, name), ["prompt_id", "features", "error", *only]).to_pandas()
        frame = frame[frame["error"].isna() & frame["features"].notna()]
        frame = frame[frame[SCALE].round(4) == np.float32(scale).round(4)] if only else frame
        features += list(frame["features"])
        ids += list(frame["prompt_id"])
        if len(ids) >= QUALITY_IMAGES:
            break
    return (np.stack(features).astype(np.float64), np.array(ids)) if ids else None


def encoder_of(folder: str) -> str | None:
    """The named encoder of the features in a folder's tables, with its revision. None: the model's autoencoder."""
    schema = next((ParquetRows(join(folder, name)).schema for name in list_tables(folder)), pa.schema([]))
    texts = (schema.field("features").metadata or {}) if "features" in schema.names else {}
    model, revision = (texts.get(key, b"").decode() for key in (b"model", b"revision"))
    return f"{model} ({revision[:16]})" if model else None


# ------------------------------------------------------------------------------------------ sections
def _run(run_dir: str, config: RunConfig, events: list[dict]) -> dict:
    uri = join(run_dir, "run.json")
    recorded = read_json(uri) if exists(uri) else {}
    times = [datetime.fromtimestamp(e["time"], UTC).isoformat(timespec="seconds") for e in events]
    return {
        "run_dir": run_dir,
        "config": recorded.get("config", config.results_config()) | {"resources": config.resources.model_dump()},
        "config_hash": recorded.get("config_hash") or config.hash(),
        "versions": recorded.get("versions") or {},
        "started": times[0] if times else None,
        "finished": times[-1] if times else None,
    }


def _timing(events: list[dict]) -> dict:
    """Wall time of each stage in seconds, summed over rounds and resumed sessions."""
    seconds = Counter()
    for event in events:
        if event["event"] == "stage_finished":
            seconds[f"{event['stage']}_s"] += event["seconds"]
    return {**seconds, "total_s": sum(seconds.values())}


def _throughput(events: list[dict], work: dict[str, Counter]) -> dict:
    """Candidates of generate, images of evaluate, and denoiser evaluations of both, per second of wall time."""
    seconds = {stage: sum(e["seconds"] for e in _finished(events, stage)) for stage in work}
    evaluations = sum(of["timed_denoiser_evaluations"] + of["timed_score_evaluations"] for of in work.values())

    def rate(amount: float, seconds: float) -> float | None:
        return amount / seconds if seconds else None

    return {
        "candidates_per_s": rate(work["generate"]["timed_rows"], seconds["generate"]),
        "denoiser_evaluations_per_s": rate(evaluations, sum(seconds.values())),
        "images_per_s": rate(work["evaluate"]["timed_rows"], seconds["evaluate"]),
    }


def _denoiser_evaluations(work: dict[str, Counter]) -> dict:
    """generate: sampling of candidates; score: their pointwise scores; evaluate: sampling and scoring of images."""
    generated, evaluated = work["generate"], work["evaluate"]
    return {
        "generate": generated["denoiser_evaluations"],
        "score": generated["score_evaluations"],
        "evaluate": evaluated["denoiser_evaluations"] + evaluated["score_evaluations"],
    }


def _prompts(events: list[dict], generated: int, evaluation: dict[str, pd.DataFrame]) -> dict:
    """Counts of the last session. A resumed run reads the same files again."""
    read = {"training": {}, "evaluation": {}}
    for event in events:
        if event["event"] == "prompts_read":
            read["evaluation" if event["stage"].startswith("eval") else "training"] = event
    training = read["training"]
    evaluated = max((frame["prompt_id"].nunique() for frame in evaluation.values()), default=0)
    used, skipped = training.get("used", generated), training.get("skipped", 0)
    return {
        "read": training.get("read", used + skipped),
        "used": used,
        "skipped": skipped,
        "evaluation": read["evaluation"].get("used", evaluated),
    }


def _statistics(frame: pd.DataFrame, columns: list[str], compared: list[str], statistic) -> dict:
    """A statistic of the columns, and of the `compared` columns for each category and split, in order of appearance."""

    def of(rows: pd.DataFrame, names: list[str]) -> dict:
        return present({name: statistic(rows, name) for name in names if name in rows})

    def grouped(by: str) -> dict:
        return {group: of(frame[frame[by] == group], compared) for group in frame[by].dropna().unique()}

    return {**of(frame, columns), "by_category": grouped("category"), "by_split": grouped("split")}


def _alignment(evaluation: dict[str, pd.DataFrame], metrics: dict[str, tuple[Column, ...]]) -> dict:
    columns = [*(column.name for of_metric in metrics.values() for column in of_metric), PMI.name]
    compared = _compared(metrics)
    return {model: _statistics(frame, columns, compared, prompt_mean) for model, frame in evaluation.items()}


def _compared(metrics: dict[str, tuple[Column, ...]]) -> list[str]:
    """The columns by which models are compared: the first column of each metric, and PMI."""
    return [*(of_metric[0].name for of_metric in metrics.values()), PMI.name]


def _comparison(
    evaluation: dict[str, pd.DataFrame], metrics: dict[str, tuple[Column, ...]], pairs: list[tuple[str, str]]
) -> dict:
    comparison, compared = {}, _compared(metrics)
    for model, baseline in pairs:
        if model in evaluation and baseline in evaluation:
            difference = partial(_difference, evaluation[baseline])
            comparison[f"{model}-{baseline}"] = _statistics(evaluation[model], compared, compared, difference)
    return comparison


def _difference(baseline: pd.DataFrame, rows: pd.DataFrame, column: str) -> dict | None:
    return paired_difference(rows, baseline, column) if column in baseline else None


def _quality(run_dir: str, models: list[str], scale: float | None) -> dict:
    """Kernel distance to the reference images, and diversity within a prompt, of each model.

    The reference images are real images of a metric, or those of the base model. relative_diversity is the diversity
    divided by that of the base model, both in standard deviations of the base model's features. With the features of a
    named encoder, the kernel distance is that of KID, and the diversity is the mean of 1 - cosine.
    """
    found = present({model: read_features(run_dir, model, scale) for model in models})
    if "base" not in found:
        return {}
    real = read_features(run_dir, REFERENCE)
    reference, _ = real or found["base"]
    quality, base, encoder = {}, found["base"][0], encoder_of(join(run_dir, "evaluation", "base"))

    def spread(features: np.ndarray, ids: np.ndarray, of: np.ndarray) -> float | None:
        return cosine_diversity(features, ids) if encoder else diversity(features, ids, of)

    whole = spread(*found["base"], base)
    for model, (features, ids) in found.items():
        is_reference = model == "base" and not real
        quality[model] = {
            "kernel_distance": 0.0 if is_reference else kernel_distance(features, reference, standard=not encoder),
            "diversity": spread(features, ids, reference),
            "relative_diversity": spread(features, ids, base) / whole if whole else None,
            "reference": "real" if real else "base",
            "encoder": encoder,
            "n_images": len(features),
        }
    for result in quality.values():
        result["collapsed"] = is_collapsed(result, quality["base"])
    return quality


def _training_of(folders: list[tuple[str, str]]) -> dict | None:
    """The training of one model, all rounds in a row. `round_starts` are indices into the curves.

    Args:
        folders: for each round the folder of the log and the folder of the adapter.
    """
    curves, summaries, starts = [], [], []
    for folder, adapter in folders:
        # After a restart, steps since the last checkpoint are repeated. The later line counts.
        lines = {line["step"]: line for line in read_lines(join(folder, "training.jsonl"))}
        uri = join(adapter, "summary.json")
        summary = read_json(uri) if exists(uri) else {}
        if lines or summary:
            starts.append(len(curves))
            curves += [lines[step] for step in sorted(lines)]
            summaries.append({"steps": len(lines), **summary})
    if not summaries:
        return None
    return {
        "steps": sum(summary["steps"] for summary in summaries),
        "loss": [line.get("loss") for line in curves],
        "grad_norm": [line.get("grad_norm") for line in curves],
        "round_starts": starts,
        **{key: summaries[-1].get(key) for key in ("outputs_changed", "output_change", "trainable_parameters")},
    }


def _training(run_dir: str, models: list[str]) -> dict:
    homes, online = arm_folders(run_dir, models), online_folders(run_dir, models)
    folders = {
        model: [(join(home, f"round-{number}", "adapter"),) * 2 for number in round_numbers(home)]
        or [(online[model], join(online[model], "adapter"))]
        for model, home in homes.items()
    }
    return present({model: _training_of(of_model) for model, of_model in folders.items()})


def _errors(events: list[dict], generated: Counter, evaluation: dict[str, pd.DataFrame]) -> list[dict]:
    """Skipped prompts and error rows. Equal ones are one entry with a `count`. If there are many skipped prompts, only
    the first ones are listed; the others are one entry without a prompt."""
    skipped = [e for e in events if e["event"] == "prompt_skipped"]  # a resumed session logs them again
    counts = Counter({(e["prompt"], e["stage"], e["message"]): e.get("count", 1) for e in skipped})
    for (prompt, stage, message), count in generated.items():
        count_error(counts, prompt, stage, message, count)
    for frame in evaluation.values():
        for row in frame[frame["error"].notna()].itertuples():
            count_error(counts, row.prompt, "evaluate", row.error)
    return [
        {"prompt": prompt, "stage": stage, "message": message, "count": count}
        for (prompt, stage, message), count in counts.items()
    ]


def _strict(value):
    """The value for strict JSON: null for NaN and infinities, Python numbers for NumPy numbers."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _benchmarks(run_dir: str) -> dict[str, dict]:
    """{name: result} of the benchmarks in the folder `benchmarks/`, written with `--out`. Other files are ignored."""
    folder = join(run_dir, "benchmarks")
    found = {
        name.removesuffix(".json"): read_json(join(folder, name))
        for name in list_names(folder)
        if name.endswith(".json")
    }
    return {name: result for name, result in found.items() if {"question", "results", "gates"} <= result.keys()}


def summarise(run_dir: str, config: RunConfig) -> dict:
    """The content of report.json, computed from the run folder only. Stages that have not run are left out.

    Intervals are 95 % t-intervals over prompts. Metrics have the units in `metrics`; scores are in nats, times in
    seconds. If images have several guidance scales, alignment, comparison and quality use one of them, see
    `guidance.guidance_section`.
    """
    events, work = _events(run_dir)
    pools, models = read_pools(run_dir, config.score.names), models_of(config)
    evaluation = present({model: read_evaluation(run_dir, model) for model in models})
    evaluated = [declared_in(join(run_dir, "evaluation", folder_name(model))) for model in evaluation]
    metrics = {**(evaluated[0] if evaluated else {})}
    metrics |= {name: columns for name, columns in pools.metrics.items() if name not in metrics}
    sound = {model: frame[frame["error"].isna()] for model, frame in evaluation.items()}
    online = read_online(run_dir, models)
    gammas = present({model: arm["effective_guidance"] for model, arm in online.items()})
    guidance = guidance_section(sound, metrics, config, gammas)
    if guidance:
        sound = {model: at_scale(frame, guidance["headline"]) for model, frame in sound.items()}
    report = {
        "run": _run(run_dir, config, events),
        "timing": _timing(events),
        "throughput": _throughput(events, work),
        "denoiser_evaluations": _denoiser_evaluations(work),
        "prompts": _prompts(events, pools.prompts, evaluation),
        "metrics": {name: [asdict(column) for column in columns] for name, columns in metrics.items()},
        "alignment": _alignment(sound, metrics),
        "comparison": _comparison(sound, metrics, pairs_of(config)),
        "guidance": guidance,
        "quality": _quality(run_dir, models, guidance.get("headline")),
        "selection": {**pools.selection, "distributions": pools.distributions},
        "training": _training(run_dir, models),
        "online": online,
        "errors": _errors(events, pools.errors, evaluation),
        "benchmarks": _benchmarks(run_dir),
    }
    return _strict(report)
