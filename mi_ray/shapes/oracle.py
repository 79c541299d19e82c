"""The exact oracle: reads the objects of an image back and holds them against a prompt. No model is involved."""

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from mi_ray.shapes.grammar import MAX_OBJECTS, ObjectSpec, SceneSpec, parse
from mi_ray.shapes.scenes import BACKGROUND, COLORS, PALETTE, SHAPES, relation_holds, silhouette

FOREGROUND_DISTANCE = 60.0  # RGB distance from the background
MIN_AREA = 20  # pixels; a smaller speck is no object
MAX_ASPECT = 1.45
MIN_SHAPE_IOU = 0.72
MAX_COLOR_DISTANCE = 75.0  # RGB distance from the palette
INK_LEVEL = 118.0  # a pixel whose brightest channel lies below is ink
MIN_INK_SHARE = 0.08
STRIPED_ROW_SHARE = 0.55  # share of the ink's variance that lies between rows

_TEMPLATE_SIDE = 96


@dataclass(frozen=True)
class Detection:
    """One object read from an image; an attribute is None where nothing fits. `x`, `y`: its centre in pixels."""

    color: str | None
    shape: str | None
    texture: str | None
    x: float
    y: float


@dataclass(frozen=True)
class OracleScore:
    """How an image fulfils its prompt. All in [0, 1]; `relation` is None where the prompt names none."""

    exact: float  # everything said is right and nothing is extra
    objects: float  # share of the named objects that are present with all their attributes
    attributes: float  # share of the named shapes, colours and textures that are right
    count: float  # share of the named kinds whose number is right (by shape)
    relation: float | None


@cache
def _template(shape: str) -> np.ndarray:
    """The silhouette, cropped to its box and scaled to a square."""
    axis = np.linspace(-1, 1, 4 * _TEMPLATE_SIDE)
    v, u = np.meshgrid(axis, axis, indexing="ij")
    mask = silhouette(shape, u, v)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pick = [np.linspace(0, n - 1, _TEMPLATE_SIDE).round().astype(int) for n in mask.shape]
    return mask[np.ix_(*pick)]


def _read_shape(mask: np.ndarray) -> str | None:
    height, width = mask.shape
    if max(height, width) > MAX_ASPECT * min(height, width):
        return None
    best, best_iou = None, MIN_SHAPE_IOU
    rows = ((np.arange(height) + 0.5) / height * _TEMPLATE_SIDE).astype(int)
    columns = ((np.arange(width) + 0.5) / width * _TEMPLATE_SIDE).astype(int)
    for shape in SHAPES:
        template = _template(shape)[np.ix_(rows, columns)]
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


def read(image: np.ndarray) -> list[Detection]:
    """Read the objects of an image (uint8, shape (64, 64, 3))."""
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
        ink = patch.max(-1) < INK_LEVEL
        paint = interior & (patch.max(-1) > INK_LEVEL + 40)
        color = _read_color(patch[paint]) if paint.sum() >= 6 else None
        y, x = (0.5 * (s.start + s.stop) for s in box)
        detections.append(Detection(color, _read_shape(filled), _read_texture(ink, interior), x, y))
    return detections


def _attributes_right(spec: ObjectSpec, found: Detection | None) -> tuple[int, int]:
    named = [(spec.shape, "shape"), (spec.color, "color"), (spec.texture, "texture")]
    named = [(value, key) for value, key in named if value]
    return sum(found is not None and getattr(found, key) == value for value, key in named), len(named)


def score(image: np.ndarray, prompt: str | SceneSpec) -> OracleScore:
    """Hold an image (uint8, (64, 64, 3)) against a prompt of the grammar, under the assignment that fits best.

    Raises:
        ValueError: the prompt is not of the grammar.
    """
    spec = parse(prompt) if isinstance(prompt, str) else prompt
    found = read(image)
    required = [obj for obj in spec.objects for _ in range(obj.count)]
    first_of_second = spec.objects[0].count
    pool = (found + [None] * len(required))[: max(len(found), len(required))]
    best = None
    # Beyond two objects more than any prompt names, the image is hopeless and the assignment hardly matters.
    for assignment in permutations(pool[: MAX_OBJECTS + 2], len(required)):
        rights = [_attributes_right(o, d) for o, d in zip(required, assignment, strict=True)]
        relation = None
        if spec.relation:
            a, b = assignment[0], assignment[first_of_second]
            relation = float(bool(a and b) and relation_holds(spec.relation, (a.x, a.y), (b.x, b.y)))
        key = (sum(right == named for right, named in rights), sum(r for r, _ in rights), relation or 0.0)
        if best is None or key > best[0]:
            best = (key, rights, relation)
    (whole, right, _), rights, relation = best
    shapes = [d.shape for d in found]
    wanted = {o.shape: sum(p.count for p in spec.objects if p.shape == o.shape) for o in spec.objects}
    return OracleScore(
        exact=float(whole == len(required) == len(found) and relation in (None, 1.0)),
        objects=whole / len(required),
        attributes=right / sum(named for _, named in rights),
        count=sum(shapes.count(s) == n for s, n in wanted.items()) / len(wanted),
        relation=relation,
    )
