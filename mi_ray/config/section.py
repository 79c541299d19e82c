"""What every configuration is made of: frozen sections that read YAML and flags alike, and the error of faults."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def _listed(value: object) -> object:
    """One name stands for a list of it."""
    return (value,) if isinstance(value, str) else value


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{', '.join(map(repr, twice))} is there more than once; name each metric once")
    return names


# Names of metrics: of the package, or package.module:Class; `alignment.metric` loads them.
MetricNames = Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_once)]
METRIC_NAMES = "oracle (prompts of the embedded world only), or package.module:Class of your own (see README)"


class ConfigError(Exception):
    """What is wrong with what the user gave: one message a fault."""

    def __init__(self, faults: list[str]):
        super().__init__("\n".join(faults))
        self.faults = faults


@contextmanager
def collecting(faults: list[str], field: str = "") -> Iterator[None]:
    """Collect what is wrong instead of raising it, so that all is told at once: the faults of a ConfigError and, where
    a field is named, each line of a ValueError as a fault of it."""
    try:
        yield
    except ConfigError as error:
        faults += error.faults
    except ValueError as error:
        if not field:
            raise
        faults += [f"{field}: {fault}" for fault in str(error).split("\n")]


def holds_credentials(uri: str) -> bool:
    """Whether a URI says user:secret@ (the secret may hold slashes) or, in its query, something like a key."""
    place, _, query = uri.partition("://")[2].partition("?")
    names = [name.lower() for name in re.findall(r"(?:^|&)([^=&]*)", query)]
    return bool(re.match(r"[^/@]*@|[^@]*:[^@]*@", place)) or any(
        word in name for name in names for word in ("key", "secret", "token", "password", "signature")
    )


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values):
        """`none` means no value, and an empty list where there is one, in YAML as on the command line."""
        if not isinstance(values, dict):
            return values
        for name, value in values.items():  # they would end in logs and in the run's folder
            if isinstance(value, str) and holds_credentials(value):
                raise ValueError(f"{name} holds credentials; take them out: set the environment or an instance role")
        lists = {name for name, field in cls.model_fields.items() if isinstance(field.default, tuple)}
        nothing = {name for name, value in values.items() if isinstance(value, str) and value.lower() == "none"}
        nothing |= {name for name in lists if name in values and values[name] in (None, [None])}
        values = values | {name: () if name in lists else None for name in nothing}
        # A section set in part keeps the rest of its own default, not of its class's.
        defaults = {name: cls.model_fields[name].default for name in values if name in cls.model_fields}
        return values | {
            name: default.model_dump(exclude_unset=True) | values[name]
            for name, default in defaults.items()
            if isinstance(default, Section) and isinstance(values[name], dict)
        }


def check_band(log_snr_min: float, log_snr_max: float):
    if log_snr_min >= log_snr_max:
        raise ValueError(f"log_snr_min is {log_snr_min}, not below log_snr_max, {log_snr_max}; lower it")


def config_hash(results: dict) -> str:
    """12 hexadecimal digits that tell what results depend on."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:12]


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
