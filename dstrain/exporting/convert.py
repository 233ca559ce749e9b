"""``python -m dstrain.exporting.convert REQUEST.json ANSWER.json``: converts a checkpoint to a model folder.

Runs on a CPU, with one block and one file of the model in memory; only the validation loss loads the whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME, logging

from dstrain.child_process import child_main
from dstrain.config.files import is_hub_name
from dstrain.data.tokenizing.tokenizer_files import BYTES
from dstrain.data.tokenizing.tokenizers import Tokenizer, load_tokenizer
from dstrain.data.training_data import ValidationSet
from dstrain.engine.checkpoint_state import SavedState
from dstrain.engine.interface import DTYPES
from dstrain.errors import DstrainError
from dstrain.exporting.adapter_folder import ExportedAdapter, check_adapter, load_with_peft, write_adapter
from dstrain.exporting.checking import (
    check_files,
    check_loaded,
    check_tokenizer,
    load_base,
    load_exported,
    validation_loss,
)
from dstrain.exporting.folder import describe, own_generation_config, writing, written_aside
from dstrain.exporting.merging import MergedState, model_maker, unquantized, untied, unties
from dstrain.exporting.writing import ExportedTensors, write_weights
from dstrain.files import write_json
from dstrain.model.adapters import Adapters
from dstrain.model.architecture import load_config
from dstrain.model.weights.pretrained import PretrainedWeights
from dstrain.model.weights.weight_files import WeightFiles
from dstrain.planning.plan import Plan
from dstrain.runs.checkpoint.identity import identity_of
from dstrain.runs.checkpoint.manifest import WHOLE, step_of
from dstrain.runs.run_folder import RunFolder, read_metrics
from dstrain.train.run_data import prepare_run_data

_OTHER_TOKENS = (
    *("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias"),
)
"""Keys of a generation's configuration that hold tokens beside the special ones: they mean those of one tokenizer."""


def export(
    run: RunFolder,
    checkpoint: Path,
    out: Path,
    *,
    aside: Path | None = None,
    dtype: str | None = None,
    with_loss: bool = True,
    merge: bool = False,
) -> dict[str, Any]:
    """Write ``out``, which appears whole and checked, or not at all: a model, or the adapter of a run that has one.

    Args:
        aside: where it is written before it has its name; None: hidden beside ``out``.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None: the precision that was trained in.
        with_loss: load the exported model and take its validation loss.
        merge: write the model with the run's adapter merged, not the adapter.

    Returns:
        What there is to say: ``step``, ``dtype``, ``files``, ``tensors``, ``parameters``, ``bytes``, ``loss``
        (None without a validation set, or where it is not wanted or not to be had), ``no_loss_because`` (the data
        are gone, or others now; else None), ``run_loss`` and ``run_loss_step``.

    Raises:
        DstrainError: it can't be read, written, or is not what was trained.
    """
    plan = Plan.read(run.plan)
    identity = identity_of(checkpoint)
    config = _model_config(_model_file(plan, run), identity)
    dtype = dtype or identity["precision"]
    state: SavedState | MergedState = SavedState(checkpoint)
    adapter = plan.run_config.adapter
    tensors: ExportedTensors | ExportedAdapter
    if adapter is None and merge:
        raise DstrainError(
            "this run trains the model's own weights, and has no adapter",
            where="--merge",
            hint="leave out --merge",
        )
    if adapter is not None:
        unpacked = DTYPES[identity["precision"]] if merge else None
        adapters = Adapters(config, adapter, seed=plan.run_config.seed, unpacked=unpacked)
    if adapter is not None and not merge:
        tensors = ExportedAdapter(SavedState(checkpoint), DTYPES[dtype])
    else:
        if adapter is not None:
            state, config = _merged(config, adapters, SavedState(checkpoint), plan)
        tensors = ExportedTensors(state, config, DTYPES[dtype], like=_files_at_the_start(plan))
    tokenizer = load_tokenizer(_tokenizer(plan, run))
    aside = aside or out.with_name(f".{out.name}.partial")
    with written_aside(out, aside, tensors.bytes):
        with writing(out):
            if isinstance(tensors, ExportedAdapter):
                _write_tokenizer(aside, plan, tokenizer)
            else:
                _write_descriptions(aside, plan, config, tensors, tokenizer)
        if isinstance(tensors, ExportedAdapter):
            files = [write_adapter(tensors, adapters, _base(plan), aside)]
            check_adapter(aside, tensors)
        else:
            files = write_weights(tensors, aside)
            check_files(aside, files, tensors)
        check_tokenizer(aside, tokenizer)
        quantization = adapters.quantization_config(tensors.dtype) if adapter is not None else None
        loss, no_loss_because = _loss(aside, plan, tensors, quantization) if with_loss else (None, None)
    step = step_of(checkpoint)
    run_loss_step, run_loss = _loss_of_run(run, step)
    return {
        "step": step,
        "dtype": dtype,
        "files": len(files),
        "tensors": len(tensors.files),
        "parameters": tensors.parameters,
        "bytes": tensors.bytes,
        "loss": loss,
        "no_loss_because": no_loss_because,
        "run_loss": run_loss,
        "run_loss_step": run_loss_step,
        "adapter_for": _base(plan) if isinstance(tensors, ExportedAdapter) else None,
    }


def _base(plan: Plan) -> str:
    """The model that a run's adapter is for, as ``from_pretrained`` takes it. Raises DstrainError: it is nowhere."""
    if plan.run_config.init != "pretrained" or plan.model.folder is None:
        raise DstrainError(
            "the adapter is for random initial weights, which lie in no folder",
            where="OUT",
            hint="--merge writes the model with the adapter in it",
        )
    name = plan.run_config.model
    return name if is_hub_name(name) else str(plan.model.folder)


def _merged(
    config: PretrainedConfig, adapters: Adapters, saved: SavedState, plan: Plan
) -> tuple[MergedState, PretrainedConfig]:
    """The run's model with its adapter in its weights, and its configuration."""
    pretrained = plan.run_config.init == "pretrained"
    make = model_maker(
        config,
        adapters,
        PretrainedWeights(plan.model.weights_folder) if pretrained else None,
        seed=plan.run_config.seed,
        splits=plan.model.pipelines,
    )

    def value(name: str) -> torch.Tensor:
        if name not in saved.parameters:
            raise DstrainError(
                f"the checkpoint lacks the adapter's {name}", where=str(saved.folder), hint=WHOLE
            )
        return saved.parameters[name].most_precise.read()

    state = MergedState(make, value, saved.folder)
    return state, unquantized(untied(config) if unties(config, adapters) else config)


def _model_file(plan: Plan, run: RunFolder) -> Path:
    """The model's config, or the copy in the run folder where it is gone: the run was moved to another machine."""
    path, kept = Path(plan.model.file), run.model / "config.json"
    return path if path.is_file() or not kept.is_file() else kept


def _tokenizer(plan: Plan, run: RunFolder) -> str:
    """The tokenizer's folder, or the copy in the run folder where it is gone."""
    named = plan.data.tokenizer
    moved = named != BYTES and not Path(named).expanduser().exists() and run.model.is_dir()
    return str(run.model) if moved else named


def _model_config(path: Path, identity: dict[str, Any]) -> PretrainedConfig:
    if path.is_file() and identity["model"]:
        found = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if found != identity["model"]:
            raise DstrainError(
                "the model's configuration has changed since the checkpoint was written",
                where=str(path),
                hint="restore the original file",
            )
    return load_config(path)


def _files_at_the_start(plan: Plan) -> dict[str, torch.Tensor] | None:
    """The tensors of the weights that a pretrained run started from, on meta; None where they are not there now.

    They are asked only for their names: without them the tensors are called as in the family's newest files.
    """
    if plan.run_config.init != "pretrained":
        return None
    try:
        stored = WeightFiles(plan.model.weights_folder).tensors
    except DstrainError:  # deleted since then, all or some of them
        return None
    if any(
        name.endswith((".quant_map", ".SCB")) for name in stored
    ):  # packed weights, which are not written so
        return None
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}


def _write_descriptions(
    folder: Path, plan: Plan, config: PretrainedConfig, tensors: ExportedTensors, tokenizer: Tokenizer
) -> None:
    """config.json, generation_config.json and the tokenizer."""
    describe(config, tensors)
    # Where the tokenizer has none, the model's own stays only if it means a token of this tokenizer.
    keep = plan.model.folder is not None and _same_folder(plan.data.tokenizer, plan.model.folder)
    ids = {
        "bos_token_id": tokenizer.begin_of_sequence,
        "eos_token_id": tokenizer.end_of_document,
        "pad_token_id": tokenizer.padding,
    }
    for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
        for name, wanted in ids.items():
            if name != "pad_token_id" or not tensors.padding_moves_positions:
                setattr(part, name, _agreeing(getattr(part, name, None), wanted, keep=keep))
    config.save_pretrained(folder)
    generation = own_generation_config(Path(plan.model.file).parent / GENERATION_CONFIG_NAME)
    if generation is None:
        generation = json.loads(GenerationConfig.from_model_config(config).to_json_string())
    for name, wanted in ids.items():
        generation[name] = _agreeing(generation.get(name), wanted, keep=keep)
    if plan.data.stop_tokens:
        now = generation.get("eos_token_id")
        known = [token for token in (now if isinstance(now, list) else [now]) if token is not None]
        stops = list(dict.fromkeys([*plan.data.stop_tokens, *known]))
        generation["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    generation = {
        name: value
        for name, value in generation.items()
        if value is not None and (keep or name not in _OTHER_TOKENS)
    }
    write_json(folder / GENERATION_CONFIG_NAME, generation)
    _write_tokenizer(folder, plan, tokenizer)


def _write_tokenizer(folder: Path, plan: Plan, tokenizer: Tokenizer) -> None:
    """With the chat template that was trained with."""
    tokenizer.save_pretrained(folder)
    if plan.data.chat_template and plan.data.chat_template != tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(plan.data.chat_template, encoding="utf-8")


def _agreeing(now: int | list[int] | None, wanted: int | None, *, keep: bool) -> int | list[int] | None:
    """A special token's id that agrees with the tokenizer; of several ids, ``wanted`` must be one."""
    if wanted is None:
        return now if keep else None
    return now if isinstance(now, list) and wanted in now else wanted


def _same_folder(one: str, other: str) -> bool:
    return one != BYTES and Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _loss(
    folder: Path,
    plan: Plan,
    tensors: ExportedTensors | ExportedAdapter,
    quantization: BitsAndBytesConfig | None,
) -> tuple[float | None, str | None]:
    """The exported model's validation loss, or why the run's data do not give one any more; the model is checked."""
    sets: tuple[ValidationSet, ...] = ()
    reason = None
    try:
        sets = prepare_run_data(plan).validation_sets
    except DstrainError as error:  # the data, which the model does not need
        reason = f"{error.where}: {error.message}" if error.where else error.message
    attention = plan.run_config.attention
    if isinstance(tensors, ExportedAdapter):
        model = load_base(plan.model.weights_folder, tensors.dtype, attention, quantization)
        load_with_peft(model, folder, tensors)
    else:
        model = load_exported(folder, tensors.dtype, attention)
        check_loaded(model, tensors)
    if not sets:
        return None, reason
    loss = validation_loss(model, [each.rows for each in sets], plan.run_config.eval_samples)
    return (loss, None) if math.isfinite(loss) else (None, f"it is {loss}")


def _loss_of_run(run: RunFolder, step: int) -> tuple[int | None, float | None]:
    """The run's validation loss at ``step``, or the last one before it, and the step that it was taken at."""
    known = {
        record["step"]: record["validation_loss"]
        for record in read_metrics(run.metrics)
        if record["step"] <= step and "validation_loss" in record
    }
    return (max(known), known[max(known)]) if known else (None, None)


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    if len(argv) != 2:
        print("usage: python -m dstrain.exporting.convert REQUEST.json ANSWER.json", file=sys.stderr)
        return 2
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    answer = export(
        RunFolder(request["run"]),
        Path(request["checkpoint"]),
        Path(request["out"]),
        aside=Path(request["aside"]),
        dtype=request["dtype"],
        with_loss=request["with_loss"],
        merge=request["merge"],
    )
    write_json(Path(argv[1]), answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
