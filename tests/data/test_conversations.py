"""A corpus of conversations: prepared, cached, split, and refused with its place."""

import gzip
import json

import numpy as np
import pytest

from dstrain.data.chat.options import RecordOptions
from dstrain.data.dataset_summary_cache import tokenizer_state
from dstrain.data.prepare import prepare
from dstrain.data.rows.packing import IGNORED
from dstrain.data.tokenizing.tokenizers import ByteTokenizer
from dstrain.errors import DstrainError


def record(number, answer="yes", **others):
    turns = [{"role": "user", "content": f"is {number} a number?"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **others}


def write(path, records):
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return str(path)


def prepared(tmp_path, source, seq_len=64, validation=0.0, pack=True, **options):
    cache = tmp_path / "cache"
    return prepare(source, "bytes", seq_len, validation, cache, pack, records=RecordOptions(**options))


def trained(data, rows=None):
    """What the labels of all rows spell."""
    rows = rows or data.train
    labels = rows.rows(np.arange(len(rows))).labels
    return ByteTokenizer().token_text(labels[labels != IGNORED])


def test_answers_are_trained_and_counted(tmp_path):
    source = write(tmp_path / "c.jsonl", [record(number) for number in range(20)])
    data = prepared(tmp_path, source, validation=0.2)
    assert (
        trained(data) == "yes<|endoftext|>" * 16 and trained(data, data.validation) == "yes<|endoftext|>" * 4
    )
    summary = data.summary()
    assert (summary["format"], summary["documents"], summary["trained_tokens"]) == ("messages", 20, 80)
    assert summary["ends_with"] == "<|endoftext|>" and summary["stop_tokens"] == [256]
    assert "generation" in summary["chat_template"]


def test_the_same_from_the_cache_and_in_other_files(tmp_path):
    """Plain, packed, and as one array; in pieces of another size."""
    records = [record(number) for number in range(50)]
    plain = prepared(tmp_path, write(tmp_path / "c.jsonl", records))
    again = prepared(tmp_path, str(tmp_path / "c.jsonl"))
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress((tmp_path / "c.jsonl").read_bytes()))
    others = [prepared(tmp_path, str(tmp_path / name)) for name in ("a.json", "z.jsonl.gz")]
    assert {data.fingerprint for data in (plain, again, *others)} == {plain.fingerprint}
    assert again.folder == plain.folder and again.summary() == plain.summary()


def test_the_fingerprint_is_of_the_content_alone(tmp_path, monkeypatch):
    source = write(tmp_path / "c.jsonl", [record(number, "word " * number) for number in range(1, 40)])
    whole = prepared(tmp_path, source, seq_len=256)
    monkeypatch.setattr("dstrain.data.chat.corpus._BATCH", 300)
    assert prepared(tmp_path / "other", source, seq_len=256).fingerprint == whole.fingerprint


CHOICES = [
    {"train_on": "all"},
    {"train_on": "last"},
    {"chat_template": "chatml"},
    {"on_bad_record": "skip"},
]


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_other_choices_have_tokens_of_their_own(tmp_path, options):
    source = write(tmp_path / "c.jsonl", [record(number) for number in range(9)])
    plain, other = prepared(tmp_path, source, 96), prepared(tmp_path, source, 96, **options)
    assert other.folder != plain.folder
    assert prepared(tmp_path, source, 96).folder == plain.folder


def test_a_changed_chat_template_is_another_tokenizer_s_state(tmp_path):
    folder = tmp_path / "tokenizer"
    ByteTokenizer().save_pretrained(folder)
    states = []
    for text in ("one", "another", None):
        if text is not None:
            (folder / "chat_template.jinja").write_text(text)
        else:
            (folder / "chat_template.jinja").unlink()
        states.append(tokenizer_state(str(folder)))
    assert states[0] != states[1] != states[2] != states[0]


def test_a_template_that_the_plan_holds_needs_no_file(tmp_path):
    source = write(tmp_path / "c.jsonl", [record(number) for number in range(9)])
    file = tmp_path / "t.jinja"
    file.write_text(
        "{%- for m in messages -%}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{%- endfor -%}"
    )
    data = prepared(tmp_path, source, chat_template=str(file))
    text = data.summary()["chat_template"]
    file.unlink()
    kept = prepared(tmp_path / "other", source, chat_template=str(file), template_text=text)
    assert kept.fingerprint == data.fingerprint


BAD = {
    "not JSON": ("{bad", "this line is not JSON"),
    "a number": ("7", "this line holds a number, not an object"),
    "another format": ({"text": "a"}, "this record is in the format text, and the one at"),
    "no answer": ({"messages": [{"role": "user", "content": "a"}]}, "no message is the assistant's"),
    "a special token": (record(1, "no<|endoftext|>yes"), "spells the special token"),
    "nothing trained": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        "no turn of this conversation is trained",
    ),
    "half a character": (record(1, "\ud800"), "half a surrogate pair"),
    "nested": ({"messages": json.loads("[" * 500 + "]" * 500)}, "messages[0] is an array"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_or_left_out(tmp_path, name):
    bad, words = BAD[name]
    source = write(tmp_path / "c.jsonl", [record(1), bad, record(2)])
    with pytest.raises(DstrainError) as refused:
        prepared(tmp_path, source)
    assert words in refused.value.message
    assert refused.value.where == f"{source}:2"
    data = prepared(tmp_path, source, on_bad_record="skip")
    assert data.documents == 2 and data.empty_documents == 1
    [line] = (data.folder / "skipped.txt").read_text().splitlines()
    assert line.startswith(f"{source}:2: ") and words in line
    first = write(tmp_path / "d.jsonl", [bad, record(1), record(2)])
    assert prepared(tmp_path, first, data_format="messages", on_bad_record="skip").documents == 2


def test_what_is_too_long(tmp_path):
    source = write(tmp_path / "c.jsonl", [record(1), record(2, "yes " * 40), record(3)])
    with pytest.raises(DstrainError, match="1 of 3 conversations have more than seq_len = 64 tokens"):
        prepared(tmp_path, source)
    dropped, cut = (prepared(tmp_path, source, too_long=how) for how in ("drop", "cut"))
    assert (dropped.dropped_documents, dropped.cut_documents, len(dropped.train)) == (1, 0, 2)
    assert (cut.dropped_documents, cut.cut_documents) == (0, 1)
    with pytest.raises(DstrainError, match="no conversation has a part to train on"):
        prepared(tmp_path, source, seq_len=8, too_long="drop")


def test_what_is_mixed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "c.jsonl", [record(1), record(2)])
    (folder / "README.md").write_text("what it is")
    with pytest.raises(DstrainError) as refused:
        prepared(tmp_path, str(folder))
    assert "README.md is a text, and no messages records; c.jsonl holds messages" in refused.value.message
    with pytest.raises(DstrainError, match="no format has a field 'mesages'"):
        prepared(tmp_path, str(folder / "c.jsonl"), data_fields={"mesages": "dialog"})
    with pytest.raises(DstrainError, match="a single conversation can't be divided"):
        prepared(tmp_path, write(tmp_path / "one.jsonl", [record(1)]), validation=0.1)
    with pytest.raises(DstrainError, match="the chat template can't be read"):
        prepared(tmp_path, str(folder / "c.jsonl"), chat_template="x" * 5000)


def test_text_under_another_name(tmp_path):
    source = write(tmp_path / "c.jsonl", [{"content": "a text of some length " * 5}] * 4)
    assert prepared(tmp_path, source).summary()["text_field"] == "content"
    both = write(tmp_path / "d.jsonl", [{"content": "a text of some length " * 5, "id": 1}] * 4)
    with pytest.raises(DstrainError, match="no field 'text'"):
        prepared(tmp_path, both)
    assert prepared(tmp_path, both, data_fields={"text": "content"}).documents == 4
