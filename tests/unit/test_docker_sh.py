"""What launch/docker.sh types, with a program in place of the engine. tests/image runs it for real."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

Call = Callable[..., list[str]]
OWN = ("DOCKER", "IMAGE", "MOUNT", "SHM_SIZE", "NETWORK", "ADDRESS", "DOCKER_OPTIONS")
HANDED_ON = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "HF_TOKEN", "OMP_NUM_THREADS")


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def typed(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The words that the engine gets, as ``docker.sh WORDS`` types them; its first ones are ``run`` and options."""
    work, programs = tmp_path / "work", tmp_path / "programs"
    for folder in (work, programs):
        folder.mkdir()
    for name, version in (("docker", "Docker version 28.2.2"), ("podman", "podman version 4.3.1")):
        answer = (
            f"case $1 in --version) echo {version};; image) echo sha256:12;; *) printf '%s\\n' \"$@\";; esac"
        )
        program(programs, name, answer)
    program(programs, "nvidia-smi", "exit 9")  # no driver
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    for name in (*OWN, *HANDED_ON):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str, code: int = 0, **more: str) -> list[str]:
        done = subprocess.run(
            [repository / "launch" / "docker.sh", *words],
            env={**os.environ, "PATH": path, **more},
            cwd=work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done
        return (done.stdout if code == 0 else done.stderr).splitlines()

    return call


def option(words: list[str], name: str) -> list[str]:
    """All values of an option."""
    return [after for word, after in pairwise(words) if word == name]


def test_a_run(typed: Call, tmp_path: Path) -> None:
    words = typed("run", "--zero", "2", "--name", "a b")
    assert words[:2] == ["run", "--rm"]
    assert words[words.index("dstrain") :] == ["dstrain", "run", "--zero", "2", "--name", "a b"]
    assert option(words, "--volume") == [f"{tmp_path}/work:/work"]
    user, group = (os.getuid(), os.getgid()) if os.getuid() else (10001, 10001)
    assert option(words, "--user") == [f"{user}:{group}"]
    assert option(words, "--shm-size") == ["8g"] and option(words, "--cap-drop") == ["ALL"]
    assert "--read-only" in words and "--tty" not in words and "--gpus" not in words
    for name in ("runs", "cache"):
        assert (tmp_path / "work" / name).stat().st_uid == user
    assert (tmp_path / "work" / "cache" / ".gitignore").read_text() == "*\n"


def test_what_the_environment_says(typed: Call, tmp_path: Path) -> None:
    place = tmp_path / "my texts"
    place.mkdir()
    more = {"IMAGE": "mine:1", "SHM_SIZE": "2g", "MOUNT": f"{place}:/usr"} | dict.fromkeys(
        HANDED_ON, "secret"
    )
    words = typed("plan", **more, DOCKER_OPTIONS="--network none --memory 4g")
    assert words[words.index("mine:1") :] == ["mine:1", "plan"]
    assert option(words, "--volume")[1:] == [f"{place}:{place}:ro", "/usr:/usr:ro"]
    assert option(words, "--shm-size") == ["2g"] and option(words, "--memory") == ["4g"]
    assert option(words, "--env") == [*HANDED_ON, "DSTRAIN_IMAGE=sha256:12"]
    assert not any("secret" in word for word in words)


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["plan"], {"MOUNT": "/nowhere/at/all"}, "MOUNT: there is no /nowhere/at/all"),
        (["plan"], {"MOUNT": "texts"}, "MOUNT: texts is no absolute path"),
        (["plan"], {"DOCKER": "nodocker"}, "DOCKER: there is no program 'nodocker'"),
        (["node"], {}, "node wants one word more: the name by which the others find this machine"),
        (["node", ""], {}, "node wants one word more: the name by which the others find this machine"),
        (["node", "node1"], {}, "there is no ./ssh: `docker.sh keys` makes it"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_made(
    typed: Call, tmp_path: Path, words: list[str], variables: dict[str, str], message: str
) -> None:
    assert typed(*words, code=2, **variables) == [f"docker.sh: {message}"]
    assert not list((tmp_path / "work").iterdir())


def test_an_image_that_is_not_here_is_fetched_first(typed: Call, tmp_path: Path) -> None:
    answer = """
        case "$1" in
            --version) echo Docker version 28.2.2 ;;
            image) [ -e here ] && echo there@sha256:12 ;;
            pull) touch here; echo pulling ;;
            *) printf '%s\\n' "$@" ;;
        esac
    """
    program(tmp_path / "programs", "docker", answer)
    words = typed("plan")
    assert words[0] == "run", "what is typed for programs stays alone"
    assert option(words, "--env") == ["DSTRAIN_IMAGE=there@sha256:12"]


def test_gpus_where_there_are_any(typed: Call, tmp_path: Path) -> None:
    program(tmp_path / "programs", "nvidia-smi", "exit 0")
    assert option(typed("run"), "--gpus") == ["all"]
    words = typed("run", DOCKER="podman")
    assert "--gpus" not in words and option(words, "--device")[0] == "nvidia.com/gpu=all"
    assert "--userns=keep-id" in words or os.getuid() == 0


def test_a_driver_that_fails_is_no_machine_without_gpus(typed: Call, tmp_path: Path) -> None:
    program(tmp_path / "programs", "nvidia-smi", "exit 18")
    said = "docker.sh: nvidia-smi fails with exit code 18; DS_ACCELERATOR=cpu trains on the CPU"
    assert typed("run", code=2) == [said]
    assert "--gpus" not in typed("run", DS_ACCELERATOR="cpu")


def test_nodes_have_the_keys_that_were_made_once(typed: Call, tmp_path: Path) -> None:
    typed("keys", PORT="2345")
    keys = tmp_path / "work" / "ssh"
    for name in (".", "id_ed25519", "host_ed25519_key"):
        assert not stat.S_IMODE((keys / name).stat().st_mode) & 0o077, name
    assert (keys / "config").read_text() == "Port 2345\n"
    known, host = (
        (keys / "known_hosts").read_text().split(),
        (keys / "host_ed25519_key.pub").read_text().split(),
    )
    assert known == ["*", *host[:2]]
    assert typed("keys", code=2) == ["docker.sh: ./ssh is there already"]

    program(tmp_path / "programs", "getent", "[ $2 = node1 ] && echo '10.0.0.4  STREAM node1'")
    words = typed("node", "node1")
    assert "--rm" not in words, "what a node has said that did not start"
    assert option(words, "--network") == ["host"] and "--hostname" not in words
    assert option(words, "--name") == ["node1"] and option(words, "--entrypoint") == ["dstrain-node"]
    assert f"{keys}:/ssh:ro" in option(words, "--volume") and words[-1] == "dstrain"
    words = typed("node", "node1", NETWORK="mine")
    assert option(words, "--network") == ["mine"] and option(words, "--hostname") == ["node1"]


def test_a_node_on_the_machines_network_listens_on_the_addresses_of_its_name(
    typed: Call, tmp_path: Path
) -> None:
    typed("keys")
    names = """case $2 in
        node1) printf '%s\\n' '127.0.1.1 STREAM node1' '10.0.0.4 STREAM node1' '10.0.0.4 DGRAM' 'fd00::4 STREAM';;
        node2) printf '%s\\n' '127.0.1.1 STREAM node2' '::1 STREAM';;
        *) exit 2;;
    esac"""
    program(tmp_path / "programs", "getent", names)

    def address(*words: str, **more: str) -> list[str]:
        found = (one.partition("=") for one in option(typed(*words, **more), "--env"))
        return [value for name, _, value in found if name == "DSTRAIN_ADDRESS"]

    assert [one.split() for one in address("node", "node1")] == [["10.0.0.4", "fd00::4"]]
    for name in ("node2", "unknown"):
        [refused] = typed("node", name, code=2)
        assert name in refused and "ADDRESS=" in refused
        assert address("node", name, ADDRESS="10.0.0.5") == ["10.0.0.5"]
    # Elsewhere it is the container that knows: its name has an address there.
    assert address("node", "node2", NETWORK="mine") == []
    assert address("node", "node2", NETWORK="mine", ADDRESS="10.0.0.6") == ["10.0.0.6"]


def test_what_is_made_is_the_users_alone(typed: Call, tmp_path: Path) -> None:
    typed("run")
    for name in ("runs", "cache"):
        assert stat.S_IMODE((tmp_path / "work" / name).stat().st_mode) == 0o700
