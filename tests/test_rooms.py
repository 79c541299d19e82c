"""Imports point down DESIGN's arrows only: this walks them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mi_ray"

# What each room may import of the package, besides itself. A room that is not here fails the test: give it its arrows.
ARROWS = {
    "section": (),
    "config": ("section",),
    "command_line": ("config", "section"),
    "s3": (),
    "gcs": (),
    "schemas": (),
    "storage": ("s3", "gcs", "section"),
    "run_folder": ("section", "storage"),
    "prompts": ("section", "storage"),
    "shard_plan": ("section", "storage", "prompts"),
    "pairs": ("section", "storage"),
    "diffusion": (),
    "information": ("diffusion.schedules",),
    "shapes": (),
    "language": ("shapes",),
    "alignment": ("shapes",),
    "report": ("config", "schemas", "section", "storage"),
    "stages": (
        *("section", "config", "schemas", "storage", "run_folder", "prompts", "shard_plan", "pairs"),
        *("diffusion", "information", "shapes", "language", "alignment", "report"),
    ),
}
WITH_RAY = ("stages",)


def imported(source: str) -> Iterator[str]:
    """Full names of all that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(room: str, source: str) -> list[str]:
    allowed = [f"mi_ray.{name}." for name in ("__version__", room, *ARROWS[room])]
    names = [f"{name}." for name in imported(source)]
    local = [name for name in names if name.startswith("mi_ray.") and not name.startswith(tuple(allowed))]
    ray = [name for name in names if name.startswith("ray.") and room not in WITH_RAY]
    return [name.rstrip(".") for name in local + ray]


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert violations(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("config", "from mi_ray import storage", ["mi_ray.storage"]),
        ("diffusion", "def f():\n    from ray.data import Dataset", ["ray.data.Dataset"]),
        ("diffusion", "import ray as r", ["ray"]),
        ("information", "from mi_ray.diffusion.schedules import NoiseSchedule", []),
        ("information", "from mi_ray.diffusion import sampling", ["mi_ray.diffusion.sampling"]),
        ("report", "import mi_ray.shapes.oracle", ["mi_ray.shapes.oracle"]),
        ("stages", "import ray\nfrom mi_ray.diffusion import sampling", []),
    ],
)
def test_the_walk_finds_what_is_wrong(room, source, expected):
    assert violations(room, source) == expected


def test_all_but_the_stages_work_without_ray():
    """Not even by a detour through the package's __init__."""
    rooms = [room for room in ARROWS if room not in WITH_RAY]
    block = "import sys; sys.modules['ray'] = None; "
    code = block + "; ".join(f"import mi_ray.{room}" for room in rooms)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_wrong_flags_and_the_status_wait_for_no_model():
    block = "import sys; sys.modules['torch'] = sys.modules['ray'] = None; "
    names = ("command_line", "config", "stages.pair_config", "stages.status")
    code = block + "; ".join(f"import mi_ray.{name}" for name in names)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
