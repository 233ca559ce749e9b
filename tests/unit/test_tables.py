"""Nothing that the command line shows is cut: what went in can be read, at any width, with and without a terminal."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.box import SQUARE
from rich.console import Console
from test_showing import gpus

import dstrain
from dstrain.api.calibration import Calibration
from dstrain.api.checkpoint_list import COMPLETE, DAMAGED, CheckpointInfo
from dstrain.api.events import Step
from dstrain.api.fitting import FitResult, FitRow
from dstrain.api.outcome import RunResult
from dstrain.api.rehearsing import RehearsalResult
from dstrain.api.reproducing import ReproduceResult
from dstrain.api.verifying import VerifyResult, VerifyRow
from dstrain.cli import checkpoints, config, doctor, reproduce, verify
from dstrain.cli.run import show_nodes
from dstrain.cli.showing.estimates import format_duration
from dstrain.cli.showing.explanation import show_explanation
from dstrain.cli.showing.fit import _nothing_fits, show_fit
from dstrain.cli.showing.measured import show_forgotten, show_held_against
from dstrain.cli.showing.picture import _title
from dstrain.cli.showing.plan import show_plan
from dstrain.cli.showing.progress import ConsoleEvents, show_result
from dstrain.cli.showing.rehearsal import show_rehearsal
from dstrain.cli.showing.samples import show_statistics
from dstrain.cli.showing.tables import Column, FoldingTable, make_console
from dstrain.config.loader import load_config
from dstrain.config.values import leaves
from dstrain.diagnostics.diagnosis import FAILED, OK, WARNING, Check
from dstrain.formatting import format_bytes
from dstrain.mixture_shares import MixturePhase
from dstrain.planning.explain import explain
from dstrain.planning.fitting.candidates import Candidate
from dstrain.planning.fitting.search import Fit, Scored
from dstrain.planning.layout import Host
from dstrain.planning.layout_names import LayoutChoice
from dstrain.planning.plan import Plan, PlannedSource
from dstrain.report.comparison import compare_bits
from dstrain.report.difference import Difference, Value
from dstrain.report.measured import HeldAgainst, Row
from dstrain.report.rehearsal import LIMITS, STEP, compare
from dstrain.runs.checkpoint.manifest import MANIFEST, make_manifest
from dstrain.runs.record.differences import differences
from dstrain.runs.run_folder import RunFolder
from tests.support.plans import DATA, plan, shape

WIDTHS = (60, 80, 200)
LENGTHS = (10, 60, 150)
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PACKAGE = Path(dstrain.__file__).parent


@dataclass(frozen=True)
class Shown:
    """What went into something that is printed: ``whole`` are numbers and short words, which no line end may part;
    ``values`` may be folded; ``long_lines``: lines that a person copies may be longer than the terminal."""

    whole: tuple[str, ...]
    values: tuple[str, ...]
    long_lines: bool = False


# --- what is printed


def name(what: str, length: int) -> str:
    """A name of this length, no two pieces of which are alike."""
    return (what + "".join(f"-{number:03}" for number in range(length)))[:length]


def path(what: str, length: int) -> str:
    return f"/{name(what, length - 1)}".replace("-00", "/00").replace("-01", " 01")


def long_plan(length: int, **choices: Any) -> Plan:
    """A plan with long paths, on hosts with long names."""
    machines = gpus(2, 4)
    hosts = tuple(Host(name(f"n{number}", length), 4) for number in range(2))
    flags: dict[str, Any] = {
        "zero": 2,
        "pipeline": 2,
        "global_batch": 64,
        "precision": "bf16",
        "offload": "cpu",
    }
    made = plan(
        machines=replace(machines, hosts=hosts), model=shape(64, hidden_size=8192), **(flags | choices)
    )
    paths = {key: path(key, length) for key in ("model", "data", "tokenizer")}
    return replace(
        made,
        config=made.config | paths,
        origins={key: f"{path('yaml', length)}:{number}" for number, key in enumerate(made.origins)},
        deepspeed_origins={key: f"{path('json', length)}:{key}" for key in made.deepspeed_origins},
        data=replace(made.data, source=path("source", length), tokenizer=path("tokens", length)),
        device=name("device", length),
        warnings=(*made.warnings, f"the file {path('warning', length)} is strange"),
    )


def print_plan(length: int, **_: Any) -> Shown:
    made = long_plan(length)
    show_plan(made, make_console(), verbose=True)
    numbers = [f"{made.model.parameters:,}", f"{DATA.tokens:,}"]
    for stage, need in enumerate(made.stage_memory):
        numbers += [
            f"{made.stage_parameters[stage]:,}",
            f"{made.stage_time[stage]:.2f}",
            format_bytes(need.total),
        ]
        numbers += [
            format_bytes(size) for size in (need.parameters, need.optimizer, need.loss, need.buffers) if size
        ]
    for place in made.layout.places():
        numbers += [f"rank {place.rank}", f"cuda:{place.local_rank}"]
    assert made.time is not None
    numbers += [format_bytes(traffic.bytes) for traffic in made.time.traffic]
    numbers += [format_duration(made.time.total), f"{made.time.tokens_per_second:,.0f}"]
    values = [*made.warnings, *made.time.assumptions, *(host.name for host in made.layout.hosts)]
    values += [traffic.reason for traffic in made.time.traffic] + [
        traffic.what for traffic in made.time.traffic
    ]
    values += [made.data.source, _title(made), made.memory_verdict]
    for key in ("model", "data", "zero", "pipeline", "seed", "activation_checkpointing", "steps"):
        values += [key, str(made.config[key]), made.origins[key]]
    return Shown(tuple(numbers), tuple(values))


def print_plan_of_several_sources(length: int, **_: Any) -> Shown:
    counts = {
        "documents": 12_345_678,
        "tokens": 9_876_543_210,
        "train_rows": 345_678,
        "validation_rows": 2_345,
    }
    texts = replace(DATA, **counts, kinds="3 .txt (12 MB)", left_out="2 .orc (5 MB)")
    chat = replace(
        texts,
        format="prompt-completion",
        trained_tokens=7,
        train_on="last",
        dropped_documents=23_456,
        kinds="",
    )
    sources = tuple(
        PlannedSource(name(f"source{number}", min(length, 60)), number < 2, 456_789, data)
        for number, data in enumerate((texts, chat, texts))
    )
    mixture = replace(DATA, source="all", sources=sources, phases=(MixturePhase(9, ((0, 1), (1, 2))),))
    show_plan(plan(data=mixture), make_console(), verbose=True)
    return Shown(
        (*(f"{number:,}" for number in list(counts.values())[:3]), "50.0%", "1.32", "23,456"),
        (*(source.name for source in sources), "3 .txt", "2 .orc", chat.format),
    )


def print_plan_of_a_large_machine(length: int, **_: Any) -> Shown:
    """Numbers of five and six digits in the picture, and stages left out of the middle."""
    hosts = tuple(Host(name(f"host{number}", length), 8) for number in range(512))
    machines = replace(gpus(1, 1), hosts=hosts)
    made = plan(machines=machines, model=shape(512), pipeline=64, global_batch=8192, micro_batch=8)
    show_plan(made, make_console(), verbose=True)
    ranks = tuple(
        f"rank {place.rank}" for place in made.layout.places() if place.host in (hosts[0].name, hosts[1].name)
    )
    return Shown((*ranks, "4095"), (hosts[0].name, hosts[1].name, hosts[-1].name))


def print_fit(length: int, **_: Any) -> Shown:
    rows = []
    for number, layout in enumerate(("zero1-pp2-dp4", "zero3-pp1-dp8-cpu", "zero1-pp2-dp4-dualpipev-cpu")):
        made = long_plan(length)
        candidate = Candidate(LayoutChoice.parse(layout), 2 + number, bool(number))
        assert made.time is not None
        scored = Scored(candidate, made.layout, made.time, 12_345_678_901 + number, True)
        rows.append(FitRow(scored, f"--zero {number} --data {path(f'flag{number}', length)}", made))
    fallen = {f"because of {path('reason', length)}": 12_345, "memory": 1}
    fitted = FitResult(
        Fit(tuple(row.scored for row in rows), False, 1.1e10, 12_346, fallen, 10),
        tuple(rows),
        f"2 hosts x 4 {name('device', length)}",
        (f"--model {path('model', length)}",),
        (f"--data {path('helps', length)}",),
    )
    show_fit(fitted, as_json=False)
    numbers = [format_duration(rows[0].scored.time.total), f"{rows[0].scored.time.tokens_per_second:,.0f}"]
    values = [row.flags for row in rows] + [row.scored.candidate.layout.name for row in rows]
    values += [fitted.machines, f"chose: {fitted.fixed[0]}", _nothing_fits(fitted), *fallen, "12.3 GB, 112%"]
    return Shown((*numbers, "12,345", "12,346"), tuple(values))


def print_explanation(length: int, **_: Any) -> Shown:
    made = long_plan(length)
    values: list[str] = []
    for key in ("data", "zero", "deepspeed.bf16.enabled"):
        show_explanation(made, key, as_json=False)
        for found in explain(made, key):
            values += [found.key, found.does, found.takes, found.why, found.origin, json.dumps(found.value)]
    return Shown((), tuple(value for value in values if value))


def print_repetition(length: int, folder: Path, **_: Any) -> Shown:
    run, again = RunFolder(folder / "one"), RunFolder(folder / "again")
    for each in (run, again):
        each.path.mkdir()
        each.metrics.write_text(json.dumps({"step": 1, "loss": 2.5, "lr": 0.1, "grad_norm": 1.0}) + "\n")
    none: dict[str, Any] = {
        **{
            part: {}
            for part in ("data", "tokenizer", "model", "config", "layout", "batch", "deepspeed", "packages")
        },
        "loss_chunk": 1,
        "devices": [],
        "python": "3.12",
        "dstrain": "0.1",
        "source": None,
    }
    first = none | {"image": path("image", length), "variables": {name("NAME", length): path("was", length)}}
    now = none | {"image": path("other", length), "variables": {}}
    result = ReproduceResult(run.path, again.path, compare_bits(run, again), tuple(differences(first, now)))
    reproduce._show(result, make_console())
    values = (path("image", length), path("other", length), name("NAME", length), path("was", length))
    return Shown(("all 1 steps",), values, long_lines=True)


def print_checkpoints(length: int, **_: Any) -> Shown:
    whys = [f"state/{path(f'file{number}', length)} has 1,234,567 bytes" for number in range(3)]
    records = [
        CheckpointInfo(
            step=1_000_000 + number,
            path="there",
            bytes=123_456_789_012,
            layout=f"zero3-pp16-dp128-dualpipev-cpu{number}",
            loss=10.1234 + number,
            saved_at=1e9,
            state=DAMAGED,
            why=why,
            checksums=True,
            unknown_files=[path(f"unknown{number}", length)],
        )
        for number, why in enumerate(whys)
    ]
    records[0] = replace(records[0], state=COMPLETE, why=None, checksums=False)
    checkpoints._show(name("[red]run", length), records)
    numbers = [str(record.step) for record in records] + [f"{record.loss:.4f}" for record in records]
    values = [
        *(f"damaged: {why}" for why in whys[1:]),
        *(str(record.layout) for record in records),
        name("[red]run", length),
    ]
    values += [
        *(record.unknown_files[0] for record in records),
        "complete (written by an older dstrain without checksums: sizes only)",
    ]
    return Shown((*numbers, "123 GB", "damaged:"), tuple(values), long_lines=True)


def print_doctor(length: int, **_: Any) -> Shown:
    checks = [
        Check(
            name(f"n{number}", length),
            "shared memory",
            status,
            f"[bold] has 64.5 MB in {path(f'shm{number}', length)}",
            f"mount -o size=8g {path(f'fix{number}', length)} :smile:",
        )
        for number, status in enumerate((OK, WARNING, FAILED))
    ]
    make_console().print(doctor._table(checks))
    values = [text for check in checks for text in (check.host, check.message, check.fix)]
    return Shown(("ok", "warning", "failed", "64.5"), tuple(values))


def print_verify(length: int, folder: Path, **_: Any) -> Shown:
    rows = (
        VerifyRow("zero3-pp16-dp128-dualpipev-cpu", "DIFFERS", 1.25e-7, 2.5e-6, 3.75e-8, 12345.6),
        VerifyRow("zero2-pp2-dp2", f"refused: {path('refusal', length)} can't be split"),
    )
    bound = {"loss": 1e-5, "grad_norm": 1e-5, "weights": 1.5e-5}
    there = folder / name("verify", length)
    verify._show(VerifyResult(rows, bound, there), make_console())
    values = [row.layout for row in rows] + [rows[1].verdict, str(there / "verify.json")]
    numbers = ("1.2e-07", "2.5e-06", "3.7e-08", "1.5e-05", "12345.6", "DIFFERS", "allowed")
    return Shown(numbers, tuple(map(str, values)), long_lines=True)


def print_differences(length: int, **_: Any) -> Shown:
    found = [
        Difference("config", "lr", Value(0.000123456, f"{path('a', length)}:12"), Value(1.5, f"{path('b', length)}:1")),
        Difference("config", "data", Value(path("one", length), "--data"), Value(path("two", length), "default")),
        Difference("deepspeed", f"zero_optimization.{name('key', length)}", Value(500_000_000, "x"), Value()),
        Difference("versions", "dstrain", Value("0.1.0"), Value(name("0.2", length))),
    ]  # fmt: skip
    config._show_differences(found)
    values = [each.key for each in found] + [
        config._value(side) for each in found for side in (each.a, each.b)
    ]
    return Shown(("0.000123456", "1.5"), tuple(values), long_lines=True)


def print_deepspeed_json(length: int, patch: pytest.MonkeyPatch, **_: Any) -> Shown:
    made = long_plan(length)
    patch.setattr("dstrain.api.planning.plan_for", lambda resolved, events: SimpleNamespace(plan=made))
    config.show.main(["--origins"], standalone_mode=False)
    values = []
    for keys, value in leaves(made.deepspeed):
        key = ".".join(keys)
        values += [key, json.dumps(value), made.deepspeed_origins[key]]
    return Shown((), tuple(values), long_lines=True)


def print_end(length: int, folder: Path, **_: Any) -> Shown:
    run = RunFolder(folder / name("[b]run", length))
    kept = run.checkpoints / "step-000004"
    kept.mkdir(parents=True)
    manifest = make_manifest(
        step=4, run="1" * 32, identity={}, config={}, versions={}, saved_at=1.0, files={}
    )
    (kept / MANIFEST).write_text(json.dumps(manifest))
    words = {"prompt": f"open({path('prompt', length)!r})", "continuation": f"[red]{path('answer', length)}"}
    show_result(RunResult(run.path, 4, True, True, kept, 1.23456, **words), make_console())
    values = [
        words["continuation"],
        f"the model continues {words['prompt']!r}",
        str(run.path),
        str(run.metrics),
        str(run.logs),
    ]
    return Shown(("1.2346",), tuple(values), long_lines=True)


def print_what_to_type(length: int, **_: Any) -> Shown:
    hosts = tuple(Host(f"n{number}", 1) for number in range(2))
    run = RunFolder(Path(name("/[b]run", length)))
    job: Any = SimpleNamespace(
        planned=SimpleNamespace(placement=SimpleNamespace(hosts=hosts)), folder=run, resolved=load_config()
    )
    show_nodes(job, make_console(), dry_run=True)
    return Shown(("--node-rank 0", "--node-rank 1"), (str(run.path),), long_lines=True)


def print_statistics(length: int, **_: Any) -> Shown:
    numbers = {
        "files": 12_345,
        "bytes": 123_456_789_012,
        "documents": 1_234_567,
        "validation_documents": 23_456,
        "tokens": 345_678_901,
        "labels": 98_765_432,
        "train_rows": 87_654,
        "validation_rows": 7_654,
        "seq_len": 4_096,
    }
    source = path("corpus", length)
    show_statistics(
        {
            **numbers,
            "source": source,
            "padding": 0.0123,
            "labels_of_a_row": [3, 1_234.5, 4_000],
            "lengths": {"0": 2, "50": 345, "100": 4_096},
            "histogram": [[2, 3, 1], [2_048, 4_095, 1_234_566]],
            "dropped_documents": 765,
            "sources": [
                {
                    "name": f"source-{number}",
                    "trained": number < 2,
                    "rows": 34_567,
                    "data": {
                        **numbers,
                        "format": "prompt-completion",
                        "padding": 0.0456,
                    },
                }
                for number in range(3)
            ],
        },
        make_console(),
    )
    return Shown(
        (*(f"{number:,}" for number in numbers.values()), "98.8%", "765", "95.4%", "0.39", "source-2"),
        (source,),
        long_lines=True,
    )


def print_measured(length: int, **_: Any) -> Shown:
    rows = (
        Row("a step", "seconds", 1.5, 12.5),
        Row("throughput", "tokens/s", None, 1_234_567.0),
        Row("memory of the fullest rank", "bytes", 2e9, 3e9, note=path("note", length)),
        Row("traffic between stages", "bytes", 4.5e9, None),
    )
    held = HeldAgainst(path("run", length), long_plan(length), (3, 12_345), rows, (path("left out", length),))
    kept = Calibration(name("device", length), "bf16", 0.4321, path("run", length), (3, 12_345), "2026-01-31")
    show_held_against(held, kept, as_json=False)
    show_forgotten([kept], as_json=False)
    numbers = ("12.5 s", "1.5 s", "1,234,567", "2 GB", "3 GB", "+50 %", "4.5 GB", "43.21%")
    values = (held.run, rows[2].note, held.notes[0], kept.device)
    return Shown((*numbers, "12345"), (*(row.what for row in rows), *values), long_lines=True)


def print_rehearsal(length: int, **_: Any) -> Shown:
    made = long_plan(length)
    where = f"{path('there', length)}:123"
    reason, what = f"not flash: {path('reason', length)}", f"2 x activations {path('shape', length)}"
    answer: dict[str, Any] = {
        "stage": 1,
        "rank": 1,
        "peaks": {"parameters": 12_345_678, "loss": 2_345_678_901},
        "total": 45_678_901_234,
        "phase_totals": {"build": 98_765_432, STEP: 45_678_901_234},
        "fullest": [[34_567_890, what, where]],
        "messages": [
            {
                "phase": STEP,
                "kind": "all_gather_into_tensor",
                "dtype": "bfloat16",
                "device": "cuda",
                "elements": 1_234_567_890,
                "ranks": 1_024,
                "count": 4_321,
            }
        ],
        "waits": [{"phase": STEP, "what": "copy to device", "where": where, "count": 7_654}],
        "attention": [
            {
                "kernel": "memory-efficient",
                "reason": reason,
                "query": [2, 32, 4096, 128],
                "key": [2, 8, 4096, 128],
                "dtype": "bfloat16",
                "mask": "bool [1, 1, 7, 7]",
                "count": 8_765,
            }
        ],
        "wrong_devices": [{"phase": STEP, "what": path("wrong", length), "where": where, "count": 1}],
        "failures": [{"phase": "validation", "error": path("error", length), "where": where}],
        "seconds": {"build": 12.0},
        "host_bytes": 456_789_012,
    }
    sent = made.time.traffic if made.time else ()
    stage = compare(made.stage_memory[1], sent, answer)
    show_rehearsal(RehearsalResult(made, (stage,)), make_console())
    numbers = (
        "12.3 MB",
        "2.35 GB",
        "45.7 GB",
        "98.8 MB",
        "34.6 MB",
        "457 MB",
        "1,234,567,890",
        "1,024",
        "4,321",
    )
    wrong = f"{STEP}: {path('wrong', length)} ({where})"
    failed = f"validation: {path('error', length)} ({where})"
    values = (where, reason, wrong, failed, what, *LIMITS)
    return Shown((*numbers, "7,654", "8,765", "memory-efficient"), values)


MAKERS: dict[str, tuple[Callable[..., Shown], tuple[str, ...]]] = {
    "plan": (print_plan, ("plan", "picture", "estimates")),
    "plan of several sources": (print_plan_of_several_sources, ("plan",)),
    "plan of 4,096 ranks": (print_plan_of_a_large_machine, ("picture", "estimates")),
    "fit": (print_fit, ("fit",)),
    "explanation": (print_explanation, ()),
    "repetition": (print_repetition, ()),
    "checkpoints": (print_checkpoints, ("checkpoints",)),
    "doctor": (print_doctor, ("doctor",)),
    "verify": (print_verify, ("verify",)),
    "rehearsal": (print_rehearsal, ("rehearsal",)),
    "config diff": (print_differences, ("config",)),
    "config show": (print_deepspeed_json, ("config",)),
    "measured": (print_measured, ("measured",)),
    "the end": (print_end, ()),
    "node by node": (print_what_to_type, ()),
    "data stats": (print_statistics, ("samples",)),
}
"""What prints each of them, and the modules whose tables it shows."""


# --- reading it back


def can_be_read(text: str, value: str, *, whole: bool = False) -> bool:
    """Whether a value stands in a text: in one line, or (not ``whole``) in pieces below each other, which begin or
    end in the same column. Spaces do not count."""
    lines, wanted = text.splitlines(), "".join(value.split())
    if whole:  # a number and its unit may stand in two lines
        return all(re.search(rf"(?<![\w.,]){re.escape(word)}(?!\w|[.,]\d)", text) for word in value.split())
    width = max(map(len, lines), default=0)
    mirrored = [line.ljust(width)[::-1] for line in reversed(lines)]
    return _stacked(lines, wanted) or _stacked(mirrored, wanted[::-1])


def _stacked(lines: list[str], wanted: str) -> bool:
    return any(
        _continues(lines[number:], column, wanted)
        for number, line in enumerate(lines)
        for column, sign in enumerate(line)
        if sign == wanted[0]
    )


def _continues(lines: list[str], column: int, wanted: str) -> bool:
    """Whether the lines hold it from this column on: each a piece that ends where a word ends."""
    read, was_empty = {0}, False
    for number, line in enumerate(lines):
        if number and not was_empty and not line[column : column + 2].strip(" │"):
            was_empty = True
            continue  # rich folds a word that fills its column and leaves a line empty behind it
        was_empty = False
        read = {end for start in read for end in _pieces(line[column:], wanted, start)}
        if len(wanted) in read or not read:
            return bool(read)
    return False


def _pieces(line: str, wanted: str, start: int) -> Iterator[int]:
    """How far a line can bring us: all places where a word ends, and two words are one space apart."""
    at, before = start, ""
    for sign in line:
        if sign == " ":
            if before == " ":
                return
        elif at < len(wanted) and sign == wanted[at]:
            at += 1
        else:
            if not sign.isalnum() and at > start:
                yield at
            return
        if at == len(wanted):
            yield at
            return
        if sign == " " and at > start:
            yield at
        before = sign
    if at > start:
        yield at


def test_reading_finds_what_is_there_and_nothing_else() -> None:
    text = "a  /data/ab  x\n   c/def  12\n   g      34"
    assert can_be_read(text, "/data/abc/defg") and can_be_read(text, "1234")
    assert not can_be_read(text, "/data/abc/defh") and not can_be_read(text, "/data/abc/deg")
    assert not can_be_read("/data/ab…\n", "/data/abc") and not can_be_read("ab  x\nc", "abx")
    assert can_be_read("  a 134\n b  GB", "134 GB", whole=True)
    assert not can_be_read("1,23\n4", "1,234", whole=True)


# --- the law


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("what", MAKERS)
def test_nothing_is_cut(
    what: str,
    width: int,
    terminal: bool,
    length: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_terminal(monkeypatch, width, terminal=terminal)
    shown = MAKERS[what][0](length=length, folder=tmp_path, patch=monkeypatch)
    said = capsys.readouterr().out
    assert ("\x1b[" in said) <= terminal
    text = ANSI.sub("", said)
    assert "…" not in text
    if not shown.long_lines:
        # An explanation is text: without a terminal its lines have a fixed length.
        assert max(map(len, text.splitlines())) <= width, text
    for value in shown.whole:
        assert can_be_read(text, value, whole=True), f"{value}\n{text}"
    for value in shown.values:
        assert can_be_read(text, value), f"{value}\n{text}"


def set_terminal(patch: pytest.MonkeyPatch, width: int, *, terminal: bool) -> None:
    """What rich and click look at."""
    for variable in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        patch.delenv(variable, raising=False)
    patch.setenv("COLUMNS", str(width))
    patch.setenv("LINES", "50")
    patch.setenv("TERM", "xterm-256color")
    if terminal:
        patch.setenv("FORCE_COLOR", "1")


WORDS = st.text("abcdefghij0123456789./", min_size=1, max_size=40)
CELLS = st.lists(WORDS, min_size=0, max_size=4).map(" ".join)


def test_a_word_that_fills_its_column_is_read() -> None:
    assert can_be_read("0000000000\n0000000000\n          \n0000000000\n", "0" * 20 + " " + "0" * 10)


@given(st.data())
def test_any_table_can_be_read_at_any_width(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 6))
    columns = [
        Column(data.draw(st.sampled_from(["", "head", "two\nlines"])), gives=data.draw(st.booleans()),
               right=data.draw(st.booleans()))
        for _ in range(number)
    ]  # fmt: skip
    rows = data.draw(st.lists(st.lists(CELLS, min_size=number, max_size=number), min_size=1, max_size=4))
    width = data.draw(st.integers(8, 120))
    table = FoldingTable(*columns, lines=data.draw(st.sampled_from([None, SQUARE])))
    for row in rows:
        table.add_row(*row)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for row in rows:
        for cell, column in zip(row, columns, strict=True):
            assert not cell or can_be_read(text, cell), text
            if not column.gives and number > 1 and max(map(len, cell.split()), default=0) <= width // 4:
                assert can_be_read(text, cell, whole=True), text


def test_what_gives_way_gives_way_first() -> None:
    table = FoldingTable(Column("path", gives=True), Column("size", right=True))
    table.add_row("/a/path/of/thirty/letters/in/it", "1,234,567 MB")
    console = Console(width=30)
    with console.capture() as capture:
        console.print(table)
    assert capture.get().splitlines() == [
        "path                      size",
        "/a/path/of/thirty 1,234,567 MB",
        "/letters/in/it                ",
    ]


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_the_live_line_leaves_out_whole_parts(
    width: int,
    terminal: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_terminal(monkeypatch, width, terminal=terminal)
    record: dict[str, Any] = {
        "step": 1234,
        "loss": 10.98765,
        "lr": 3.21e-4,
        "grad_norm": 1.5,
        "tokens": 10**9,
        "seconds": 4.0,
    }
    with ConsoleEvents(make_console()) as events:
        events.planned(replace(long_plan(10), config=long_plan(10).config | {"steps": 12340}))
        events.started(tmp_path, "bash launch.sh")
        events.step(Step(**(record | {"step": 1233, "tokens": 10**8}), metrics={"validation_loss": 9.87654}))
        events.validated(1233, 9.87654, {})
        capsys.readouterr()
        events.step(Step(**record, metrics=record))
    parts = ("step 1234/12340", "loss 10.9877", "validation 9.8765", "lr 3.21e-04", "grad 1.500",
             "tokens/s 225,000,000", "left 12:20:24")  # fmt: skip
    said = [line.strip() for line in re.split(r"[\r\n]+", ANSI.sub("", capsys.readouterr().out))]
    if not terminal:
        assert "  ".join(parts) in said
        return
    (shown,) = (
        {line for line in said if line.startswith("step 1234/")} if width >= 40 else {"  ".join(said).strip()}
    )
    kept = [part for part in parts if part in shown]
    assert re.split(" {2,}", shown) == kept and parts[0] in kept and parts[1] in kept
    assert len(shown) <= max(width, 30)
    assert (kept == list(parts)) == (width > 110)


# --- and nobody goes around it


def sources() -> dict[str, ast.Module]:
    return {
        str(file.relative_to(PACKAGE)): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(PACKAGE.rglob("*.py"))
    }


THE_HOME = "cli/showing/tables.py"
CUTTING = {
    "rich.table",
    "rich.columns",
    "rich.panel",
    "rich.progress",
    "rich.tree",
    "rich.layout",
    "rich.align",
}


def offences(tree: ast.Module) -> Iterator[str]:
    """What cuts by rich's own choice, or makes a console that does not know our rules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            modules = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules = {alias.name for alias in node.names}
        else:
            modules = set()
        yield from modules & CUTTING
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("Console", "print_json", "shorten", "get_console"):
                yield called
            yield from (word.arg for word in node.keywords if word.arg in ("no_wrap", "overflow"))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "…" in node.value:
            yield "…"


def test_all_tables_are_made_in_one_place() -> None:
    found = {file: set(offences(tree)) for file, tree in sources().items() if file != THE_HOME}
    assert not {file: what for file, what in found.items() if what}, "FoldingTable and make_console, please"


@pytest.mark.parametrize(
    "code",
    ["from rich.table import Table", "from rich import table", "import rich.progress", "Console(width=3)",
     "rich.console.Console()", "table.add_column('x', no_wrap=True)", "print('a…')"],
)  # fmt: skip
def test_going_around_it_is_seen(code: str) -> None:
    assert list(offences(ast.parse(code)))


def test_every_table_is_shown_above() -> None:
    with_tables = {
        Path(file).stem
        for file, tree in sources().items()
        if file != THE_HOME
        and any(
            isinstance(node, ast.Call) and getattr(node.func, "id", "") == "FoldingTable"
            for node in ast.walk(tree)
        )
    }
    assert with_tables == {module for _, modules in MAKERS.values() for module in modules}
