"""The exact oracle: detect the objects of an image and compare them with a prompt. It uses no model."""

from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from operator import getitem

import numpy as np
from scipy import ndimage

from mi_ray.shapes.grammar import ObjectSpec, SceneSpec, parse
from mi_ray.shapes.scenes import BACKGROUND, COLORS, PALETTE, SHAPES, relation_holds, silhouette

FOREGROUND_DISTANCE = 60.0  # RGB distance from the background
MIN_AREA = 20  # pixels; smaller regions are ignored
MAX_ASPECT = 1.45
MIN_SHAPE_IOU = 0.72
COVERAGE = 0.25  # a pixel with this coverage or more is foreground
MAX_COLOR_DISTANCE = 75.0  # RGB distance from the palette
PAINT_LEVEL = 0.8  # paint: at least this share of the 90th percentile of an object's brightness; the rest: ink or edge
INK_LEVEL = 118.0  # a pixel is ink if its brightest channel is below this value
MIN_INK_SHARE = 0.08
STRIPED_ROW_SHARE = 0.55  # striped: the share of the ink's variance between rows is above this value

_OVERSAMPLING = 8


@dataclass(frozen=True)
class Detection:
    """One object detected in an image; an attribute is None if no value fits. `x`, `y`: its centre in pixels."""

    color: str | None
    shape: str | None
    texture: str | None
    x: float
    y: float


@dataclass(frozen=True)
class OracleScore:
    """How well an image matches its prompt. All values in [0, 1]; `relation` is None if the prompt has no relation."""

    exact: float  # 1 if everything in the prompt is right and there is no extra object
    objects: float  # share of the named objects that are present with all their attributes
    attributes: float  # share of the named shapes, colours and textures that are right
    count: float  # share of the named shapes with the right number of objects
    relation: float | None


@cache
def _outline(shape: str) -> tuple[float, float, float, float]:
    """The bounding box of a silhouette in its own coordinates: left, right, top, bottom, in [-1, 1]."""
    axis = np.linspace(-1, 1, 801)
    mask = silhouette(shape, axis[None, :], axis[:, None])
    columns, rows = axis[mask.any(0)], axis[mask.any(1)]
    return float(columns[0]), float(columns[-1]), float(rows[0]), float(rows[-1])


@cache
def _template(shape: str, height: int, width: int) -> np.ndarray:
    """The silhouette, cropped to its bounding box, as a mask of (height, width) pixels."""
    left, right, top, bottom = _outline(shape)
    u = left + (right - left) * (np.arange(width * _OVERSAMPLING) + 0.5) / (width * _OVERSAMPLING)
    v = top + (bottom - top) * (np.arange(height * _OVERSAMPLING) + 0.5) / (height * _OVERSAMPLING)
    inside = silhouette(shape, u[None, :], v[:, None])
    return inside.reshape(height, _OVERSAMPLING, width, _OVERSAMPLING).mean((1, 3)) >= COVERAGE


def _read_shape(mask: np.ndarray) -> str | None:
    height, width = mask.shape
    if max(height, width) > MAX_ASPECT * min(height, width):
        return None
    best, best_iou = None, MIN_SHAPE_IOU
    for shape in SHAPES:
        template = _template(shape, height, width)
        iou = (template & mask).sum() / (template | mask).sum()
        if iou > best_iou:
            best, best_iou = shape, iou
    return best


def _read_color(pixels: np.ndarray) -> str | None:
    palette = np.array([PALETTE[c] for c in COLORS], np.float32)
    distance = np.linalg.norm(palette - np.median(pixels, 0), axis=1)
    return COLORS[int(distance.argmin())] if distance.min() <= MAX_COLOR_DISTANCE else None


def _read_texture(ink: np.ndarray, interior: np.ndarray) -> str:
    values = ink[interior].astype(np.float32)
    if values.mean() < MIN_INK_SHARE:
        return "solid"
    counts = interior.sum(1)
    rows = counts > 0
    row_means = (ink & interior).sum(1)[rows] / counts[rows]
    between = (counts[rows] * (row_means - values.mean()) ** 2).sum() / counts.sum()
    return "striped" if between > STRIPED_ROW_SHARE * max(values.var(), 1e-6) else "dotted"


def _centre(box: tuple[slice, slice], shape: str | None) -> tuple[float, float]:
    """The centre (x, y) of the object: the centre of its box, corrected for shapes that are not symmetric."""
    (top, bottom), (left, right) = ((s.start, s.stop) for s in box)
    if shape is None:
        return (left + right) / 2, (top + bottom) / 2
    u0, u1, v0, v1 = _outline(shape)
    return left + (right - left) * u0 / (u0 - u1), top + (bottom - top) * v0 / (v0 - v1)


def read(image: np.ndarray) -> list[Detection]:
    """Detect the objects of an image (uint8, shape (64, 64, 3))."""
    pixels = image.astype(np.float32)
    foreground = np.linalg.norm(pixels - np.array(BACKGROUND, np.float32), axis=-1) > FOREGROUND_DISTANCE
    labels, _ = ndimage.label(foreground)
    detections = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == index
        if mask.sum() < MIN_AREA:
            continue
        patch = pixels[box]
        filled = ndimage.binary_fill_holes(mask)
        interior = ndimage.binary_erosion(filled) & mask
        if not interior.any():
            interior = mask
        brightness = patch.max(-1)
        paint = interior & (brightness >= PAINT_LEVEL * np.percentile(brightness[interior], 90))
        shape = _read_shape(filled)
        texture = _read_texture(brightness < INK_LEVEL, interior)
        detections.append(Detection(_read_color(patch[paint]), shape, texture, *_centre(box, shape)))
    return detections


def _rights(spec: ObjectSpec, found: Detection | None) -> tuple[bool, int]:
    """Whether all attributes that `spec` names are right in `found`, and the number of right attributes."""
    named = [(spec.shape, "shape"), (spec.color, "color"), (spec.texture, "texture")]
    right = [found is not None and getattr(found, key) == value for value, key in named if value]
    return all(right), sum(right)


def score(image: np.ndarray, prompt: str | SceneSpec) -> OracleScore:
    """Compare an image (uint8, (64, 64, 3)) with a prompt of the grammar, under the best assignment of objects.

    Raises:
        ValueError: the prompt is not a sentence of the grammar.
    """
    return compare(read(image), parse(prompt) if isinstance(prompt, str) else prompt)


def compare(found: list[Detection], spec: SceneSpec) -> OracleScore:
    """Compare the objects of an image with the specification of a prompt, under the best assignment of objects."""
    required = [obj for obj in spec.objects for _ in range(obj.count)]
    # With n required objects, the best assignment gives each object one of the n detections that fit it best.
    near = set()
    for obj in spec.objects:
        near.update(sorted(range(len(found)), key=lambda i, o=obj: _rights(o, found[i]))[-len(required) :])
    pool = [found[i] for i in sorted(near)]
    pool += [None] * (len(required) - len(pool))
    rights = [[_rights(obj, d) for d in pool] for obj in required]

    def relation(assignment: tuple[int, ...]) -> float | None:
        if not spec.relation:
            return None
        first, second = (obj.count for obj in spec.objects[:2])
        chosen = [pool[i] for i in assignment[: first + second]]
        pairs = product(chosen[:first], chosen[first:])
        return float(all(a and b and relation_holds(spec.relation, (a.x, a.y), (b.x, b.y)) for a, b in pairs))

    def fit(assignment: tuple[int, ...]) -> tuple[int, int, float]:
        whole, right = (sum(column) for column in zip(*map(getitem, rights, assignment), strict=True))
        return whole, right, relation(assignment) or 0.0

    best = max(permutations(range(len(pool)), len(required)), key=fit)
    whole, right, _ = fit(best)
    shapes = [d.shape for d in found]
    wanted = {o.shape: sum(p.count for p in spec.objects if p.shape == o.shape) for o in spec.objects}
    return OracleScore(
        exact=float(whole == len(required) == len(found) and relation(best) in (None, 1.0)),
        objects=whole / len(required),
        attributes=right / sum(bool(o.shape) + bool(o.color) + bool(o.texture) for o in required),
        count=sum(shapes.count(s) == n for s, n in wanted.items()) / len(wanted),
        relation=relation(best),
    )
