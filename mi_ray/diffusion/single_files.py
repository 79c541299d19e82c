"""Checkpoints in a single file: what they hold, and the command that makes a diffusers folder of one."""

import json
import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open

SUFFIXES = (".safetensors", ".ckpt")
# Pipelines whose files hold all parts: what the names of the network's weights and of the text encoder's begin with.
_WHOLE = {
    "StableDiffusionPipeline": ("model.diffusion_model.", "cond_stage_model."),
    "StableDiffusionXLPipeline": ("model.diffusion_model.", "conditioner.embedders."),
    "StableDiffusion3Pipeline": ("model.diffusion_model.joint_blocks.", "text_encoders."),
}


def single_file_fault(path: str) -> str:
    """Why a file, or a path with the name of one, is no model folder, and what to do."""
    if not Path(path).is_file():
        return f"{path!r} does not exist; give the folder of a diffusers pipeline or a hub id"
    if not path.endswith(SUFFIXES):
        return f"{path!r} is a file; give the folder of a diffusers pipeline"
    fault = f"{path!r} is a checkpoint in a single file"
    pipeline = "StableDiffusionPipeline"
    if path.endswith(".safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
        except (SafetensorError, OSError) as error:
            fault += f" that cannot be read ({error}): fetch it again, whole"
        else:
            pipeline = next((name for name, starts in _WHOLE.items() if all(_has(keys, s) for s in starts)), None)
            if pipeline is None:
                holds = f"{len(keys)} weights{f', such as {keys[0][:100]}' if keys else ''}"
                return f"{path!r} holds only a part of a model or an adapter ({holds}); give a diffusers folder"
    advice = 'convert it once to a diffusers folder (without a network, add config="FOLDER", of a similar model)'
    return f"{fault}; {advice}: {_command(pipeline, path)}"


def _has(keys: list[str], start: str) -> bool:
    return any(key.startswith(start) for key in keys)


def _command(pipeline: str, path: str) -> str:
    """The command that writes a folder of the file's name beside the file."""
    source, folder = json.dumps(path), json.dumps(str(Path(path).with_suffix("")))
    code = f"import diffusers; diffusers.{pipeline}.from_single_file({source}).save_pretrained({folder})"
    return f"python -c {shlex.quote(code)}"
