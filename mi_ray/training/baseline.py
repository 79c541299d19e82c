"""The baseline of a selection: what learning from a random selection of the same pool does, taken off an adapter."""

import tempfile
from pathlib import Path

from mi_ray.config import RunConfig
from mi_ray.diffusion.adapters import save_weighted_sum
from mi_ray.runs.layout import SUMMARY
from mi_ray.storage import exists, join, local_folder, read_json, write_bytes, write_json


def take_off_baseline(config: RunConfig, adapter: str, baseline: str, start: str | None, destination: str):
    """Write the adapter less `finetune.baseline` of what the baseline learnt: adapter - share (baseline - start).

    Learning from one's own images moves a model whatever is chosen among them. An adapter that learnt from a random
    selection of the same pool has made that move and no other, so what is left is due to the choice: the baseline of a
    policy gradient (Williams 1992, section 4), as task arithmetic.

    Args:
        adapter, baseline: URIs of two adapters' folders that started from the same one.
        start: URI of that one's folder; None: from none.
        destination: URI of the folder to write, like an adapter's, without its log.
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
