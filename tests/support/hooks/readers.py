"""What trackers left on the disk, read back: step -> name -> value."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Values = dict[int, dict[str, float]]


def from_tensorboard(folder: Path) -> Values:
    """As TensorBoard shows it: events of steps that were repeated are gone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=True).Reload()
    found: Values = defaultdict(dict)
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in found[event.step], f"{tag} of step {event.step} is shown twice"
            found[event.step][tag] = event.value
    return dict(found)


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a ``run-ID.wandb``: protobufs in LevelDB's log format, behind a header of 7 bytes.

    Source: LevelDB, "Log format" (blocks of 32 KiB; checksum 4, length 2, type 1 byte; 1 full, 2 first, 4 last).
    """
    from wandb.proto import wandb_internal_pb2

    content, at, parts = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def from_wandb(folder: Path) -> tuple[list[Values], list[Any]]:
    """Of each launch's file below ``wandb/``, in order of time: the history, and its run record."""
    histories, runs = [], []
    for file in sorted(folder.glob("*run-*/run-*.wandb")):
        history: Values = {}
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append(record.run)
            if kind == "history":
                values = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                step = values.pop("_step", record.history.step.num)
                history[int(step)] = {key: value for key, value in values.items() if not key.startswith("_")}
        histories.append(history)
    return histories, runs


def from_mlflow(uri: str, experiment: str = "dstrain") -> tuple[Values, Any]:
    """The values of the only run, each of which it has once, and the run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    [run] = client.search_runs([found.experiment_id])
    values: Values = defaultdict(dict)
    for key in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, key):
            assert key not in values[metric.step], f"{key} of step {metric.step} is there twice"
            values[metric.step][key] = metric.value
    return dict(values), run


def from_metrics(file: Path) -> Values:
    """What metrics.jsonl says, without what a tracker can't plot."""
    from dstrain.hooks.trackers import numbers_in

    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {line["step"]: numbers_in(line) for line in lines}
