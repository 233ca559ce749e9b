"""Folders that others have filled, through the commands: nothing in them is run, and nothing outside is written.

All processes are real ones, with a canary: a file that whatever is run would write to.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.support.e2e import Said
from tests.support.sampling import heavy

pytestmark = pytest.mark.timeout(900)

# Python's own modules, installed ones, and ones that libraries look for and do without.
MODULES = (
    *(
        "random",
        "json",
        "typing",
        "runpy",
        "socket",
        "subprocess",
        "multiprocessing",
        "logging",
        "dataclasses",
    ),
    *(
        "sitecustomize",
        "usercustomize",
        "torch",
        "numpy",
        "deepspeed",
        "transformers",
        "tokenizers",
        "datasets",
    ),
    *("yaml", "click", "pydantic", "rich", "psutil", "safetensors", "dstrain", "wandb", "mlflow", "trackio"),
    *("flash_attn", "sentencepiece", "pandas", "sklearn", "cupy", "apex", "triton", "mpi4py", "peft"),
)
RUN = (
    *(
        "--model",
        "model",
        "--data",
        "text.jsonl",
        "--seq-len",
        "32",
        "--global-batch",
        "4",
        "--micro-batch",
        "2",
    ),
    *("--steps", "2", "--set", "sample_tokens=4", "--set", "validation=0.2", "--set", "save_every=2"),
)


class HostileFolder:
    """A folder to stand in, where every import that finds it leaves a word in the canary."""

    def __init__(self, place: Path, environment: Mapping[str, str], console_script: Path) -> None:
        self.place, self.canary = place, place.parent / "canary"
        self._environment, self._script = dict(environment), console_script
        self.canary.touch()
        code = f"open({str(self.canary)!r}, 'a').write(__file__ + '\\n')\n"
        for number, name in enumerate(MODULES):
            if number % 2:
                (place / f"{name}.py").write_text(code)
            else:
                (place / name).mkdir()
                (place / name / "__init__.py").write_text(code)

    def call(self, *arguments: str, change: str = "", **environment: str) -> Said:
        """The installed ``dstrain`` command. ``change``: code that is run first."""
        script = self._script
        if change:
            script = self.place.parent / "changed"
            script.write_text(f"{change}\n{self._script.read_text()}")
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            cwd=self.place,
            env=self._environment | environment,
            input="y\n" * 100,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def log(self, name: str) -> str:
        logs = sorted((self.place / "runs" / name / "logs").glob("*"))
        return "\n".join(log.read_text() for log in logs)


@pytest.fixture
def hostile(place: Path, materials: Path, tmp_path: Path) -> HostileFolder:
    script = tmp_path / "bin" / "dstrain"
    script.parent.mkdir()
    script.write_text("from dstrain.cli.main import main\nmain()\n")
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("model", "text.jsonl"):
        (folder / name).symlink_to(materials / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return HostileFolder(folder, environment, script)


def test_no_module_of_the_current_folder_is_imported(hostile: HostileFolder) -> None:
    for arguments in (("run", *RUN, "--data-parallel", "2", "--name", "r"), ("export", "runs/r", "out")):
        said = hostile.call(*arguments)
        assert said.code == 0, (arguments, said, hostile.log("r"))
        assert hostile.canary.read_text() == "", arguments


@pytest.mark.heavy
def test_nor_by_any_other_command(hostile: HostileFolder) -> None:
    for arguments in (
        ("run", *RUN, "--name", "r"),
        ("export", "runs/r", "out"),
        ("generate", "out", "one", "--tokens", "3"),
        ("doctor",),
        ("checkpoints", "r", "--verify"),
        ("resume", "r", "--steps", "5"),
        ("reproduce", "r"),
        ("plan", *RUN),
    ):
        said = hostile.call(*arguments)
        assert said.code == 0, (arguments, said, hostile.log("r"))
        assert hostile.canary.read_text() == "", arguments


@pytest.mark.heavy
def test_nor_with_python_3_10_which_knows_no_safe_path(hostile: HostileFolder) -> None:
    change = "from dstrain.launch import environment\nenvironment.SAFE_PATH = False"
    said = hostile.call("run", *RUN, "--name", "r", "--launcher", "none", "--processes", "1", change=change)
    assert said.code == 0, said.out + said.err + hostile.log("r")
    assert hostile.canary.read_text() == ""


@pytest.mark.parametrize("kind", ["model", *heavy("tokenizer")])
def test_a_models_own_code_is_not_run(kind: str, hostile: HostileFolder, materials: Path) -> None:
    """Nor after a question that nobody sees: all answers are yes."""
    folder = hostile.place / "received"
    shutil.copytree(materials / "model", folder)
    code = f"open({str(hostile.canary)!r}, 'a').write(__file__ + '\\n')\n"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    if kind == "model":
        own = {"AutoConfig": "configuration_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
        config |= {"model_type": "own", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    words = {word: number for number, word in enumerate(("<eos>", "<unk>", "one"))}
    Tokenizer(WordLevel(words, "<unk>")).save(os.fspath(folder / "tokenizer.json"))
    own_tokenizer = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own_tokenizer))
    given = (*RUN, "--tokenizer", "received") if kind == "tokenizer" else ("--model", "received", *RUN[2:])
    for arguments in (("run", *given, "--name", "r"), ("generate", "received", "one")):
        said = hostile.call(*arguments)
        assert said.code == 2, said
        assert "own code" in said.err or "code of its own" in said.err, said
        assert hostile.canary.read_text() == ""


def test_the_canary_sings(hostile: HostileFolder) -> None:
    """Where Python looks into the current folder, it is found."""
    subprocess.run([sys.executable, "-m", "tabnanny"], cwd=hostile.place, capture_output=True, check=False)
    subprocess.run(
        [sys.executable, "-c", "import torch"], cwd=hostile.place, capture_output=True, check=False
    )
    assert "torch" in hostile.canary.read_text()
