"""Conversations through the command line: what is trained is what Hugging Face's chat template says, in every layout.

The yardstick is a plain loop over each conversation alone, with the tokens and the mask that ``apply_chat_template``
of the exported tokenizer gives. Of dstrain it takes the initial weights, and which conversations are in which step.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dstrain.config.schema import RunConfig
from dstrain.data.chat.options import RecordOptions
from dstrain.data.prepare import prepare
from dstrain.data.rows.order import SampleOrder
from dstrain.model.architecture import load_config
from dstrain.runs.run_folder import RunFolder, read_metrics
from tests.e2e.test_families import EPS, LR, SEED, adamw, initial_model
from tests.support.e2e import Said

pytestmark = pytest.mark.timeout(400)

STEPS, SEQ_LEN, GLOBAL_BATCH = 4, 128, 8
TRAINING = f"""\
model: model
tokenizer: bytes
too_long: drop
validation: 0
seq_len: {SEQ_LEN}
steps: {STEPS}
global_batch: {GLOBAL_BATCH}
seed: {SEED}
lr: {LR}
lr_schedule: constant
warmup_steps: 0
eps: {EPS}
sample_tokens: 0
"""
CHAT = f"""\
data: chat.jsonl
{TRAINING}"""
LAYOUTS = [
    ("--zero", "1", "--pipeline", "2", "--micro-batch", "2"),
    ("--zero", "2", "--data-parallel", "2", "--micro-batch", "1"),
    ("--zero", "3", "--data-parallel", "2", "--micro-batch", "4", "--no-pack"),
]
MORE_LAYOUTS = [
    ("--zero", "0", "--micro-batch", "8"),
    ("--zero", "0", "--micro-batch", "1"),
    ("--zero", "0", "--pipeline", "4", "--micro-batch", "1"),
    ("--zero", "0", "--pipeline", "4", "--micro-batch", "2", "--no-pack"),
    ("--zero", "1", "--data-parallel", "4", "--micro-batch", "1"),
    ("--zero", "1", "--pipeline", "2", "--data-parallel", "2", "--micro-batch", "1"),
    ("--zero", "1", "--pipeline", "2", "--data-parallel", "2", "--micro-batch", "2", "--no-pack"),
    (
        "--zero",
        "2",
        "--pipeline",
        "1",
        "--data-parallel",
        "2",
        "--micro-batch",
        "2",
        "--activation-checkpointing",
    ),
    ("--zero", "3", "--data-parallel", "4", "--micro-batch", "2"),
    ("--zero", "3", "--data-parallel", "2", "--micro-batch", "1"),
]


def write_conversations(path: Path) -> list[list[dict[str, Any]]]:
    """Short and long ones, with answers of one word and of many: micro-batches have very unequal numbers of labels."""
    draw = random.Random(11)
    words = ["the", "a", "of", "model", "train", "data", "rank", "stage", "layer"]

    def say(most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, most)))

    found = []
    for number in range(60):
        messages = [{"role": "system", "content": "Be brief."}] if number % 4 == 0 else []
        for _ in range(draw.choice([1, 1, 2])):
            messages.append({"role": "user", "content": say(4)})
            answer: dict[str, Any] = {"role": "assistant", "content": say(draw.choice([1, 10]))}
            if number % 7 == 0 and not messages[:-1]:
                answer["weight"] = 0
            messages.append(answer)
        if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
            messages += [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
        found.append(messages)
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in found))
    return found


@pytest.fixture
def chat(place: Path) -> list[list[dict[str, Any]]]:
    (place / "chat.yaml").write_text(CHAT)
    return write_conversations(place / "chat.jsonl")


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.heavy) for layout in MORE_LAYOUTS)],
    ids=lambda layout: " ".join(layout).replace("--", ""),
)
def test_a_layout_trains_as_a_plain_loop_over_each_conversation(
    layout: tuple[str, ...],
    chat: list[list[dict[str, Any]]],
    dstrain: Callable[..., Said],
    place: Path,
    cache: Path,
) -> None:
    said = dstrain("run", "--config", "chat.yaml", "--name", "run", *layout)
    assert said.code == 0, said.out + said.err
    records = read_metrics(RunFolder(place / "runs" / "run").metrics)
    exported = dstrain("export", "run", "out", "--no-loss")
    assert exported.code == 0, exported.err
    losses, norms, hf = plain_loop(place, chat, cache, pack="--no-pack" not in layout)
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-4)
    trained = AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32)
    for (name, found), (_, wanted) in zip(trained.named_parameters(), hf.named_parameters(), strict=True):
        assert float((found - wanted).abs().max()) < 1e-6, name


def plain_loop(
    place: Path, chat: list[list[dict[str, Any]]], cache: Path, *, pack: bool
) -> tuple[list[float], list[float], PreTrainedModel]:
    """Losses and gradient norms, and the model in the end."""
    tokenizer = AutoTokenizer.from_pretrained(place / "out")
    known = {}
    for messages in chat:
        found = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        ids, mask = list(found["input_ids"]), np.array(found["assistant_masks"], bool)
        turns = np.split(np.arange(mask.size), np.flatnonzero(np.diff(mask.astype(int))) + 1)
        turns = [turn for turn in turns if mask[turn[0]]]
        answers = [message for message in messages if message["role"] == "assistant"]
        for turn, answer in zip(turns, answers, strict=True):
            mask[turn] = answer.get("weight") != 0
        known[tuple(ids)] = mask
    rows = prepare(
        str(place / "chat.jsonl"),
        "bytes",
        SEQ_LEN,
        0.0,
        cache / "data",
        pack,
        records=RecordOptions(too_long="drop"),
    ).train
    hf = initial_model(load_config(place / "model"))
    choices = RunConfig()
    optimizer = adamw(hf, choices)
    order = SampleOrder(len(rows), GLOBAL_BATCH, SEED)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        batch = rows.rows(order.sample_ids(step))
        conversations = [
            one
            for ids, positions in zip(batch.input_ids, batch.position_ids, strict=True)
            for one in np.split(ids, np.flatnonzero(positions == 0)[1:])
        ]
        whole = [known_as(conversation.tolist(), known) for conversation in conversations]
        counts = [int(known[ids][1:].sum()) for ids in whole]
        labels = sum(counts)
        assert max(counts) > 4 * min(counts), "they are to be very unequal"
        total = 0.0
        for ids in whole:
            tokens = torch.tensor([ids])
            wanted = torch.where(torch.from_numpy(known[ids]), tokens[0], -100)[1:]
            logits = hf(input_ids=tokens, use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits, wanted, reduction="sum") / labels
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(hf.parameters(), choices.gradient_clipping)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, hf


def known_as(ids: list[int], known: dict[tuple[int, ...], Any]) -> tuple[int, ...]:
    """The conversation without the padding behind it."""
    while tuple(ids) not in known:
        assert ids and ids[-1] == 256, "no conversation of the file"
        ids = ids[:-1]
    return tuple(ids)


def test_the_export_answers_and_holds_the_template(
    chat: list[list[dict[str, Any]]], dstrain: Callable[..., Said], place: Path
) -> None:
    more = ("--set", "validation=0.2", "--set", "sample_tokens=3", "--set", "prompt=Hi", "--steps", "2")
    said = dstrain(
        "run", "--config", "chat.yaml", "--name", "run", "--pipeline", "2", "--micro-batch", "2", *more
    )
    assert said.code == 0, said.out + said.err
    result = json.loads((place / "runs" / "run" / "result.json").read_text())
    assert result["continuation"].startswith("user: Hi")
    exported = dstrain("export", "run", "out")
    assert exported.code == 0, exported.err
    tokenizer = AutoTokenizer.from_pretrained(place / "out")
    assert "generation" in tokenizer.chat_template
    text = tokenizer.apply_chat_template(chat[0], tokenize=False)
    assert text.endswith("<|endoftext|>")
    answer = dstrain("generate", "out", "Hi", "--chat", "--tokens", "4", "--system", "Be brief.")
    assert answer.code == 0, answer.err
    assert "Hi" not in answer.out and "assistant:" not in answer.out
    more = dstrain("resume", "run", "--steps", "4", "--data-parallel", "2", "--pipeline", "1")
    assert more.code == 0, more.out + more.err
    steps = [record["step"] for record in read_metrics(RunFolder(place / "runs" / "run").metrics)]
    assert steps == [0, 1, 2, 3, 4]


def test_samples_and_statistics(
    chat: list[list[dict[str, Any]]], dstrain_here: Callable[..., Said], place: Path
) -> None:
    said = dstrain_here("data", "show", "--config", "chat.yaml", "--json", "-n", "500")
    assert said.code == 0, said.err
    samples = json.loads(said.out)
    trained = [piece["text"] for sample in samples for piece in sample["pieces"] if piece["trained"]]
    answers = [
        f"{message['content']}<|endoftext|>"
        for messages in chat
        if len(text_of(messages)) <= SEQ_LEN
        for message in messages
        if message["role"] == "assistant" and message.get("weight") != 0
    ]
    assert sorted(trained) == sorted(answers)
    for sample in samples:
        assert sum(piece["tokens"] for piece in sample["pieces"]) + sample["padding"] == SEQ_LEN
        assert sample["labels"] == sum(piece["tokens"] for piece in sample["pieces"] if piece["trained"])
    statistics = json.loads(dstrain_here("data", "stats", "--config", "chat.yaml", "--json").out)
    assert statistics["train_rows"] == len(samples)
    assert statistics["labels"] == sum(sample["labels"] for sample in samples)
    shown = dstrain_here("data", "show", "--config", "chat.yaml", "-n", "1")
    assert "train" in shown.out and "sample 0" in shown.out
    assert "assistant: " in shown.out


def text_of(messages: list[dict[str, Any]]) -> list[int]:
    """As many elements as the conversation has tokens."""
    text = "".join(f"{message['role']}: {message['content']}#" for message in messages)
    return list(text.encode())


def test_what_a_sample_of_text_trains_is_shown_to_its_last_label(
    dstrain_here: Callable[..., Said], place: Path
) -> None:
    (place / "text.txt").write_text(
        "".join(chr(97 + at % 26) for at in range(200)) + "\u4f60\u597d \U0001f600" * 9
    )
    chosen = (
        "--model",
        "model",
        "--tokenizer",
        "bytes",
        "--data",
        "text.txt",
        "--seq-len",
        "64",
        "--set",
        "validation=0",
    )
    samples = json.loads(dstrain_here("data", "show", *chosen, "-n", "9", "--json").out)
    for sample, following in pairwise(samples):
        trained = [piece for piece in sample["pieces"] if piece["trained"]]
        assert sum(piece["tokens"] for piece in trained) == sample["labels"] == 64
        assert trained[-1]["beyond"] and trained[-1]["ids"][0] in following["pieces"][0]["text"].encode()
    said = dstrain_here("data", "show", *chosen, "-n", "9", "--html", "page.html")
    assert said.code == 0, said.err
    text = "".join(
        text for style, _, text in Page((place / "page.html").read_text()).tokens if "beyond" not in style
    )
    assert "\u4f60\u597d \U0001f600" in text


def test_texts_are_shown_too(dstrain_here: Callable[..., Said], place: Path) -> None:
    arguments = ("--model", "model", "--data", "text.jsonl", "--seq-len", "64", "--json")
    for pack in ("--pack", "--no-pack"):
        [sample] = json.loads(dstrain_here("data", "show", *arguments, pack, "-n", "1").out)
        text = "".join(piece["text"] for piece in sample["pieces"])
        assert "the quick brown fox" in text
        assert not sample["pieces"][0]["trained"] and sample["pieces"][0]["tokens"] == 1


def test_the_recipe_for_conversations(
    chat: list[list[dict[str, Any]]], dstrain: Callable[..., Said], place: Path
) -> None:
    first = dstrain("run", "--config", "chat.yaml", "--name", "base", "--steps", "1", "--micro-batch", "4")
    assert first.code == 0, first.err
    assert dstrain("export", "base", "base", "--no-loss").code == 0
    more = ("--steps", "2", "--global-batch", "4", "--seq-len", "128", "--set", "sample_tokens=2")
    said = dstrain(
        "run", "--recipe", "sft", "--model", "base", "--data", "chat.jsonl", "--name", "run", *more
    )
    assert said.code == 0, said.out + said.err
    steps = read_metrics(RunFolder(place / "runs" / "run").metrics)
    assert [record["step"] for record in steps] == [0, 1, 2]
    assert steps[-1]["validation_loss"] < steps[0]["validation_loss"] * 1.01
    plan = dstrain(
        "plan", "--init", "pretrained", "--model", "base", "--data", "chat.jsonl", "--set", "too_long=drop"
    )
    assert plan.code == 0, plan.err
    assert "sft.yaml:" in plan.out and "1e-05" in plan.out


class Page(HTMLParser):
    """The tokens of a page by their class, and what its titles say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tokens: list[tuple[str, str, str]] = []
        self._open: tuple[str, str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert tag not in ("script", "b", "img"), "what the data say is no part of the page"
        if tag == "span" and "title" in found:
            self._open = (str(found["class"]), str(found["title"]))
            self.tokens.append((*self._open, ""))

    def handle_data(self, data: str) -> None:
        if self._open:
            self.tokens[-1] = (*self._open, self.tokens[-1][2] + data)

    def handle_endtag(self, tag: str) -> None:
        self._open = None


def test_a_page_of_samples(dstrain_here: Callable[..., Said], place: Path) -> None:
    chat = [
        {"role": "user", "content": "<script>alert(1)</script>"},
        {"role": "assistant", "content": "<b>&</b>\n"},
    ]
    (place / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (place / "chat.yaml").write_text(CHAT)
    said = dstrain_here("data", "show", "--config", "chat.yaml", "-n", "1", "--html", "page.html")
    assert said.code == 0 and "1 samples written to page.html" in said.out, said
    page = Page((place / "page.html").read_text())
    trained = "".join(text for style, _, text in page.tokens if style == "t")
    assert trained.replace("↵\n", "\n") == "<b>&</b>\n<|endoftext|>"
    assert all(("not trained" in title) == (style == "c") for style, title, _ in page.tokens)
    positions = [int(title.split("position ")[1].split(",")[0]) for _, title, _ in page.tokens]
    assert positions == list(range(len(positions)))
    both = dstrain_here("data", "show", "--config", "chat.yaml", "--html", "page.html", "--json")
    assert both.code == 2 and "--json and --html" in both.err
    nowhere = dstrain_here("data", "show", "--config", "chat.yaml", "--html", "no/page.html")
    assert nowhere.code == 2 and "the page can't be written" in nowhere.err and "hint" in nowhere.err
