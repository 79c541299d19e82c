"""Information-theoretic text-to-image alignment as a distributed batch system.

For notebooks: `load_denoiser` a model, sample with a `Sampler`, score with a `Scorer`; `RunConfig` and `run_pipeline`
for the whole job. Names are imported when first used, so that `import mi_ray` costs nothing.
"""

import os
from importlib import import_module

__version__ = "0.1.0"

# Without these settings, the libraries print messages in every worker that our users do not need. The user's own
# settings are kept.
for _name, _value in {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(_name, _value)

_HOMES = {
    "RunConfig": "config",
    "load_denoiser": "diffusion.denoisers",
    "Sampler": "scoring.sampler",
    "Scorer": "scoring.scorer",
    "Work": "scoring.work",
    "run_pipeline": "stages.pipeline",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'mi_ray' has no attribute {name!r}")
    return getattr(import_module(f"mi_ray.{_HOMES[name]}"), name)
