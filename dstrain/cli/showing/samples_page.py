"""Training samples as a page for a browser: every token, coloured where it counts in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from dstrain.config.text_file import shown

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Training samples</title><style>
body { font: 15px/1.7 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
h2 { font-size: 1.05em; margin: 2em 0 .4em }
.document { border-left: 4px solid #99a; margin: .5em 0; padding: .1em .8em; white-space: pre-wrap;
  overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: 13px }
.document::before { content: "document " attr(data-number); display: block; color: #778; font-size: 11px }
span { border-radius: 2px; box-shadow: inset -1px 0 #0002 } .t { background: #bfe8c5 } .c { color: #667 }
.beyond { outline: 1px dashed #58a; margin-left: .3em } span:empty::after { content: "\00b7" }
.key span { padding: 0 .4em } .padding { color: #778; font-size: 12px }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #ddd } .t { background: #1f5a2c }
  .c { color: #99a } span { box-shadow: inset -1px 0 #fff2 } }
</style></head><body>
<h1>Training samples</h1>
"""


def samples_page(samples: Sequence[Mapping[str, Any]], statistics: Mapping[str, Any]) -> str:
    """HTML that needs nothing else. Of each token the number, its position and whether it is trained are its title.

    Args:
        samples, statistics: of `dstrain.api.data_samples.data_samples`, with each token.
    """
    return "".join(_parts(samples, statistics))


def _parts(samples: Sequence[Mapping[str, Any]], statistics: Mapping[str, Any]) -> Iterator[str]:
    yield _HEAD
    source = escape(shown(str(statistics["source"])))
    about = "about " if statistics["streamed"] else ""
    yield (
        f"<p>{source}: {about}{statistics['train_rows']:,} samples of {statistics['seq_len']:,} tokens.</p>\n"
        '<p class="key"><span class="t">counts in the loss</span> <span class="c">context only</span></p>\n'
    )
    for sample in samples:
        named = f"{escape(sample['source'])}: " if sample["source"] else ""
        yield (
            f"<h2>Sample {sample['number']}: {named}{sample['labels']:,} of {statistics['seq_len']:,} tokens are"
            f" trained</h2>\n"
        )
        document = None
        for piece in sample["pieces"]:
            if piece["document"] != document:
                yield "</div>\n" if document is not None else ""
                document = piece["document"]
                yield f'<div class="document" data-number="{document}">'
            yield from _tokens(piece)
        yield "</div>\n" if document is not None else ""
        if sample["padding"]:
            yield f'<p class="padding">{sample["padding"]:,} tokens of padding</p>\n'
    yield "</body></html>\n"


def _tokens(piece: Mapping[str, Any]) -> Iterator[str]:
    style, trained = ("t", "trained") if piece["trained"] else ("c", "not trained")
    if piece["beyond"]:
        style, trained = "t beyond", "trained, behind the sample"
    for at, (token, text) in enumerate(zip(piece["ids"], piece["texts"], strict=True)):
        # A line end is shown, and then breaks the line.
        spelled = escape(text).replace("\n", "&#8629;\n")
        title = f"token {token}, position {piece['position'] + at}, {trained}"
        yield f'<span class="{style}" title="{title}">{spelled}</span>'
