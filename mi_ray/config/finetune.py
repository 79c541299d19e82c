"""The configuration of fine-tuning."""

from typing import Annotated, Literal

from pydantic import Field

from mi_ray.config.section import Positive, Section, Share

MethodName = Literal["supervised", "nft", "awm", "dgpo", "crd", "gors", "hn-itm"]
BETA = {"nft": 0.5, "dgpo": 100.0, "crd": 1.0}  # where finetune.beta is none


class FinetuneConfig(Section):
    """LoRA/DoRA fine-tuning on candidates of the model's own. Defaults: MI-TUNE's released code for SD2.1."""

    method: MethodName = Field(
        "supervised",
        description="the loss: supervised (the paper's: learn the kept candidates); with online.updates also nft"
        " (DiffusionNFT), awm (advantage-weighted matching), dgpo (group DPO), crd, gors, hn-itm",
    )
    beta: float | None = Field(
        None, gt=0, description="strength of nft, dgpo or crd as their papers define it; none: nft 0.5, dgpo 100, crd 1"
    )
    anchor: float = Field(
        0.02, ge=0, description="weight of the squared distance to the base model's prediction; supervised has none"
    )
    anchor_guidance: float = Field(
        1.0,
        ge=1,
        description="guidance scale of that prediction: 1: unguided; above 1: trains a guidance-free student",
    )
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


class OnlineConfig(Section):
    """Online fine-tuning: many small updates, each on fresh candidates of the current policy. Off unless `updates` is
    set. The pool of one prompt has `generate.candidates_per_prompt` candidates, drawn by `sampler`."""

    updates: Annotated[int, Field(ge=0)] = Field(0, description="number of updates; 0: the rounds of the paper instead")
    prompts_per_update: Positive = Field(
        48, description="prompts of an update, in shards of generate.prompts_per_shard"
    )
    inner_steps: Positive = Field(2, description="optimiser steps of one update")
    noise_levels: Positive = Field(1, description="noise levels of each prompt in one optimiser step")
    shared_noise: bool = Field(True, description="all candidates of a prompt meet the same noise at the same level")
    rewards: tuple[str, ...] = Field(
        (),
        description="what is rewarded: scores, metrics of generate.alignment (by their first column) or their columns,"
        " each with a weight if you like (pmi_negatives, pmi:0.5); random: a control; none: select.by",
    )
    reward_floor: float = Field(
        0.3,
        ge=0,
        description="added to the spread of a prompt's rewards before they are divided by it",
    )
    reward_clip: float = Field(2.0, gt=0, description="advantages are cut at plus and minus this, in spreads")
    lag: Annotated[int, Field(ge=0, le=1)] = Field(
        1, description="1: an update's candidates are drawn while the update before is trained; 0: after it"
    )
    decay: tuple[float, float, float] = Field(
        (0.05, 0.005, 0.5),
        description="the policy that draws is an average of the trained weights with decay min(third, first + second *"
        " update)",
    )  # DiffusionNFT, arXiv 2509.16117, has (0, 0.001, 0.5) for its thousand updates
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="an update closes so long after its first shard, with the shards that are there; none:"
        " it waits for all, and a rerun repeats it exactly",
    )
    validate_every: Positive = Field(10, description="updates between two checkpoints, each scored on held-out prompts")
    validation_prompts: Annotated[int, Field(ge=0)] = Field(
        16, description="prompts at the end of the list that are scored at each checkpoint and never trained"
    )
    validation_candidates: Positive = Field(4, description="images of each of them")
    max_latent_drift: float = Field(
        0.15,
        gt=0,
        description="stop if the standard deviation of the candidates' latents is off the first update's by"
        " more than this share",
    )
    min_diversity: Share = Field(
        0.8, description="stop if the diversity of candidates of a prompt is below this share of the first update's"
    )
