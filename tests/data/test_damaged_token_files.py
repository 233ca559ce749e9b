"""Files of tokens that are empty, cut or made up: what can't be read of them is said in one message."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstrain.data.chat.options import RecordOptions
from dstrain.data.prepare import PackedData, prepare
from dstrain.data.token_files.megatron_index import read_index
from dstrain.errors import DstrainError
from tests.support.token_files import write_llm_c, write_megatron, write_nanogpt

END = 256
DOCUMENT = [1, 2, 3, END]
HEADERS = [struct.pack("<II", 20240520, 1), struct.pack("<II", 20240801, 7)]


def prepared(place: Path, source: Path, *, limit: int | None = None, **options: str) -> PackedData:
    return prepare(
        str(source), "bytes", 4, 0.0, place / "cache", records=RecordOptions(**options), limit=limit
    )


def test_shards_without_tokens_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    folder.mkdir()
    write_megatron(folder / "a.bin", [])
    write_megatron(folder / "b.bin", [[DOCUMENT]])
    write_megatron(folder / "c.bin", [[[]], [[]]])
    write_megatron(folder / "d.bin", [[DOCUMENT]])
    data = prepared(tmp_path, folder)
    assert (data.documents, data.empty_documents, data.tokens) == (2, 2, 8)
    assert prepared(tmp_path, folder, limit=2).documents == 1, "the second one is empty"
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    (folder / "a.bin").touch()
    write_nanogpt(folder / "b.bin", DOCUMENT * 40)
    assert prepared(tmp_path, folder, data_format="nanogpt").documents == 40
    folder = tmp_path / "llm.c"
    folder.mkdir()
    write_llm_c(folder / "a.bin", [])
    write_llm_c(folder / "b.bin", DOCUMENT)
    assert prepared(tmp_path, folder).documents == 1


@pytest.mark.parametrize("write", [write_llm_c, lambda path, _: write_megatron(path, [[[]]])])
def test_nothing_but_such_shards_is_an_error(tmp_path: Path, write) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder / "a.bin", [])
    with pytest.raises(DstrainError, match=r"no document in this source has a token|are empty"):
        prepared(tmp_path, folder)


@pytest.mark.parametrize("size", [8, 12, 1023])
def test_a_header_that_is_cut(tmp_path: Path, size: int) -> None:
    path = write_llm_c(tmp_path / "a.bin", DOCUMENT)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DstrainError, match=f"this file has {size:,} bytes, and its header alone takes 1,024"):
        prepared(tmp_path, path)


def test_bounds_that_wrap_around_are_out_of_order(tmp_path: Path) -> None:
    """Their differences in 64 bits are not negative."""
    path = write_megatron(tmp_path / "a.bin", [[[1]]])
    index = path.with_suffix(".idx")
    bounds = np.array([0, 2**63 - 1, -(2**63), -1, 1], dtype="<i8")
    index.write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, 1, bounds.size)
        + struct.pack("<iq", 1, 0)
        + bounds.tobytes()
    )
    with pytest.raises(DstrainError, match="the documents of this index do not"):
        read_index(index)


COUNTS = st.one_of(st.integers(0, 6), st.sampled_from([2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]))


@st.composite
def index_files(draw: st.DrawFn) -> bytes:
    """Some that are nearly right, some that say anything."""
    sequences, bounds = draw(COUNTS), draw(COUNTS)
    head = b"MMIDIDX\0\0" + struct.pack(
        "<QBQQ", draw(st.sampled_from([1, 1, 1, 2])), draw(st.integers(0, 9)), sequences, bounds
    )
    lengths = [draw(st.integers(-2, 5)) for _ in range(min(sequences, 6))]
    places, at = [], 0
    for length in lengths:
        places.append(at)
        at += 2 * length
    edges = st.one_of(st.integers(0, 6), st.sampled_from([-1, 2**63 - 1, -(2**63), sequences % 2**63]))
    ends = [draw(edges) for _ in range(min(bounds, 6))]
    body = struct.pack(f"<{len(lengths)}i{len(places)}q{len(ends)}q", *lengths, *places, *ends)
    whole = head + body
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else whole


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    index=st.one_of(
        index_files(), st.binary(max_size=80), st.binary(max_size=60).map(b"MMIDIDX\0\0".__add__)
    ),
    tokens=st.one_of(
        st.binary(max_size=40),
        st.tuples(st.sampled_from(HEADERS), st.binary(max_size=1100)).map(b"".join),
        st.lists(st.integers(0, END), max_size=20).map(lambda ids: np.array(ids, "<u2").tobytes()),
    ),
    data_format=st.sampled_from(["auto", "nanogpt", "megatron", "llm.c"]),
    named=st.booleans(),
)
def test_whatever_lies_there_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, index: bytes, tokens: bytes, data_format: str, named: bool
) -> None:
    place = tmp_path_factory.mktemp("files")
    folder = place / "data"
    folder.mkdir()
    (folder / "a.bin").write_bytes(tokens)
    if data_format != "nanogpt":
        (folder / "a.idx").write_bytes(index)
    tracemalloc.start()
    try:
        prepared(place, folder / "a.bin" if named else folder, data_format=data_format)
    except DstrainError as error:
        assert error.where is not None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**23, "memory must not follow from what a file says of itself"
