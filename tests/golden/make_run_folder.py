"""How ``data/run-0.1.tar.gz`` was made, by the last commit of 0.1, and ``data/run-0.1.json`` beside it.

The archive holds a small model's config, a text, the config file ``train.yaml``, and the run folder of two steps in
2 stages x ZeRO-2 over 2 replicas, with a checkpoint of step 2. All paths in it are relative to where it is unpacked;
the absolute ones that the run wrote down are replaced by neutral ones. A later version must not make it anew: it
stands for the run folders that users have.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tests.golden.commands import DATA, MATERIALS, REPOSITORY, Said, environment, start
from tests.golden.processor import fingerprint
from tests.golden.runs import losses_of

ARCHIVE = DATA / "run-0.1.tar.gz"
ANSWERS = DATA / "run-0.1.json"
NAME = "first"
CHOICES = f"--config train.yaml --zero 2 --pipeline 2 --data-parallel 2 --steps 2 --name {NAME}"
WEIGHTS = "model.safetensors"
HOME_OF_THE_RUN = "/home/user/training"
"""The folder that the run was started in, as its files have it."""

_LONG_AGO = 1_735_689_600  # seconds since 1970: 2025-01-01


def make_run_folder() -> None:
    """Write both files. Commands are new interpreters."""
    with tempfile.TemporaryDirectory() as aside:
        place = Path(aside) / "training"
        place.mkdir()
        shutil.copytree(MATERIALS / "model", place / "model")
        for name in ("text.jsonl", "train.yaml"):
            shutil.copy(MATERIALS / name, place)
        environ = environment(Path(aside) / "home", Path(aside) / "cache")
        environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])

        def dstrain(*arguments: str) -> Said:
            said = start(place, environ, *arguments, real=True).said()
            assert said.code == 0, said
            return said

        dstrain("run", *CHOICES.split())
        dstrain("export", NAME, "exported", "--no-loss")
        exported = weights_of(place / "exported")
        shutil.rmtree(place / "exported")
        _forget_this_machine(place / "runs" / NAME, place)
        ARCHIVE.write_bytes(_packed(place))

        dstrain("resume", NAME, "--steps", "4")
        answers = {
            "made_on": fingerprint(),
            "losses": losses_of(place / "runs" / NAME),
            "weights": exported,
        }
        ANSWERS.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")
        print(ARCHIVE.name, ARCHIVE.stat().st_size)


def weights_of(exported: Path) -> dict[str, Any]:
    """Type, shape and SHA-256 of each tensor of an exported model."""
    from safetensors import safe_open

    found = {}
    with safe_open(exported / WEIGHTS, framework="numpy") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest = hashlib.sha256(tensor.tobytes()).hexdigest()
            found[name] = {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": digest}
    return found


def _forget_this_machine(folder: Path, place: Path) -> None:
    """In text files alone: what a checkpoint holds has checksums, and names no path."""
    others = {
        str(place): HOME_OF_THE_RUN,
        str(REPOSITORY): "/home/user/dstrain",
        sys.prefix: "/home/user/dstrain/.venv",
        sys.base_prefix: "/usr",
        str(place.parent): "/home/user",
    }
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "checkpoints" not in path.relative_to(folder).parts:
            text = path.read_text(encoding="utf-8")
            for own, other in others.items():
                text = text.replace(own, other)
            path.write_text(host.sub("machine", text), encoding="utf-8")


def _packed(place: Path) -> bytes:
    """A tar.gz of a folder in which no user, no time and no order is this machine's."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(place.rglob("*")):
            entry = archive.gettarinfo(path, path.relative_to(place).as_posix())
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = _LONG_AGO
            archive.addfile(entry, path.open("rb") if path.is_file() else None)
    return gzip.compress(packed.getvalue(), compresslevel=9, mtime=0)
