"""What both ends of a control connection agree on: its variable, and when silence means that the other end is gone."""

from __future__ import annotations

import hashlib
import socket

ADDRESS = "DSTRAIN_CONTROL"
"""The environment variable that tells a rank where its supervisor is: ``LAUNCH@ADDRESS,ADDRESS,...:PORT``."""

SILENCE_SECONDS = 16
"""So long a line may be cut before both ends give it up: the run must have ended everywhere within 30."""

_PROBE_SECONDS = 4


def plan_digest(text: str) -> str:
    """By which a rank tells the supervisor which plan.json it sees."""
    return hashlib.sha256(text.encode()).hexdigest()


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel notice within `SILENCE_SECONDS` that the other end is gone, also while nothing is said."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _PROBE_SECONDS),
        ("TCP_KEEPINTVL", _PROBE_SECONDS),
        ("TCP_KEEPCNT", SILENCE_SECONDS // _PROBE_SECONDS - 1),
        ("TCP_USER_TIMEOUT", SILENCE_SECONDS * 1000),  # and while something was said and not answered
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
