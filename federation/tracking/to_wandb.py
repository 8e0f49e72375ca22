"""Weights & Biases: online or offline, as its own environment variables and login say."""

import os

import wandb

from federation.tracking.run import Run

INIT_TIMEOUT = 30  # seconds


class Tracker:
    """A run of Weights & Biases, whose id is that of the run itself, so that no attempt to make it makes a second."""

    def open(self, run: Run, known: str | None, sent: int) -> tuple[str, int]:
        quiet = wandb.Settings(
            console="off", silent=True, save_code=False, x_disable_stats=True, init_timeout=INIT_TIMEOUT
        )
        self.run = wandb.init(
            id=known or run.identity, resume="allow", settings=quiet, config=run.parameters,
            project=os.environ.get("WANDB_PROJECT") or run.task.replace("/", "-"),
            name=os.environ.get("WANDB_NAME") or run.name,
        )  # fmt: skip
        offline = f"offline, in {self.run.dir.removesuffix('/files')}: wandb sync sends it"
        self.where = offline if self.run.offline else str(self.run.url)
        return self.run.id, sent if self.run.offline else self.run.step

    def send(self, number: int, values: dict[str, float], time: float) -> None:
        self.run.log({**values, "_timestamp": time}, step=number)

    def close(self, run: Run) -> None:
        self.run.log({path.stem: wandb.Image(str(path)) for path in run.pictures}, step=len(run.rounds) - 1)
        if run.models:
            models = wandb.Artifact(f"model-{run.identity}", "model")
            for path in run.models:
                models.add_file(str(path))
            self.run.log_artifact(models)
        self.run.finish(exit_code=int(run.status != "finished"))
