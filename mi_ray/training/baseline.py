"""The baseline of a selection: subtract from an adapter what training on a random selection of the same pool learns."""

import tempfile
from pathlib import Path

from mi_ray.config import RunConfig
from mi_ray.diffusion.adapter_files import save_weighted_sum
from mi_ray.runs.layout import SUMMARY
from mi_ray.storage import exists, join, local_folder, read_json, write_bytes, write_json


def subtract_baseline(config: RunConfig, adapter: str, baseline: str, start: str | None, destination: str):
    """Write adapter - share (baseline - start), where share is `finetune.baseline`.

    Training on a model's own images changes the model, whichever images are selected. The baseline adapter was trained
    on a random selection of the same pool, so it has only this change. The difference is the effect of the selection.
    This is the baseline of a policy gradient (Williams 1992, section 4), computed by task arithmetic.

    Args:
        adapter, baseline: URIs of the folders of two adapters that started from the same adapter.
        start: URI of the folder of that adapter; None: both started from a new adapter.
        destination: URI of the folder to write, with the files of an adapter but without its log.
    """
    if exists(join(destination, SUMMARY)):
        return
    share = config.finetune.baseline
    terms = [(1.0, adapter), (-share, baseline), *([(share, start)] if start else [])]
    with tempfile.TemporaryDirectory() as folder:
        save_weighted_sum([(weight, Path(local_folder(uri))) for weight, uri in terms], Path(folder))
        for file in sorted(Path(folder).iterdir()):
            write_bytes(join(destination, file.name), file.read_bytes())
    write_json(join(destination, SUMMARY), read_json(join(adapter, SUMMARY)) | {"baseline": share})
