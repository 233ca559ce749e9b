"""``dstrain config schema``: JSON Schema for editors."""

from __future__ import annotations

import json

import click


@click.command("schema")
def command() -> None:
    """Print the JSON Schema (draft 2020-12) of config files, DeepSpeed's keys included.

    Editors with a YAML language server take it from a first line
    `# yaml-language-server: $schema=FILE`, after `dstrain config schema > FILE`.
    """
    from dstrain.config.json_schema import json_schema

    click.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))
