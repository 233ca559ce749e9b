"""``export`` and ``generate``: a checkpoint as a Hugging Face folder, and text generated from it."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from dstrain.addresses import refuse_address
from dstrain.api.events import SILENT, Events, progress_to
from dstrain.api.model_lookup import find_base
from dstrain.api.received import note_owner, refused
from dstrain.api.resuming import find_run
from dstrain.child_process import run_module
from dstrain.config.data_sources import paths_read
from dstrain.errors import DstrainError
from dstrain.files import read_json
from dstrain.lora import ADAPTER_CONFIG
from dstrain.plugins import is_code
from dstrain.runs.checkpoint.hold import held
from dstrain.runs.checkpoint.manifest import damage_of, named_checkpoints, step_of
from dstrain.runs.received import first_owner
from dstrain.runs.run_folder import RunFolder
from dstrain.strict_json import to_json


@dataclass(frozen=True)
class ExportResult:
    """An exported model, every tensor of which was read back and compared with the checkpoint's.

    Attributes:
        folder: `AutoModelForCausalLM.from_pretrained` loads it.
        step: of the checkpoint.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        files, tensors, parameters, bytes: of the weights.
        loss: the exported model's validation loss; None where it was not taken.
        no_loss_because: why it could not be taken.
        adapter_for: the model that it is an adapter for, as ``from_pretrained`` takes it; None for a whole model.
        run_loss, run_loss_step: the run's own validation loss, and the step that it was taken after.
    """

    folder: Path
    step: int
    dtype: str
    files: int
    tensors: int
    parameters: int
    bytes: int
    loss: float | None
    no_loss_because: str | None
    run_loss: float | None
    run_loss_step: int | None
    adapter_for: str | None = None


def export(
    run: str | PathLike[str],
    out: str | PathLike[str],
    *,
    step: int | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    with_loss: bool = True,
    merge: bool = False,
    trust: bool = False,
    events: Events = SILENT,
) -> ExportResult:
    """Write a run's model as a Hugging Face folder, tokenizer and generation config included; or its adapter.

    Works for every layout but ``offload: nvme``, without GPUs, and a block at a time.

    Args:
        run: a run folder, or a run's name below ``runs/``.
        out: a folder that is not there yet, or empty.
        step: of which checkpoint; by default of the newest.
        dtype: by default the precision that was trained in.
        with_loss: load the exported model for its validation loss.
        merge: of a run that trains an adapter, write the model with the adapter merged into its weights. Without it,
            the adapter is written, as PEFT does.
        trust: for that, import the dataset that the run's config names, though its folder belongs to another user.
        events: told of the progress.

    Raises:
        DstrainError: there is no such run or checkpoint, ``out`` can't be written, or the folder belongs to another
            user and names code.
    """
    folder, target = find_run(run), Path(out)
    _refuse_occupied(target)
    _look_at_owner(folder, _checkpoint(folder, step), with_loss=with_loss, trust=trust, events=events)
    aside = _aside(target)
    request = {
        "run": str(folder.path),
        "out": str(target.absolute()),
        "aside": str(aside),
        "dtype": dtype,
        "with_loss": with_loss,
        "merge": merge,
    }
    while True:
        checkpoint = _checkpoint(folder, step)
        chosen = request | {"checkpoint": str(checkpoint)}
        try:
            with held(checkpoint):
                return ExportResult(folder=target, **_ask("dstrain.exporting.convert", chosen, events))
        except (FileNotFoundError, DstrainError):
            if checkpoint.exists():
                raise
        except BaseException:  # told to end: what was killed leaves what it had written
            shutil.rmtree(aside, ignore_errors=True)
            raise
        # The training goes on, where files can't be locked or with an older dstrain, and keeps newer ones.
        events.note(f"{checkpoint.name} was removed by the training meanwhile", "export")


@dataclass(frozen=True)
class MergeResult:
    """A model with an adapter merged into its weights, every tensor of which was read back and compared.

    Attributes:
        folder: `AutoModelForCausalLM.from_pretrained` loads it.
        base: the model that the adapter was for.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        files, tensors, parameters, bytes: of the weights.
    """

    folder: Path
    base: str
    dtype: str
    files: int
    tensors: int
    parameters: int
    bytes: int


def merge(
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    base: str | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    events: Events = SILENT,
) -> MergeResult:
    """Write a model with an adapter merged into its weights: without GPUs, and a block at a time.

    Args:
        adapter: a folder that PEFT's ``save_pretrained`` or `export` wrote.
        out: a folder that is not there yet, or empty.
        base: the model that it is for, a folder or a name on the hub; by default the one that its configuration names.
        dtype: by default that of the base model's configuration.
        events: told of the progress.

    Raises:
        DstrainError: there is no such adapter or model, they do not belong together, or ``out`` can't be written.
    """
    source, target = Path(adapter), Path(out)
    _refuse_occupied(target)
    note_owner(events, source)
    named = base or _base_of(source)
    where = "--base" if base else str(source / ADAPTER_CONFIG)
    request = {
        "adapter": str(source),
        "base": str(find_base(named, where, events)),
        "out": str(target.absolute()),
        "aside": str(_aside(target)),
        "dtype": dtype,
    }
    return MergeResult(folder=target, base=named, **_ask("dstrain.exporting.merge_adapter", request, events))


def _base_of(adapter: Path) -> str:
    """The model that an adapter's configuration names. Raises DstrainError."""
    where = str(adapter / ADAPTER_CONFIG)
    hint = "name a folder that PEFT's save_pretrained or `dstrain export` wrote"
    try:
        named = read_json(adapter / ADAPTER_CONFIG)["base_model_name_or_path"]
    except FileNotFoundError:
        raise DstrainError(f"{adapter} is not an adapter folder", where=where, hint=hint) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DstrainError(
            f"the adapter's configuration can't be read: {error}", where=where, hint=hint
        ) from None
    if not isinstance(named, str) or not named:
        raise DstrainError("the adapter does not say which model it is for", where=where, hint="--base MODEL")
    return named


def generate(
    folder: str | PathLike[str],
    prompt: str,
    *,
    tokens: int = 120,
    temperature: float = 0.7,
    seed: int = 0,
    chat: bool = False,
    system: str = "",
    events: Events = SILENT,
) -> str:
    """Let a Hugging Face causal language model continue a prompt, or answer a user.

    Args:
        folder: of `export`, or any model or adapter folder with a tokenizer.
        tokens: at most so many.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling.
        chat: the prompt is what a user says; the tokenizer's chat template makes a conversation of it.
        system: with ``chat``: a system message in front.
        events: told of the progress.

    Returns:
        The prompt and its continuation; with ``chat``, the answer.

    Raises:
        DstrainError: the model or its tokenizer can't be loaded, or the prompt fills all positions.
    """
    refuse_address(str(folder), "FOLDER")
    place = Path(folder)
    if not any((place / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise DstrainError(
            f"{place} is not a model folder (it has no config.json)",
            where="FOLDER",
            hint="`dstrain export RUN FOLDER` creates one from a run",
        )
    note_owner(events, place)
    if system and not chat:
        raise DstrainError("a system message needs a conversation", where="--system", hint="add --chat")
    choices = {
        "prompt": prompt,
        "tokens": tokens,
        "temperature": temperature,
        "seed": seed,
        "chat": chat,
        "system": system,
    }
    base = None
    if not (place / "config.json").is_file():
        base = str(find_base(_base_of(place), str(place / ADAPTER_CONFIG), events))
    answer = _ask("dstrain.exporting.generate", {"folder": str(place), "base": base} | choices, events)
    text: str = answer["text"]
    return text


def _look_at_owner(
    folder: RunFolder, checkpoint: Path, *, with_loss: bool, trust: bool, events: Events
) -> None:
    """Say whose the run is. Raises DstrainError where its loss needs code of another user's."""
    note_owner(events, folder.path, folder.plan, folder.checkpoints, checkpoint)
    found = first_owner(folder.path, folder.plan)
    if found is None or trust or not with_loss:
        return
    try:
        paths = paths_read(read_json(folder.plan)["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # the export says what is wrong with it
    code = [f"dataset {path}" for path in paths if is_code(path)]
    if code:
        error = refused(code, *found)
        raise DstrainError(
            error.message, where=error.where, hint=f"{error.hint}, or leave it out with --no-loss"
        )


def _ask(module: str, request: dict[str, Any], events: Events) -> dict[str, Any]:
    """Run a module that reads a request and writes an answer. Raises DstrainError."""
    with tempfile.TemporaryDirectory() as aside:
        asked, answered = Path(aside) / "request.json", Path(aside) / "answer.json"
        asked.write_text(to_json(request), encoding="utf-8")
        run_module(module, str(asked), str(answered), say=progress_to(events))
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return answer


def _checkpoint(folder: RunFolder, step: int | None) -> Path:
    """The newest complete checkpoint, or that of ``step``. Raises DstrainError."""
    damage = {path: damage_of(path) for path in named_checkpoints(folder.checkpoints)}
    found = {step_of(path): path for path, why in damage.items() if why is None}
    if found and step in (None, *found):
        return found[step or max(found)]
    wrong = {path: why for path, why in damage.items() if why and step in (None, step_of(path))}
    available = f"available steps: {', '.join(map(str, found))}" if found else ""
    if wrong:
        reasons = "\n".join(f"  {path.name}: {why}" for path, why in wrong.items())
        which = f"no complete checkpoint of step {step}" if step is not None else "no complete checkpoint"
        raise DstrainError(
            f"{folder.name} has {which}:\n{reasons}",
            where=str(folder.checkpoints),
            hint="; ".join(filter(None, [available, "restore the files from a backup"])),
        )
    if found:
        raise DstrainError(
            f"{folder.name} has no checkpoint of step {step}",
            where="--step",
            hint=f"{available}; a larger `keep` keeps more checkpoints",
        )
    raise DstrainError(
        f"{folder.name} has no complete checkpoint",
        where=str(folder.checkpoints),
        hint=f"`dstrain resume {folder.name}` continues it to its end and saves one",
    )


def _aside(out: Path) -> Path:
    """Where a folder is written before it has its name."""
    return out.absolute().with_name(f".{out.absolute().name}.partial")


def _refuse_occupied(out: Path) -> None:
    refuse_address(str(out), "OUT", written=True)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise DstrainError(f"{out} {what}", where="OUT", hint="name a folder that does not exist yet")
    above = next((folder for folder in out.absolute().parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise DstrainError(
            f"{out} can't be created: {above} is a file",
            where="OUT",
            hint="name a folder that does not exist yet",
        )
