"""No file that others could have written is read by a reader that runs what the file names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dstrain.config import yaml_reader

ROOT = Path(__file__).resolve().parents[2] / "dstrain"

# Readers of pickles, and of YAML with Python's own types.
UNPICKLERS = {
    *(
        f"{module}.{name}"
        for module in ("pickle", "cPickle", "dill", "cloudpickle")
        for name in ("load", "loads")
    ),
    *(
        "pickle.Unpickler",
        "marshal.load",
        "marshal.loads",
        "shelve.open",
        "joblib.load",
        "pandas.read_pickle",
    ),
    *("torch.jit.load", "torch.package.PackageImporter", "yaml.unsafe_load", "yaml.full_load"),
    *("yaml.unsafe_load_all", "yaml.full_load_all", "yaml.load_all"),
}
# Collectives of torch that send pickles, by whatever name the module has.
PICKLED_COLLECTIVES = (
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
)
# Loaders of transformers that run code out of a folder, unless they are told not to.
AUTO_LOADERS = ("from_pretrained", "from_config")
MODULES = ("pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")


def dangers(source: str) -> Iterator[str]:
    """Each call (with its line) that could run what a file names, and each import that hides such a call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            imported = names if isinstance(node, ast.Import) else [node.module or ""]
            hidden = (
                isinstance(node, ast.ImportFrom)
                and node.module in ("torch", "numpy", "yaml")
                and "load" in names
            )
            if hidden or any(name.split(".")[0] in MODULES for name in imported):
                yield f"{node.lineno}: {ast.unparse(node)}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        arguments = [ast.unparse(argument) for argument in node.args]
        if (
            called in UNPICKLERS
            or (called == "torch.load" and given.get("weights_only") != "True")
            or (called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
            or (called == "yaml.load" and (given.get("Loader") or arguments[1:2] or [""])[0] != "_Loader")
            or given.get("trust_remote_code", "False") != "False"
            or called.rpartition(".")[2] in PICKLED_COLLECTIVES
            or (
                called.startswith("Auto")
                and called.rpartition(".")[2] in AUTO_LOADERS
                and given.get("trust_remote_code") != "False"
            )
        ):
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from torch import load",
        "pickle.loads(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoModelForCausalLM.from_config(config, dtype=dtype)",
        "torch.distributed.all_gather_object(found, mine)",
        "dist.broadcast_object_list(told, src=0)",
        "distributed.gather_object(mine)",
    ],
)
def test_the_check_sees_what_is_dangerous(line: str) -> None:
    assert list(dangers(line)) == [f"1: {line}"]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.load(text, _Loader)",
        "json.loads(text)",
        "engine.load(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)",
        "all_gather_json(mine)",
    ],
)
def test_the_check_lets_pass_what_is_not(line: str) -> None:
    assert list(dangers(line)) == []


WORKERS = "data/tokenizing/worker_pool.py"
"""Pickles go between a process and its own children, over a pair of connected sockets that has no name."""


def test_nothing_that_dstrain_reads_can_run_code() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 50
    found = {str(path.relative_to(ROOT)): list(dangers(path.read_text(encoding="utf-8"))) for path in files}
    assert found.pop(WORKERS), "it needs no exception any more"
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_workers_are_connected_to_their_parent_alone() -> None:
    tree = ast.parse((ROOT / WORKERS).read_text(encoding="utf-8"))
    called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert called.count("socket.socketpair") == 1
    assert not {"socket.socket", "socket.create_server", "open", "Listener", "Client"} & set(called)
    # Each end is one of the pair's: passed on as the number of an open file, or made of it.
    assert {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Connection"
    } == {"Connection(int(argv[0]))", "Connection(ours.detach())"}


def test_the_loader_of_yaml_knows_plain_values_alone() -> None:
    assert issubclass(yaml_reader._Loader, yaml.SafeLoader)
