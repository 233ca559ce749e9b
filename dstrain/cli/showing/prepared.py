"""Shows what was tokenized ahead."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dstrain.api.prepare_data import PreparedSource
from dstrain.config.text_file import shown


def print_prepared(sources: Sequence[PreparedSource]) -> None:
    """A line for what each source holds, and one for where it lies and how long that took."""
    for source in sources:
        data = source.data
        if data.streamed:
            click.echo(f"{shown(data.source)}: a stream, of which nothing is tokenized ahead")
            continue
        cut = f", {data.empty_documents:,} left out" if data.empty_documents else ""
        click.echo(
            f"{shown(data.source)}: {data.documents:,} documents{cut}, {data.tokens:,} tokens"
            f" of {data.bytes / 1e6:,.1f} MB"
        )
        if source.was_there:
            click.echo(f"  was there already: {shown(source.folder)}")
        else:
            rate = data.bytes / 1e6 / max(source.seconds, 1e-3)
            click.echo(f"  prepared in {source.seconds:,.1f} s ({rate:,.1f} MB/s): {shown(source.folder)}")
