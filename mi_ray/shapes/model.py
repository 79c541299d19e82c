"""Architecture, tokenizer and training pairs of the embedded model, a small Stable Diffusion model."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mi_ray.shapes.grammar import (
    CATEGORIES,
    FORMS,
    MAX_OBJECTS,
    NUMERALS,
    SceneSpec,
    draw_scene,
    is_held_out,
    is_unseen_combination,
    sample_spec,
    sentence,
)
from mi_ray.shapes.scenes import COLORS, IMAGE_SIZE, RELATIONS, SHAPES, TEXTURES, render

WRONG_CAPTION_SHARE = 1 / 3
MAX_TOKENS = 24
EMBEDDING_SIZE = 128
LATENT_CHANNELS = 16
_OTHER_WORDS = ("a", "an", "and", "with", "there", "is", "are", "to", "the", "of", ",", ".")


# ---------------------------------------------------------------------------------------------- architecture
def _byte_pairs(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one token: most frequent first, ties in lexical order."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while counts := Counter(pair for parts in split for pair in pairwise(parts)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for parts in split:
            for i in reversed(range(len(parts) - 1)):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with byte pairs learned from the words of the grammar, so each word is one token."""
    plurals = [s + ("es" if s == "cross" else "s") for s in SHAPES]
    merges = _byte_pairs([*COLORS, *SHAPES, *plurals, *TEXTURES, *RELATIONS, *NUMERALS.values(), *_OTHER_WORDS])
    printable = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    tokens = dict.fromkeys(printable + [c + "</w>" for c in printable] + ["".join(m) for m in merges])
    vocabulary = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def text_config(tokenizer: CLIPTokenizer, width: int = EMBEDDING_SIZE, layers: int = 3) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer))


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(96, 96),  # attribute binding needs the width at full resolution
        layers_per_block=1,
        cross_attention_dim=EMBEDDING_SIZE,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDPMScheduler:
    """The noise schedule of Stable Diffusion: scaled-linear betas, 1000 steps, epsilon prediction."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )


def build_pipeline(vae, text_encoder, tokenizer, unet) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# ---------------------------------------------------------------------------------------------- training pairs
def corrupt(spec: SceneSpec, rng: np.random.Generator) -> SceneSpec:
    """Change one thing in `spec`: swap or replace an attribute, flip the relation, or change a count."""
    objects = spec.objects
    options = []

    def with_object(index, **changes):
        return replace(spec, objects=tuple(replace(o, **changes) if i == index else o for i, o in enumerate(objects)))

    for key, values in (("color", COLORS), ("texture", TEXTURES), ("shape", SHAPES)):
        for i, obj in enumerate(objects):
            others = [v for v in values if v != getattr(obj, key)]
            if getattr(obj, key):
                options.append(with_object(i, **{key: str(rng.choice(others))}))
        if len(objects) > 1 and getattr(objects[0], key) != getattr(objects[1], key):
            first, second = getattr(objects[0], key), getattr(objects[1], key)
            swapped = (replace(objects[0], **{key: second}), replace(objects[1], **{key: first}))
            options += 2 * [replace(spec, objects=swapped + objects[2:])]
    if spec.relation:
        opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
        options += 2 * [replace(spec, relation=opposite[spec.relation])]
    for i, obj in enumerate(objects):
        room = MAX_OBJECTS - spec.total + obj.count
        counts = [n for n in range(1, room + 1) if abs(n - obj.count) == 1]
        if spec.numeric and counts:
            options += 2 * [with_object(i, count=int(rng.choice(counts)))]
    if len(objects) > 1:
        options.append(replace(spec, objects=objects[:-1], relation=spec.relation if len(objects) > 2 else None))
    return options[rng.integers(len(options))]


def draw_pair(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """Draw a training caption and its image. The share `WRONG_CAPTION_SHARE` of the captions has one error.

    Captions and images never contain a held-out specification or an unseen combination.
    """
    while True:
        spec = sample_spec(CATEGORIES[rng.integers(len(CATEGORIES))], rng)
        shown = corrupt(spec, rng) if rng.random() < WRONG_CAPTION_SHARE else spec
        if not any(is_held_out(s) or any(is_unseen_combination(o) for o in s.objects) for s in (spec, shown)):
            caption = sentence(spec, str(rng.choice(FORMS[spec.structure])))
            return caption, render(draw_scene(shown, rng))


def draw_textured(rng: np.random.Generator) -> np.ndarray:
    """Draw an image of any objects and textures, without a caption, to train the decoder: (64, 64, 3) uint8."""
    scene = draw_scene(sample_spec(CATEGORIES[rng.integers(len(CATEGORIES))], rng), rng, unseen=True)
    return render(tuple(replace(o, texture=str(rng.choice(TEXTURES))) if rng.random() < 0.7 else o for o in scene))
