"""Tiny judges with random weights, in the classes and the files of the real ones. They know the words of the shapes."""

from pathlib import Path

import torch
from mi_ray.shapes.model import build_tokenizer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)


def clip_config(tokenizer: CLIPTokenizer, positions: int = 12, size: int = 16) -> CLIPConfig:
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    both |= {"projection_dim": 24, "hidden_act": "gelu", "initializer_range": 0.5}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**both, **special, "vocab_size": len(tokenizer), "max_position_embeddings": positions}
    vision = {**both, "image_size": size, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


def save_clip(folder: Path) -> CLIPModel:
    tokenizer = build_tokenizer()
    torch.manual_seed(2)
    model = CLIPModel(clip_config(tokenizer)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
