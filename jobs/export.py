"""Write the tuned model of a run as a folder for diffusers and the hub: jobs/export.py --run-dir DIR --out FOLDER"""

from pathlib import Path

from mi_ray.config.command_line import run_command
from mi_ray.config.export import ExportConfig
from mi_ray.config.section import ConfigError, collecting


def run(config: ExportConfig, dry_run: bool):
    from mi_ray.diffusion.folders import fetch_model, model_commit, pipeline_class  # takes seconds; --help needs none
    from mi_ray.report.card import model_card
    from mi_ray.report.summary import models_of
    from mi_ray.runs.layout import SUMMARY, final_adapter, read_run
    from mi_ray.storage import exists, join, local_folder
    from mi_ray.training.export import check_out, export

    of_run, content = read_run(config.run_dir)
    model, out, faults = of_run.model.path, Path(config.out), []
    arms = [name for name in models_of(of_run) if name != "base"]
    if config.arm not in arms:
        faults.append(f"arm: the run has no {config.arm!r}; give one of {', '.join(arms)}")
    elif not exists(join(final_adapter(of_run, config.arm), SUMMARY)):
        faults.append(f"run_dir: the fine-tuning of {config.arm} has not ended; continue the run")
    with collecting(faults, "out"):
        check_out(out)
    with collecting(faults, "model.path"):
        if model_commit(model) != content.get("model_commit"):
            raise ValueError(f"{model!r} has other weights than when the run began; restore them")
    if faults:
        raise ConfigError(faults)
    adapter = final_adapter(of_run, config.arm)
    print(f"{model} with {adapter} merged in: {out}", flush=True)
    if not dry_run:
        card = model_card(of_run, content, config.arm, pipeline_class(model))
        export(fetch_model(model), Path(local_folder(adapter)), out, card)


if __name__ == "__main__":
    run_command(run, model=ExportConfig)
