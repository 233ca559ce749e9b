"""Where other machines find this one."""

from __future__ import annotations

import socket

import psutil  # type: ignore[import-untyped]


def own_addresses() -> list[str]:
    """This machine's IPv4 addresses, those that others reach first; 127.0.0.1 at the end.

    The kernel chooses the address by which a packet to the outside would leave; nothing is sent. Those of the other
    network cards come after it.
    """
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation: RFC 5737
            found.append(probe.getsockname()[0])
        except OSError:
            pass  # no way to the outside
    cards = psutil.net_if_addrs().values()
    found += [entry.address for card in cards for entry in card if entry.family == socket.AF_INET]
    outside = [address for address in dict.fromkeys(found) if not address.startswith("127.")]
    return [*outside, "127.0.0.1"]
