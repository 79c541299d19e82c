"""The configuration of fine-tuning."""

from typing import Annotated, Literal

from pydantic import Field

from mi_ray.config.metrics import RewardName
from mi_ray.config.paths import SharedPath
from mi_ray.config.section import Positive, Section, Share

MethodName = Literal["supervised", "nft", "awm", "dgpo", "crd", "gors", "hn-itm", "dpok"]
BETA = {"nft": 0.5, "dgpo": 100.0, "crd": 1.0}  # used if finetune.beta is none


class FinetuneConfig(Section):
    """LoRA/DoRA fine-tuning on the model's own candidates. Defaults: MI-TUNE's released code for SD2.1."""

    method: MethodName = Field(
        "supervised",
        description="fine-tuning loss. supervised: denoising loss on the kept candidates (the paper's). The others need"
        " online.updates: nft (DiffusionNFT), awm (advantage-weighted matching), dgpo (group DPO), crd, gors, hn-itm,"
        " dpok (policy gradient of sampling steps)",
    )
    beta: float | None = Field(
        None, gt=0, description="beta of nft, dgpo or crd, as defined in their papers; none: nft 0.5, dgpo 100, crd 1"
    )
    anchor: float = Field(
        0.02, ge=0, description="weight of the squared distance to the base model's prediction; not used by supervised"
    )
    anchor_guidance: float = Field(
        1.0,
        ge=1,
        description="guidance_scale of the base model's prediction in anchor. 1: no guidance; above 1: the tuned model"
        " learns to work without guidance",
    )
    ratio_clip: float = Field(
        1e-4, gt=0, description="dpok: largest distance of the likelihood ratio from 1 that has a gradient"
    )  # DPOK's released code
    adapter: Literal["lora", "dora"] = Field(
        "lora", description="type of adapter; DoRA: Liu et al. 2024, arXiv 2402.09353"
    )
    rank: Positive = Field(32, description="rank of the adapter matrices")
    alpha: Positive = Field(32, description="scale of the adapter: its output is multiplied by alpha / rank")
    target_modules: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), description="layers that get an adapter, by the end of their names"
    )
    start_from: SharedPath | None = Field(
        None,
        description="a LoRA or DoRA of the model to train further: a folder of PEFT, or a .safetensors file with the"
        " names of diffusers, kohya or ComfyUI. Its type, rank, alpha and layers are used instead of those above. The"
        " model with it is the base model of the run: it makes the first candidates, and is evaluated as base; none: a"
        " new adapter",
    )
    learning_rate: float = Field(1e-4, gt=0, description="learning rate of AdamW")
    lr_warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="number of optimiser steps with linear warm-up; 0: no warm-up"
    )
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="learning rate after the warm-up; cosine: decays to 0"
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average (EMA) of the weights, which is saved; none: save the last"
        " weights. An online run averages the sampling policies, one step per update",
    )
    baseline: Share = Field(
        0.0,
        description="share of a baseline adapter that is subtracted. The baseline is trained on a random selection of"
        " the same candidates, because a model that is trained on its own images changes for any selection; 0: no"
        " baseline",
    )
    weight_decay: float = Field(1e-2, ge=0, description="weight decay of AdamW")
    steps: Positive = Field(300, description="number of optimiser steps")
    batch_size: Positive = Field(8, description="number of rows in one batch of one worker")
    gradient_accumulation: Positive = Field(
        50, description="number of batches in one optimiser step, divided among the workers"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="maximum norm of the gradient; a larger gradient is clipped")
    min_snr_gamma: float | None = Field(
        None, gt=0, description="gamma of the Min-SNR loss weight, Hang et al. 2023, eq. 5; none: plain epsilon loss"
    )
    log_snr_max: float | None = Field(
        None,
        description="highest log SNR that is trained (lower ones are noisier, the prompt matters more there); none:"
        " train all",
    )
    timestep_density: Literal["uniform", "logit-normal"] = Field(
        "uniform",
        description="density of the trained timesteps of a flow model, in rounds. logit-normal: more at medium noise,"
        " with mean 0 and deviation 1 of the logit, over the noise levels of the model's scheduler",
    )  # Esser et al. 2024, arXiv 2403.03206, eq. 19; MI-TUNE's released code for Stable Diffusion 3.5
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, about a third more time"
    )
    shard: Literal["fsdp"] | None = Field(
        None,
        description="fsdp: divide the frozen weights among resources.train_workers, for a model that one GPU does not"
        " hold; none: every worker has the whole model",
    )
    prompt_dropout: Share = Field(0.0, description="share of the rows that are trained without their prompt")
    checkpoint_every: Positive = Field(100, description="number of optimiser steps between two checkpoints")
    max_failures: Annotated[int, Field(ge=-1)] = Field(
        3, description="maximum number of worker restarts, not counting preempted nodes; -1: no limit"
    )
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",),
        description="where losses are logged, besides training.jsonl; wandb and mlflow need an extra of the package",
    )

    @property
    def new_dora(self) -> bool:
        """Whether a new adapter is a DoRA. What `start_from` is, is known when it is read."""
        return self.adapter == "dora" and self.start_from is None

    @property
    def adapter_settings(self) -> dict:
        """The keyword arguments of `diffusion.adapters.attach_adapter`."""
        settings = {"rank": self.rank, "alpha": self.alpha, "target_modules": self.target_modules}
        return settings | {"use_dora": self.adapter == "dora"}


class OnlineConfig(Section):
    """Online fine-tuning: many small updates, each on new candidates of the current policy. It is off if `updates` is
    0. Each prompt gets `generate.candidates_per_prompt` candidates, sampled as `sampler` says."""

    updates: Annotated[int, Field(ge=0)] = Field(
        0, description="number of updates; 0: no online training, but the rounds of the paper"
    )
    prompts_per_update: Positive = Field(
        48, description="number of prompts in one update, rounded up to whole shards (generate.prompts_per_shard)"
    )
    inner_steps: Positive = Field(2, description="number of optimiser steps in one update")
    noise_levels: Positive = Field(1, description="number of noise levels per prompt in one optimiser step")
    held_share: Share = Field(
        0.25,
        description="share of the rows that are trained towards the base model's prediction instead: for the empty"
        " prompt, and for all prompts at log SNRs above finetune.log_snr_max. Otherwise the adapter changes these"
        " predictions too",
    )
    held_weight: float = Field(5.0, gt=0, description="weight of the rows of held_share in the loss; other rows have 1")
    shared_noise: bool = Field(True, description="true: all candidates of a prompt get the same noise and noise level")
    rewards: tuple[RewardName, ...] = Field(
        (),
        description="rewards: scores, metrics of generate.alignment (their first column) or columns of these metrics."
        " A weight is optional (pmi_negatives, pmi:0.5). random: a control; none: the reward is select.by",
    )
    reward_floor: float = Field(
        0.3,
        ge=0,
        description="the scores of a prompt are divided by their standard deviation plus this; not used for metrics",
    )
    reward_clip: float = Field(
        2.0, gt=0, description="advantages are clipped to plus and minus this, in standard deviations"
    )
    trained_candidates: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="number of candidates per prompt to train on: one half the best, one half the worst; none: all"
        " candidates",
    )
    stored_steps: Positive = Field(
        4, description="dpok: number of sampling steps of each trained candidate that are stored and trained on"
    )
    lag: Annotated[int, Field(ge=0, le=1)] = Field(
        1, description="1: sample the candidates of an update while the previous update is trained; 0: after it"
    )
    decay: tuple[float, float, float] = Field(
        (0.05, 0.005, 0.5),
        description="(first, second, maximum): the sampling policy is a moving average of the trained weights, with"
        " decay min(maximum, first + second * update)",
    )  # DiffusionNFT, arXiv 2509.16117, uses (0, 0.001, 0.5) for a thousand updates
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="seconds after the first shard of an update until it is trained with the shards that are ready;"
        " none: wait for all shards, so that a rerun gives the same result",
    )
    validate_every: Positive = Field(
        10, description="number of updates between two checkpoints; each checkpoint is scored on held-out prompts"
    )
    validation_prompts: Annotated[int, Field(ge=0)] = Field(
        16, description="number of held-out prompts, from the end of the list: scored at each checkpoint, never trained"
    )
    validation_candidates: Positive = Field(4, description="number of images per held-out prompt")
    max_latent_drift: float = Field(
        0.15,
        gt=0,
        description="stop if the standard deviation of the candidates' latents in the last validate_every updates"
        " differs from that in the first ones by more than this share",
    )
    min_diversity: Share = Field(
        0.8,
        description="stop if the diversity of a prompt's candidates in the last validate_every updates is below this"
        " share of that in the first ones",
    )
