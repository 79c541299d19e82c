"""Make the prompt files of the embedded world: python jobs/make_shapes_prompts.py"""

import json
from itertools import chain
from pathlib import Path

import numpy as np
from pydantic import Field, PositiveInt
from pydantic_settings import BaseSettings, SettingsConfigDict

from mi_ray.config.command_line import run_settings
from mi_ray.config.paths import LocalOrUri
from mi_ray.shapes.grammar import CATEGORIES, sample_prompts
from mi_ray.storage import join, write_bytes

SPLITS = ("train", "test", "ood")


def draw(split: str, count: int, *seed: int, without: frozenset[str] = frozenset()) -> list[list[dict[str, str]]]:
    """Draw `count` rounds of rows. Each round has one row of every category. Prompts of a category are distinct.

    Args:
        without: prompts to leave out.
    """
    streams = []
    for index, category in enumerate(CATEGORIES):
        rng = np.random.default_rng((*seed, SPLITS.index(split), index))
        drawn = sample_prompts(category, split, 2 * count if without else count, rng)
        prompts = [prompt for prompt in drawn if prompt not in without][:count]
        streams.append([{"prompt": prompt, "category": category, "split": split} for prompt in prompts])
    return [list(rows) for rows in zip(*streams, strict=True)]


class Command(BaseSettings):
    """Write shapes-train.jsonl, shapes-test.jsonl and shapes-online.jsonl, in which all categories alternate.

    In the test file, two prompts of the held-out split test alternate with one prompt of the split ood. The online file
    has the kind of prompts that the embedded model fails on: those of the split ood. None of them is in another file.
    """

    model_config = SettingsConfigDict(cli_parse_args=True, cli_kebab_case=True, extra="forbid")

    folder: LocalOrUri = Field(str(Path(__file__).parent / "configs" / "prompts"), description="output folder")
    seed: int = Field(0, description="random seed")
    train_per_category: PositiveInt = Field(100, description="number of prompts per category in shapes-train.jsonl")
    ood_per_category: PositiveInt = Field(
        20, description="number of prompts of the split ood per category in shapes-test.jsonl; twice as many of test"
    )
    online_per_category: PositiveInt = Field(120, description="number of prompts per category in shapes-online.jsonl")

    def cli_cmd(self):
        train = draw("train", self.train_per_category, self.seed)
        test, ood = draw("test", 2 * self.ood_per_category, self.seed), draw("ood", self.ood_per_category, self.seed)
        in_turn = zip(test[0::2], test[1::2], ood, strict=True)
        files = {"train": list(chain(*train)), "test": [row for rounds in in_turn for rows in rounds for row in rows]}
        others = frozenset(row["prompt"] for rows in files.values() for row in rows)
        files["online"] = list(chain(*draw("ood", self.online_per_category, self.seed, 1, without=others)))
        if len({row["prompt"] for rows in files.values() for row in rows}) < sum(map(len, files.values())):
            raise ValueError(f"seed is {self.seed}, and with it two categories have the same prompt; use another seed")
        for name, rows in files.items():
            path = join(self.folder, f"shapes-{name}.jsonl")
            write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
            print(f"{len(rows)} prompts are in {path}")


if __name__ == "__main__":
    run_settings(Command)
