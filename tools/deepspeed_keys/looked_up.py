"""Which keys DeepSpeed looks up in a config, found by giving it a dictionary that takes notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig

Path = tuple[str, ...]

_ENOUGH = {"train_batch_size": 1}  # without it DeepSpeed ends before it has read all


class Watched(dict[str, Any]):
    """A dictionary that notes which keys are looked up, in it and in those inside it, and with which default."""

    def __init__(self, values: Mapping[str, Any], seen: dict[Path, Any], path: Path = ()) -> None:
        super().__init__(
            {k: Watched(v, seen, (*path, k)) if isinstance(v, dict) else v for k, v in values.items()}
        )
        self._seen, self._path = seen, path

    def _note(self, key: str, default: Any = None) -> None:
        place = (*self._path, key)
        if self._seen.get(place) is None:
            self._seen[place] = default

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self._note(key, *default)
        return super().pop(key, *default)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return _Keys(self)


class _Keys:
    """``key in block.keys()`` is a look into the block too."""

    def __init__(self, block: Watched) -> None:
        self._block = block

    def __contains__(self, key: object) -> bool:
        return key in self._block

    def __iter__(self) -> Iterator[str]:
        return iter(self._block)


def looked_up(values: Mapping[str, Any]) -> tuple[dict[Path, Any], Exception | None]:
    """Every key that DeepSpeed looks up in a config of these values, with its default, and how that ended."""
    seen: dict[Path, Any] = {}
    try:
        DeepSpeedConfig(Watched({**_ENOUGH, **values}, seen))
    except Exception as error:
        return seen, error
    return seen, None


def nested(path: Path, value: Any) -> dict[str, Any]:
    """A config with nothing but this value at this path, which has a key at least."""
    for key in reversed(path):
        value = {key: value}
    return dict(value)
