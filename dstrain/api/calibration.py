"""The utilisation that a run's devices reached, kept for later plans on this machine."""

from __future__ import annotations

import hashlib
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstrain.config.files import cache_folder
from dstrain.errors import DstrainError
from dstrain.estimate.device import Device
from dstrain.report.measured import HeldAgainst
from dstrain.shared_caches import is_own, write_own
from dstrain.strict_json import to_json

FORGET = "dstrain plan --forget-calibration"


@dataclass(frozen=True)
class Calibration:
    """A utilisation that a run on a kind of device reached.

    Attributes:
        device: as the plan calls it.
        precision: in which it computed.
        utilisation: of the peak, by matrix multiplications.
        run: name of the run.
        steps: the first and the last step that were timed.
        day: when it was kept, as 2026-01-31.
    """

    device: str
    precision: str
    utilisation: float
    run: str
    steps: tuple[int, int]
    day: str

    @property
    def origin(self) -> str:
        """In words, for a plan's assumptions."""
        first, last = self.steps
        return f"measured by run {self.run}, steps {first} to {last}, on {self.day}; {FORGET} removes it"


def keep(held: HeldAgainst, here: Device | None) -> Calibration:
    """Keep the utilisation with which the plan would have estimated what was measured, for later plans on this machine.

    Args:
        here: this machine's device; None: not known.

    Raises:
        DstrainError: the run was not on this machine's devices, no time was estimated, or its steps were faster or
            slower than any utilisation explains; or it can't be written.
    """
    plan, time_of = held.plan, held.plan.time
    seconds = held.row("a step").measured
    if time_of is None or not time_of.matrices or seconds is None:
        raise DstrainError(
            f"the plan of {held.run} estimated no time that could be calibrated",
            where="--calibrate",
            hint="the speed of its devices must be known, and the plan be of this version: train a few steps anew",
        )
    if here is None or here.name != plan.device:
        raise DstrainError(
            f"{held.run} was planned for {plan.device or 'unknown devices'}, and this machine has"
            f" {here.name if here else 'devices of unknown speed'}",
            where="--calibrate",
            hint="calibrate on a machine with the devices that the run trained on",
        )
    rest = time_of.total - time_of.matrices
    reached = time_of.utilisation * time_of.matrices / (seconds - rest) if seconds > rest else float("inf")
    if not 0 < reached <= 1:
        raise DstrainError(
            f"{held.run} took {seconds:.3g} s a step, and the estimate without matrix multiplications is already"
            f" {rest:.3g} s: what they reach can't be told from it",
            where="--calibrate",
            hint="calibrate with a run that mostly computes: a larger model or micro-batch, fewer ranks",
        )
    made = Calibration(
        plan.device, plan.config["precision"], reached, held.run, held.steps, time.strftime("%Y-%m-%d")
    )
    path = _file(made.device, made.precision)
    try:
        write_own(path, to_json(vars(made)) + "\n")
    except OSError as error:
        raise DstrainError(
            f"the calibration can't be written: {error.strerror}",
            where=str(path),
            hint="name a cache folder on a writable disk: DSTRAIN_CACHE=FOLDER",
        ) from error
    return made


def forget(here: Device) -> list[Calibration]:
    """Remove what was kept of a device; what that was. Raises DstrainError where it can't be."""
    gone = []
    for precision in here.precisions:
        kept = _kept(here.name, precision)
        if kept is not None:
            path = _file(here.name, precision)
            try:
                path.unlink()
            except OSError as error:
                raise DstrainError(
                    f"the calibration can't be removed: {error.strerror}", where=str(path), hint="remove it"
                ) from error
            gone.append(kept)
    return gone


def calibrated(device: Device, precision: str) -> Device:
    """The device with the utilisation that was kept for it in this precision, if one was."""
    kept = _kept(device.name, precision)
    if kept is None:
        return device
    return replace(device, utilisation=kept.utilisation, measured=kept.origin)


def _file(device: str, precision: str) -> Path:
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")[:40]
    exact = hashlib.sha256(device.encode()).hexdigest()[:8]
    return cache_folder() / "calibration" / f"{words}-{exact}-{precision}.json"


def _kept(device: str, precision: str) -> Calibration | None:
    """None where nothing was kept, or it is damaged."""
    path = _file(device, precision)
    if not is_own(path):
        return None
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = Calibration(**{**record, "steps": (int(record["steps"][0]), int(record["steps"][1]))})
        alike = (found.device, found.precision) == (device, precision)
        words = isinstance(found.run, str) and isinstance(found.day, str)
        if alike and words and isinstance(found.utilisation, float) and 0 < found.utilisation <= 1:
            return found
    return None
