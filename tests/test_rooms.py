"""Imports point down the arrows of CONTRIBUTING.md only, and no files import each other in a circle."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mi_ray.alignment.oracle import Oracle

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mi_ray"
MOST_LINES, MOST_LINES_OF_STAGES = 400, 2200

# What each room may import of the package, besides itself. A room that is not here fails the test: give it its arrows.
DATA = ("config", "storage", "inputs", "runs")
ARROWS = {
    "config": (),
    "storage": ("config", "alignment.metric"),
    "inputs": ("config", "storage", "language", "shapes.grammar", "diffusion.folders"),
    "runs": ("config", "storage"),
    "diffusion": (),
    "information": ("diffusion.schedules", "diffusion.conditioning"),
    "shapes": (),
    "language": ("shapes",),
    "alignment": ("shapes", "language.nouns", "diffusion.hub"),
    "guidance": ("config", "diffusion", "language"),
    "scoring": ("config", "inputs", "diffusion", "information", "language", "guidance", "alignment.metric"),
    "report": ("config", "storage", "alignment.metric"),
    "training": (*DATA, "diffusion", "information", "shapes", "alignment.metric", "scoring"),
    "stages": (*DATA, "diffusion", "information", "shapes", "language", "alignment", "scoring", "report", "training"),
}
WITH_RAY = ("stages/", "training/loop.py", "training/pretrain.py")


def imported(source: str) -> Iterator[str]:
    """The full names of all imports of a module, anywhere in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(file: str, source: str) -> list[str]:
    """The imports of a file that its room does not allow. The file is relative to the package folder."""
    room = file.split("/")[0]
    allowed = [f"mi_ray.{name}." for name in ("__version__", room, *ARROWS[room])]
    names = [f"{name}." for name in imported(source)]
    local = [name for name in names if name.startswith("mi_ray.") and not name.startswith(tuple(allowed))]
    ray = [name for name in names if name.startswith("ray.") and not file.startswith(WITH_RAY)]
    return [name.rstrip(".") for name in local + ray]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every file that imports itself indirectly, with the path of imports."""
    found = []
    for start in graph:
        ways, seen = [[start]], set()
        while ways:
            way = ways.pop()
            for step in graph[way[-1]]:
                if step == start:
                    found.append([*way, start])
                elif step not in seen:
                    seen.add(step)
                    ways.append([*way, step])
    return found


def graph_of(folder: Path, prefix: str) -> dict[str, set[str]]:
    """{module: modules of the same folder that it imports}; the rooms' __init__ files only re-export names."""
    paths = [path for path in sorted(folder.rglob("*.py")) if path.name != "__init__.py"]
    names = {prefix + ".".join(path.relative_to(folder).with_suffix("").parts): path for path in paths}
    graph = {}
    for name, path in names.items():
        used = set(imported(path.read_text(encoding="utf-8")))
        graph[name] = {other for other in names if any(f"{u}.".startswith(f"{other}.") for u in used)}
    return graph


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    assert violations(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("config/run.py", "from mi_ray import storage", ["mi_ray.storage"]),
        ("diffusion/sampling.py", "def f():\n    from ray.data import Dataset", ["ray.data.Dataset"]),
        ("diffusion/sampling.py", "import ray as r", ["ray"]),
        ("information/maps.py", "from mi_ray.diffusion.schedules import NoiseSchedule", []),
        ("information/maps.py", "from mi_ray.diffusion import sampling", ["mi_ray.diffusion.sampling"]),
        ("report/page.py", "import mi_ray.shapes.oracle", ["mi_ray.shapes.oracle"]),
        ("training/loop.py", "import ray.train", []),
        ("training/select.py", "import ray.train", ["ray.train"]),
        ("stages/generate.py", "import ray\nfrom mi_ray.diffusion import sampling", []),
    ],
)
def test_wrong_imports_are_found(file, source, expected):
    assert violations(file, source) == expected


@pytest.mark.parametrize(("folder", "prefix"), [(PACKAGE, "mi_ray."), (ROOT / "benchmarks", "")])
def test_no_files_import_each_other_in_a_circle(folder, prefix):
    assert circles(graph_of(folder, prefix)) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"], ["c", "b", "c"]]


def test_length_of_files_and_stages_is_limited():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {str(path): count for path, count in lines.items() if count > MOST_LINES} == {}
    assert sum(count for path, count in lines.items() if path.parent.name == "stages") < MOST_LINES_OF_STAGES


def test_each_room_has_a_docstring_with_its_limits():
    for room in ARROWS:
        lines = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))).split("\n\n")
        assert len(lines) == 2, room


def test_only_alignment_names_the_oracle_and_its_columns():
    """All other rooms get the names of metrics from the config and their columns from the metric."""
    at_home = (
        "mi_ray/alignment/",
        "mi_ray/shapes/",
        "mi_ray/language/",
        "benchmarks/oracle.py",
        "benchmarks/wrong_captions.py",
    )
    documented = {"mi_ray/config/metrics.py", "jobs/calibrate.py"}  # name the oracle in descriptions of options
    # The same words with another meaning: the fit of an image, the wrong attribute of a caption.
    others = {
        "exact": {"mi_ray/inputs/pair_config.py", "mi_ray/inputs/images.py"},
        "attributes": {"mi_ray/report/audit.py", "mi_ray/report/audit.html.j2"},
        "relation": set(),
        "objects": set(),
    }
    assert {column.name for column in Oracle.columns} == {*others, "count"}  # a common word in tables of errors
    found = []
    for path in sorted(p for room in ("mi_ray", "benchmarks", "jobs") for p in (ROOT / room).rglob("*")):
        name = path.relative_to(ROOT).as_posix()
        if path.suffix not in (".py", ".j2") or name.startswith(at_home):
            continue
        text = path.read_text(encoding="utf-8")
        if re.search(r"\boracle", text, re.IGNORECASE) and name not in documented:
            found.append((name, "oracle"))
        for word, allowed in others.items():
            quoted = rf"""["'.](\w+_)?{word}["']""" if path.suffix == ".py" else rf"\b(\w+_)?{word}\b"
            if re.search(quoted, text) and name not in allowed:
                found.append((name, word))
    assert found == []


def test_all_rooms_except_stages_import_without_ray():
    """Also not through the __init__ of the package."""
    names = [path.relative_to(ROOT).with_suffix("").as_posix() for path in modules()]
    free = [
        name.replace("/", ".") for name in names if not f"{name[7:]}.py".startswith(WITH_RAY) and "triton" not in name
    ]
    block = "import sys; sys.modules['ray'] = None; "
    code = block + "; ".join(f"import {name.removesuffix('.__init__')}" for name in free)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_and_status_do_not_import_torch():
    block = "import sys; sys.modules['torch'] = sys.modules['ray'] = None; "
    names = (
        "config.command_line",
        "config",
        "config.calibration",
        "config.export",
        "config.rescore",
        "inputs.pair_config",
        "inputs.more_prompts_config",
        "runs.status",
    )
    code = block + "; ".join(f"import mi_ray.{name}" for name in names)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
