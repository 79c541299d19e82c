"""Tiny detectors with random weights, in the classes and the files of the real ones."""

import json
from pathlib import Path

import torch
from tiny_judges import save_word_tokenizer
from transformers import (
    BertConfig,
    Dinov2Config,
    Dinov2Model,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    SwinConfig,
)

from mi_ray.shapes.model import build_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "cat", "lamp", "person"]


def save_owlv2(folder: Path) -> Path:
    tokenizer = build_tokenizer()
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    both |= {"initializer_range": 0.1}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = {**both, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**both, "image_size": 32, "patch_size": 8}
    torch.manual_seed(3)
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=32))
    for parameter in model.box_head.parameters():
        parameter.data *= 0.2  # boxes inside the image
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _swin() -> SwinConfig:
    return SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"], initializer_range=0.3,
    )  # fmt: skip


def save_grounding_dino(folder: Path) -> Path:
    ids = save_word_tokenizer(WORDS, folder)
    text = BertConfig(
        vocab_size=len(ids), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    backbone = _swin()
    backbone.out_features = ["stage2", "stage3", "stage4"]
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, num_queries=12, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4,
        max_text_len=16, num_feature_levels=4,
    )  # fmt: skip
    torch.manual_seed(1)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    return folder


def save_mask2former(folder: Path, labels: int = 80) -> Path:
    config = Mask2FormerConfig(
        backbone_config=_swin(), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=4, num_queries=6,
        num_labels=labels, init_std=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=28, patch_size=14,
        initializer_range=0.3,
    )  # fmt: skip
    Dinov2Model(config).save_pretrained(folder)
    prepared = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "resample": 3}
    prepared |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    prepared |= {"image_processor_type": "BitImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return folder
