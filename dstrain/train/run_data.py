"""The data of a run, as its plan has them."""

from __future__ import annotations

from dstrain.config.files import cache_folder
from dstrain.data.prepare import PackedData, prepare
from dstrain.errors import DstrainError
from dstrain.plan.plan import Plan


def prepare_run_data(plan: Plan) -> PackedData:
    """The packed data, from the cache where the launch has left them. Raises DstrainError if they changed."""
    config = plan.run_config
    data = prepare(
        config.data,
        plan.data["tokenizer"],
        config.seq_len,
        config.held_out,
        cache_folder() / "data",
        config.pack,
    )
    found = data.summary()["fingerprint"]
    if found != plan.data["fingerprint"]:
        raise DstrainError(
            f"the data are not those that the plan was made for ({found} for {plan.data['fingerprint']})",
            where=config.data,
            hint="start a new run for changed data",
        )
    return data
