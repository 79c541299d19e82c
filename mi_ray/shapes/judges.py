"""Architecture, tokenizer and training examples of the two small judges of the embedded world: BLIP and CLIP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from mi_ray.shapes.grammar import (
    CATEGORIES,
    FORMS,
    MAX_OBJECTS,
    NUMERALS,
    UNSEEN_FORMS,
    ObjectSpec,
    SceneSpec,
    draw_scene,
    is_held_out,
    noun_phrase,
    sample_spec,
    sentence,
)
from mi_ray.shapes.model import corrupt
from mi_ray.shapes.oracle import Detection, compare
from mi_ray.shapes.scenes import COLORS, IMAGE_SIZE, SHAPES, TEXTURES, SceneObject, render, silhouette

PATCH = 8  # pixels of a scene
PATCHES = IMAGE_SIZE // PATCH
BLIP_SIZE = 480  # pixels of the images that the metric blip-vqa gives its model
GROUP = 4  # a scene and its changed forms
VALUES = {"color": COLORS, "shape": SHAPES, "texture": TEXTURES}
LABELS = (*(len(values) + 1 for values in VALUES.values()), *3 * [MAX_OBJECTS + 1])  # sizes of the patches' labels
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "yes", "no")
_OTHER_WORDS = ("a", "an", "and", "with", "there", "is", "are", "to", "the", "of", ",", "?", "photo", "depicts")
_ANSWER = ("[DEC]", "[ENC]")  # begin an answer and a question; BLIP needs this order


# ---------------------------------------------------------------------------------------------- architecture
def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: [CLS] text [SEP] in lower case. One for both judges."""
    plurals = [noun_phrase(ObjectSpec(shape, count=2), True).split()[1] for shape in SHAPES]
    relations = ("left", "right", "above", "below")
    words = (*_SPECIAL, *_OTHER_WORDS, *NUMERALS.values(), *COLORS, *TEXTURES, *SHAPES, *plurals, *relations, *_ANSWER)
    ids = {word: index for index, word in enumerate(words)}
    inside = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inside.normalizer = normalizers.Lowercase()
    inside.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    inside.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=inside, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def build_blip(tokenizer: PreTrainedTokenizerFast, image_size: int = IMAGE_SIZE) -> BlipForQuestionAnswering:
    """A small BLIP for images of `image_size` pixels, in 8 x 8 patches."""
    both = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "initializer_range": 0.08}
    start = tokenizer.convert_tokens_to_ids("[DEC]")
    special = {"pad_token_id": 0, "sep_token_id": tokenizer.sep_token_id, "bos_token_id": start}
    text = {**both, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 40, "num_hidden_layers": 2}
    vision = {**both, "image_size": image_size, "patch_size": image_size // PATCHES, "num_hidden_layers": 4}
    return BlipForQuestionAnswering(BlipConfig(text_config={**text, "encoder_hidden_size": 128}, vision_config=vision))


def build_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A small CLIP for 64 x 64 pixels, in 8 x 8 patches."""
    both = {"hidden_size": 160, "intermediate_size": 640, "num_attention_heads": 4, "projection_dim": 128}
    special = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id, "pad_token_id": 0}
    text = {**both, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 36, "num_hidden_layers": 3}
    vision = {**both, "image_size": IMAGE_SIZE, "patch_size": PATCH, "num_hidden_layers": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def box_average() -> torch.Tensor:
    """Weights (480, 8) of the mean over pixels: 60 pixels of an enlarged image to 8 pixels of a scene, (60, 8)."""
    fine, coarse = BLIP_SIZE // PATCHES, PATCH
    low, high = torch.arange(coarse) * fine / coarse, (torch.arange(coarse) + 1) * fine / coarse
    pixel = torch.arange(fine)[:, None]
    return (torch.minimum(pixel + 1, high) - torch.maximum(pixel, low)).clamp(min=0) * coarse / fine


def enlarged(blip: BlipForQuestionAnswering, tokenizer: PreTrainedTokenizerFast) -> BlipForQuestionAnswering:
    """The same BLIP for images of 480 x 480 pixels: its patch kernel first averages over boxes of 7.5 pixels."""
    large, weights = build_blip(tokenizer, BLIP_SIZE), blip.state_dict()
    name = "vision_model.embeddings.patch_embedding.weight"
    box = box_average().to(weights[name])
    large.load_state_dict(weights | {name: torch.einsum("ocij,hi,wj->ochw", weights[name], box, box)})
    return large


@cache
def seen_pixels() -> torch.Tensor:
    """(64, 64): how an axis of a scene looks after it is enlarged to 480 pixels (bicubic) and averaged over boxes."""
    columns = [
        Image.fromarray(row[None]).resize((BLIP_SIZE, 1), Image.Resampling.BICUBIC)
        for row in np.eye(IMAGE_SIZE, dtype=np.float32)
    ]
    bicubic = torch.from_numpy(np.stack([np.asarray(column)[0] for column in columns], axis=1))  # (480, 64)
    return torch.block_diag(*[box_average()] * PATCHES).T @ bicubic


def image_processors() -> dict[str, BlipImageProcessor | CLIPImageProcessor]:
    """What the stock processors of the two judges do with an image, as the metrics do."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return {
        "blip": BlipImageProcessor(size={"height": BLIP_SIZE, "width": BLIP_SIZE}),
        "clip": CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=square),
    }


# ---------------------------------------------------------------------------------------------- training examples
@dataclass(frozen=True)
class Example:
    """A rendered scene with an exact caption."""

    scene: tuple[SceneObject, ...]
    spec: SceneSpec
    caption: str


def draw_group(category: str, rng: np.random.Generator) -> list[Example]:
    """A scene of a category and three scenes whose specifications differ from it in one thing, each with a caption.

    All attribute combinations and sentence forms occur, but no held-out specification.
    """
    while True:
        spec = sample_spec(category, rng)
        specs = [] if is_held_out(spec) else [spec]
        for _ in range(2 * GROUP * len(specs)):
            changed = corrupt(spec, rng)
            if changed not in specs and not is_held_out(changed):
                specs.append(changed)
            if len(specs) == GROUP:
                break
        if len(specs) == GROUP:
            break
    scenes = [draw_scene(each, rng, unseen=True) for each in specs]
    forms = [FORMS[each.structure] + UNSEEN_FORMS.get(each.structure, ()) for each in specs]
    captions = [sentence(each, str(rng.choice(form))) for each, form in zip(specs, forms, strict=True)]
    return [Example(*each) for each in zip(scenes, specs, captions, strict=True)]


def is_exact(scene: Sequence[SceneObject], spec: SceneSpec) -> bool:
    """Whether the scene has everything that `spec` says and nothing else, in the sense of the oracle."""
    found = [Detection(each.color, each.shape, each.texture, each.x, each.y) for each in scene]
    return compare(found, spec).exact == 1


@dataclass(frozen=True)
class Question:
    """A question of blip-vqa about a scene."""

    text: str  # a noun phrase with a question mark
    answer: bool
    shown: tuple[int, ...]  # the objects of the scene that have all its attributes


def draw_question(scene: Sequence[SceneObject], rng: np.random.Generator) -> Question:
    """A question about a scene.

    About half of the phrases describe an object of the scene; in the others one attribute is changed, half of the time
    to one of another object. A quarter of them has a number: yes means exactly this number of objects.
    """
    chosen = scene[rng.integers(len(scene))]
    named = ["shape", *(key for key, share in (("color", 0.75), ("texture", 0.35)) if rng.random() < share)]
    asked = {key: getattr(chosen, key) for key in named}
    if rng.random() < 0.55:
        key = str(rng.choice(named))
        values = [getattr(each, key) for each in scene] if rng.random() < 0.5 else []
        values = [value for value in values if value != asked[key]]
        asked[key] = str(rng.choice(values or [value for value in VALUES[key] if value != asked[key]]))
    shown = tuple(i for i, each in enumerate(scene) if _agree(each, asked))
    if rng.random() >= 0.25:
        return Question(f"{noun_phrase(ObjectSpec(**asked), False)}?", bool(shown), shown)
    count = len(shown) if shown and rng.random() < 0.6 else int(rng.integers(1, MAX_OBJECTS + 1))
    phrase = noun_phrase(replace(ObjectSpec(**asked), count=count), True)
    return Question(f"{phrase}?", len(shown) == count, shown)


def _agree(shown: SceneObject, attributes: Mapping[str, str]) -> bool:
    return all(getattr(shown, key) == value for key, value in attributes.items())


def patch_owners(scene: Sequence[SceneObject]) -> np.ndarray:
    """(64,): the number of the object at the centre of each patch, from 0; -1: background."""
    centres = (np.arange(PATCHES) + 0.5) * PATCH
    owners = np.full((PATCHES, PATCHES), -1)
    for number, each in enumerate(scene):
        u, v = (centres - each.x) / (each.size / 2), (centres - each.y) / (each.size / 2)
        within = np.maximum(np.abs(u[None, :]), np.abs(v[:, None])) <= 1  # a silhouette is defined there only
        owners[within & silhouette(each.shape, u[None, :], v[:, None])] = number
    return owners.ravel()


def patch_labels(scene: Sequence[SceneObject], owners: np.ndarray) -> np.ndarray:
    """(64, 6) int64, 0 for background: color, shape and texture of each patch's object, from 1, and the number of
    objects that have its shape, its shape and color, and all its attributes."""
    labels = np.zeros((len(scene) + 1, len(LABELS)), np.int64)  # the last row is that of background
    for row, each in zip(labels, scene, strict=False):
        row[:3] = [values.index(getattr(each, key)) + 1 for key, values in VALUES.items()]
        for place, keys in enumerate((("shape",), ("shape", "color"), tuple(VALUES)), 3):
            row[place] = sum(_agree(other, {key: getattr(each, key) for key in keys}) for other in scene)
    return labels[owners]


def shifted(example: Example, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[SceneObject]]:
    """The image (64, 64, 3) and its scene, moved by whole pixels so that all objects stay inside."""
    moves = []
    for key in ("x", "y"):
        ends = [(getattr(each, key) - each.size / 2, getattr(each, key) + each.size / 2) for each in example.scene]
        low, high = int(min(low for low, _ in ends)) - 1, IMAGE_SIZE - 1 - int(np.ceil(max(high for _, high in ends)))
        moves.append(int(rng.integers(-max(low, 0), max(high, 0) + 1)))
    dx, dy = moves
    scene = [replace(each, x=each.x + dx, y=each.y + dy) for each in example.scene]
    return np.roll(image, (dy, dx), (0, 1)), scene


def draw_pool(groups: int, seed: int) -> tuple[np.ndarray, list[list[Example]], np.ndarray]:
    """Groups over all categories in turn. Group n depends only on `seed` and n.

    Returns:
        Images (groups, 4, 64, 64, 3) uint8, their examples, and (groups, 4, 4) bool: whether image i of a group is
        exact for caption j.
    """
    drawn = [draw_group(CATEGORIES[n % len(CATEGORIES)], np.random.default_rng((seed, n))) for n in range(groups)]
    images = np.stack([[render(example.scene) for example in group] for group in drawn])
    return images, drawn, np.array([[[is_exact(a.scene, b.spec) for b in group] for a in group] for group in drawn])
