"""Which of this machine's addresses leads to a host, according to the kernel's routing table."""

from __future__ import annotations

import socket

# Any does.
_PORT = 9
OUTSIDE = "192.0.2.1"
"""Reserved for documentation (RFC 5737): the way there is the way to the outside."""


def address_towards(family: int, place: str) -> str | None:
    """The own address by which a packet to the address ``place`` would leave; None where no way leads there."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((place, _PORT))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def own_addresses() -> list[str]:
    """This machine's IPv4 addresses, that of the way to the outside first; 127.0.0.1 at the end."""
    import psutil  # here: a plan asks for no more than `address_towards`

    outward = address_towards(socket.AF_INET, OUTSIDE)
    cards = psutil.net_if_addrs().values()
    found = [] if outward is None else [outward]
    found += [entry.address for card in cards for entry in card if entry.family == socket.AF_INET]
    outside = [address for address in dict.fromkeys(found) if not address.startswith("127.")]
    return [*outside, "127.0.0.1"]
