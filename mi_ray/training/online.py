"""The training data of an online run: the candidates of each update, read from the run folder.

This file does not know how candidates are generated. A `Board` reports when the parts of an update are committed, and
receives the policy after each update.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from mi_ray import storage
from mi_ray.config import RunConfig
from mi_ray.diffusion.adapters import adapter_state
from mi_ray.diffusion.conditioning import Conditioning
from mi_ray.diffusion.denoisers import Denoiser
from mi_ray.inputs.online_plan import OnlinePlan
from mi_ray.runs.layout import CANDIDATES, policy_folder
from mi_ray.scoring.rewards import Reward, prompts_of, raw_rewards, run_rewards, validation_rewards_of
from mi_ray.training.losses import Batch, Objective, weights_of
from mi_ray.training.transitions import Rows, Transitions
from mi_ray.training.validation import finite_mean, validation_rewards

GUARDED = ("latent_std", "diversity")  # values of the candidates; a large change stops the training
PROBE_ROWS = 32  # smallest number of rows that the effective guidance is measured on, if there are as many
READ = ("prompt_id", "prompt", "advantage", "latents")  # columns of a part that are read, in addition to the rewards


class Board(Protocol):
    """The connection between generation and training, see `training.board.Meeting`."""

    def wait(self, indices: Sequence[int], deadline_s: float | None) -> list[int] | None:
        """Wait until parts are committed, at most `deadline_s` after the first one. Returns them; None: it ended."""

    def publish(self, version: int, policy: dict[str, Tensor]):
        """Send a version of the policy to the actors."""


@dataclass(frozen=True, eq=False)
class Group:
    """The m trained candidates of one prompt."""

    prompt_id: str
    prompt: str
    latents: Tensor  # (m, *latent_shape) fp32
    advantages: Tensor  # (m,)
    steps: Tensor | None = None  # (K,) stored sampling steps, of dpok
    transitions: Tensor | None = None  # (m, K, 2, *latent_shape), see `training.transitions`


class RunAway(Exception):
    """The policy has changed too much, so the training must stop."""


def decay_at(update: int, decay: tuple[float, float, float]) -> float:
    """The decay, after an update, of the moving average of the weights that is the policy (DiffusionNFT, section 4)."""
    first, rise, most = decay
    return min(most, first + rise * update)


class OnlineSource:
    """The batches of every optimiser step of an online run, and the changes of the policy between updates.

    All workers have the same state and read the same parts. The data of a step do not depend on the number of workers.

    Args:
        folder: URI of the arm's folder, see `runs.layout`.
        timesteps: the trained timesteps.
        average: moving average of the sampling policies, which is validated and saved. None: the policies themselves
            are validated and saved.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: OnlinePlan,
        folder: str,
        board: Board,
        denoiser: Denoiser,
        objective: Objective,
        timesteps: range,
        average: EMAModel | None = None,
    ):
        self.config, self.plan, self.folder, self.board = config, plan, folder, board
        self.candidates = storage.join(folder, CANDIDATES)
        self.denoiser, self.objective, self.timesteps, self.average = denoiser, objective, timesteps, average
        self.rewards: tuple[Reward, ...] = run_rewards(config)
        of_steps = config.finetune.method == "dpok"
        self.transitions = Transitions(denoiser.schedule, config.sampler) if of_steps else None
        self.steps = config.online.updates * config.online.inner_steps
        self.save: Callable[[str, list[Tensor]], None] | None = None  # on rank 0: writes an adapter folder
        self.recent: dict[int, dict[str, Tensor]] = {}  # the last lag + 1 versions; a restart publishes them again
        self.scores: dict[int, np.ndarray] = {}  # {validated version: mean reward of each held-out prompt}
        self.groups: list[Group] = []
        self.figures: dict[str, float] = {}
        self.history: list[dict[str, float]] = []  # `GUARDED` values of every update so far
        self.update = -1

    # ------------------------------------------------------------------------------------------ reading
    def open(self, step: int) -> bool:
        update = step // self.config.online.inner_steps
        if update == self.update:
            return True
        self._judge(update)
        return self._read(update)

    def _read(self, update: int) -> bool:
        """Wait for the candidates of an update and read them. False: the run has ended."""
        online = self.config.online
        arrived = self.board.wait(self.plan.of_update(update), online.deadline_s)
        if arrived is None:
            return False
        tables = [storage.read_table(storage.join(self.candidates, self.plan.name(i))) for i in sorted(arrived)]
        read = READ if self.transitions is None else (*READ, "transition_steps", "transitions")
        present = tables[0].column_names
        scores = [name for name in present if any(name in reward.columns([name]) for reward in self.rewards)]
        table = pa.concat_tables(tables).select([*read, *scores])
        rows, self.groups = table.select(["prompt_id", "advantage", *scores]).to_pydict(), []
        for start, stop in prompts_of(rows["prompt_id"]):
            kept = [i for i in range(start, stop) if rows["advantage"][i] is not None]
            if kept:
                self.groups.append(self._group(table.take(kept)))
        self.update = update
        values = raw_rewards(self.rewards, rows) if scores else np.full(1, np.nan)
        self._look(values[np.isfinite(values)], len(prompts_of(rows["prompt_id"])))
        return True

    def _group(self, rows: pa.Table) -> Group:
        shape, advantage = self.denoiser.latent_shape, torch.tensor(rows["advantage"].to_pylist(), dtype=torch.float32)
        x0 = _tensor(rows["latents"]).view(-1, *shape)
        group = Group(rows["prompt_id"][0].as_py(), rows["prompt"][0].as_py(), x0, advantage)
        if self.transitions is None:
            return group
        steps, stored = torch.tensor(rows["transition_steps"][0].as_py()), _tensor(rows["transitions"])
        return replace(group, steps=steps, transitions=stored.view(len(x0), len(steps), 2, *shape))

    def _look(self, rewards: np.ndarray, prompts: int):
        """Compute the logged values of an update, and check them.

        Raises:
            RunAway: as `_guard`.
        """
        self.figures = {"update": self.update, "trained_prompts": len(self.groups) / max(1, prompts)}
        if len(rewards):
            self.figures["reward"] = float(rewards.mean())
        if not self.groups:
            return
        latents = torch.cat([group.latents for group in self.groups])
        within = [group.latents.flatten(1).std(0).mean().item() for group in self.groups]
        self.figures |= {
            "latent_mean": latents.mean().item(),
            "latent_std": latents.std().item(),
            "diversity": float(np.mean(within)),
        }
        self.history.append({name: self.figures[name] for name in GUARDED})
        self._guard()

    def _guard(self):
        """Compare the means of the last updates with those of the first ones. Single updates have different prompts.

        Raises:
            RunAway: the scale or the diversity of the candidates has changed too much.
        """
        size = self.config.online.validate_every
        if len(self.history) < 2 * size:
            return
        first, last = (
            {name: np.mean([figures[name] for figures in some]) for name in GUARDED}
            for some in (self.history[:size], self.history[-size:])
        )
        drift = abs(last["latent_std"] / first["latent_std"] - 1)
        if drift > self.config.online.max_latent_drift:
            raise RunAway(f"the standard deviation of the latents of {size} updates has changed by {drift:.0%}")
        share = last["diversity"] / first["diversity"]
        if share < self.config.online.min_diversity:
            raise RunAway(f"the diversity of a prompt's candidates is {share:.0%} of that of the first {size} updates")

    # ------------------------------------------------------------------------------------------ batches
    def parts(self, step: int, rank: int, workers: int) -> list[tuple[Callable[[], Batch], float]]:
        """The microbatches of a worker, each with its share of the loss of the step.

        A microbatch has all rows of its prompts, up to `finetune.batch_size` rows or one prompt. All workers get the
        same number of microbatches, because they exchange gradients after each one: if one is missing, the first
        microbatch is used with share zero.
        """
        inner, levels = step % self.config.online.inner_steps, self.config.online.noise_levels
        batches, rows = [[]], 0
        for group in self.groups:
            more = len(group.latents) * levels
            if batches[-1] and rows + more > self.config.finetune.batch_size:
                batches, rows = [*batches, []], 0
            batches[-1].append(group)
            rows += more
        total = sum(len(group.latents) for group in self.groups)
        if not total:
            return []
        mine = batches[rank::workers]
        share = [sum(len(group.latents) for group in batch) / total * workers for batch in mine]
        missing = -(-len(batches) // workers) - len(mine)
        mine, share = mine + [batches[0]] * missing, share + [0.0] * missing
        return [(lambda batch=batch: self._draw(batch, inner), part) for batch, part in zip(mine, share, strict=True)]

    def _draw(self, groups: list[Group], inner: int) -> Batch:
        """The rows of prompts at their noise levels: a pure function of (seed, update, inner step, prompt)."""
        online, parts, count = self.config.online, [], len(self.timesteps)
        for group in groups:
            key = f"online noise/{self.config.seed}/{self.update}/{inner}/{group.prompt_id}"
            generator = _generator(key)
            m, levels = len(group.latents), online.noise_levels
            # Stratified noise levels: one in each of `levels` equal parts of the timesteps.
            places = (torch.arange(levels) + torch.rand(levels, generator=generator)) / levels
            drawn = self.timesteps.start + (places * count).long().clamp(max=count - 1)
            # What is not trained is held at the base model: the empty prompt, and all levels outside the range.
            held, empty, anywhere = torch.rand(3, levels, generator=generator)
            held = held < online.held_share
            drawn = torch.where(held, (anywhere * self.timesteps.stop).long(), drawn)
            empty = held & ((empty < 0.5) | (drawn >= self.timesteps.start))
            for level in range(levels):
                noise = torch.randn(1 if online.shared_noise else m, *group.latents.shape[1:], generator=generator)
                rows = Rows(group.latents, noise.expand_as(group.latents), drawn[level])
                if self.transitions and not held[level]:
                    rows = self.transitions.rows(group.steps, group.transitions, float(places[level]))
                parts.append((group, rows, held[level], empty[level]))
        sizes = torch.tensor([len(group.latents) for group, *_ in parts])
        held = torch.stack([held for *_, held, _ in parts]).repeat_interleave(sizes)
        prompts = ["" if empty else group.prompt for group, *_, empty in parts]
        advantage = torch.cat([group.advantages for group, *_ in parts])
        guidance, precision = torch.tensor([(rows.guidance, rows.precision) for _, rows, *_ in parts]).T
        return Batch(
            x0=torch.cat([rows.x0 for _, rows, *_ in parts]),
            noise=torch.cat([rows.noise for _, rows, *_ in parts]),
            timesteps=torch.stack([rows.timestep for _, rows, *_ in parts]).repeat_interleave(sizes),
            conditioning=self._encoded(prompts, sizes),
            weights=torch.where(held, online.held_weight, 1.0),
            advantages=advantage,
            rewards=(advantage + 1) / 2,
            group=torch.arange(len(parts)).repeat_interleave(sizes),
            held=held if online.held_share else None,
            guidance=guidance.repeat_interleave(sizes) if (guidance != 1).any() else None,
            precision=precision.repeat_interleave(sizes),
        ).to(self.denoiser.device)

    def _encoded(self, prompts: list[str], sizes: Tensor) -> Conditioning:
        """The conditioning of each row. `sizes` are the numbers of rows of the prompts."""
        distinct = list(dict.fromkeys(prompts))
        number = torch.tensor([distinct.index(prompt) for prompt in prompts]).repeat_interleave(sizes)
        return self.denoiser.encode_prompts(distinct).rows(number)

    # ------------------------------------------------------------------------------------------ between updates
    def close(self, step: int) -> dict[str, float]:
        """After the last step of an update, move the policy towards the trained weights and publish it.

        Returns:
            Values for the log.
        """
        online, figures = self.config.online, self.figures
        update, inner = divmod(step, online.inner_steps)
        if inner + 1 < online.inner_steps:
            return {"update": update}
        if update % online.validate_every == 0:
            figures |= {"effective_guidance": self.effective_guidance()}
        keep = decay_at(update, online.decay)
        with torch.no_grad():
            for average, parameter in zip(self.objective.old, self.objective.parameters_trained, strict=True):
                average.lerp_(parameter, 1 - keep)
        if self.average:
            with weights_of(self.objective.old, self.objective.parameters_trained):
                self.average.step(self.objective.parameters_trained)
        self._publish(update + 1)
        return figures

    def _publish(self, version: int):
        """Send a version of the policy to the actors. Versions at checkpoints are also saved."""
        with weights_of(self.objective.old, self.objective.parameters_trained):
            self.recent[version] = adapter_state(self.objective.model)
        self.recent = {v: state for v, state in self.recent.items() if v > version - 1 - self.config.online.lag}
        if self.save:  # rank 0
            if self.plan.is_checkpoint(version):
                saved = self.average.shadow_params if self.average else self.objective.old
                self.save(policy_folder(self.folder, version), saved)
            self.board.publish(version, self.recent[version])

    def due(self, step: int) -> bool:
        online = self.config.online
        return (step + 1) % (online.inner_steps * online.validate_every) == 0

    def probe(self) -> Batch | None:
        self.update, self.history = -1, []  # the training has ended
        first = self.parts(0, 0, 1) if self._read(0) else []
        return first[0][0]() if first else None

    def state(self) -> dict:
        return {"recent": self.recent}

    def load(self, state: dict, lines: list[dict]):
        if not lines:
            self._publish(0)
            return
        seen = [line for line in lines if line.get("latent_std") is not None]
        self.history = [{name: line[name] for name in GUARDED} for line in seen]
        self.recent = state["recent"]
        if self.save:
            for version, policy in sorted(self.recent.items()):
                self.board.publish(version, policy)

    def _judge(self, update: int):
        """Compare the second last validated version with the best version, on the same prompts and seeds.

        The last version is not used: its validation may not be finished. So the training need not wait, and a rerun
        compares the same versions.

        Raises:
            RunAway: the self-score is worse by more than three standard errors.
        """
        version = update - self.config.online.validate_every
        if version <= 0 or not self.plan.of_validation(version):
            return
        judged_by = validation_rewards_of(self.config)
        for v in range(0, version + 1, self.config.online.validate_every):
            if v not in self.scores and self.board.wait(self.plan.of_validation(v), None) is not None:
                self.scores[v] = validation_rewards(self.plan, self.candidates, v, judged_by)
        if version not in self.scores or not len(self.scores[version]):
            return
        best = max(self.scores, key=lambda v: finite_mean(self.scores[v]))
        lost = self.scores[best] - self.scores[version]
        lost = lost[np.isfinite(lost)]
        if len(lost) > 1 and lost.mean() > 3 * lost.std(ddof=1) / math.sqrt(len(lost)):
            raise RunAway(f"the self-score of held-out prompts fell by {lost.mean():.2f} since update {best}")

    def effective_guidance(self) -> float:
        """The guidance_scale at which the base model is most similar to the policy without guidance.

        gamma = <eps_policy(y) - eps(), Delta> / ||Delta||^2 with Delta = eps(y) - eps() of the base model, on the
        update's candidates. 1: the base model itself.
        """
        objective, null = self.objective, self.denoiser.encode_prompts([""])
        rows, overlap, square = 0, 0.0, 0.0
        for draw, _ in self.parts(0, 0, 1):
            batch = draw()
            with torch.no_grad(), weights_of(objective.base, objective.parameters_trained):
                empty = objective.predict(batch, null.expand(len(batch.x0)))
                delta = objective.predict(batch) - empty
            with torch.no_grad(), weights_of(objective.old, objective.parameters_trained):
                moved = objective.predict(batch) - empty
            overlap, square = overlap + (moved * delta).sum().item(), square + delta.square().sum().item()
            if (rows := rows + len(batch.x0)) >= PROBE_ROWS:
                break
        return overlap / square if square else math.nan


def _generator(key: str) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _tensor(column: pa.ChunkedArray) -> torch.Tensor:
    """A column of lists of equal length as a tensor with one row per list, fp32. It makes no Python lists, which would
    take seconds for the latents of a large model."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(values.astype(np.float32)).view(len(column), -1)
