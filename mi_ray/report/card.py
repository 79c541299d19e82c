"""The model card of a tuned model: what it was made of, how, and what the evaluation found."""

import base64
import html
import io

import yaml
from PIL import Image

from mi_ray.config import RunConfig, without_revision
from mi_ray.report.page import alignment_table, headline, plots, side_by_side
from mi_ray.report.summary import summarise

_TITLES = {
    "differences": "Tuned − base",
    "guidance": "Over guidance scales",
    "online": "During the fine-tuning",
    "training": "Training loss",
    "auc": "How well each score ranks",
    "scores": "Scores of the candidates",
}
_PROMPTS = 4  # shown with images
_USE = """## Use

```python
import diffusers

pipe = diffusers.{pipeline}.from_pretrained(FOLDER)
image = pipe({prompt!r}).images[0]
```

The weights are those of the base model with the adapter merged in. `adapter/` holds the adapter alone: for PEFT, for
`load_lora_weights` of diffusers and, if there is a `comfyui.safetensors`, for ComfyUI."""


def model_card(config: RunConfig, content: dict, arm: str, pipeline: str) -> dict[str, bytes]:
    """The files of a card: README.md as the hub reads it, and its figures. Paths are shortened to their last part.

    Args:
        content: of the run's run.json.
        arm: the tuned model, or a control.
        pipeline: class of the pipeline in diffusers.

    Returns:
        {path in the model's folder: content}.
    """
    report, model = summarise(config.run_dir, config), without_revision(config.model.path)
    on_hub = "/" in model and not model.startswith("/")
    base = f"[{model}](https://huggingface.co/{model})" if on_hub else f"`{_short(model)}`"
    commit = content.get("model_commit")
    head = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["mi_ray", "lora"]}
    if on_hub:
        head["base_model"] = model
    facts = {"base model": base + (f", commit or digest `{commit}`; " if commit else "; ") + "its licence applies"}
    facts |= _facts(config, content, report, arm)
    title, verdict = headline(report)
    cards = side_by_side(config.run_dir, report["guidance"].get("headline"))[:_PROMPTS] if report["alignment"] else []
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        "# " + ("Tuned" if arm == "tuned" else f"Control {arm}: tuned") + f" from {base}",
        f"**{title}.** {verdict}",
        "\n".join(f"- {name}: {text}" for name, text in facts.items()),
        _USE.format(pipeline=pipeline, prompt=cards[0]["prompt"] if cards else "a prompt"),
    ]
    if report["alignment"]:
        parts.append(f"## Evaluation\n\n```\n{alignment_table(report)}\n```")
    files = {}
    if cards and arm == "tuned":
        files["figures/samples.png"] = _samples(cards)
        prompts = "; ".join(f"“{html.escape(card['prompt'])}”" for card in cards)
        parts.append(
            f"![Base and tuned model](figures/samples.png)\n\nA row a prompt, base left, tuned right: {prompts}"
        )
    for name, uri in plots(report).items():
        files[f"figures/{name}.svg"] = base64.b64decode(uri.partition(",")[2])
        parts.append(f"![{_TITLES[name]}](figures/{name}.svg)")
    settings = yaml.safe_dump(_short(content["config"]), sort_keys=False, allow_unicode=True)
    parts.append(f"## Configuration\n\n```yaml\n{settings}```")
    return {"README.md": ("\n\n".join(parts) + "\n").encode(), **files}


def _facts(config: RunConfig, content: dict, report: dict, arm: str) -> dict[str, str]:
    tuning, online = config.finetune, config.online
    kind = f"from {_short(tuning.start_from)}" if tuning.start_from else f"{tuning.adapter}, rank {tuning.rank}"
    by = arm if arm != "tuned" else ", ".join(online.rewards) or config.select.by
    return {
        "prompts": f"{report['prompts']['used']} to train on, {report['prompts']['evaluation']} held out",
        "candidates": f"{config.generate.candidates_per_prompt} per prompt, sampled by the model itself",
        "scores": ", ".join(config.score.names),
        "rewarded by" if online.updates else "selected by": by,
        "fine-tuning": f"{tuning.method}, {kind}, learning rate {tuning.learning_rate:g}",
        "length": f"{online.updates} updates" if online.updates else f"rounds: {config.rounds}, steps: {tuning.steps}",
        "versions": ", ".join(f"{name} {version}" for name, version in content.get("versions", {}).items()),
    }


def _short(value):
    """The same configuration with the last part of each absolute path or URI only."""
    if isinstance(value, dict):
        return {key: _short(of_key) for key, of_key in value.items()}
    is_path = isinstance(value, str) and (value.startswith("/") or "://" in value)
    return value.rstrip("/").rpartition("/")[2] if is_path else value


def _samples(cards: list[dict]) -> bytes:
    """PNG of the images side by side: a row a prompt, the base model's left, the tuned model's right."""
    rows = [
        [
            Image.open(io.BytesIO(base64.b64decode(tile["source"].partition(",")[2])))
            for name in ("base", "tuned")
            for tile in card["tiles"][name]
        ]
        for card in cards
    ]
    width, height = (max(getattr(image, side) for row in rows for image in row) for side in ("width", "height"))
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
