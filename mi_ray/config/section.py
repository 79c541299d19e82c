"""Parts of every configuration: frozen sections, read from YAML or flags, and the error that lists all faults."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


LONGEST = 200  # characters of the user's data in a message


def excerpt(value: object, longest: int = LONGEST) -> str:
    """The user's data or a library's message as one line of bounded length, for a message."""
    text = " ".join((value if isinstance(value, str) else str(value))[: 4 * longest].split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


class ConfigError(Exception):
    """Faults of the user's input, one message each."""

    def __init__(self, faults: list[str]):
        super().__init__("\n".join(faults))
        self.faults = faults


@contextmanager
def collecting(faults: list[str], field: str = "") -> Iterator[None]:
    """Collect faults instead of raising them, so that all are reported at once.

    It takes the faults of a ConfigError. If `field` is given, each line of a ValueError is a fault of this field.
    """
    try:
        yield
    except ConfigError as error:
        faults += error.faults
    except ValueError as error:
        if not field:
            raise
        faults += [f"{field}: {fault}" for fault in str(error).split("\n")]


def split_query(uri: str) -> tuple[str, str]:
    """A URI's path and query. The query begins at the last `?`, since the names of objects may hold others, and is
    empty or has the form name=value&...; a `?` before anything else belongs to the path."""
    path, mark, query = uri.rpartition("?")
    is_query = mark and all(re.fullmatch(r"[^=&/]+=[^&]*", part) for part in query.split("&") if part)
    return (path, query) if is_query else (uri, "")


def holds_credentials(uri: str) -> bool:
    """Whether a URI contains user:secret@ (the secret may contain slashes), or a key, secret or token in its query."""
    place, query = split_query(uri.partition("://")[2])
    names = [name.lower() for name in re.findall(r"(?:^|&)([^=&]*)", query)]
    return bool(re.match(r"[^/@]*@|[^@]*:[^@]*@", place)) or any(
        word in name for name in names for word in ("key", "secret", "token", "password", "signature")
    )


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values):
        """Replace `none` by no value, or by an empty list in a list field, in YAML and on the command line."""
        if not isinstance(values, dict):
            return values
        for name, value in values.items():  # credentials would end up in logs and in the run folder
            if isinstance(value, str) and holds_credentials(value):
                raise ValueError(
                    f"{name} contains credentials, which would appear in logs; remove them and use the environment or a"
                    " role"
                )
        lists = {name for name, field in cls.model_fields.items() if isinstance(field.default, tuple)}
        nothing = {name for name, value in values.items() if isinstance(value, str) and value.lower() == "none"}
        nothing |= {name for name, value in values.items() if value == [None] or (value is None and name in lists)}
        values = values | {name: () if name in lists else None for name in nothing}
        # A section that is set in part keeps the other values of its field's default, not of its class's defaults.
        defaults = {name: cls.model_fields[name].default for name in values if name in cls.model_fields}
        return values | {
            name: default.model_dump(exclude_unset=True) | values[name]
            for name, default in defaults.items()
            if isinstance(default, Section) and isinstance(values[name], dict)
        }


def check_band(log_snr_min: float, log_snr_max: float):
    if log_snr_min >= log_snr_max:
        raise ValueError(f"log_snr_min is {log_snr_min}, but it must be below log_snr_max, {log_snr_max}; lower it")


def config_hash(results: dict) -> str:
    """Hash of what the results depend on, 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()[:12]


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
