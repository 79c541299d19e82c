"""A tuned model as a folder of diffusers: the parts of the base model, and its network with the adapter merged in."""

import json
import re
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open

from mi_ray.diffusion.adapter_files import COMFYUI, CONFIG, DIFFUSERS, WEIGHTS
from mi_ray.diffusion.denoisers import load_part
from mi_ray.diffusion.folder_checks import INDEX, family_of, read_index
from mi_ray.diffusion.weights import VARIANTS, quiet_loading, weight_names


def check_out(out: Path):
    """
    Raises:
        ValueError: the folder has files, or is a file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists and is not empty; give another folder")


def export(model: Path, adapter: Path, out: Path, card: dict[str, bytes]):
    """Write the model with its adapter merged in.

    All parts but the network are copied as they are, except that their files have no variant, such as fp16, in their
    names: stock diffusers loads the folder without `variant`. The adapter is merged in float32, and the network is
    written in the dtype of its own files. The adapter's files are copied into `adapter/`.

    Args:
        model: checked folder of the base model.
        adapter: folder of the adapter, with the files of `save_adapter`.
        out: folder that is missing or empty.
        card: {path in the folder: content} of the model card.
    """
    index, part = read_index(model), family_of(model).network
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model / INDEX, out / INDEX)
    for name in index:
        if name != part and (model / name).is_dir():
            shutil.copytree(model / name, out / name)
            _drop_variant(out / name)
    with safe_open(model / part / weight_names(model, index, part)[0], framework="pt") as file:
        dtype = file.get_tensor(next(iter(file.keys()))).dtype
    with quiet_loading():
        network = load_part(model, index, part, torch.float32)
        merged = PeftModel.from_pretrained(network, str(adapter), torch_device="cpu").merge_and_unload()
        merged.to(dtype).save_pretrained(out / part)
    (out / "adapter").mkdir()
    for name in (CONFIG, WEIGHTS, DIFFUSERS, COMFYUI):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, out / "adapter" / name)
    for name, content in card.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)


def _drop_variant(folder: Path):
    """Rename weights of which there are only files of a variant: model.fp16.safetensors becomes model.safetensors."""
    names = [path.name for path in folder.glob("*.safetensors*")]  # with indices such as *.safetensors.index.fp16.json
    for variant in filter(None, VARIANTS):
        renamed = {name: re.sub(rf"\.{variant}(?=[.-])", "", name) for name in names}
        renamed = {name: new for name, new in renamed.items() if name != new}
        if not renamed or set(renamed.values()) & set(names):
            continue
        for name, new in renamed.items():
            (folder / name).rename(folder / new)
            if new.endswith(".index.json"):
                index = json.loads((folder / new).read_text(encoding="utf-8"))
                index["weight_map"] = {key: renamed.get(file, file) for key, file in index["weight_map"].items()}
                (folder / new).write_text(json.dumps(index, indent=2), encoding="utf-8")
        return
