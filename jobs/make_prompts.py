"""Make new prompts from your own list: python jobs/make_prompts.py --file mine.txt --out more.jsonl --count 1000"""

from mi_ray.config.command_line import run_command
from mi_ray.inputs.more_prompts_config import MorePromptsConfig


def run(config: MorePromptsConfig, dry_run: bool):
    from mi_ray.inputs.make_prompts import make_prompts  # takes seconds; --help and wrong flags do not need it

    make_prompts(config, dry_run)


if __name__ == "__main__":
    run_command(run, model=MorePromptsConfig)
