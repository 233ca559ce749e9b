from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dstrain.errors import DstrainError
from dstrain.launch.hosts import is_this_host, numbered_hosts, read_hostfile
from dstrain.planning.layout import Host

GOOD = {
    "one": (b"n1 slots=4\n", [("n1", 4)]),
    "two in order": (b"n2 slots=8\nn1 slots=8\n", [("n2", 8), ("n1", 8)]),
    "no end of line": (b"n1 slots=4", [("n1", 4)]),
    "tabs": (b"n1\t\tslots=4\t\n", [("n1", 4)]),
    "windows": (b"n1 slots=4\r\nn2 slots=2\r\n", [("n1", 4), ("n2", 2)]),
    "old mac": (b"n1 slots=4\rn2 slots=2\r", [("n1", 4), ("n2", 2)]),
    "comments and blanks": (b"# ours\n\n  # more\nn1 slots=4\n   \n", [("n1", 4)]),
    "trailing comment": (b"n1 slots=4 # rack 3\n", [("n1", 4)]),
    "leading spaces": (b"   n1 slots=4\n", [("n1", 4)]),
    "full name": (b"gpu-01.rack_2.example.com slots=8\n", [("gpu-01.rack_2.example.com", 8)]),
    "ipv4": (b"10.0.0.1 slots=1\n", [("10.0.0.1", 1)]),
    "neighbours in name": (b"n1.a.org slots=1\nn1.b.org slots=1\n", [("n1.a.org", 1), ("n1.b.org", 1)]),
    "neighbours in address": (b"10 slots=1\n10.0.0.1 slots=1\n", [("10", 1), ("10.0.0.1", 1)]),
    "uneven": (b"n1 slots=3\nn2 slots=2\n", [("n1", 3), ("n2", 2)]),
    "more than there can be": (b"n1 slots=999999\n", [("n1", 999999)]),
    "leading zeros": (b"n1 slots=08\n", [("n1", 8)]),
    "byte order mark": (b"\xef\xbb\xbfn1 slots=4\n", [("n1", 4)]),
}


@pytest.mark.parametrize("case", GOOD)
def test_good(case: str, tmp_path: Path) -> None:
    text, hosts = GOOD[case]
    (tmp_path / "hostfile").write_bytes(text)
    assert read_hostfile(tmp_path / "hostfile") == tuple(Host(*host) for host in hosts)


# bytes, line, part of the message, part of the hint
BAD = {
    "empty": (b"", 1, "lists no hosts", "slots=N"),
    "only comments": (b"# n1 slots=4\n\n", 1, "lists no hosts", "slots=N"),
    "bare host": (b"n1 slots=4\nn2\n", 2, "n2 has no slots", "n2 slots=N"),
    "bare host with comment": (b"n1 # slots=4\n", 1, "n1 has no slots", "n1 slots=N"),
    "zero": (b"n1 slots=0\n", 1, "slots=0", "1 or more"),
    "negative": (b"n1 slots=-1\n", 1, "slots=-1", "1 or more"),
    "fraction": (b"n1 slots=1.5\n", 1, "slots=1.5", "whole number"),
    "word": (b"n1 slots=all\n", 1, "slots=all", "whole number"),
    "no number": (b"n1 slots=\n", 1, "slots=", "whole number"),
    "space before =": (b"n1 slots =4\n", 1, "'slots'", "n1 slots=N"),
    "space after =": (b"n1 slots= 4\n", 1, "slots=", "without spaces"),
    "foreign digits": ("n1 slots=٤\n".encode(), 1, "slots=٤", "whole number"),
    "absurd number": (b"n1 slots=" + b"9" * 5000, 1, "slots=999", "whole number"),
    "colon": (b"n1 slots:4\n", 1, "slots:4", "n1 slots=N"),
    "capitals": (b"n1 SLOTS=4\n", 1, "SLOTS=4", "n1 slots=N"),
    "open mpi": (b"n1 slots=4 max_slots=8\n", 1, "max_slots=8", "n1 slots=4"),
    "other key": (b"n1 gpus=4\n", 1, "gpus=4", "n1 slots=N"),
    "duplicate": (b"n1 slots=4\n\nn1 slots=4\n", 3, "line 1", "one line"),
    "duplicate in capitals": (b"n1 slots=4\nN1 slots=2\n", 2, "line 1", "one line"),
    "duplicate, short and full": (
        b"n1 slots=4\nn1.example.com slots=4\n",
        2,
        "first listed on line 1, as n1)",
        "one line",
    ),
    "duplicate, full and short": (
        b"N1.example.com slots=4\nn1 slots=4\n",
        2,
        "first listed on line 1",
        "one line",
    ),
    "option": (b"-oProxyCommand=x slots=4\n", 1, "not a host name", "letter or digit at the start"),
    "dot": (b".. slots=4\n", 1, "not a host name", "letter or digit at the start"),
    # To pdsh `exec:n2` is: run the command here, with "n2" for %h.
    "a way for pdsh": (b"exec:n2 slots=4\n", 1, "not a host name", "no colon"),
    "ipv6": (b"2001:db8::1 slots=1\n", 1, "not a host name", "give an IPv6 address a name"),
    "ipv6 in brackets": (b"[2001:db8::1] slots=1\n", 1, "not a host name", "give an IPv6 address a name"),
    "port": (b"n1:2222 slots=1\n", 1, "not a host name", "`Port ...`"),
    "quotes": (b"'n1' slots=4\n", 1, "not a host name", "letters"),
    "double quotes": (b'"n1" slots=4\n', 1, "not a host name", "letters"),
    "backquotes": (b"`id` slots=4\n", 1, "not a host name", "letters"),
    "glob": (b"n* slots=4\n", 1, "not a host name", "letters"),
    "file for pdsh": (b"^/etc/hosts slots=4\n", 1, "not a host name", "letters"),
    "percent": (b"n%h slots=4\n", 1, "not a host name", "letters"),
    "pipe": (b"n1|sh slots=4\n", 1, "not a host name", "letters"),
    "a space in a name": (b"node 1 slots=4\n", 1, "expected slots=N, found '1'", "node slots=N"),
    "a space that is none": ("n1\u200b slots=4\n".encode(), 1, "not a host name", "letters"),
    "letters from elsewhere": ("n\u0661 slots=4\n".encode(), 1, "not a host name", "letters"),
    "utf-16": ("n1 slots=4\n".encode("utf-16"), 1, "UTF-16, not UTF-8", "iconv"),
    "two byte order marks": (b"\xef\xbb\xbf\xef\xbb\xbfn1 slots=4\n", 1, "not a host name", "letters"),
    "plus": (b"n1 slots=+4\n", 1, "slots=+4", "whole number"),
    "hexadecimal": (b"n1 slots=0x8\n", 1, "slots=0x8", "whole number"),
    "a list": (b"n1 slots=0,1,2\n", 1, "slots=0,1,2", "whole number"),
    "twice": (b"n1 slots=4 slots=2\n", 1, "unexpected text 'slots=2'", "n1 slots=4"),
    "shell after slots": (b"n1 slots=4;reboot\n", 1, "slots=4;reboot", "whole number"),
    "user": (b"me@n1 slots=4\n", 1, "not a host name", ".ssh/config"),
    "semicolon": (b"n1;reboot slots=4\n", 1, "not a host name", "letters"),
    "substitution": (b"$(reboot) slots=4\n", 1, "not a host name", "letters"),
    "two names": (b"n1,n2 slots=4\n", 1, "not a host name", "letters"),
    "pdsh range": (b"n[1-4] slots=4\n", 1, "not a host name", "letters"),
    "slots first": (b"slots=4 n1\n", 1, "not a host name", "letters"),
    "nul": (b"n\x001 slots=4\n", 1, "binary file, not text", "the right file"),
    "no utf-8": (b"n1 slots=4\nn\xff slots=4\n", 2, "not UTF-8", "iconv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad(case: str, tmp_path: Path) -> None:
    text, line, message, hint = BAD[case]
    path = tmp_path / "hostfile"
    path.write_bytes(text)
    with pytest.raises(DstrainError) as caught:
        read_hostfile(path)
    assert caught.value.where == f"{path}:{line}"
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_lines_are_known(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("# ours\nn1 slots=4\n\nn2 slots=2\n")
    assert numbered_hosts(tmp_path / "hostfile") == {Host("n1", 4): 2, Host("n2", 2): 4}


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DstrainError, match="hostfile not found"):
        read_hostfile(tmp_path / "nowhere")
    with pytest.raises(DstrainError, match="is a folder"):
        read_hostfile(tmp_path)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "127.0.1.1", socket.gethostname()])
def test_this_host(name: str) -> None:
    assert is_this_host(name)


# 192.0.2.0/24 is kept free for documents (RFC 5737), .invalid for names that never resolve (RFC 2606)
@pytest.mark.parametrize("name", ["192.0.2.7", "no-such-host.invalid", "..", "a" * 300])
def test_other_host(name: str) -> None:
    assert not is_this_host(name)


def test_short_and_full_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "n1.example.com")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    assert is_this_host("N1")
    assert is_this_host("n1.EXAMPLE.com")
    assert not is_this_host("n1.elsewhere.org")
    assert not is_this_host("n2")
