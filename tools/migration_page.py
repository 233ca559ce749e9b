"""docs/migration.md: the keys of other trainers, and what to write instead.

``python -m tools.migration_page > docs/migration.md`` writes it; tests/unit/test_docs.py keeps it current.
"""

from __future__ import annotations

import json

from dstrain.config.foreign_keys import FOREIGN_KEYS

_HEAD = """\
# Coming from another trainer

<!-- Written by `make docs` from dstrain/config/foreign_keys.py. Do not edit. -->

A config file that holds keys of another trainer is refused, and each error says what to write instead, with the value:

```console
$ dstrain config check theirs.yaml
error: theirs.yaml:1: unknown key 'per_device_train_batch_size'
  hint: in dstrain: micro_batch: 4
```

The tables below are those translations. [Configuration](configuration.md) describes every key of dstrain.
A key that is nested in the other trainer's file stands here with a dot.
"""


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for trainers in dict.fromkeys(foreign.trainers for foreign in FOREIGN_KEYS.values()):
        parts.append(f"\n## {', '.join(trainers)}\n\n| there | in dstrain |\n| --- | --- |\n")
        for name, foreign in FOREIGN_KEYS.items():
            if foreign.trainers == trainers:
                there = f"{name}: {json.dumps(foreign.example)}".replace("|", "\\|")
                parts.append(
                    f"| `{there}` | {foreign.translate(foreign.example).replace('|', chr(92) + '|')} |\n"
                )
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
