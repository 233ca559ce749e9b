"""Addresses (``https://...``, ``s3://...``) where a path is wanted: one message, with what fetches it."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dstrain.errors import DstrainError

# Path("s3://bucket") has one slash; a letter alone is a drive of Windows.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/]|$)(.*)", re.DOTALL)
_HUB_PAGES = re.compile(r"(?:www\.)?(?:huggingface\.co|hf\.co)/(datasets/)?([\w.-]+(?:/[\w.-]+)?)")
_FETCHED_BY = {
    "s3": "aws s3 cp --recursive {} FOLDER",
    "gs": "gcloud storage cp --recursive {} FOLDER",
    "az": "azcopy copy {} FOLDER --recursive",
    "abfs": "azcopy copy {} FOLDER --recursive",
    "hdfs": "hdfs dfs -get {} FOLDER",
    "http": "curl -LO {}",
    "https": "curl -LO {}",
    "ftp": "curl -LO {}",
}


def refuse_address(value: str, where: str, *, hub: bool = False, written: bool = False) -> None:
    """Refuse an address where a path is wanted, unless a file of that name is there.

    Args:
        where: what names it, for the message.
        hub: names on the hub are taken there.
        written: it is a folder that is written to.

    Raises:
        DstrainError: with what fetches it, or for a folder that is written to, what to do instead.
    """
    match = _ADDRESS.fullmatch(value)
    if match is None or Path(value).expanduser().exists():
        return
    scheme, rest = match[1].lower(), match[2]
    address = f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest}"
    if written and scheme != "file":
        raise DstrainError(
            f"{address} is an address, and what is written goes to a folder of this machine",
            where=where,
            hint="name a folder, and copy it there afterwards",
        )
    raise DstrainError(
        f"{address} is an address, and nothing is downloaded",
        where=where,
        hint=_way_out(scheme, rest, address, hub),
    )


def _way_out(scheme: str, rest: str, address: str, hub: bool) -> str:
    if scheme == "file":
        return f"name the path: /{unquote(urlsplit(f'file:///{rest}').path).lstrip('/')}"
    page = _HUB_PAGES.match(rest) if scheme in ("http", "https") else None
    if scheme == "hf":
        page = re.match(r"(datasets/)?([\w.-]+(?:/[\w.-]+)?)", rest)
    if page is not None:
        if page[1]:
            return f"as data, name it as on the hub: {page[2]}"
        if hub:
            return f"name it as on the hub: {page[2]}"
        return f"hf download {page[2]} --local-dir FOLDER, and name the folder"
    command = _FETCHED_BY.get(scheme)
    return (
        f"{command.format(address)}, and name what it has fetched" if command else "copy it to this machine"
    )
