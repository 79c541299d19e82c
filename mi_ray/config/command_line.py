"""Reads a configuration from YAML files and flags. Flags override files. All faults are reported at once."""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    CliToggleFlag,
    CliUnknownArgs,
    SettingsConfigDict,
    SettingsError,
)

from mi_ray.config import RunConfig
from mi_ray.config.paths import absolute
from mi_ray.config.section import ConfigError, Section, excerpt

Config = TypeVar("Config", bound=Section)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if _is_section(field):
            names += _field_names(field.annotation, f"{prefix}{name}.")
    return names


def _suggestion(name: str, model: type[BaseModel]) -> str:
    name = name.lstrip("-").partition("=")[0].replace("-", "_")
    known = _field_names(model)
    close = difflib.get_close_matches(name, known, 1, 0.75)
    if not close:  # then compare the last part of the name only
        leaves = {k: k.rsplit(".", 1)[-1] for k in known}
        leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves.values(), 1, 0.75)
        close = [k for k in known if leaves[k] in leaf]
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "remove it (--help lists every field)"


def _faults(error: ValidationError, model: type[BaseModel]) -> list[str]:
    messages = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            messages.append(f"{name}: unknown key; {_suggestion(name, model)}")
        elif fault["type"] == "missing":
            messages.append(f"{name}: missing; set it in the config file or with --{name.replace('_', '-')}")
        elif fault["type"] == "value_error":
            messages += [f"{name + ': ' if name else ''}{text}" for text in str(fault["ctx"]["error"]).split("\n")]
        elif fault["type"] == "model_type":
            given = excerpt(repr(fault["input"]))
            advice = "set its fields (--help lists them)"
            messages.append(f"{name}: {given} is not valid, because this is a section; {advice}")
        else:
            reason = fault["msg"][0].lower() + fault["msg"][1:]
            messages.append(f"{name}: {excerpt(repr(fault['input']))} is not valid; {excerpt(reason)}")
    return messages


def _read_yaml(path: str) -> dict:
    try:
        tree = yaml.safe_load(Path(absolute(path)).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError) as error:
        raise ConfigError([f"--config: {path!r} cannot be read ({error}); give a YAML file"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"--config: {path!r} is not YAML ({excerpt(error)}); correct it"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"--config: {path!r} is not a mapping of fields; see the examples in jobs/configs/"])
    return tree


class _CommandLine(BaseSettings):
    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
        cli_ignore_unknown_args=True,
        cli_hide_none_type=True,
        cli_parse_none_str="none",
    )
    config: tuple[str, ...] = Field(
        (),
        description="YAML file with the fields below, or several: later files override earlier ones, and flags"
        " override files",
    )
    smoke: CliToggleFlag[bool] = Field(
        False, description="use the job's smoke config: a small run of the same code, to try it"
    )
    dry_run: CliToggleFlag[bool] = Field(False, description="print the plan and exit")
    unknown: CliUnknownArgs = Field(default=[])  # kept, so that all faults are reported at once


_COMMAND_FIELDS = {"config": (), "smoke": False, "dry_run": False}


def _merge(below: dict, above: dict) -> dict:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if both else value
    return merged


def _flag(argument: str) -> str:
    """The flag with dashes in its name: --generate.batch_size=4 becomes --generate.batch-size=4."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _takes_several(flag: str, model: type[BaseModel]) -> bool:
    """Whether the field of a flag is a list."""
    field = None
    for part in flag.removeprefix("--").replace("-", "_").split("."):
        field = model.model_fields.get(part)
        if field is None:
            return False
        if _is_section(field):
            model = field.annotation
    return any(get_origin(kind) in (tuple, list) for kind in (field.annotation, *get_args(field.annotation)))


def _one_value_each(arguments: list[str], model: type[BaseModel]) -> list[str]:
    """The flags with one value each: `--field a b` of a list becomes `--field a --field b`."""
    flags, before = [], ""
    for argument in arguments:
        flag = _flag(argument)
        if argument.startswith("--"):
            before = flag
        elif before and flags[-1] != before and _takes_several(before, model):
            flags.append(before)
        flags.append(flag)
    return flags


def _unknown_arguments(unknown: list[str], model: type[BaseModel]) -> list[str]:
    """One message for each argument that matches no field. An argument after an unknown flag is its value."""
    faults = []
    for before, argument in zip(["", *unknown], unknown, strict=False):
        if argument.startswith("--"):
            faults.append(f"{excerpt(argument)}: unknown flag; {_suggestion(argument, model)}")
        elif not before.startswith("--") or "=" in before:
            shown = excerpt(argument)
            faults.append(f"{shown}: is not the value of any flag; write --field {shown}, or remove it")
    return faults


def load_config(
    arguments: list[str], description: str = "", smoke_file: str | None = None, model: type[Config] = RunConfig
) -> tuple[Config, bool]:
    """Read the --config files, the flags and --dry-run. Returns (config, dry_run).

    Args:
        model: the class of the configuration. Its docstring is the default of `description`.

    Raises:
        ConfigError: with all faults of the files and the flags.
    """
    command = type("Command", (model, _CommandLine), {"__doc__": description or model.__doc__})
    flags = _one_value_each(arguments, command)
    try:
        given = CliSettingsSource(command, cli_prog_name=Path(sys.argv[0]).name, cli_parse_args=flags)()
    except SettingsError as error:
        raise ConfigError([str(error).removeprefix("error parsing CLI: ").removeprefix("argument ")]) from error
    files, smoke, dry_run = (given.pop(name, default) for name, default in _COMMAND_FIELDS.items())
    unknown = _unknown_arguments(given.pop("unknown", []), model)
    sections = {name: {} for name, field in model.model_fields.items() if field.is_required() and _is_section(field)}
    tree = sections
    for file in files or ([smoke_file] if smoke and smoke_file else []):
        tree = _merge(tree, _read_yaml(file))
    tree = _merge(tree, given)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(unknown + _faults(error, model)) from error
    if unknown:
        raise ConfigError(unknown)
    return config, bool(dry_run)


def run_command(
    run: Callable[[Config, bool], None],
    description: str = "",
    smoke_file: str | None = None,
    model: type[Config] = RunConfig,
):
    """Run a job from the command line: exit code 0 (done), 2 (user error, one message a fault) or 1 (our error)."""
    try:
        run(*load_config(sys.argv[1:], description, smoke_file, model))
    except ConfigError as error:
        _refuse(error.faults)


def run_settings(command: type[BaseSettings]):
    """As `run_command`, for a job whose command line is a settings class with a `cli_cmd` method."""
    try:
        CliApp.run(command)
    except ConfigError as error:
        _refuse(error.faults)
    except ValidationError as error:
        _refuse(_faults(error, command))


def _refuse(faults: list[str]):
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    sys.exit(2)
