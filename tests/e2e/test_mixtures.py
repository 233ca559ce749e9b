"""Several sources at once: texts and conversations in one run, by weights and phases, with a loss for each set.

The yardstick is a plain loop over each document alone. Of dstrain it takes the initial weights, and which rows are in
which step; that these have the shares that were asked for is checked by themselves.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dstrain.config.schema import RunConfig
from dstrain.data.rows.packing import IGNORED
from dstrain.data.training_data import TrainingData
from dstrain.model.architecture import load_config
from dstrain.planning.plan import Plan
from dstrain.runs.run_folder import RunFolder, read_metrics
from dstrain.train.run_data import prepare_run_data
from tests.e2e.test_chat import GLOBAL_BATCH, SEQ_LEN, STEPS, TRAINING, write_conversations
from tests.e2e.test_families import SEED, adamw, initial_model
from tests.support.e2e import Said

pytestmark = pytest.mark.timeout(400)

MIXTURE = f"""\
data:
  - text.jsonl
  - {{path: numbers.txt, limit: 1, validation: 0.25}}
  - {{path: chat.jsonl, name: chat, format: messages, validation: more.jsonl}}
data_phases:
  - {{until: 0.5, weights: {{text: 2, numbers: 1, chat: 1}}}}
  - {{weights: {{chat: 3, text: 1}}}}
eval_every: 2
eval_samples: 6
{TRAINING}"""
LAYOUTS = [
    ("--zero", "0", "--micro-batch", "8"),
    ("--zero", "1", "--pipeline", "2", "--data-parallel", "2", "--micro-batch", "1"),
]
MORE_LAYOUTS = [
    ("--zero", "0", "--pipeline", "4", "--micro-batch", "2"),
    ("--zero", "2", "--data-parallel", "4", "--micro-batch", "2"),
    ("--zero", "3", "--data-parallel", "2", "--micro-batch", "2", "--no-pack"),
    ("--zero", "1", "--pipeline", "2", "--micro-batch", "2", "--no-pack"),
]


@pytest.fixture
def mixture(place: Path) -> Path:
    (place / "mixture.yaml").write_text(MIXTURE)
    (place / "numbers.txt").write_text(" ".join(str(number) for number in range(4000)))
    write_conversations(place / "chat.jsonl")
    lines = (place / "chat.jsonl").read_text().splitlines(keepends=True)
    (place / "more.jsonl").write_text("".join(lines[::5]))
    return place


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.heavy) for layout in MORE_LAYOUTS)],
    ids=lambda layout: " ".join(layout).replace("--", ""),
)
def test_a_layout_trains_as_a_plain_loop_over_each_document(
    layout: tuple[str, ...], mixture: Path, dstrain: Callable[..., Said]
) -> None:
    said = dstrain("run", "--config", "mixture.yaml", "--name", "run", *layout)
    assert said.code == 0, said.out + said.err
    folder = RunFolder(mixture / "runs" / "run")
    records = {record["step"]: record for record in read_metrics(folder.metrics)}
    data = prepare_run_data(Plan.read(folder.plan))
    check_shares(data)
    losses, validation = plain_loop(mixture, data)
    assert [records[step]["loss"] for step in range(1, STEPS + 1)] == pytest.approx(losses, rel=1e-5)
    for step in (0, 2, 4):
        found = {key: value for key, value in records[step].items() if key.startswith("validation_loss")}
        assert found == pytest.approx(validation[step], rel=1e-5), step
        assert list(found) == ["validation_loss", "validation_loss/numbers", "validation_loss/chat"]
    result = json.loads(folder.result.read_text())
    assert {key: result[key] for key in found} == found


def check_shares(data: TrainingData) -> None:
    """Those of the tokens of each half of the run are the weights, to within two rows for each source."""
    order = data.order(GLOBAL_BATCH, SEED)
    rows = [len(source.data.train) for source in data.sources]
    for steps, weights in (((1, 2), (2, 1, 1)), ((3, 4), (1, 0, 3))):
        ids = np.concatenate([order.sample_ids(step) for step in steps])
        numbers = np.searchsorted(np.cumsum(rows), ids, side="right")
        tokens = [
            int((numbers == at).sum()) * (1 - source.data.train.padding) * SEQ_LEN
            for at, source in enumerate(data.sources)
        ]
        for weight, found in zip(weights, tokens, strict=True):
            assert abs(found - sum(tokens) * weight / sum(weights)) <= 2 * SEQ_LEN


def plain_loop(place: Path, data: TrainingData) -> tuple[list[float], dict[int, dict[str, float]]]:
    """The loss of each step, and the validation losses before the first, in the middle and in the end."""
    hf = initial_model(load_config(place / "model"))
    choices = RunConfig()
    optimizer = adamw(hf, choices)
    order = data.order(GLOBAL_BATCH, SEED)
    losses, validation = [], {0: validation_losses(hf, data)}
    for step in range(1, STEPS + 1):
        documents = documents_of(data.rows, order.sample_ids(step))
        labels = sum(int((wanted != IGNORED).sum()) for _, wanted in documents)
        total = 0.0
        for ids, wanted in documents:
            loss = loss_of(hf, ids, wanted) / labels
            loss.backward()
            total += loss.item()
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(hf.parameters(), choices.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            validation[step] = validation_losses(hf, data)
    return losses, validation


@torch.no_grad()
def validation_losses(hf: Any, data: TrainingData) -> dict[str, float]:
    sums, counts = {}, {}
    for each in data.validation_sets:
        documents = documents_of(each.rows, np.arange(min(6, len(each.rows))))
        sums[each.name] = sum(loss_of(hf, ids, wanted).item() for ids, wanted in documents)
        counts[each.name] = sum(int((wanted != IGNORED).sum()) for _, wanted in documents)
    return {
        "validation_loss": sum(sums.values()) / sum(counts.values()),
        **{f"validation_loss/{name}": sums[name] / counts[name] for name in sums},
    }


def documents_of(rows: Any, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens and labels of each document in these rows."""
    batch = rows.rows(ids)
    found = []
    for tokens, positions, labels in zip(*batch, strict=True):
        borders = np.flatnonzero(positions == 0)[1:]
        found += zip(np.split(tokens, borders), np.split(labels, borders), strict=True)
    return found


def loss_of(hf: Any, ids: np.ndarray, wanted: np.ndarray) -> torch.Tensor:
    """Summed over the labels."""
    logits = hf(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0]
    return F.cross_entropy(logits, torch.tensor(wanted), ignore_index=IGNORED, reduction="sum")


def test_a_run_is_stopped_and_goes_on_with_another_layout_and_the_same_samples(
    mixture: Path, dstrain: Callable[..., Said]
) -> None:
    whole = dstrain("run", "--config", "mixture.yaml", "--name", "whole", "--micro-batch", "2")
    assert whole.code == 0, whole.err
    steps = (
        "--set",
        "data_phases=[{until: 2, weights: {text: 2, numbers: 1, chat: 1}}, {weights: {chat: 3, text: 1}}]",
    )
    first = dstrain(
        "run", "--config", "mixture.yaml", "--name", "part", "--micro-batch", "2", *steps, "--steps", "3"
    )
    assert first.code == 0, first.err
    rest = dstrain(
        "resume", "part", "--steps", "4", "--data-parallel", "2", "--pipeline", "2", "--micro-batch", "1"
    )
    assert rest.code == 0, rest.out + rest.err
    losses = {
        name: [record.get("loss") for record in read_metrics(RunFolder(mixture / "runs" / name).metrics)]
        for name in ("whole", "part")
    }
    assert losses["part"][1:] == pytest.approx(losses["whole"][1:], rel=1e-5)
    exported = dstrain("export", "part", "out")
    assert exported.code == 0, exported.out + exported.err
    lines = dict(
        line.split(maxsplit=1) for line in exported.out.splitlines() if line.startswith(("validation", "run"))
    )
    last = read_metrics(RunFolder(mixture / "runs" / "part").metrics)[-1]["validation_loss"]
    assert float(lines["validation"].split()[0]) == pytest.approx(last, rel=1e-4)
    again = dstrain("reproduce", "whole", "--name", "again")
    assert again.code == 0, again.out + again.err


def test_phases_by_fractions_end_where_they_did_when_a_run_goes_on_for_more_steps(
    mixture: Path, dstrain: Callable[..., Said]
) -> None:
    assert dstrain("run", "--config", "mixture.yaml", "--name", "run", "--steps", "2").code == 0
    said = dstrain("resume", "run", "--steps", "3")
    assert said.code == 0, said.err
    assert "phases of the data end where they did: after step 1" in said.out
    phases = Plan.read(RunFolder(mixture / "runs" / "run").plan).data.phases
    assert [phase.last_step for phase in phases] == [1, 3]
    others = "data_phases=[{until: 2, weights: {text: 1}}, {weights: {chat: 1, numbers: 1}}]"
    changed = dstrain("resume", "run", "--steps", "4", "--set", others)
    assert changed.code == 2 and "weights and phases" in changed.err


def test_samples_come_in_the_order_of_training_with_their_sources(
    mixture: Path, dstrain_here: Callable[..., Said]
) -> None:
    said = dstrain_here("data", "show", "--config", "mixture.yaml", "--json", "-n", str(STEPS * GLOBAL_BATCH))
    assert said.code == 0, said.err
    samples = json.loads(said.out)
    halves = [Counter(sample["source"] for sample in part) for part in (samples[:16], samples[16:])]
    assert set(halves[0]) == {"text", "numbers", "chat"} and set(halves[1]) == {"text", "chat"}
    for sample in samples:
        text = "".join(piece["text"] for piece in sample["pieces"])
        assert (sample["source"] == "chat") == ("assistant: " in text)
    shown = dstrain_here("data", "show", "--config", "mixture.yaml", "-n", "2").out
    assert f"sample 0 {samples[0]['source']}: " in shown
    table = dstrain_here("data", "stats", "--config", "mixture.yaml").out
    for name in ("text", "numbers", "chat", "validation", "epochs"):
        assert name in table
    plan = dstrain_here("plan", "--config", "mixture.yaml")
    assert plan.code == 0, plan.err
    assert "epochs" in plan.out and "numbers" in plan.out
    assert "no effect" not in plan.out, "too_long is for the conversations among them"


def test_a_validation_set_is_not_trained_on(mixture: Path, dstrain_here: Callable[..., Said]) -> None:
    (mixture / "own.py").write_text("def texts(kind='a'):\n    return [f'{kind} of many words'] * 400\n")
    (mixture / "folder").mkdir()
    (mixture / "folder" / "numbers.txt").write_text((mixture / "numbers.txt").read_text())
    kinds = "{path: 'own:texts', options: {kind: b}}"
    for data, validation, wrong in (
        ("[numbers.txt]", "[{path: ./numbers.txt, name: same}]", "validation set same: "),
        (
            "[{path: numbers.txt, validation: numbers.txt}]",
            "0",
            "numbers.txt is trained on too, in source numbers",
        ),
        ("[folder]", "[folder/numbers.txt]", "numbers.txt is trained on too, in source folder"),
        ("['own:texts']", "[{path: 'own:texts', name: own}]", "own:texts {} is trained on too"),
        ("['own:texts']", f"[{kinds[:-1]}, name: other}}]", None),
    ):
        chosen = ("--set", f"data={data}", "--set", f"validation={validation}", "--seq-len", "64")
        said = dstrain_here("plan", "--model", "model", "--tokenizer", "bytes", *chosen)
        assert (said.code == 0) if wrong is None else (said.code == 2 and wrong in said.err), said


def test_an_error_names_its_source(mixture: Path, dstrain_here: Callable[..., Said]) -> None:
    (mixture / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    for data, validation, said in (
        ("[numbers.txt, {path: bad.jsonl, name: mine}]", "0", "source mine: "),
        ("[numbers.txt]", "[bad.jsonl]", "validation set bad: "),
        ("[numbers.txt, {path: nowhere.txt, name: mine}]", "0", "source mine: there is no such file"),
    ):
        chosen = ("--set", f"data={data}", "--set", f"validation={validation}")
        found = dstrain_here("plan", "--model", "model", "--tokenizer", "bytes", *chosen)
        assert found.code == 2 and said in found.err and "hint" in found.err, found


def test_a_validation_list_changes_nothing_of_what_a_single_source_trains_on(
    mixture: Path, dstrain_here: Callable[..., Said]
) -> None:
    plans = []
    for validation in ("0", "[text.jsonl]", "[text.jsonl, {path: more.jsonl, name: chat}]"):
        chosen = (
            "--set",
            "data=numbers.txt",
            "--set",
            f"validation={validation}",
            "--set",
            "too_long=drop",
            "--json",
        )
        said = dstrain_here("plan", "--model", "model", "--tokenizer", "bytes", "--seq-len", "128", *chosen)
        assert said.code == 0, said.err
        plans.append(json.loads(said.out)["data"])
    assert len({plan["fingerprint"] for plan in plans}) == 1
    assert all(not plan["phases"] for plan in plans)
    assert [len(plan["sources"]) for plan in plans] == [0, 2, 3]


def test_the_recipe_for_a_mixture(place: Path, dstrain: Callable[..., Said]) -> None:
    for name, words in (
        ("web", "the rank of a stage"),
        ("code", "def step(rank):"),
        ("books", "Once upon a time"),
    ):
        (place / "data" / name).mkdir(parents=True)
        for number in range(3):
            (place / "data" / name / f"{number}.txt").write_text(f"{words} {number}\n" * 200)
    smaller = ("--steps", "5", "--global-batch", "4", "--seq-len", "64", "--set", "validation=0.1")
    said = dstrain("run", "--recipe", "pretrain-mix", "--model", "model", "--name", "run", *smaller)
    assert said.code == 0, said.out + said.err
    folder = RunFolder(place / "runs" / "run")
    losses = read_metrics(folder.metrics)[-1]
    assert {"validation_loss/web", "validation_loss/code", "validation_loss/books"} < losses.keys()
    plan = Plan.read(folder.plan)
    assert [phase.last_step for phase in plan.data.phases] == [4, 5]
    assert plan.origins["data"].startswith("pretrain-mix.yaml:")
