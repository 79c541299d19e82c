"""Scenes of the embedded world and their renderer: 8 colours x 6 shapes x 3 textures on 64x64 pixels."""

from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 64
BACKGROUND = (248, 248, 244)
INK = (38, 38, 46)  # colour of stripes and dots: dark on every colour, so a texture never interrupts a silhouette
PALETTE = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 215, 50),
    "green": (45, 165, 70),
    "cyan": (70, 205, 220),
    "blue": (50, 85, 215),
    "purple": (135, 60, 180),
    "pink": (250, 140, 200),
}
COLORS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
TEXTURES = ("solid", "striped", "dotted")
RELATIONS = ("left", "right", "above", "below")

STRIPE_PERIOD = 6  # pixels; half of them are ink
DOT_PITCH, DOT_RADIUS = 6.5, 2.0  # pixels
SUPERSAMPLING = 4
MARGIN = 2  # pixels between an object and the border
GAP = 4  # pixels between the boxes of two objects
SIZE_RANGE = {1: (22, 34), 2: (19, 27), 3: (18, 24), 4: (17, 22)}  # by number of objects


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; (`x`, `y`) is its centre and `size` its side length, in pixels."""

    color: str
    shape: str
    texture: str
    x: float
    y: float
    size: float


def silhouette(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether each point (u right, v down, both in [-1, 1]) lies inside `shape`."""
    if shape == "circle":
        return u**2 + v**2 <= 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.9
    if shape == "triangle":
        return (v <= 0.85) & (np.abs(u) <= (v + 0.95) / 1.8)
    if shape == "star":
        fold = np.pi / 5  # the outline consists of ten copies of the edge from an outer to an inner corner
        angle = np.abs((np.arctan2(u, -v) + fold) % (2 * fold) - fold)
        outer, inner = 1.0, 0.46
        edge = outer * inner * np.sin(fold) / (outer * np.sin(angle) + inner * np.sin(fold - angle))
        return np.hypot(u, v) <= edge
    if shape == "cross":
        return np.minimum(np.abs(u), np.abs(v)) <= 0.36
    if shape == "heart":
        x, y = 1.18 * u, -1.18 * v + 0.12
        return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 <= 0
    raise ValueError(f"unknown shape {shape!r}; use one of {', '.join(SHAPES)}")


def _ink(texture: str, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
    """Whether each point (in pixels from the object's centre) is ink."""
    if texture == "solid":
        return np.zeros(x.shape, bool)
    if texture == "striped":
        return (y + size / 2) % STRIPE_PERIOD >= STRIPE_PERIOD / 2
    if texture == "dotted":
        dx = (x + DOT_PITCH / 2) % DOT_PITCH - DOT_PITCH / 2
        dy = (y + DOT_PITCH / 2) % DOT_PITCH - DOT_PITCH / 2
        return dx**2 + dy**2 <= DOT_RADIUS**2
    raise ValueError(f"unknown texture {texture!r}; use one of {', '.join(TEXTURES)}")


def render(scene: tuple[SceneObject, ...]) -> np.ndarray:
    """Draw a scene of objects that do not overlap, antialiased: uint8 array of shape (64, 64, 3)."""
    image = np.broadcast_to(np.array(BACKGROUND, np.float32), (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    for obj in scene:
        half = obj.size / 2
        rows, columns = (slice(max(int(c - half), 0), min(int(np.ceil(c + half)), IMAGE_SIZE)) for c in (obj.y, obj.x))
        axes = [
            (np.arange((s.stop - s.start) * SUPERSAMPLING) + 0.5) / SUPERSAMPLING + s.start - c
            for s, c in ((rows, obj.y), (columns, obj.x))
        ]
        y, x = np.meshgrid(*axes, indexing="ij")
        inside = silhouette(obj.shape, x / half, y / half)
        ink = inside & _ink(obj.texture, x, y, obj.size)
        # Shares of each pixel that are covered by ink, by paint and by background.
        ink_share, inside_share = (
            m.reshape(rows.stop - rows.start, SUPERSAMPLING, -1, SUPERSAMPLING).mean((1, 3))[..., None]
            for m in (ink, inside)
        )
        paint_share = inside_share - ink_share
        patch = image[rows, columns]
        patch *= 1 - inside_share
        patch += paint_share * np.array(PALETTE[obj.color]) + ink_share * np.array(INK)
    return np.round(image).astype(np.uint8)


def relation_holds(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether centre `a` (x, y) is in `relation` to centre `b`, along the axis with the larger distance."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if relation in ("left", "right"):
        return abs(dx) > abs(dy) and (dx < 0) == (relation == "left")
    return abs(dy) > abs(dx) and (dy < 0) == (relation == "above")


def place(count: int, relation: str | None, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw `count` boxes (x, y, size) with a gap of at least `GAP`; the first is in `relation` to the second."""
    low, high = SIZE_RANGE[count]
    while True:
        boxes: list[tuple[float, float, float]] = []
        for _ in range(60):
            size = rng.uniform(low, high)
            edge = size / 2 + MARGIN
            x, y = rng.uniform(edge, IMAGE_SIZE - edge, 2)
            clear = all(max(abs(x - bx), abs(y - by)) >= (size + bs) / 2 + GAP for bx, by, bs in boxes)
            if clear and not (len(boxes) == 1 and relation and not relation_holds(relation, boxes[0][:2], (x, y))):
                boxes.append((x, y, size))
                if len(boxes) == count:
                    return boxes
