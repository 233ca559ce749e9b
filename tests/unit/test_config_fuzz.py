"""Whatever stands in a config, a --set or a hostfile: it is read, or refused in words, and never fails otherwise."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstrain.config.json_reader import read_json
from dstrain.config.loader import ResolvedConfig, load_config
from dstrain.config.schema import field_names
from dstrain.errors import DstrainError
from dstrain.launch.hosts import read_hostfile
from dstrain.planning.checks import refuse

# Pieces of YAML that mean something, so that what is put together out of them comes further than noise does.
_PIECES = st.sampled_from(
    [
        *field_names(),
        "recipe",
        "quickstart",
        "zero_optimization",
        "stage",
        "fp16",
        "enabled",
        ":",
        ": ",
        "\n",
        "\n  ",
        "\n- ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "'",
        '"',
        "|",
        ">",
        "#",
        "&a ",
        "*a",
        "<<: ",
        "!!",
        "!!int ",
        "!!float ",
        "!!set ",
        "!!binary ",
        "!!timestamp ",
        "!!bool ",
        "!!omap ",
        "!!pairs ",
        "!!str ",
        "!!null ",
        "!!python/name:os ",
        "---",
        "...",
        "%YAML 9.9\n",
        "? ",
        "0",
        "1",
        "-1",
        "1.5",
        "1e9",
        "1e999",
        ".nan",
        ".inf",
        "0x",
        "0xff",
        "1_000",
        "9" * 500,
        "true",
        "null",
        "~",
        "yes",
        "2020-99-99",
        "1:30",
        "\t",
        " ",
        "\\",
        "\u2028",
        "\x85",
        "\ufeff",
        "\x00",
        "\x1b",
        "é",
        "🎉",
        "20m",
        "auto",
        "never",
    ]
)
_TEXTS = st.lists(_PIECES | st.text(max_size=6), max_size=24).map("".join)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(field_names()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def refused_or_read(**layers: Any) -> None:
    """Only a DstrainError with one line in words may come out of it."""
    try:
        resolved = load_config(**layers)
        assert isinstance(resolved, ResolvedConfig)
        refuse(resolved)
        resolved.to_yaml()
    except DstrainError as error:
        assert error.message and len(str(error)) < 3000 and error.exit_code == 2


@_MANY
@given(text=_TEXTS)
def test_yaml_of_pieces(text: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    refused_or_read(config_file=str(path))


@_MANY
@given(key=st.sampled_from(field_names()), text=_TEXTS)
def test_a_key_and_anything(key: str, text: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(f"{key}: {text}", encoding="utf-8", errors="surrogatepass", newline="")
    refused_or_read(config_file=str(path))


@_MANY
@given(content=st.binary(max_size=60))
def test_bytes(content: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(content)
    refused_or_read(config_file=str(path))
    for read in (lambda: read_hostfile(path), lambda: read_json(path, where="--ds-config")):
        with suppress(DstrainError):
            read()


@_MANY
@given(
    settings=st.lists(
        st.one_of(
            _TEXTS,
            st.tuples(st.sampled_from(field_names()), _TEXTS).map("=".join),
            _TEXTS.map("deepspeed.{}".format),
        ),
        max_size=3,
    )
)
def test_settings(settings: list[str]) -> None:
    refused_or_read(settings=settings)


@_MANY
@given(flags=st.dictionaries(st.sampled_from(field_names()), _VALUES, max_size=3))
def test_flags(flags: dict[str, Any]) -> None:
    refused_or_read(flags=flags)


@_MANY
@given(text=_TEXTS)
def test_hostfiles(text: str, tmp_path_factory: Any) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "fuzz.hosts"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        assert all(host.slots > 0 for host in read_hostfile(path))
    except DstrainError as error:
        assert error.message
