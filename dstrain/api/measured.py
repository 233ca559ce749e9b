"""``dstrain plan --of RUN``: a plan beside what its run measured."""

from __future__ import annotations

from os import PathLike

from dstrain.api import calibration
from dstrain.api.calibration import Calibration
from dstrain.api.machines import device_here
from dstrain.api.resuming import find_run
from dstrain.report.measured import HeldAgainst, hold_against


def measured(run: str | PathLike[str]) -> HeldAgainst:
    """A run's plan beside what was measured.

    Args:
        run: its folder, or its name in ``runs/``.

    Raises:
        DstrainError: there is no such run, or nothing that its plan can be held against.
    """
    return hold_against(find_run(run))


def calibrate(held: HeldAgainst) -> Calibration:
    """Keep the utilisation that the run reached, for later plans on this machine.

    Raises:
        DstrainError: the run was not on this machine's devices, or its time says nothing of what they reach.
    """
    return calibration.keep(held, device_here())


def forget_calibrations() -> list[Calibration]:
    """Remove what was kept of this machine's devices; what that was. Raises DstrainError where it can't be."""
    here = device_here()
    return calibration.forget(here) if here is not None else []
