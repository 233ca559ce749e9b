"""Progress is silent unless one would ask."""

from dstrain.data import progress
from dstrain.data.progress import Progress


def test_quiet_at_first_then_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = Progress("reading x", 10_000_000, "bytes")
    documents = Progress("tokenizing x", 1200, "documents")
    for second, said in [
        (1.9, ""),
        (2.0, "reading x: 2.0 MB of 10.0 MB, 1.0 MB/s, about 8 s left"),
        (6.9, ""),
        (7.0, "about 3 s"),
    ]:
        now[0] = 100 + second
        lines.update(int(second * 1e6))
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == bool(said)
    documents.update(1200)
    assert capsys.readouterr().err == "dstrain: tokenizing x: 1,200 documents of 1,200 documents\n"
    of_unknown_length = Progress("reading x", 0, "documents")
    now[0] += 3
    of_unknown_length.update(4000)
    assert capsys.readouterr().err == "dstrain: reading x: 4,000 documents\n"
