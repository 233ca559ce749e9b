"""Writes tables of all kinds: each function gives one that writes to a path."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq

Write = Callable[[Path], object]


def zstd(content: bytes) -> bytes:
    """In one frame."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def parquet(*records: Mapping[str, Any], rows: int = 1000) -> Write:
    """In row groups of so many rows."""
    return lambda path: pq.write_table(pa.Table.from_pylist(records), path, row_group_size=rows)


def arrow_stream(*records: Mapping[str, Any], schema: Any = None) -> Write:
    def write(path: Path) -> None:
        table = pa.Table.from_pylist(list(records), schema)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)

    return write


def feather(*records: Mapping[str, Any]) -> Write:
    return lambda path: pyarrow.feather.write_feather(pa.Table.from_pylist(records), str(path))


def saved(
    records: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    lose: str = "",
    shards: int | None = None,
) -> Write:
    """A folder of ``datasets.save_to_disk``, with one data set or several splits, and without the file ``lose``."""

    def write(path: Path) -> None:
        from datasets import Dataset, DatasetDict

        if isinstance(records, Mapping):
            DatasetDict({name: Dataset.from_list(rows) for name, rows in records.items()}).save_to_disk(
                str(path)
            )
        else:
            Dataset.from_list(records).save_to_disk(str(path), num_shards=shards)
        if lose:
            (path / lose).unlink()

    return write


def encrypted(what: str) -> Write:
    """Parquet with one column, encrypted: all of it for ``footer``, else its pages alone."""
    import pyarrow.parquet.encryption as pe

    class Keys(pe.KmsClient):  # type: ignore[misc]
        """Wraps keys so that everybody can read them."""

        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return base64.b64encode(key_bytes)

        def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
            return base64.b64decode(wrapped_key)

    def write(path: Path) -> None:
        table = pa.table({"text": ["a" * 100] * 9})
        config = pe.EncryptionConfiguration(
            footer_key="footer",
            column_keys={"column": ["text"]},
            plaintext_footer=what == "columns",
            cache_lifetime=datetime.timedelta(minutes=1),
        )
        factory = pe.CryptoFactory(lambda connection: Keys())
        properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), config)
        with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
            writer.write_table(table)

    return write
