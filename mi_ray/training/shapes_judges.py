"""Training of the two small judges of the embedded world: plain PyTorch in one process."""

import json
import os
import pickle
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mi_ray.shapes import judges
from mi_ray.shapes.judges import GROUP, LABELS, Example

TEMPLATE = "A photo depicts {}"  # of CLIPScore
JudgeName = Literal["blip", "clip"]


class JudgeConfig(BaseModel):
    """Settings of the training of a judge."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    judge: JudgeName = Field("blip", description="blip answers questions, for blip-vqa; clip compares, for clip-score")
    seed: int = Field(0, description="seed of the weights, the scenes and the batches")
    groups: PositiveInt = Field(2500, description="number of groups of four scenes that differ in one thing")
    steps: PositiveInt = Field(2000, description="number of optimiser steps")
    images: PositiveInt = Field(64, multiple_of=GROUP, description="number of images per step, in whole groups")
    questions: PositiveInt = Field(6, description="number of questions per image and step, for blip")
    learning_rate: float = Field(1e-3, gt=0, description="highest learning rate, after a warm-up of 100 steps")
    patch_weight: float = Field(0.5, ge=0, description="weight of the loss that reads the objects of each patch")
    place_weight: float = Field(
        0.5, ge=0, description="weight of the loss of the attention to the asked objects, for blip"
    )
    bfloat16: bool = Field(True, description="forward pass in bfloat16; the weights are in float32")
    threads: PositiveInt = Field(1, description="number of CPU threads")
    checkpoint_every: PositiveInt = Field(100, description="number of steps between two checkpoints")

    @model_validator(mode="after")
    def _enough_groups(self):
        if self.images > GROUP * self.groups:
            raise ValueError(
                f"images is {self.images}, but {self.groups} groups have {GROUP * self.groups} images; set more groups"
            )
        return self


class _Training(nn.Module):
    """A judge and heads that read the object of each patch, used only in training."""

    def __init__(self, config: JudgeConfig, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        torch.manual_seed(config.seed)
        self.config, self.tokenizer = config, tokenizer
        build = {"blip": judges.build_blip, "clip": judges.build_clip}[config.judge]
        self.judge = build(tokenizer)
        width = self.judge.config.vision_config.hidden_size
        self.patches = nn.ModuleList([nn.Linear(width, size) for size in LABELS])
        self.yes_no = torch.tensor(tokenizer.convert_tokens_to_ids(["no", "yes"]))

    def read_patches(self, seen: Tensor, labels: Tensor) -> Tensor:
        """The loss of the objects of each patch: seen (n, 65, width), labels (n, 64, 6)."""
        return sum(
            cross_entropy(head(seen[:, 1:]).flatten(0, 1).float(), labels[..., i].flatten())
            for i, head in enumerate(self.patches)
        )

    def blip(
        self, pixels: Tensor, texts: list[str], owners: Tensor, answers: Tensor, places: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Losses of n questions about images: the first token of the answer, as the metric blip-vqa reads it.

        `places` (n, 65): the patches that the question is about; a head of the last cross-attention learns them.
        """
        blip, text = self.judge, self.judge.config.text_config
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        ids[:, 0] = text.bos_token_id + 1
        seen = blip.vision_model(pixel_values=pixels).last_hidden_state
        asked = blip.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen[owners],
            encoder_attention_mask=torch.ones(len(owners), seen.shape[1], dtype=torch.long), output_attentions=True,
        )  # fmt: skip
        looks = (asked.cross_attentions[-1][:, 0, 0].float() * places).sum(1)
        start = torch.full((len(texts), 1), text.bos_token_id)
        logits = blip.text_decoder(
            input_ids=start, encoder_hidden_states=asked.last_hidden_state, encoder_attention_mask=mask
        ).logits
        answer = logits[:, 0].float()
        return {
            "loss": cross_entropy(answer, self.yes_no[answers]),
            "right": (answer[:, self.yes_no].argmax(1) == answers).float().mean(),
            "patches": self.read_patches(seen, labels),
            "places": -looks.clamp(min=1e-6).log().mean(),
        }

    def clip(self, pixels: Tensor, texts: list[str], truth: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Symmetric contrastive loss (Radford et al. 2021, section 2.3) of n images and their n captions.

        `truth` (groups, 4, 4): image i of a group is exact for caption j; such pairs are no negatives.
        """
        clip, count = self.judge, len(texts)
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        seen = clip.vision_model(pixel_values=pixels)
        text = clip.text_projection(clip.text_model(**tokens).pooler_output).float()
        image = clip.visual_projection(seen.pooler_output).float()
        image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
        logits = clip.logit_scale.clamp(max=4.6).exp() * image @ text.T
        also = torch.block_diag(*truth.float()).bool() & ~torch.eye(count, dtype=torch.bool)
        logits, own = logits.masked_fill(also, -1e4), torch.arange(count)
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        within = torch.stack([logits[i : i + GROUP, i : i + GROUP] for i in range(0, count, GROUP)])
        right = (within.argmax(2) == torch.arange(GROUP)).float().mean()
        return {"loss": loss, "right": right, "patches": self.read_patches(seen.last_hidden_state, labels)}


def _pool(config: JudgeConfig, folder: Path) -> tuple[np.ndarray, list[list[Example]], np.ndarray]:
    """The pool of scenes. It is drawn once and stored on disk; both judges may use the same one."""
    path = folder / f"pool-{config.seed}-{config.groups}.pickle"
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_bytes(pickle.dumps(judges.draw_pool(config.groups, config.seed)))
        part.replace(path)
    return pickle.loads(path.read_bytes())


def _batch(config: JudgeConfig, pool: tuple, step: int) -> tuple:
    """The arguments of the loss at a step. They depend only on the seed and the step."""
    images, groups, truth = pool
    rng = np.random.default_rng((config.seed, 1, step))
    chosen = rng.choice(len(groups), config.images // GROUP, replace=False)
    examples = [example for group in chosen for example in groups[group]]
    drawn = [
        judges.shifted(e, i, rng) for e, i in zip(examples, images[chosen].reshape(-1, *images.shape[2:]), strict=True)
    ]
    patches = [judges.patch_owners(scene) for _, scene in drawn]
    labels = [judges.patch_labels(scene, of_patch) for (_, scene), of_patch in zip(drawn, patches, strict=True)]
    labels = torch.from_numpy(np.stack(labels))
    pixels = np.stack([image for image, _ in drawn]).astype(np.float32)
    pixels += rng.normal(0, 1, pixels.shape) * rng.uniform(0, 8, (len(pixels), 1, 1, 1))  # artefacts of an autoencoder
    x = torch.from_numpy(
        ((pixels / 255 - np.float32(OPENAI_CLIP_MEAN)) / np.float32(OPENAI_CLIP_STD)).astype(np.float32)
    ).permute(0, 3, 1, 2)
    if config.judge == "clip":
        return x, [TEMPLATE.format(e.caption) for e in examples], torch.from_numpy(truth[chosen]), labels
    axis = judges.seen_pixels()
    asked = [judges.draw_question(scene, rng) for _, scene in drawn for _ in range(config.questions)]
    owners = torch.arange(len(drawn)).repeat_interleave(config.questions)
    places = np.stack([np.isin(patches[owner], each.shown) for owner, each in zip(owners, asked, strict=True)])
    places = np.concatenate([~places.any(1, keepdims=True), places], axis=1)  # the class token: nowhere
    answers = torch.tensor([each.answer for each in asked]).long()
    return axis @ x @ axis.T, [each.text for each in asked], owners, answers, torch.from_numpy(places), labels


def train_judge(config: JudgeConfig, folder: Path) -> Path:
    """Start or continue the training in `folder`; return the folder of the finished judge."""
    torch.set_num_threads(config.threads)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, pool = judges.build_tokenizer(), _pool(config, folder)
    training, state = _Training(config, tokenizer), folder / f"{config.judge}.pt"
    matrices = [p for p in training.parameters() if p.ndim > 1]
    rest = [p for p in training.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, config.steps, pct_start=min(0.3, 100 / config.steps), cycle_momentum=False
    )
    parts, first = {"training": training, "optimizer": optimizer, "schedule": schedule}, 0
    if state.exists():
        stored = torch.load(state, weights_only=True)
        first = stored["step"]
        for name, part in parts.items():
            part.load_state_dict(stored[name])
    began = time.monotonic()
    for step in range(first, config.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            found = getattr(training, config.judge)(*_batch(config, pool, step))
        optimizer.zero_grad(set_to_none=True)
        weights = {"loss": 1.0, "patches": config.patch_weight, "places": config.place_weight}
        sum(weight * found[name] for name, weight in weights.items() if name in found).backward()
        nn.utils.clip_grad_norm_(training.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 20 == 0:
            line = {"step": step + 1, **{name: round(value.item(), 4) for name, value in found.items()}}
            line["seconds"] = round(time.monotonic() - began, 1)
            with (folder / f"{config.judge}.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            part = state.with_suffix(".part")
            torch.save({"step": step + 1, **{name: each.state_dict() for name, each in parts.items()}}, part)
            os.replace(part, state)
    return save_judge(training.judge, tokenizer, folder / config.judge)


def save_judge(judge: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write a folder for from_pretrained of transformers, in half precision. BLIP then reads 480 x 480 pixels."""
    kind = judge.config.model_type
    judge = judges.enlarged(judge, tokenizer) if kind == "blip" else judge
    judge.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    judges.image_processors()[kind].save_pretrained(folder)
    return folder
