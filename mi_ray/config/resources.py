"""The configuration of actors, workers, batches and prices."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mi_ray.config.section import Positive, Section


def _pair(value: object) -> object:
    """One number n means (n, n)."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    return (value, value) if isinstance(value, (int, str)) else value


class ResourcesConfig(Section):
    """Hardware and speed. Nothing here changes a result, except by floating-point rounding."""

    num_actors: Annotated[tuple[Positive, Positive], BeforeValidator(_pair)] = Field(
        (1, 1), description="(minimum, maximum) number of generating actors; one number means both"
    )
    cpus_per_actor: Annotated[float, Field(ge=0)] = Field(1, description="number of CPUs and of threads per actor")
    gpus_per_actor: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        0.0,
        description="number of GPUs per actor; 0: CPUs only; 0.5: two actors share a GPU; auto: chosen by a trial when"
        " the run starts",
    )
    batch_size: Positive | Literal["auto"] = Field(
        64,
        description="number of candidates in one denoiser batch (twice as many rows with guidance), if images have the"
        " model's own size; at another size the batch has as many latent tokens; auto: chosen by a trial",
    )
    shard_timeout_s: float | None = Field(
        None,
        gt=0,
        description="seconds per shard after which an actor is stopped and another one gets the shard; with judges this"
        " includes waiting while the actor computes another shard; none: stop an actor that has not called the model"
        " for an hour",
    )
    lease_s: float = Field(
        40,
        gt=0,
        description="seconds without a heartbeat after which the lease of a driver on another machine expires; a dead"
        " driver on this machine is noticed at once",
    )
    train_workers: Annotated[tuple[Positive, Positive], BeforeValidator(_pair)] = Field(
        (1, 1),
        description="number of data-parallel workers of the fine-tuning; (minimum, maximum): as many as the cluster"
        " has room for",
    )
    train_cpus: Annotated[float, Field(ge=0)] = Field(
        1,
        description="number of CPUs per worker; 0: it shares those of the actors (online training on a small machine)",
    )
    train_gpus: Annotated[float, Field(ge=0)] = Field(
        0, description="number of GPUs per worker, at most 1; 0: the worker trains on CPUs"
    )
    judge_actors: Annotated[int, Field(ge=0)] = Field(
        0,
        description="number of actors that only measure the metrics, for judges that are too large to share a device"
        " with the denoiser; 0: the generating actors measure them",
    )
    judge_cpus: Annotated[float, Field(ge=0)] = Field(1, description="number of CPUs and of threads per judge")
    judge_gpus: Annotated[float, Field(ge=0)] = Field(0, description="number of GPUs per judge")
    price_per_gpu_hour: float | None = Field(
        None, ge=0, description="price of one GPU hour in any currency: --dry-run prints the cost; none: no cost"
    )

    @model_validator(mode="after")
    def _order(self):
        if self.num_actors[0] > self.num_actors[1]:
            raise ValueError(f"num_actors is {self.num_actors}, but it must be (minimum, maximum); swap them")
        if self.train_workers[0] > self.train_workers[1]:
            raise ValueError(f"train_workers is {self.train_workers}, but it must be (minimum, maximum); swap them")
        return self
