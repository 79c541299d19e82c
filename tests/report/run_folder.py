"""A small run folder like that of a real run, with known values; images are rendered scenes of the embedded world."""

import hashlib
import io
import json
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from mi_ray.alignment.oracle import Oracle
from mi_ray.config import RunConfig
from mi_ray.shapes.grammar import draw_scene, parse, sample_prompts
from mi_ray.shapes.scenes import render
from mi_ray.storage import write_json, write_table
from mi_ray.storage.tables import candidates_schema, evaluation_schema, online_schema

SCORES = ("mitune", "pmi_negatives")
METRICS = {"oracle": Oracle.columns}
CANDIDATES, SEEDS = 12, 4
HOSTILE = '<script>alert("prompt")</script> & a <b>red</b> circle'
EXACT_SHARE = {"base": 0.4, "tuned": 0.6, "random": 0.42}
GUIDED_SHARE = {  # by guidance scale
    "base": {1.0: 0.2, 2.0: 0.5, 4.0: 0.8, 4.4: 0.7, 6.0: 0.6},
    "tuned": {1.0: 0.85, 2.0: 0.97, 4.0: 0.95, 4.4: 0.93, 6.0: 0.9},
    "random": {1.0: 0.3, 2.0: 0.5, 4.0: 0.7, 4.4: 0.7, 6.0: 0.6},
}
UPDATES, VALIDATE_EVERY, GAMMA, STOPPED = 6, 2, 1.1, "the self-score fell"


def prompt_id(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def png(image: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def features(image: np.ndarray) -> list[float]:
    """Means of 8 x 8 pixel blocks, 192 values."""
    return (image.reshape(8, 8, 8, 8, 3).mean((1, 3)).ravel() / 255).tolist()


def config_of(run_dir: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "prompts": {"file": "prompts.txt"},
            "score": {"names": SCORES},
            "select": {"by": "pmi_negatives"},
            "generate": {"candidates_per_prompt": CANDIDATES, "alignment": "oracle"},
            "evaluation": {"images_per_prompt": SEEDS, "alignment": "oracle", "controls": ["random"]},
        }
    )


def _metrics(exact: bool, rng: np.random.Generator) -> dict:
    part = 1.0 if exact else float(rng.choice([0.0, 0.5]))
    return {"exact": float(exact), "objects": part, "attributes": max(part, 0.5), "count": 1.0, "relation": None}


def _image(prompt: str, exact: bool, prompts: list[str], rng: np.random.Generator) -> np.ndarray:
    """What the prompt says if exact, else what another one says."""
    shown = prompt if exact else str(rng.choice([other for other in prompts if other != prompt]))
    return render(draw_scene(parse(shown), rng, unseen=True))


def _write_candidates(run_dir: Path, prompts: list[str], rng: np.random.Generator):
    rows = []
    for number, prompt in enumerate(prompts):
        pool = []
        for index in range(CANDIDATES):
            exact = bool(rng.random() < 0.4)
            # mitune knows nothing of `exact`; pmi_negatives does, and ties now and then.
            scores = {
                "score_mitune": rng.normal(number, 1),
                "score_pmi_negatives": round(rng.normal(1.2 * exact, 1), 1),
            }
            pool.append({"candidate_index": index, "seed": index, **scores, **_metrics(exact, rng)})
        order = sorted(pool, key=lambda row: -row["score_pmi_negatives"])
        for rank, row in enumerate(order):
            image = png(_image(prompt, row["exact"] == 1, prompts, rng)) if rank == 0 or number < 4 else None
            rows.append({"prompt_id": prompt_id(prompt), "prompt": prompt, "rank": rank, "kept": rank == 0, **row})
            rows[-1]["image"] = image
    rows.append({"prompt_id": prompt_id(HOSTILE), "prompt": HOSTILE, "error": "no <scene> drawn"})
    table = pa.Table.from_pylist(rows, candidates_schema(SCORES, METRICS))
    write_table(str(run_dir / "round-0" / "candidates" / "part-00000-0.parquet"), table)


def _write_evaluation(
    run_dir: Path,
    prompts: dict[str, tuple[str, str]],
    rng: np.random.Generator,
    shares: dict[str, dict[float | None, float]],
):
    """`shares`: of exact images, by model and guidance scale."""
    for model, by_scale in shares.items():
        rows = []
        for (prompt, (category, split)), (scale, share) in product(prompts.items(), by_scale.items()):
            for index in range(SEEDS):
                exact = bool(rng.random() < share)
                image = _image(prompt, exact, list(prompts), rng)
                facts = {"prompt_id": prompt_id(prompt), "prompt": prompt, "category": category, "split": split}
                facts["guidance_scale"] = scale
                measured = {"score_pmi": rng.normal(5 + exact, 1), "features": features(image), "image": png(image)}
                rows.append({**facts, "image_index": index, "seed": 100 + index, **measured, **_metrics(exact, rng)})
        table = pa.Table.from_pylist(rows, evaluation_schema(METRICS))
        write_table(str(run_dir / "evaluation" / model / "part-00000-0.parquet"), table)


def _write_events(run_dir: Path):
    shard = {"model": "base", "shard": "part-00000-0.parquet"}
    generated = {"stage": "generate", "rows": 60, "denoiser_evaluations": 6000, "score_evaluations": 600, "seconds": 9}
    evaluated = {"stage": "evaluate", "rows": 96, "denoiser_evaluations": 9600, "score_evaluations": 960, "seconds": 8}
    skipped = {"prompt": "a b c", "stage": "prompts", "message": "longer than 77 tokens"}
    events = [
        (0, "prompts_read", {"stage": "train", "read": 26, "used": 25, "skipped": 1}),
        (0, "prompt_skipped", skipped),
        (5, "shard_written", {**shard, **generated}),  # then the session was killed
        (100, "prompts_read", {"stage": "train", "read": 26, "used": 25, "skipped": 1}),
        (100, "prompt_skipped", skipped),
        (108, "shard_written", {**shard, **generated}),
        (110, "stage_finished", {"stage": "generate", "seconds": 10.0}),
        (111, "prompts_read", {"stage": "evaluation", "read": 24, "used": 24, "skipped": 0}),
        (120, "stage_finished", {"stage": "finetune", "seconds": 6.5}),
        (125, "shard_written", {**shard, **evaluated}),
        (130, "stage_finished", {"stage": "evaluate_base", "seconds": 8.0}),
        (132, "shard_written", {**shard, **evaluated, "model": "reference"}),
        (133, "stage_finished", {"stage": "evaluate_reference", "seconds": 2.0}),
        (140, "stage_finished", {"stage": "finetune", "seconds": 2.0}),
    ]
    lines = [json.dumps({"time": 1.7e9 + time, "event": event, **facts}) for time, event, facts in events]
    (run_dir / "events.jsonl").write_text("\n".join([*lines, '{"time": 17000']))  # the last line cut short by a kill


def _write_training(folder: Path, rng: np.random.Generator):
    folder.mkdir(parents=True)
    steps = [*range(1, 31), *range(21, 61)]  # restarted from step 20
    loss = [float("nan") if step == 60 else 0.1 + 1 / step + 0.02 * rng.random() for step in steps]
    lines = [
        json.dumps({"step": step, "loss": value, "grad_norm": 0.5, "learning_rate": 1e-4})
        for step, value in zip(steps, loss, strict=True)
    ]
    (folder / "training.jsonl").write_text("\n".join(lines))
    summary = {"steps": 60, "trainable_parameters": 1234, "outputs_changed": True, "output_change": 0.02}
    write_json(str(folder / "summary.json"), summary)


def _prompts(rng: np.random.Generator) -> dict[str, tuple[str, str]]:
    prompts = {}
    for category in ("color", "spatial", "complex"):
        for split in ("test", "ood"):
            prompts |= dict.fromkeys(sample_prompts(category, split, 4, rng), (category, split))
    return prompts


def write_run(folder: Path):
    """Two dozen prompts, half of them out of distribution; base, tuned and random evaluated, real renders beside."""
    rng = np.random.default_rng(0)
    prompts = _prompts(rng)
    _write_candidates(folder, list(prompts), rng)
    shares = {model: {7.5: share} for model, share in EXACT_SHARE.items()} | {"reference": {None: 1.0}}
    _write_evaluation(folder, prompts, rng, shares)
    _write_events(folder)
    _write_training(folder / "round-0" / "adapter", rng)
    _write_training(folder / "controls" / "random" / "round-0" / "adapter", rng)
    write_json(str(folder / "run.json"), {"config": {"seed": 0}, "config_hash": "abc", "versions": {"torch": "2"}})


# ------------------------------------------------------------------------------------------ an online run
def online_config_of(run_dir: Path) -> RunConfig:
    """Of `write_online_run`: a guidance-free student, evaluated at several guidance scales."""
    config = config_of(run_dir).model_dump(mode="json")
    config["online"] |= {"updates": UPDATES, "validate_every": VALIDATE_EVERY, "prompts_per_update": 4}
    config["finetune"] |= {"method": "nft", "anchor_guidance": 4.0}
    config["evaluation"] |= {"guidance_scales": list(GUIDED_SHARE["base"])}
    config["evaluation"]["sampler"] |= {"guidance_scale": 2.0, "num_inference_steps": 20}
    return RunConfig.model_validate(config)


def _online_part(
    prompts: list[str], validation: bool, each: int, update: int, share: float, rng: np.random.Generator
) -> pa.Table:
    """A part of candidates, a share of them exact; of an update's the first and the last of each prompt are trained."""
    rows = []
    for prompt in prompts:
        for index in range(each):
            exact = bool(rng.random() < share)
            row = {"prompt_id": prompt_id(prompt), "prompt": prompt, "candidate_index": index, "seed": index}
            row |= {"score_mitune": rng.normal(), "score_pmi_negatives": rng.normal(3.0 * exact), "update": update}
            if not validation and index in (0, each - 1):
                row |= {"advantage": 1.0 if index else -1.0, "latents": [0.0] * 4, "latents_shape": [4]}
            if validation and index == 0:
                row["image"] = png(_image(prompt, exact, prompts, rng))
            rows.append({**row, **_metrics(exact, rng)})
    return pa.Table.from_pylist(rows, online_schema(SCORES, METRICS))


def _write_online(folder: Path, prompts: list[str], rng: np.random.Generator, finished: bool):
    candidates, lines = folder / "candidates", []
    for update in range(UPDATES + 1):
        share, name = 0.4 + 0.05 * update, f"{update:05d}-000-abc.parquet"
        if update % VALIDATE_EVERY == 0:
            write_table(str(candidates / f"validation-{name}"), _online_part(prompts[:6], True, 2, update, share, rng))
        if update < UPDATES:
            drawn = prompts[6 + 3 * update :][:3]
            write_table(str(candidates / f"update-{name}"), _online_part(drawn, False, 6, update, share, rng))
    for step in range(1, 2 * UPDATES + 1):
        update, inner = divmod(step - 1, 2)
        line = {"step": step, "loss": 1 / step, "grad_norm": 0.5, "update": update, "distance_to_base": 0.01 * step}
        if inner:
            line |= {"reward": 1 + 0.2 * update, "latent_std": 0.9, "diversity": 0.5 - 0.01 * update}
            line |= {"effective_guidance": GAMMA if update else 1.0} if update % VALIDATE_EVERY == 0 else {}
        lines.append(json.dumps(line))
    (folder / "training.jsonl").write_text("\n".join(lines))
    if finished:
        summary = {"steps": 2 * UPDATES, "trainable_parameters": 1234, "outputs_changed": True, "output_change": 0.02}
        validation = {str(version): 1 + 0.1 * version for version in range(0, UPDATES + 1, VALIDATE_EVERY)}
        summary |= {"version": 4, "validation": validation, "stopped": STOPPED}
        write_json(str(folder / "adapter" / "summary.json"), summary)


def write_online_run(folder: Path):
    """The prompts of `write_run`; an online run that stopped itself, its control still training, both evaluated at the
    guidance scales of `GUIDED_SHARE`."""
    rng = np.random.default_rng(0)
    prompts = _prompts(rng)
    _write_evaluation(folder, prompts, rng, GUIDED_SHARE | {"reference": {None: 1.0}})
    _write_online(folder / "online", list(prompts), rng, finished=True)
    _write_online(folder / "controls" / "random" / "online", list(prompts), rng, finished=False)
    write_json(str(folder / "run.json"), {"config": {"seed": 0}, "config_hash": "abc", "versions": {"torch": "2"}})
    shard = {"stage": "online", "model": "policy", "rows": 18, "denoiser_evaluations": 360, "score_evaluations": 90}
    events = [
        {"time": 1.7e9, "event": "shard_written", **shard},
        {"time": 1.7e9 + 9, "event": "stage_finished", "stage": "online", "seconds": 10.0},
    ]
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
