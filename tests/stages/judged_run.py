"""Run a stage whose metric an actor of its own measures: python judged_run.py FOLDER PROMPT... (for the tests)."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from mi_ray import storage
from mi_ray.alignment.metric import columns_of, load_metrics, measure
from mi_ray.config import RunConfig
from mi_ray.inputs.prompts import PROMPTS, prompt_id
from mi_ray.inputs.shard_plan import ShardPlan, write_prompts
from mi_ray.stages.judges import ask
from mi_ray.stages.shards import ShardWriter, run_stage
from mi_ray.storage import tables

ROOT, PROMPT_TEXTS = Path(sys.argv[1]), sys.argv[2:]
BEGUN = ROOT / "begun"  # exists when a shard after the first one is begun


class Writer:
    """An actor that writes one row per prompt: a grey image, 50 brighter from shard to shard."""

    def __init__(self, config: dict, folder: str, token: int | None = None, judges=()):
        config = RunConfig.model_validate(config)
        self.metrics = load_metrics(config.metrics)
        schema = tables.candidates_schema(("mitune",), columns_of(self.metrics))
        self.empty = dict.fromkeys(schema.names)
        self.write = ShardWriter("generate", "round 0", folder, schema, config, token, lambda: 0)
        ask(judges, self.metrics, self.write.turn)

    def __call__(self, batch):
        return self.write(batch, self.rows)

    def rows(self, shard, positions, work):
        if shard.index:
            BEGUN.touch()
        prompts = [shard.prompts[p] for p in positions]
        values = measure(self.metrics, np.full((len(prompts), 4, 4, 3), 50 * shard.index, np.uint8), prompts)
        columns = {"prompt_id": [shard.prompt_ids[p] for p in positions], "prompt": prompts, **values}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [self.empty | row | {"candidate_index": 0} for row in rows]


def main():
    source, folder = str(ROOT / "prompts.parquet"), str(ROOT / "candidates")
    prompts = [{"prompt_id": prompt_id(text), "prompt": text} for text in PROMPT_TEXTS]
    write_prompts(source, [pa.RecordBatch.from_pylist(prompts, PROMPTS)])
    config = RunConfig.model_validate(
        {
            "run_dir": str(ROOT),
            "prompts": {"file": "unused"},
            "score": {"names": ["mitune"]},
            "generate": {"alignment": [f"dark_pixels:Patient@{BEGUN}"]},
            "resources": {"judge_actors": 1, "judge_cpus": 0.5},
        }
    )
    ray.init(log_to_driver=False, logging_level="error")
    constructor = {"config": config.model_dump(mode="json"), "folder": folder}
    run_stage("generate", "round 0", Writer, constructor, ShardPlan(source, 1, "key"), folder, config)
    for row in sorted(storage.read_tables(folder).to_pylist(), key=lambda row: row["prompt"]):
        print(row["prompt"], row["darkest"], row["error"])


if __name__ == "__main__":
    main()
