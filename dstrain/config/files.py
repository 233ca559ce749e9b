"""Finds the files of ``ds_configs/``: recipes, built-in model shapes and DeepSpeed JSON fragments."""

from __future__ import annotations

import difflib
import os
import re
from functools import lru_cache
from pathlib import Path

from dstrain.addresses import refuse_address
from dstrain.errors import DstrainError
from dstrain.foreign_weights import describe_foreign_file, describe_foreign_weights
from dstrain.shared_caches import own_place

_PACKAGE = Path(__file__).resolve().parents[1]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
# fmt: off
_WITHOUT_ORGANISATION = frozenset({
    "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt", "ctrl", "transfo-xl-wt103",
    "xlnet-base-cased", "xlnet-large-cased", "bert-base-uncased", "bert-base-cased", "bert-large-uncased",
    "bert-large-cased", "bert-base-chinese", "bert-base-german-cased", "bert-base-multilingual-cased",
    "bert-base-multilingual-uncased", "distilbert-base-uncased", "distilbert-base-cased", "roberta-base",
    "roberta-large", "distilroberta-base", "xlm-roberta-base", "xlm-roberta-large", "camembert-base", "albert-base-v2",
    "t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b",
})
# fmt: on
"""The hub makes no such names any more."""


@lru_cache(maxsize=1)
def ds_configs() -> Path:
    """The folder. Raises DstrainError where it is missing."""
    return packaged("ds_configs")


def packaged(name: str) -> Path:
    """What comes with dstrain: inside the package when installed from a wheel, beside it in a checkout.

    Raises:
        DstrainError: it is missing.
    """
    for path in (_PACKAGE / name, _PACKAGE.parent / name):
        if path.exists():
            return path
    raise DstrainError(f"{name} is missing from this installation", hint="reinstall dstrain")


def recipes() -> list[str]:
    """Names of the recipes that come with dstrain."""
    return sorted(path.stem for path in (ds_configs() / "recipes").glob("*.yaml"))


def recipe_path(name: str, *, where: str = "--recipe") -> Path:
    """The file of a recipe. Raises DstrainError for an unknown name."""
    if name not in recipes():
        raise DstrainError(
            f"there is no recipe {name!r}",
            where=where,
            hint=f"{_near(name, recipes())}known: {', '.join(recipes())}; for a file of your own use --config FILE",
        )
    return ds_configs() / "recipes" / f"{name}.yaml"


def _near(name: str, names: list[str]) -> str:
    """The name that was meant, if one is near, in front of a hint."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}? " if near else ""


def model_shapes() -> list[str]:
    """Names of the built-in model shapes."""
    return sorted(path.stem for path in (ds_configs() / "models").glob("*.json"))


def is_hub_name(model: str) -> bool:
    """Whether ``model`` is a name on the Hugging Face hub and no path here.

    That is ``org/name``, ``org/name@revision``, or one of the old names without an organisation: ``gpt2``.
    """
    known = _HUB_NAME.fullmatch(model) is not None or model.partition("@")[0] in _WITHOUT_ORGANISATION
    return known and not Path(model).expanduser().exists()


def model_config_file(model: str, *, where: str) -> Path:
    """The Hugging Face config file that ``model`` means: a built-in shape or a folder's config.json.

    Raises:
        DstrainError: neither a built-in shape nor a folder with a ``config.json``.
    """
    if model in model_shapes():
        return ds_configs() / "models" / f"{model}.json"
    if not model.strip():
        raise DstrainError(
            "no model given",
            where=where,
            hint=f"a folder, org/name, or one of: {', '.join(model_shapes())}",
        )
    refuse_address(model, where, hub=True)
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder / "config.json"
    if folder.is_dir():
        what, hint = describe_foreign_weights(folder) or ("", "name a Hugging Face model folder")
        raise DstrainError(
            f"{folder} has no config.json{f'; there is {what}' if what else ''}", where=where, hint=hint
        )
    if folder.exists():
        hint = f"name its folder: {folder.parent}"
        if not (folder.parent / "config.json").is_file():
            what, hint = describe_foreign_file(folder) or (
                "",
                "name a folder with a Hugging Face config.json",
            )
            raise DstrainError(f"{folder} is a file{what and f': {what}'}", where=where, hint=hint)
        raise DstrainError(f"{folder} is a file", where=where, hint=hint)
    raise DstrainError(
        f"{model!r} is neither a folder nor a built-in shape, nor a hub name such as org/name",
        where=where,
        hint=f"{_near(model, model_shapes())}a folder with a Hugging Face config.json, org/name, or one of:"
        f" {', '.join(model_shapes())}",
    )


def cache_folder() -> Path:
    """Where prepared data and measured model shapes are kept between runs.

    ``DSTRAIN_CACHE``, else ``dstrain`` below ``XDG_CACHE_HOME`` or ``~/.cache``. Where others can write there, it is a
    folder of this user's in it, or else ``~/.cache/dstrain``.

    Raises:
        DstrainError: others can write there too.
    """
    wanted = _wanted_cache()
    for base in (wanted, Path("~/.cache/dstrain").expanduser().absolute()):
        if (found := own_place(base)) is not None:
            return found
    raise DstrainError(
        "other users can write to the cache, and what they put there can't be believed",
        where=str(wanted),
        hint="set DSTRAIN_CACHE to a folder that is yours alone (chmod 700)",
    )


def cache_note() -> str | None:
    """That the cache is not where it was wanted; None where it is. Raises as `cache_folder`."""
    wanted, found = _wanted_cache(), cache_folder()
    if found == wanted:
        return None
    return f"other users can write to the cache {wanted}: {found} is used"


def _wanted_cache() -> Path:
    chosen = os.environ.get("DSTRAIN_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "dstrain"
