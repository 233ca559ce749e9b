"""Files that hold tokens already, recognised without reading their tokens: Megatron's, nanoGPT's and llm.c's.

- ``megatron``: tokens in ``NAME.bin``, and in ``NAME.idx`` where the documents are;
- ``llm.c``: a header of 256 numbers of 32 bits, then the tokens;
- ``nanogpt``: nothing but tokens, so it is read where that was said alone.

`dstrain.data.token_files.mapped` reads them.
"""

from __future__ import annotations

from pathlib import Path

from dstrain.data.listing.file_kinds import TOKEN_KINDS, Kind
from dstrain.errors import DstrainError

MEGATRON_MAGIC = b"MMIDIDX\0\0"
"""How an index begins."""
# magic number and version -> bytes of a token
LLM_C_HEADERS = {(20240520, 1): 2, (20240801, 7): 4}
LLM_C_HEADER_BYTES = 1024


def is_token_file(path: Path, data_format: str) -> bool:
    """Whether it may be one: by its name, or because that was said."""
    return path.suffix in (".bin", ".idx") or data_format in TOKEN_KINDS


def named_by_its_prefix(path: Path) -> Path:
    """The ``.bin`` file that is meant by its name alone, or by its index, as Megatron's tools take it."""
    beside = Path(f"{path}.bin")
    if not path.exists() and beside.is_file() and index_of(beside).is_file():
        return beside
    if path.suffix == ".idx" and _is_index(path) and path.with_suffix(".bin").is_file():
        return path.with_suffix(".bin")
    return path


def index_of(path: Path) -> Path:
    """Where the index of a ``.bin`` file of Megatron's lies."""
    return path.with_suffix(".idx")


def token_file_kind(path: Path, data_format: str) -> Kind | None:
    """What a file of tokens is; None where it is none that is known.

    Args:
        data_format: the format that was named, or ``auto``.

    Raises:
        OSError: it can't be read.
        DstrainError: it is not of the format that was named.
    """
    with open(path, "rb") as stream:
        begin = stream.read(8)
    has_index = path.suffix == ".bin" and _is_index(index_of(path))
    numbers = tuple(int.from_bytes(begin[at : at + 4], "little") for at in (0, 4))
    found: Kind | None = "megatron" if has_index else "llm.c" if numbers in LLM_C_HEADERS else None
    if data_format not in TOKEN_KINDS:
        return found
    if data_format == "nanogpt":
        if found is not None:
            raise DstrainError(
                f"this file is in the format {found}, and data_format says nanogpt",
                hint=f"--set data_format={found}, or leave it out",
                where=str(path),
            )
        return "nanogpt"
    if found != data_format:
        raise _not_of_format(path, data_format)
    return found


def _is_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as stream:
        return stream.read(len(MEGATRON_MAGIC)) == MEGATRON_MAGIC


def _not_of_format(path: Path, data_format: str) -> DstrainError:
    if data_format == "llm.c":
        return DstrainError(
            "this file does not begin with a header of llm.c's",
            hint="without a header it is nanogpt's: --set data_format=nanogpt",
            where=str(path),
        )
    index = index_of(path)
    reason = (
        "there is no index beside this file"
        if not index.is_file()
        else f"{index.name} is no index of Megatron's"
    )
    return DstrainError(
        reason,
        hint=f"copy {index.name} there too; a .bin file without one is nanogpt's: --set data_format=nanogpt",
        where=str(path),
    )
