"""Corpora of files that hold tokens already: what `dstrain.data.token_files.mapped` maps into memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstrain.data.listing.file_kinds import TOKEN_KINDS
from dstrain.data.listing.sources import FormattedSource, Source
from dstrain.errors import DstrainError


@dataclass(frozen=True)
class TokenFiles(FormattedSource):
    """A corpus of token files.

    Attributes:
        format: the kind of all of them.
    """

    format: str

    @property
    def state(self) -> list[Any]:
        """As of a `Source`."""
        return [*self.source.state, self.format]


def token_files(source: Source, data_format: str) -> TokenFiles | None:
    """The corpus, where the source's files hold tokens; None where none of them does.

    Raises:
        DstrainError: only some of them do, or they are of several formats.
    """
    first: dict[str, str] = {}
    for file in source.files:
        if file.kind != "index":
            first.setdefault(file.kind if file.kind in TOKEN_KINDS else "text or records", file.relative)
    kinds = [kind for kind in first if kind in TOKEN_KINDS]
    if not kinds:
        if data_format in TOKEN_KINDS:
            raise DstrainError(
                f"data_format is {data_format}, and this source has no .bin file",
                hint="name such a file, or leave data_format out",
                where=source.place,
            )
        return None
    if len(first) > 1:
        (one, here), (other, there) = list(first.items())[:2]
        raise DstrainError(
            f"{here} is a file of {one}, and {there} of {other}",
            hint="name files of one format, or several sources",
            where=source.place,
        )
    return TokenFiles(source, kinds[0])
