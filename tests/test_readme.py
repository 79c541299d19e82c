"""The table of model families in README.md says what the tests show."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/diffusion"))

from test_adapter_files import IN_COMFYUI  # noqa: E402
from tiny_families import CASES  # noqa: E402

from mi_ray.diffusion.families import FAMILIES  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(first: str) -> list[list[str]]:
    """The rows of the table whose header begins with this cell."""
    lines = README[README.index(f"\n| {first} |") :].strip().split("\n")
    rows = [line.strip("| ").split(" | ") for line in lines[: lines.index("")]]
    return rows[2:]


def test_every_family_has_a_row_and_its_cells_are_those_of_the_tests():
    titles = {family.title.replace("Sigma", "Σ"): name for name, family in FAMILIES.items()}
    rows = {row[0]: row[1:] for row in table("family | class in `model_index.json`")}
    assert rows.keys() == titles.keys()
    assert CASES.keys() == FAMILIES.keys()  # the tests of what every family can do have all families
    for title, cells in rows.items():
        in_model_index, *_, in_diffusers, in_comfyui = cells
        assert in_model_index == f"`{titles[title]}`"
        assert in_diffusers == ("PEFT only" if title == "PixArt-Σ" else "yes")
        key = IN_COMFYUI.get(titles[title], ("", "no"))[1]
        assert in_comfyui.strip("`") == (
            "kohya names" if key.startswith("lora_unet_") else key.partition(".")[0] + "." * (key != "no")
        )


def test_the_tests_that_the_table_names_exist():
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in sources] == []
