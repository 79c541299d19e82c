"""More prompts, from files to a file: what `inputs` reads is recombined by `language`, and written."""

from collections import Counter
from itertools import islice

from mi_ray.config.section import ConfigError, collecting
from mi_ray.inputs.more_prompts_config import MorePromptsConfig
from mi_ray.inputs.prompts import write_prompts
from mi_ray.inputs.sources import read_sources
from mi_ray.language.recombine import recombined
from mi_ray.language.shapes import reads
from mi_ray.language.shapes_templates import GrammarTemplates
from mi_ray.language.sources import templates_by
from mi_ray.shapes.grammar import CATEGORIES


def make_prompts(config: MorePromptsConfig, dry_run: bool = False):
    """Write config.count new prompts to config.out, and say what they are made of; on a dry run only say it.

    Raises:
        ConfigError: a file will not do, no prompt of the list can be recombined, or too few come of it.
    """
    faults, tokenizer = [], None
    with collecting(faults):
        sources = read_sources(config)
    with collecting(faults, "phrases"):
        make = templates_by(config.phrases, config.split)
    if config.model:
        with collecting(faults, "model"):
            from mi_ray.diffusion.folders import check_model, load_tokenizer  # seconds, only where they are needed

            check_model(config.model)
            tokenizer = load_tokenizer(config.model)
    if faults:
        raise ConfigError(faults)
    for note in sources.notes:
        print(note)
    prompts, categories, weights = [*sources.categories], [*sources.categories.values()], sources.weights
    if prompts:
        templates = make(prompts, weights)
        drawn = [index for index, weight in enumerate(weights) if weight > 0]
        varied = sum(map(templates.varies, drawn))
        if not varied:
            fault = f"{config.phrases!r} finds nothing in {len(drawn)} prompts that another could stand in the place of"
            raise ConfigError([f"phrases: {fault}; give more prompts, such as 'a red car and a blue dog'"])
        print(f"{varied} of {len(drawn)} prompts are templates; in the others nothing can be exchanged")
    else:
        templates, categories, weights = GrammarTemplates(config.split), CATEGORIES, [1.0] * len(CATEGORIES)

    def fits(prompt: str) -> bool:
        return tokenizer is None or len(tokenizer(prompt).input_ids) <= tokenizer.model_max_length

    new = recombined(templates, weights, config.seed, [*sources.excluded, *prompts], fits)
    rows = [_row(prompt, categories[index], config.split) for index, prompt in islice(new, config.count)]
    if len(rows) < config.count:
        remedy = f"give --count {len(rows)}, or more prompts" if rows else "give more prompts, or exclude fewer"
        raise ConfigError([f"count: {config.count} new prompts are wanted and {len(rows)} can be made; {remedy}"])
    if not dry_run:
        try:
            write_prompts(config.out, rows)
        except (OSError, ValueError) as error:
            raise ConfigError([f"out: {config.out!r} cannot be written ({error}); give another --out"]) from error
    counts = Counter(row["category"] for row in rows if "category" in row).items()
    shares = ": " * bool(counts) + ", ".join(f"{count} {category}" for category, count in counts)
    print(f"{len(rows)} prompts {'can be made' if dry_run else f'are in {config.out}'}{shares}")


def _row(prompt: str, category: str | None, split: str) -> dict[str, str]:
    row = {"prompt": prompt, "category": category, "split": split if reads(prompt) else None}
    return {name: value for name, value in row.items() if value is not None}
