"""What a run folder says, as one dictionary: the content of report.json."""

import math
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pandas as pd

from mi_ray.config import RunConfig
from mi_ray.report.statistics import (
    diversity,
    is_collapsed,
    kernel_distance,
    paired_difference,
    prompt_mean,
    within_prompt_auc,
)
from mi_ray.storage import exists, join, list_names, read_json, read_lines, read_tables

MODELS = ("base", "tuned", "random", "oracle")
PAIRS = (("tuned", "base"), ("tuned", "random"), ("random", "base"), ("oracle", "base"), ("tuned", "oracle"))
REFERENCE = "reference"  # real renders, evaluated like a model
METRICS = ("exact", "objects", "attributes", "count", "relation")
CLOCK_SLACK_S = 1.0  # between a stage's own stopwatch and the times in events.jsonl


# ------------------------------------------------------------------------------------------ reading
def _read_frame(folder: str, columns: list[str]) -> pd.DataFrame | None:
    if not any(name.endswith(".parquet") for name in list_names(folder)):
        return None
    frame = read_tables(folder, columns).to_pandas()
    numbers = [c for c in columns if c in METRICS or c.startswith("score_")]
    frame[numbers] = frame[numbers].astype(np.float64).replace([np.inf, -np.inf], np.nan)
    return frame


def round_numbers(run_dir: str) -> list[int]:
    numbers = [name.removeprefix("round-") for name in list_names(run_dir) if name.startswith("round-")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def read_candidates(run_dir: str, score_names: tuple[str, ...]) -> pd.DataFrame:
    """All rounds' candidates without curves, latents and images; `round` is an additional column."""
    columns = ["prompt_id", "prompt", *(f"score_{name}" for name in score_names), "exact", "kept", "error"]
    frames = [pd.DataFrame(columns=["round", *columns])]
    for number in round_numbers(run_dir):
        frame = _read_frame(join(run_dir, f"round-{number}", "candidates"), columns)
        if frame is not None:
            frames.append(frame.assign(round=number))
    return pd.concat(frames[1:] or frames, ignore_index=True)


def read_evaluation(run_dir: str, model: str) -> pd.DataFrame | None:
    """The evaluated images of a model (or of `REFERENCE`) without the images; None if there are none."""
    columns = ["prompt_id", "prompt", "category", "split", "seed", "score_pmi", *METRICS, "features", "error"]
    frame = _read_frame(join(run_dir, "evaluation", model), columns)
    return frame if frame is None else frame.rename(columns={"score_pmi": "pmi"})


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
    """Wall time per stage, seconds, added up over rounds and resumed sessions."""
    seconds = Counter()
    for event in events:
        if event["event"] == "stage_finished":
            seconds[f"{event['stage']}_s"] += event["seconds"]
    return {**seconds, "total_s": sum(seconds.values())}


def _shards(events: list[dict], stage: str) -> list[dict]:
    """The shards that a stage wrote, without those of the reference, which no model draws."""
    written = [e for e in events if e["event"] == "shard_written" and e["stage"] == stage]
    return [e for e in written if e["model"] != REFERENCE]


def _finished_work(events: list[dict], stage: str) -> tuple[list[dict], float]:
    """The shards that were written in sessions that finished the stage, and those sessions' seconds.

    `stage` stands for all its arms too (evaluate: evaluate_base, evaluate_tuned). A killed session leaves shards but
    no time; to count them would overstate the throughput.
    """
    finished = [e for e in events if e["event"] == "stage_finished" and e["stage"].partition("_")[0] == stage]
    sessions = [e for e in finished if not e["stage"].endswith(REFERENCE)]
    windows = [(e["time"] - e["seconds"] - CLOCK_SLACK_S, e["time"]) for e in sessions]
    shards = _shards(events, stage)
    timed = [s for s in shards if any(start <= s["time"] <= end for start, end in windows)]
    return timed, sum(e["seconds"] for e in sessions)


def _throughput(events: list[dict]) -> dict:
    """Per second of wall time: candidates of generate, images of evaluate, and the denoiser evaluations of both."""
    generated, generate_s = _finished_work(events, "generate")
    evaluated, evaluate_s = _finished_work(events, "evaluate")
    evaluations = sum(s["denoiser_evaluations"] + s["score_evaluations"] for s in generated + evaluated)

    def rate(amount, seconds):
        return amount / seconds if seconds else None

    return {
        "candidates_per_s": rate(sum(s["rows"] for s in generated), generate_s),
        "denoiser_evaluations_per_s": rate(evaluations, generate_s + evaluate_s),
        "images_per_s": rate(sum(s["rows"] for s in evaluated), evaluate_s),
    }


def _denoiser_evaluations(events: list[dict]) -> dict:
    """generate: sampling the candidates; score: their pointwise scores; evaluate: sampling and scoring its images."""
    generated, evaluated = _shards(events, "generate"), _shards(events, "evaluate")
    return {
        "generate": sum(e["denoiser_evaluations"] for e in generated),
        "score": sum(e["score_evaluations"] for e in generated),
        "evaluate": sum(e["denoiser_evaluations"] + e["score_evaluations"] for e in evaluated),
    }


def _prompts(events: list[dict], candidates: pd.DataFrame, evaluation: dict[str, pd.DataFrame]) -> dict:
    """Counts of the last session: a resumed one reads the same files again."""
    read = {"training": {}, "evaluation": {}}
    for event in events:
        if event["event"] == "prompts_read":
            read["evaluation" if event["stage"].startswith("eval") else "training"] = event
    training = read["training"]
    generated = candidates["prompt_id"].nunique()
    evaluated = max((frame["prompt_id"].nunique() for frame in evaluation.values()), default=0)
    used, skipped = training.get("used", generated), training.get("skipped", 0)
    return {
        "read": training.get("read", used + skipped),
        "used": used,
        "skipped": skipped,
        "evaluation": read["evaluation"].get("used", evaluated),
    }


def _present(results: dict) -> dict:
    return {name: result for name, result in results.items() if result is not None}


def _grouped(frame: pd.DataFrame, column: str, statistic) -> dict:
    """exact and pmi of each group; groups in order of appearance."""
    groups = {}
    for name in frame[column].dropna().unique():
        groups[name] = _present({m: statistic(frame[frame[column] == name], m) for m in ("exact", "pmi")})
    return groups


def _alignment(evaluation: dict[str, pd.DataFrame]) -> dict:
    return {
        model: {
            **_present({metric: prompt_mean(frame, metric) for metric in (*METRICS, "pmi")}),
            "by_category": _grouped(frame, "category", prompt_mean),
            "by_split": _grouped(frame, "split", prompt_mean),
        }
        for model, frame in evaluation.items()
    }


def _comparison(evaluation: dict[str, pd.DataFrame]) -> dict:
    comparison = {}
    for model, baseline in PAIRS:
        if model in evaluation and baseline in evaluation:
            frame, other = evaluation[model], evaluation[baseline]

            def difference(rows, metric, other=other):
                return paired_difference(rows, other, metric)

            comparison[f"{model}-{baseline}"] = {
                **_present({metric: difference(frame, metric) for metric in ("exact", "pmi")}),
                "by_category": _grouped(frame, "category", difference),
                "by_split": _grouped(frame, "split", difference),
            }
    return comparison


def _quality(evaluation: dict[str, pd.DataFrame], renders: pd.DataFrame | None) -> dict:
    """Distance to the reference images (real renders, else the base model's own) and diversity within a prompt."""
    frames = {model: frame[frame["features"].notna()] for model, frame in evaluation.items()}
    frames = {model: frame for model, frame in frames.items() if len(frame)}
    if "base" not in frames:
        return {}
    real = renders is not None and renders["features"].notna().any()
    reference = np.stack((renders if real else frames["base"])["features"].dropna()).astype(np.float64)
    quality = {}
    for model, frame in frames.items():
        features = np.stack(frame["features"]).astype(np.float64)
        itself = model == "base" and not real
        quality[model] = {
            "kernel_distance": 0.0 if itself else kernel_distance(features, reference),
            "diversity": diversity(features, frame["prompt_id"].to_numpy(), reference),
            "reference": "real" if real else "base",
            "n_images": len(frame),
        }
    for result in quality.values():
        result["collapsed"] = is_collapsed(result, quality["base"])
    return quality


def _selection_of(candidates: pd.DataFrame, score_names: tuple[str, ...]) -> dict:
    aucs = {name: within_prompt_auc(candidates, f"score_{name}") for name in score_names}
    kept = candidates[candidates["kept"].eq(True)]
    exact = {"pool_exact": prompt_mean(candidates, "exact"), "kept_exact": prompt_mean(kept, "exact")}
    return {"auc": _present(aucs), **_present(exact)}


def _selection(candidates: pd.DataFrame, score_names: tuple[str, ...]) -> dict:
    rounds = sorted(candidates["round"].unique())
    selection = {**_selection_of(candidates, score_names), "rounds": len(rounds)}
    if len(rounds) > 1:
        selection["by_round"] = [_selection_of(candidates[candidates["round"] == r], score_names) for r in rounds]
    return selection


def _training_of(folders: list[str]) -> dict | None:
    """The training of one model, its rounds one after the other; `round_starts` are indices into the curves."""
    curves, summaries, starts = [], [], []
    for folder in folders:
        # Steps since the last checkpoint are repeated after a restart: the later line counts.
        lines = {line["step"]: line for line in read_lines(join(folder, "training.jsonl"))}
        uri = join(folder, "summary.json")
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


def _training(run_dir: str) -> dict:
    homes = {"tuned": run_dir} | {control: join(run_dir, "controls", control) for control in ("random", "oracle")}
    return _present(
        {
            model: _training_of([join(home, f"round-{number}", "adapter") for number in round_numbers(home)])
            for model, home in homes.items()
        }
    )


def _errors(events: list[dict], candidates: pd.DataFrame, evaluation: dict[str, pd.DataFrame]) -> list[dict]:
    """Skipped prompts and error rows; rows that say the same are one entry with a `count`, and of many skipped prompts
    those beyond the first are one entry without a prompt."""
    skipped = [e for e in events if e["event"] == "prompt_skipped"]  # a resumed session says it again
    counts = Counter({(e["prompt"], e["stage"], e["message"]): e.get("count", 1) for e in skipped})
    for stage, frame in [("generate", candidates), *(("evaluate", frame) for frame in evaluation.values())]:
        failed = frame[frame["error"].notna()]
        counts.update((row.prompt, stage, row.error) for row in failed.itertuples())
    return [
        {"prompt": prompt, "stage": stage, "message": message, "count": count}
        for (prompt, stage, message), count in counts.items()
    ]


def _strict(value):
    """The same for JSON: NaN and infinities as null, NumPy's numbers as Python's."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _benchmarks(run_dir: str) -> dict[str, dict]:
    """What benchmarks wrote by `--out` into the folder `benchmarks/`, by name; other files there are left out."""
    folder = join(run_dir, "benchmarks")
    found = {
        name.removesuffix(".json"): read_json(join(folder, name))
        for name in list_names(folder)
        if name.endswith(".json")
    }
    return {name: told for name, told in found.items() if {"question", "results", "gates"} <= told.keys()}


def summarise(run_dir: str, config: RunConfig) -> dict:
    """The content of report.json, from the run's folder alone; what has not run yet is left out.

    Intervals are 95 % t-intervals over prompts; shares lie in [0, 1], scores are in nats, times in seconds.
    """
    events = read_lines(join(run_dir, "events.jsonl"))
    candidates = read_candidates(run_dir, config.score.names)
    evaluation = _present({model: read_evaluation(run_dir, model) for model in MODELS})
    sound = {model: frame[frame["error"].isna()] for model, frame in evaluation.items()}
    report = {
        "run": _run(run_dir, config, events),
        "timing": _timing(events),
        "throughput": _throughput(events),
        "denoiser_evaluations": _denoiser_evaluations(events),
        "prompts": _prompts(events, candidates, evaluation),
        "alignment": _alignment(sound),
        "comparison": _comparison(sound),
        "quality": _quality(sound, read_evaluation(run_dir, REFERENCE)),
        "selection": _selection(candidates[candidates["error"].isna()], config.score.names),
        "training": _training(run_dir),
        "errors": _errors(events, candidates, evaluation),
        "benchmarks": _benchmarks(run_dir),
    }
    return _strict(report)
