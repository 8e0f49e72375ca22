"""MLflow: on the server or in the database that its own environment variables name, or else its default."""

import os
import re
from typing import Any

QUICK = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # seconds; we try again ourselves
os.environ.update({name: os.environ.get(name, value) for name, value in QUICK.items()})
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param  # noqa: E402

from federation.app.run_folder import METRICS  # noqa: E402
from federation.tracking.run import Run  # noqa: E402

TAG = "federation.run"
MOST_METRICS, MOST_PARAMETERS = 1000, 100  # in one request
STATUS = {"finished": "FINISHED", "failed": "FAILED", "running": "KILLED"}


class Tracker:
    """A run of MLflow. A tag says which run it is of, so that no attempt to make it makes a second one."""

    def open(self, run: Run, known: str | None, sent: int) -> tuple[str, int]:
        self.client = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment(run)
        self.id = known or self._find(experiment, run) or self._create(experiment, run)
        self.where = f"run {self.id} of experiment {experiment}, {self.client.tracking_uri}"
        self.client.update_run(self.id, status="RUNNING")
        data = self.client.get_run(self.id).data
        self._set_parameters(run.parameters, data.params)
        return self.id, int(data.metrics.get("round", -1)) + 1

    def _experiment(self, run: Run) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.task
        found = self.client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self.client.create_experiment(name))

    def _find(self, experiment: str, run: Run) -> str | None:
        found = self.client.search_runs([experiment], f"tags.`{TAG}` = '{run.identity}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _create(self, experiment: str, run: Run) -> str:
        began = int(1000 * min([run.written, *run.times[:1]]))
        made = self.client.create_run(experiment, began, {TAG: run.identity}, run.name)
        return str(made.info.run_id)

    def _set_parameters(self, new: dict[str, Any], old: dict[str, str]) -> None:
        """Set the parameters. MLflow lets none change: those that a resumed run has changed become tags."""
        missing = [Param(name, str(value)) for name, value in new.items() if name not in old]
        for start in range(0, len(missing), MOST_PARAMETERS):
            self.client.log_batch(self.id, params=missing[start : start + MOST_PARAMETERS])
        for name, value in new.items():
            if old.get(name, str(value)) != str(value):
                self.client.set_tag(self.id, name, value)

    def send(self, number: int, values: dict[str, float], time: float) -> None:
        """Add a round. Its number is the last of all: by that it counts as sent."""
        names = [name for name in values if name != "round"]
        metrics = [Metric(re.sub(r"[^\w.\-:/ ]", "_", name), values[name], int(1000 * time), number) for name in names]
        metrics.append(Metric("round", number, int(1000 * time), number))
        for start in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + MOST_METRICS])

    def close(self, run: Run) -> None:
        for path in (*run.pictures, run.folder / METRICS):
            self.client.log_artifact(self.id, str(path))
        for path in run.models:
            self.client.log_artifact(self.id, str(path), "model")
        self.client.set_terminated(self.id, STATUS[run.status], int(1000 * run.written))
