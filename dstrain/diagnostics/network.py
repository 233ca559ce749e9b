"""Checks the network between the hosts: connections, and the speed of torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dstrain.diagnostics.diagnosis import FAILED, OK, WARNING, Check
from dstrain.diagnostics.remote_session import Conversation, ask_all, ask_each
from dstrain.launch.ssh_reachability import Trouble
from dstrain.runs.this_machine import listening_socket, own_addresses

HERE = "this machine"
_PORT_SECONDS = 30.0
EXCHANGE_SECONDS = {"cpu": 90.0, "cuda": 600.0}
"""Starting torch may take long from a shared disk; each part of the exchange has a shorter limit of its own."""
# A pair that is so much slower than the fastest deserves a look.
_SLOW = 5


def check_ports(conversations: Sequence[Conversation], *, all_pairs: bool) -> list[Check]:
    """Whether the hosts can connect to this machine, where the supervisor listens, and to the first host, where the
    ranks meet; with ``all_pairs`` to each other as well."""
    if not conversations:
        return []
    listening = conversations if all_pairs else conversations[:1]
    with listening_socket() as listener:
        *outside, loopback = own_addresses()
        targets: list[dict[str, Any]] = [
            {
                "name": HERE,
                "hosts": outside or [loopback],
                "ports": [listener.getsockname()[1]],
            }
        ]
        for conversation, answer in zip(
            listening, ask_all(listening, "listen", seconds=_PORT_SECONDS), strict=True
        ):
            if not isinstance(answer, Trouble):
                name = conversation.host
                targets.append({"name": name, "hosts": [name], "ports": answer["ports"]})
        answers = ask_all(conversations, "reach", seconds=_PORT_SECONDS, targets=targets)
    checks = []
    for conversation, answer in zip(conversations, answers, strict=True):
        host = conversation.host
        if isinstance(answer, Trouble):
            checks.append(Check(host, "ports", FAILED, answer.message, answer.fix))
            continue
        for one in answer["unreached"]:
            message = f"can't connect to {one['name']} at TCP port {one['port']}: {one['why']}"
            checks.append(Check(host, "ports", FAILED, message, _way(host, one)))
        if not answer["unreached"]:
            checks.append(Check(host, "ports", OK, "reaches " + ", ".join(one["name"] for one in targets)))
    return checks


def _way(host: str, unreached: dict[str, Any]) -> str:
    name = unreached["name"]
    if "not known" in unreached["why"]:
        return f"make the name {name} resolvable on {host} (DNS or /etc/hosts)"
    if "refused" in unreached["why"]:
        return f"check that {name} resolves to the right machine on {host}, and that no firewall refuses the port"
    return f"allow TCP ports from 1024 up between {host} and {name} (firewall, security group)"


def exchange(
    conversations: Sequence[Conversation],
    device: str,
    *,
    on_one_machine: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[Check]:
    """A real all-reduce of all hosts, and a real send between each pair, through gloo or (``cuda``) NCCL.

    Args:
        say: gets a line every 15 s, in this thread.
    """
    first = conversations[0].host
    [meeting] = ask_all(conversations[:1], "free_port", seconds=_PORT_SECONDS)
    if isinstance(meeting, Trouble):
        return [Check(first, "all-reduce", FAILED, meeting.message, meeting.fix)]
    limit, backend = EXCHANGE_SECONDS[device], "NCCL" if device == "cuda" else "gloo"
    arguments = []
    for rank in range(len(conversations)):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(conversations)),
            "LOCAL_RANK": str(rank if on_one_machine else 0),
            "MASTER_ADDR": "127.0.0.1" if on_one_machine else first,
            "MASTER_PORT": str(meeting["port"]),
        }
        arguments.append({"environment": environment, "device": device, "limit": limit})
    what = f"all-reduce and send between {len(conversations)} ranks"
    answers = ask_each(
        *(conversations, "exchange", arguments),
        seconds=limit + 10,
        waiting=lambda passed: say(f"{what} ({backend}): {passed:.0f} s of at most {limit:.0f} s"),
    )
    names = [conversation.host for conversation in conversations]
    if on_one_machine:
        names = [f"{device}:{rank}" if device == "cuda" else f"rank {rank}" for rank in range(len(names))]
    checks = judge_exchange(names, answers, backend)
    if not on_one_machine:
        return checks
    return [
        Check(first, check.check, check.status, f"{check.host}: {check.message}", check.fix)
        for check in checks
    ]


def judge_exchange(
    names: Sequence[str], answers: Sequence[dict[str, Any] | Trouble], backend: str
) -> list[Check]:
    """What the ranks' answers to ``exchange`` mean; ``names`` are theirs, in their order."""
    checks: list[Check] = []
    speeds = [
        one["bytes_per_second"]
        for answer in answers
        if not isinstance(answer, Trouble)
        for one in answer["said"]
        if one.get("done") == "send"
    ]
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, Trouble):
            checks.append(Check(name, "all-reduce", FAILED, answer.message, answer.fix))
            continue
        said = answer["said"]
        card = next((one["card"] for one in said if one.get("card")), "the default card")
        reduced = [one for one in said if one.get("done") == "all-reduce"]
        sent = [one for one in said if one.get("done") == "send"]
        if reduced:
            message = f"{_speed(reduced[0])} ({backend}, {card})"
            checks.append(Check(name, "all-reduce", OK, message))
        if answer["error"] is not None:
            checks.append(_failure(name, said, answer["error"], names, backend, card))
        elif sent:
            checks.append(_sent(name, sent, max(speeds), names))
    return checks


def _sent(name: str, sent: list[dict[str, Any]], fastest: float, names: Sequence[str]) -> Check:
    slowest = min(sent, key=lambda one: float(one["bytes_per_second"]))
    message = f"{_speed(slowest)} with {names[slowest['peer']]}" + (", the slowest" if len(sent) > 1 else "")
    if slowest["bytes_per_second"] * _SLOW >= fastest:
        return Check(name, "send", OK, message)
    message += f"; the fastest pair of hosts reaches {fastest / 1e9:.2f} GB/s"
    fix = "check its cable, its switch port and its card's speed (ethtool), and what else uses them"
    return Check(name, "send", WARNING, message, fix)


def _failure(
    name: str, said: list[dict[str, Any]], error: str, names: Sequence[str], backend: str, card: str
) -> Check:
    """What a rank was doing last is what failed."""
    last: dict[str, Any] = {"doing": "start"}
    doing = next((one for one in reversed(said) if "doing" in one), last)
    fix = (
        f"check that {card} is the network card that connects the hosts (choose another with"
        " GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME) and that no firewall blocks them"
    )
    if backend == "NCCL":
        fix += "; NCCL_DEBUG=INFO gives more details"
    if doing["doing"] == "send":
        pair = " and ".join(sorted((name, names[doing["peer"]])))
        return Check(name, "send", FAILED, f"between {pair}: {error}", fix)
    words = {
        "start": "torch did not start",
        "meeting": f"rendezvous at {names[0]} failed",
        "all-reduce": "the all-reduce",
    }
    if doing["doing"] == "start":
        fix = f'try it there: python -c "import torch" on {name}'
    return Check(name, "all-reduce", FAILED, f"{words[doing['doing']]}: {error}", fix)


def _speed(done: dict[str, Any]) -> str:
    return f"{done['bytes_per_second'] / 1e9:.2f} GB/s"
