"""MLflow tracker: a tracking server, or a database in the run folder (``mlflow.db``)."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstrain.hooks.trackers import Record, State, Tracker, flat_config, numbers_in, origins_of
from dstrain.train.hooks import StartInfo

# Tags of an MLflow run: which run of dstrain it is, and the last step that it has.
_RUN, _LAST_STEP = "dstrain.run_id", "dstrain.last_step"
_CHANGED = "resumed."
_MOST_PARAMS, _MOST_TAGS = 100, 100  # in a request
_LONGEST_PARAM, _LONGEST_TAG = 6000, 5000  # characters
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# MLflow would wait for minutes and try seven times; what failed is tried again here too.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class MlflowTracker(Tracker):
    """One MLflow run for all launches of a run, found by a tag. Steps that it has already are not sent again.

    Args:
        uri: of the tracking server; else MLFLOW_TRACKING_URI, else a database in the run folder.
        experiment: its name; else MLFLOW_EXPERIMENT_NAME, else "dstrain".
    """

    name = "mlflow"

    def __init__(self, uri: str | None = None, experiment: str | None = None) -> None:
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "dstrain"
        self._client: Any = None
        self._id = ""
        super().__init__()

    def load(self) -> None:
        for name, value in {**_PATIENCE, "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
            os.environ.setdefault(name, value)
        import mlflow  # noqa: F401

        for name in ("mlflow", "alembic"):  # each table that they make is a line in the log
            logging.getLogger(name).setLevel(logging.WARNING)

    def open(self, info: StartInfo) -> None:
        from mlflow import MlflowClient

        if self._uri is None:
            _do_not_wait_for_the_disk()
        uri = self._uri or f"sqlite:///{Path(info.folder) / 'mlflow.db'}"
        self._client = client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment_id(info)
        found = client.search_runs(
            [experiment], filter_string=f"tags.`{_RUN}` = '{info.run_id}'", max_results=1
        )
        run = (
            found[0] if found else client.create_run(experiment, run_name=info.run, tags={_RUN: info.run_id})
        )
        self._id = run.info.run_id
        self.last_step = int(run.data.tags.get(_LAST_STEP, -1))
        self._tell_config(info, run.data.params)
        client.update_run(self._id, status="RUNNING")

    def write(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(key, value, int(when * 1000), record["step"])
            for when, record in records
            if record["step"] > self.last_step
            for key, value in numbers_in(record).items()
        ]
        if metrics:
            last = RunTag(_LAST_STEP, str(records[-1][1]["step"]))
            self._client.log_batch(self._id, metrics=metrics, tags=[last])

    def close(self, state: State) -> None:
        self._client.set_terminated(self._id, status=_STATUS[state])

    def _experiment_id(self, info: StartInfo) -> str:
        client = self._client
        known = client.get_experiment_by_name(self._experiment)
        if known is not None:
            return str(known.experiment_id)
        # The folder of a server's artifacts is the server's matter.
        artifacts = None if self._uri else (Path(info.folder) / "mlflow-artifacts").as_uri()
        return str(client.create_experiment(self._experiment, artifact_location=artifacts))

    def _tell_config(self, info: StartInfo, known: dict[str, str]) -> None:
        """Parameters can't be changed: what a resumed run has another value of becomes a tag."""
        from mlflow.entities import Param, RunTag

        values = {key: str(value)[:_LONGEST_PARAM] for key, value in flat_config(info).items()}
        params = [Param(key, value) for key, value in values.items() if key not in known]
        tags = origins_of(info)
        tags |= {_CHANGED + key: value for key, value in values.items() if known.get(key, value) != value}
        told = [RunTag(key, value[:_LONGEST_TAG]) for key, value in tags.items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._id, params=params[first : first + _MOST_PARAMS])
        for first in range(0, len(told), _MOST_TAGS):
            self._client.log_batch(self._id, tags=told[first : first + _MOST_TAGS])


def _do_not_wait_for_the_disk() -> None:
    """MLflow makes a new database in some hundred transactions, and SQLite brings each to the disk.

    The kernel does that in its own time too; what a power cut would take from the copy stands in metrics.jsonl.
    Source: SQLAlchemy, "Foreign Key Support" of its SQLite dialect, which sets a PRAGMA for each connection like this.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    if not event.contains(Engine, "connect", _connected):
        event.listen(Engine, "connect", _connected)


def _connected(connection: Any, record: Any) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")
