"""The inputs of new prompts: the user's list, the prompts that fail (focus), and the prompts to exclude."""

from dataclasses import dataclass

from mi_ray.config.section import ConfigError, collecting
from mi_ray.inputs.focus import Focus, read_focus
from mi_ray.inputs.more_prompts_config import MorePromptsConfig
from mi_ray.inputs.prompts import read_prompts


@dataclass(frozen=True)
class Sources:
    """Prompts, with the weights with which their templates and words are drawn."""

    categories: dict[str, str | None]  # prompt -> category; first those of the list, then those only in the focus
    weights: list[float]  # of these prompts; 0 for prompts outside the focus, if there is one
    excluded: list[str]
    notes: list[str]  # messages for the user about the files


def read_sources(config: MorePromptsConfig) -> Sources:
    """Read all files that the configuration names.

    Raises:
        ConfigError: with all faults of the files.
    """
    faults: list[str] = []
    notes: list[str] = []
    listed: dict[str, str | None] = {}
    excluded: list[str] = []
    focus: Focus = {}

    def read(field: str, file: str) -> dict[str, str | None]:
        table, skipped = read_prompts(file, field, broken="skip", duplicates="drop")
        if skipped:
            count = sum(row.get("count", 1) for row in skipped)
            notes.append(f"{field}: {file!r}: {count} lines are repeated or have no prompt: {skipped[0]['message']}")
        return dict(zip(table["prompt"].to_pylist(), table["category"].to_pylist(), strict=True))

    if config.file:
        with collecting(faults):
            listed = read("file", config.file)
    for file in config.exclude:
        with collecting(faults):
            excluded += read("exclude", file)
    if config.focus:
        with collecting(faults):
            focus = read_focus(config.focus, config.focus_metric, config.focus_below)
    if faults:
        raise ConfigError(faults)
    categories = listed | {prompt: category for prompt, (_, category) in focus.items() if prompt not in listed}
    weights = [focus.get(prompt, (0.0, None))[0] if focus else 1.0 for prompt in categories]
    if focus:
        both = len(focus.keys() & listed.keys())
        notes.append(
            f"focus: {len(focus)} prompts fail, {both} of them are in the list; new prompts are made only from these"
        )
    return Sources(categories, weights, excluded, notes)
