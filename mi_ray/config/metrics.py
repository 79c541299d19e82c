"""Names of metrics in a configuration. `alignment.metric` loads them."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from mi_ray.config.paths import model_place

METRIC_NAMES = (
    "oracle (only for prompts of the embedded world), clip-score, clip-cosine, pick-score, hps-v2.1, blip-vqa,"
    " vqa-score, soft-tifa or soft-tifa@QUESTIONS, spatial-proxy, numeracy-proxy, 3-in-1-proxy, geneval-port, or your"
    " own package.module:Class (see README). name@MODEL takes another model than the default one: a local folder, or"
    " owner/name or owner/name@revision of the hub; soft-tifa@QUESTIONS@MODEL; name@A+B for several models"
)


def metric_place(name: str) -> str:
    """The name of a metric, with the local paths after @ made absolute. Any other name is returned unchanged.

    Raises:
        ValueError: as `model_place` does.
    """
    metric, at, places = name.partition("@")
    if "+" in places and not os.path.exists(places):  # several models
        return metric + at + "+".join(metric_place(f"@{place}")[1:] for place in places.split("+"))
    first, *rest = places.split("@")
    first = model_place(first) if first else first
    if os.path.isfile(first) and rest:  # a file of questions, then a model
        rest = [model_place(rest[0]), *rest[1:]]
    return metric + at + "@".join([first, *rest])


def reward_place(text: str) -> str:
    """A reward, name or name:weight, with the local paths of a metric's name made absolute.

    Raises:
        ValueError: as `metric_place` does.
    """
    name, colon, weight = text.rpartition(":")
    if "@" in name and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", weight, re.IGNORECASE):
        return metric_place(name) + colon + weight
    return metric_place(text)


def _listed(value: object) -> object:
    """A single name means a list with this name."""
    return (value,) if isinstance(value, str) else value


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{', '.join(map(repr, twice))} is listed more than once; list each metric once")
    return names


MetricName = Annotated[str, AfterValidator(metric_place)]  # also a name that is no metric, such as that of a score
RewardName = Annotated[str, AfterValidator(reward_place)]
MetricNames = Annotated[tuple[MetricName, ...], BeforeValidator(_listed), AfterValidator(_once)]
