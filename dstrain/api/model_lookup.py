"""Finds a run's model: a built-in shape, a folder or a hub name; checks that its weights are complete."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

from dstrain.api.events import SILENT, Events, progress_to
from dstrain.config.files import cache_folder, is_hub_name, model_config_file, model_shapes
from dstrain.config.loader import ResolvedConfig
from dstrain.config.text_file import read_text
from dstrain.data.tokenizing.tokenizer_files import VOCABULARY_FILES
from dstrain.errors import DstrainError
from dstrain.model_config_bounds import refuse_sizes
from dstrain.runs.record.environment import weights_fingerprint
from dstrain.shared_caches import is_own, write_own
from dstrain.strict_json import to_json

_SHOWN = 3  # names in one line


@dataclass(frozen=True)
class FoundModel:
    """A model's files on this machine.

    Attributes:
        config_file: its Hugging Face configuration.
        folder: what else belongs to it lies here; None for a built-in shape.
    """

    config_file: Path
    folder: Path | None

    @property
    def tokenizer(self) -> str:
        """What ``tokenizer: auto`` means: the model folder's own, where it has one, else bytes."""
        if self.folder and any((self.folder / name).is_file() for name in VOCABULARY_FILES):
            return str(self.folder)
        return "bytes"


def find_model(resolved: ResolvedConfig, events: Events = SILENT) -> FoundModel:
    """The model that the config names, fetched from the hub where it lies there. Raises DstrainError."""
    config, where = resolved.config, str(resolved.origin("model"))
    if config.init == "pretrained" and config.model in model_shapes():
        raise DstrainError(
            f"{config.model} is a built-in shape, which has no weights",
            where=str(resolved.origin("init")),
            hint="--init random, or name a folder or a hub model that has weights",
        )
    model = config.model
    if is_hub_name(model):
        model = str(_fetch(model, "weights" if config.init == "pretrained" else "config", where, events))
    file = model_config_file(model, where=where).absolute()
    _refuse_no_config(file, where)
    found = FoundModel(file, None if config.model in model_shapes() else file.parent)
    if config.init == "pretrained" and config.tokenizer == "auto" and found.tokenizer == "bytes":
        raise DstrainError(
            f"{found.folder} has no tokenizer, and its weights were not trained on bytes",
            where=str(resolved.origin("tokenizer")),
            hint="--tokenizer FOLDER, or --tokenizer bytes if that is meant",
        )
    return found


def find_base(name: str, where: str, events: Events = SILENT) -> Path:
    """The folder of a model that an adapter is for, fetched from the hub where it lies there. Raises DstrainError."""
    folder = (
        _fetch(name, "weights", where, events) if is_hub_name(name) else Path(name).expanduser().absolute()
    )
    if not (folder / "config.json").is_file():
        raise DstrainError(
            f"{name} is not a model folder (it has no config.json)", where=where, hint="--base MODEL"
        )
    return folder


def find_tokenizer(resolved: ResolvedConfig, model: FoundModel, events: Events = SILENT) -> str:
    """What the config's tokenizer is here: ``bytes``, or a folder, fetched from the hub where it lies there.

    Raises DstrainError.
    """
    name = resolved.config.tokenizer
    if name == "auto":
        return model.tokenizer
    if is_hub_name(name):
        return str(_fetch(name, "config", str(resolved.origin("tokenizer")), events))
    return name


def _refuse_no_config(file: Path, where: str) -> None:
    """What can be told of a config.json without transformers. Raises DstrainError."""
    hint = 'a Hugging Face config.json is one JSON object: {"model_type": "llama", ...}'
    text = read_text(file, where=where)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DstrainError(
            f"malformed JSON: {error.msg}", where=f"{file}:{error.lineno}", hint=hint
        ) from None
    except (ValueError, RecursionError) as error:
        raise DstrainError(f"malformed JSON: {error}", where=str(file), hint=hint) from None
    if not isinstance(values, dict):
        raise DstrainError("expected a JSON object", where=str(file), hint=hint)
    if not isinstance(values.get("model_type"), str):
        raise DstrainError(
            "the configuration has no model_type",
            where=str(file),
            hint='add the model family, for example "model_type": "llama"',
        )
    refuse_sizes(values, where=str(file))


def _fetch(name: str, what: str, where: str, events: Events) -> Path:
    import tempfile

    from dstrain.child_process import run_module

    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "folder.json"
        try:
            run_module("dstrain.model.weights.hub", name, what, str(answer), say=progress_to(events))
        except DstrainError as error:
            raise DstrainError(f"{where}: {error}", exit_code=error.exit_code) from None
        return Path(json.loads(answer.read_text(encoding="utf-8"))["folder"])


def _state_of_weights(folder: Path) -> str:
    """Where the weight files lie, with their names, sizes and times."""
    state = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for pattern in ("*.safetensors", "*.bin", "*.index.json")
        for path in folder.glob(pattern)
    )
    return f"{folder.absolute()} {state}"


def fingerprint_of_base(model: FoundModel) -> str:
    """A hash of the weights that an adapter is for, which its checkpoints do not hold. Kept, for files that stay.

    Raises DstrainError.
    """
    assert model.folder is not None
    state = hashlib.sha256(_state_of_weights(model.folder).encode()).hexdigest()[:24]
    kept = cache_folder() / "weights" / f"{state}.fingerprint.json"
    if not is_own(kept):
        try:
            write_own(kept, to_json(weights_fingerprint(model.folder)))
        except OSError as error:
            raise DstrainError(
                f"the weights can't be read: {error.strerror}",
                where=str(model.folder),
                hint="check its files",
            ) from error
    fingerprint: str = json.loads(kept.read_text(encoding="utf-8"))
    return fingerprint


def check_pretrained(model: FoundModel, events: Events = SILENT) -> None:
    """Refuse weights that are not whole or not this model's, before anything is launched; no data are read.

    A good result is kept by the names, sizes and times of the files. Raises DstrainError.
    """
    assert model.folder is not None
    version = importlib.metadata.version("transformers")
    content = f"2 {version} {_state_of_weights(model.folder)}".encode() + model.config_file.read_bytes()
    kept = cache_folder() / "weights" / f"{hashlib.sha256(content).hexdigest()[:24]}.json"
    if not is_own(kept):
        import tempfile

        from dstrain.child_process import run_module

        with tempfile.TemporaryDirectory() as place:
            checked = Path(place) / kept.name
            run_module(
                "dstrain.model.weights.check_weights",
                str(model.config_file),
                str(model.folder),
                str(checked),
                say=progress_to(events),
            )
            write_own(kept, checked.read_text(encoding="utf-8"))
    found = json.loads(kept.read_text(encoding="utf-8"))
    for names, what in (
        (found["unexpected"], "are not part of the model, and are ignored"),
        (found["absent"], "are missing from the weight files, and keep the family's initial value"),
    ):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            events.note(f"{len(names)} tensors {what}: {shown}", "progress")
