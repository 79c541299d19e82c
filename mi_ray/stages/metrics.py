"""Prometheus metrics of the actors, through ray.util.metrics. cluster/monitoring/grafana.json shows them."""

from ray.util.metrics import Counter, Gauge

from mi_ray.scoring.rewards import score_statistics

COUNTERS = {
    "mi_ray_rows": "candidates or images written",
    "mi_ray_shards": "shards committed",
    "mi_ray_error_rows": "rows with an error instead of a result",
    "mi_ray_denoiser_evaluations": "denoiser evaluations for sampling",
    "mi_ray_score_evaluations": "denoiser evaluations for pointwise scores",
    "mi_ray_batch_halvings": "batches that did not fit into memory and were halved",
    "mi_ray_actor_restarts": "actors restarted after their process was lost",
    "mi_ray_busy_seconds": "seconds that actors spent on shards; the rate per actor is its busy share",
}
GAUGES = {
    "mi_ray_actor_up": "1 for each actor with a loaded model",
    "mi_ray_score_mean": "mean score of the candidates of the last shard, nats",
    "mi_ray_score_spread": "standard deviation of a score within a prompt, mean over the last shard's prompts, nats",
}


class StageMetrics:
    """The metrics of one actor, with the tags stage and model."""

    def __init__(self, stage: str, model: str):
        self.tags = {"stage": stage, "model": model}
        keys = tuple(self.tags)
        self.counters = {name: Counter(name, text, keys) for name, text in COUNTERS.items()}
        scored = {name: (*keys, "score") if "score" in name else keys for name in GAUGES}
        self.gauges = {name: Gauge(name, text, scored[name]) for name, text in GAUGES.items()}
        self.gauges["mi_ray_actor_up"].set(1, self.tags)

    def committed(self, receipt: dict, rows: list[dict]):
        """Update the metrics after this actor has committed a shard."""
        amounts = {
            "mi_ray_rows": receipt["rows"],
            "mi_ray_shards": 1,
            "mi_ray_error_rows": receipt["errors"],
            "mi_ray_denoiser_evaluations": receipt["denoiser_evaluations"],
            "mi_ray_score_evaluations": receipt["score_evaluations"],
            "mi_ray_batch_halvings": receipt["batch_halvings"],
            "mi_ray_actor_restarts": receipt["actor_restarts"],
            "mi_ray_busy_seconds": receipt["seconds"],
        }
        for name, amount in amounts.items():
            if amount > 0:
                self.counters[name].inc(amount, self.tags)
        for score, (mean, spread) in score_statistics(rows).items():
            tags = self.tags | {"score": score}
            self.gauges["mi_ray_score_mean"].set(mean, tags)
            self.gauges["mi_ray_score_spread"].set(spread, tags)
