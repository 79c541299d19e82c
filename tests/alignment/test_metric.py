"""What a metric declares and returns, and the messages for an invalid one."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from mi_ray.alignment.metric import (
    METRICS,
    Column,
    Metric,
    check_prompts,
    columns_of,
    load_metrics,
    measure,
    reference_of,
)
from mi_ray.alignment.oracle import Oracle
from mi_ray.shapes.oracle import score

HERE = Path(__file__).parent
MINE = "dark_pixels:DarkPixels"
PROMPTS = ["a red circle", "a blue square left of a green star"]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture
def images() -> np.ndarray:
    oracle = Oracle()
    return np.stack([oracle.reference(prompt, seed) for seed, prompt in enumerate(PROMPTS)])


def test_every_metric_of_the_package_is_a_metric_class():
    for name, place in METRICS.items():
        module, _, attribute = place.partition(":")
        assert issubclass(getattr(import_module(module), attribute), Metric), name


def test_measure_returns_the_columns_of_all_metrics_in_order(images):
    metrics = load_metrics(["oracle", MINE])
    found = measure(metrics, images, PROMPTS)
    assert list(found) == [c.name for columns in columns_of(metrics).values() for c in columns]
    assert found["exact"] == [1, 1]
    assert found["relation"] == [None, 1]
    expected = [int((image.mean(-1) < 128).sum()) for image in images]
    assert found["dark_pixels"] == expected
    assert all(type(value) is float for value in found["dark_pixels"])  # not NumPy types
    assert measure(metrics, [], []) == {name: [] for name in found}
    assert measure({}, images, PROMPTS) == {}


def test_oracle_metric_equals_the_shapes_oracle(images):
    swapped = PROMPTS[::-1]
    found = Oracle().measure(images, swapped)
    for index, (image, prompt) in enumerate(zip(images, swapped, strict=True)):
        truth = score(image, prompt)
        assert {name: values[index] for name, values in found.items()} == vars(truth)


def test_only_the_oracle_has_real_images(images):
    assert reference_of(load_metrics([MINE])) is None
    reference = reference_of(load_metrics([MINE, "oracle"]))
    assert (reference(PROMPTS[1], 1) == images[1]).all()


@pytest.mark.parametrize(
    ("names", "reported"),
    [
        (["oracel"], r"'oracel' is not a metric: use one of oracle, .*, or your own as package\.module:Class"),
        (["no_such_module:Metric"], r"cannot be loaded \(ModuleNotFoundError: .*on every node.*PYTHONPATH"),
        (["dark_pixels:Missing"], r"'dark_pixels:Missing' cannot be loaded \(AttributeError"),
        (["dark_pixels:NeedsAPath"], r"cannot be loaded \(TypeError: .*class without arguments"),
        (["dark_pixels:NoMetric"], r"is not a valid metric: derive its class from mi_ray\.alignment\.metric\.Metric"),
        (["oracle", "dark_pixels:Exact"], r"'oracle' and 'dark_pixels:Exact' both declare the column 'exact'"),
    ],
)
def test_unknown_metric_gives_one_message(names, reported):
    with pytest.raises(ValueError, match=reported) as refused:
        load_metrics(names)
    assert len(str(refused.value).splitlines()) == 1


def test_load_metrics_reports_all_faults():
    with pytest.raises(ValueError, match="oracel") as refused:
        load_metrics(["oracel", "nowhere:X", "oracle"])
    assert len(str(refused.value).splitlines()) == 2


def test_check_prompts_counts_unreadable_prompts_and_shows_the_first():
    prompts = ["a cat", "a red circle", "a dog", "an owl", "a cow"]
    expected = (
        r"the oracle reads only prompts of the shapes grammar, not 'a cat', 'a dog', 'an owl' \(4 of 5\);"
        " set it to none for your own prompts"
    )
    with pytest.raises(ValueError, match=expected):
        check_prompts(load_metrics(["oracle"]), iter(prompts))
    with pytest.raises(ValueError, match="remove oracle for your own prompts"):
        check_prompts(load_metrics(["oracle", MINE]), prompts)
    check_prompts(load_metrics([MINE]), prompts)


@pytest.mark.parametrize(
    ("returned", "reported"),
    [
        ({"other": [1.0, 2.0]}, r"'m' returned the columns \['other'\], but it declares \['mine'\]"),
        ({"mine": [1.0]}, "'m' returned 1 values of 'mine' for 2 images"),
        ({"mine": [1.0, None]}, "'m' returned None in the column 'mine', which is not declared nullable"),
        ({"mine": [1.0, float("nan")]}, "'m' returned None in the column 'mine'"),
    ],
)
def test_measure_reports_undeclared_columns(images, returned, reported):
    class Mine(Metric):
        columns = (Column("mine", "mine"),)

        def measure(self, images, prompts):
            return returned

    with pytest.raises(ValueError, match=reported):
        measure({"m": Mine()}, images, PROMPTS)


def test_measured_values_have_the_type_of_the_tables(images):
    class Mine(Metric):
        columns = (Column("mine", "mine"),)

        def measure(self, images, prompts):
            return {"mine": [0.1, 0.1 + 1e-12]}

    assert measure({"m": Mine()}, images, PROMPTS)["mine"] == [np.float32(0.1)] * 2


def test_column_metadata_round_trip():
    column = Column(
        "a", "b", "nats", -1.5, None, False, "owner/name", "abc", True, False, "Is it {}?", "transformers 5"
    )
    texts = column.as_metadata()
    assert texts["description"] == "b"
    assert all(isinstance(text, str) for text in texts.values())
    assert Column.from_metadata("a", texts) == column
    plain = Column("a", "b")
    assert Column.from_metadata("a", plain.as_metadata()) == plain


def test_load_metrics_does_not_import_torch():
    code = f"import sys; sys.modules['torch'] = None; sys.path.append({str(HERE)!r}); "
    code += f"from mi_ray.alignment.metric import load_metrics; load_metrics(['oracle', {MINE!r}])"
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], check=True)
