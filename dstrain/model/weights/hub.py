"""Downloads models from the Hugging Face hub into its cache.

``python -m dstrain.model.weights.hub NAME[@REVISION] {config,weights} OUT.json`` writes ``{"folder": ...}``. Only
safetensors are fetched where there are any, else ``.bin``; configuration and tokenizer alone for ``config``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging
from tqdm import tqdm

from dstrain.child_process import child_main
from dstrain.errors import DstrainError
from dstrain.files import write_json

SMALL = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]
"""Configuration, tokenizer, and the index of the weights."""

_SECONDS_BETWEEN_LINES = 5.0


def fetch(name: str, *, weights: bool) -> Path:
    """The folder of a model, fetched unless the cache holds it.

    Args:
        name: ``org/name``, or ``org/name@revision``.
        weights: whether the weights are wanted too.

    Raises:
        DstrainError: no such model or revision, no right to it, or no network and not in the cache.
    """
    repository, _, revision = name.partition("@")
    folder = _fetch(name, repository, revision or None, SMALL)
    if weights:
        for whole, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ):
            # By the commit that the first call has found: a branch may move meanwhile.
            names = _shards(folder / index) if (folder / index).is_file() else [whole]
            _fetch(name, repository, folder.name, names)
            if (folder / whole).is_file() or (folder / index).is_file():
                break
    return folder


def _shards(index: Path) -> list[str]:
    """What the index names; one that can't be read is reported when the weights are checked."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [index.name]


def _fetch(name: str, repository: str, revision: str | None, files: list[str]) -> Path:
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=files, tqdm_class=_lines_about(name)
            )
        )
    except Exception as error:  # besides the hub's own, whatever the network raises
        raise _explained(error, name) from error


def _explained(error: Exception, name: str) -> DstrainError:
    repository, _, revision = name.partition("@")
    page = f"{constants.ENDPOINT}/{repository}"
    offline = "a folder with the model works without a network"
    if isinstance(error, GatedRepoError):
        return DstrainError(
            f"{repository} is a gated repository, and you have no access",
            hint=f"accept its terms on {page}, then `hf auth login`, or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return DstrainError(
            f"{repository} has no revision {revision!r}", hint=f"{page}/tree/main lists branches and tags"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DstrainError(
            f"{repository!r} is neither a local folder nor a model on the hub (or it is private)",
            hint=f"check the name on {constants.ENDPOINT}; for a private model `hf auth login`, or set HF_TOKEN",
        )
    if isinstance(error, HFValidationError):
        return DstrainError(
            f"{repository!r} is neither a local folder nor a valid name on the hub: {_describe(error)}",
            hint="a name there is ORGANISATION/MODEL; a folder is to be there, and to hold a config.json",
        )
    if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError):
        part = "only a part of it is" if isinstance(error, IncompleteSnapshotError) else "it is not"
        return DstrainError(
            f"{name!r} is not a local folder, HF_HUB_OFFLINE prevents access to the hub, and {part} in"
            f" its cache {constants.HF_HUB_CACHE}",
            hint=f"unset HF_HUB_OFFLINE; {offline}",
        )
    if isinstance(error, HfHubHTTPError):
        return DstrainError(
            f"{repository} can't be downloaded from the hub: {_describe(error)}", hint=offline
        )
    return DstrainError(
        f"{name!r} is not a local folder, and the hub can't be reached: {_describe(error.__cause__ or error)}",
        hint=f"check the network ({constants.ENDPOINT}); {offline}",
    )


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _lines_about(name: str) -> type[Any]:
    """A progress bar that says a line now and then, as all of dstrain does."""

    class Lines(tqdm):  # type: ignore[type-arg]
        next_line: ClassVar[float] = 0.0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{key: value for key, value in options.items() if key != "name"})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            now = time.monotonic()
            if self.unit != "B" or not self.n or not self.total or now < Lines.next_line:
                return
            Lines.next_line = now + _SECONDS_BETWEEN_LINES
            print(
                f"dstrain: fetching {name}: {self.n / 1e6:,.0f} of {self.total / 1e6:,.0f} MB",
                file=sys.stderr,
            )

    return Lines


@child_main
def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    logging.set_verbosity_error()  # what it would warn of is said in errors, or in none
    if len(arguments) != 3 or arguments[1] not in ("config", "weights"):
        raise DstrainError(
            "usage: python -m dstrain.model.weights.hub NAME[@REVISION] {config,weights} OUT.json"
        )
    folder = fetch(arguments[0], weights=arguments[1] == "weights")
    write_json(Path(arguments[2]), {"folder": str(folder)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
