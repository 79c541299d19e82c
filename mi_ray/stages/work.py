"""The former place of `Work`, which notebooks import: now `from mi_ray import Work`."""

from mi_ray.scoring.work import Work as Work
