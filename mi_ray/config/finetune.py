"""The configuration of fine-tuning."""

from typing import Annotated, Literal

from pydantic import Field

from mi_ray.config.section import Positive, Section, Share


class FinetuneConfig(Section):
    """LoRA/DoRA fine-tuning on the kept candidates. Defaults: MI-TUNE's released code for SD2.1."""

    adapter: Literal["lora", "dora"] = Field("lora", description="DoRA: Liu et al. 2024, arXiv 2402.09353")
    rank: Positive = Field(32, description="of the adapter's matrices")
    alpha: Positive = Field(32, description="the adapter is scaled by alpha / rank")
    target_modules: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), description="ends of the names of the layers that get an adapter"
    )
    learning_rate: float = Field(1e-4, gt=0, description="of AdamW")
    lr_warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="optimiser steps of linear warm-up")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up; cosine: down to 0")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="save a moving average of the weights, less swayed by the last batches; none: the last",
    )
    baseline: Share = Field(
        0.0,
        description="how much is taken off of what learning from a random selection of the same pool does: learning"
        " from its own images changes a model whatever is chosen",
    )
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW")
    steps: Positive = Field(300, description="optimiser steps")
    batch_size: Positive = Field(8, description="rows in one batch of one worker")
    gradient_accumulation: Positive = Field(
        50, description="batches in one optimiser step, shared out among the workers"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient is clipped to this norm")
    min_snr_gamma: float | None = Field(None, gt=0, description="Hang et al. 2023, eq. 5; none: plain epsilon loss")
    log_snr_max: float | None = Field(
        None, description="train only at noise levels up to this log SNR, where a prompt decides; none: at all of them"
    )
    activation_checkpointing: bool = Field(
        False, description="activations are computed again in the backward pass: less memory, a third more time"
    )
    prompt_dropout: Share = Field(0.0, description="share of the rows that train without their prompt")
    checkpoint_every: Positive = Field(100, description="optimiser steps")
    max_failures: Annotated[int, Field(ge=-1)] = Field(
        3, description="restarts of the workers, beside those for preempted nodes; -1: no limit"
    )
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description="where losses go besides training.jsonl; the last two by extras"
    )
