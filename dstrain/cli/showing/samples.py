"""Training samples with what is trained of them, and statistics of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from dstrain.cli.showing.estimates import headed
from dstrain.cli.showing.tables import Column, FoldingTable
from dstrain.config.text_file import shown

_TRAINED, _CONTEXT = "train", "-"
_BAR = 40
_LONGEST = 2_000


def show_samples(
    samples: Sequence[Mapping[str, Any]], statistics: Mapping[str, Any], console: Console
) -> None:
    """Each piece on a line of its own: ``train`` where its tokens count in the loss. Line ends are shown as such."""
    for sample in samples:
        documents = f"{sample['documents']} document{'s' if sample['documents'] != 1 else ''}"
        source = f"{sample['source']}: " if sample["source"] else ""
        console.print(
            headed(
                f"sample {sample['number']}",
                f"{source}{documents}, {sample['labels']:,} of {statistics['seq_len']:,} tokens are trained,"
                f" {sample['padding']:,} are padding",
                "bold",
            )
        )
        document = -1
        for piece in sample["pieces"]:
            if piece["document"] != document:
                document = piece["document"]
                console.print(Text(f"  document {document}", style="dim"))
            mark, style = (_TRAINED, "green") if piece["trained"] else (_CONTEXT, "dim")
            line = Text(f"    {mark:<6}{piece['tokens']:>6} {piece['position']:>6}  ")
            line.append(_elided(repr(piece["text"])[1:-1]), style=style)
            if piece["beyond"]:
                line.append("  (behind the sample; its last token predicts it)", style="dim")
            console.print(line, soft_wrap=True)
        console.print()
    about, epoch = ("about ", " an epoch") if statistics["streamed"] else ("", "")
    console.print(
        Text(
            f"{about}{statistics['train_rows']:,} training samples{epoch}; beside each piece: its tokens, the position"
            " of the first",
            style="dim",
        )
    )


def _sources(sources: Sequence[Mapping[str, Any]]) -> FoldingTable:
    """A row for each of several: its share of the tokens that the run trains on, and how full its samples are."""
    table = FoldingTable(
        Column("source", style="bold", gives=True),
        Column("format", gives=True),
        *(Column(name, right=True) for name in ("documents", "tokens", "samples", "share", "epochs", "fill")),
    )
    taken = [source["rows"] * (1 - source["data"]["padding"]) for source in sources]
    for source, tokens in zip(sources, taken, strict=True):
        data = source["data"]
        table.add_row(
            source["name"],
            data["format"],
            f"{data['documents']:,}",
            f"{data['tokens']:,}",
            f"{data['train_rows']:,}",
            f"{tokens / sum(taken):.1%}" if source["trained"] else "validation",
            f"{source['rows'] / data['train_rows']:.2f}" if source["trained"] else "-",
            f"{1 - data['padding']:.1%}",
        )
    return table


def _elided(text: str) -> str:
    """A long text without its middle: how it begins and ends is what one looks for."""
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]} [{len(text) - _LONGEST:,} characters] {text[-half:]}"


def show_statistics(statistics: Mapping[str, Any], console: Console) -> None:
    """One line for each number, and a histogram of the lengths of documents."""
    rows = statistics["train_rows"]
    lines = [
        (
            "source",
            f"{shown(statistics['source'])}: {statistics['files']:,} files, {statistics['bytes']:,} bytes",
        ),
        ("format", statistics.get("format", "text")),
        (
            "documents",
            f"{statistics['documents']:,}, {statistics['validation_documents']:,} of them for validation",
        ),
        ("tokens", f"{statistics['tokens']:,}"),
        ("trained", f"{statistics['labels']:,} tokens in the training samples"),
        (
            "samples",
            f"{rows:,} to train on, {statistics['validation_rows']:,} for validation, of"
            f" {statistics['seq_len']:,} tokens",
        ),
        ("fill", f"{1 - statistics['padding']:.1%} of the samples' tokens are text"),
        (
            "labels",
            "{} to {} in a sample, {} on average".format(
                statistics["labels_of_a_row"][0],
                statistics["labels_of_a_row"][2],
                statistics["labels_of_a_row"][1],
            ),
        ),
        (
            "lengths",
            ", ".join(f"{share} %: {tokens:,}" for share, tokens in statistics["lengths"].items())
            + " tokens",
        ),
    ]
    for name, key in (
        ("left out", "empty_documents"),
        ("dropped", "dropped_documents"),
        ("cut", "cut_documents"),
    ):
        if statistics.get(key):
            lines.append((name, f"{statistics[key]:,}"))
    grid = FoldingTable(Column(style="bold", least=9), Column(gives=True), gap=2)
    for name, text in lines:
        grid.add_row(name, text)
    console.print(grid)
    if statistics["sources"]:
        console.print()
        console.print(_sources(statistics["sources"]))
    console.print()
    most = max(count for _, _, count in statistics["histogram"])
    for first, last, count in statistics["histogram"]:
        bar = "#" * max(1, round(_BAR * count / most))
        console.print(Text(f"{first:>9,} to {last:<9,} {count:>9,}  {bar}"), soft_wrap=True)
