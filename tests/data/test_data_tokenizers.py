"""Tokenizers: bytes, and Hugging Face folders made here."""

import json
import subprocess
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.data.prepare import prepare
from dstrain.data.tokenizing.tokenizers import ByteTokenizer, load_tokenizer
from dstrain.errors import DstrainError

utf8_text = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A byte-level BPE with an end token; truncation and padding are on, to see that they don't bite."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the hat"] * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_truncation(5)
    backend.enable_padding()
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


@given(utf8_text)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_facts():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_document) == ("bytes", 257, 256)
    assert tokenizer.decode([104, 105, 256]) == "hi"
    assert tokenizer.decode([0xC3, 300]) == "\ufffd\ufffd"
    assert tokenizer.decode([]) == ""


def test_bytes_saved_for_hugging_face_give_the_same_ids(tmp_path):
    ours = ByteTokenizer()
    ours.save_pretrained(tmp_path)
    theirs = load_tokenizer(str(tmp_path))
    assert (theirs.vocab_size, theirs.end_of_document) == (257, 256)
    every_byte = "".join(map(chr, range(0x800))) + "語😀\r\n\t  x"
    assert theirs.encode(every_byte).tolist() == ours.encode(every_byte).tolist()
    assert theirs.decode(theirs.encode(every_byte)) == every_byte


def test_a_folder_encodes_whole_texts_without_special_tokens(hf_folder):
    tokenizer = load_tokenizer(str(hf_folder))
    text = "the cat sat on the mat, and the hat: é😀"
    ids = tokenizer.encode(text)
    assert ids.size > 5 and ids.dtype == np.uint16
    assert not {0, 1} & set(ids.tolist())
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document == 1
    written = json.loads((hf_folder / "tokenizer.json").read_text())
    ids_written = [*written["model"]["vocab"].values(), *(token["id"] for token in written["added_tokens"])]
    # Padding that is on in the file makes transformers add its own token for it.
    assert tokenizer.vocab_size in (max(ids_written) + 1, max(ids_written) + 2)
    batch = tokenizer.encode_batch(["the", "", text])
    assert [piece.tolist() for piece in batch] == [tokenizer.encode("the").tolist(), [], ids.tolist()]
    assert tokenizer.encode_batch([]) == []


def test_the_fingerprint_follows_the_content_not_the_place(hf_folder, tmp_path):
    for path in hf_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = load_tokenizer(str(hf_folder)).fingerprint
    assert load_tokenizer(str(tmp_path)).fingerprint == first
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "<s>"}))
    assert load_tokenizer(str(tmp_path)).fingerprint != first


def test_large_vocabularies_get_wider_integers():
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 1 << 16
    assert tokenizer.dtype == np.uint16
    tokenizer.vocab_size += 1
    assert tokenizer.dtype == np.uint32


def refused(name):
    with pytest.raises(DstrainError) as caught:
        load_tokenizer(str(name))
    return caught.value


def test_folders_that_hold_no_usable_tokenizer_are_refused(hf_folder, tmp_path):
    assert "a model on the hub" in refused("gpt2").hint
    assert "no tokenizer folder" in refused("").message
    assert "no tokenizer in this folder" in refused(tmp_path).message
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert "no tokenizer in this folder" in refused(tmp_path).message
    (tmp_path / "tokenizer.json").write_text("{")
    assert "can't load" in refused(tmp_path).message
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    error = refused(tmp_path)
    assert "no end-of-sequence token" in error.message
    assert error.where == str(tmp_path)


@pytest.mark.parametrize(
    ("files", "kind", "eos"),
    [
        (("vocab.json", "merges.txt"), "GPT2Tokenizer", "<|endoftext|>"),
        (("vocab.txt",), "BertTokenizer", "[SEP]"),
    ],
)
def test_a_vocabulary_without_its_class_says_how_to_name_it(files, kind, eos, tmp_path):
    content = {
        "vocab.json": '{"a": 0, "<|endoftext|>": 1}',
        "merges.txt": "#version: 0.2\n",
        "vocab.txt": "a\n[UNK]\n[CLS]\n[SEP]\n",
    }
    for name in files:
        (tmp_path / name).write_text(content[name])
    error = refused(tmp_path)
    assert "nor the class of its vocabulary" in error.message and f'"tokenizer_class": "{kind}"' in error.hint
    (tmp_path / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{kind}", "eos_token": "{eos}"}}')
    assert 0 in load_tokenizer(str(tmp_path)).encode("a")


def test_a_package_that_a_tokenizer_needs_is_what_to_install(tmp_path):
    if find_spec("mistral_common"):
        pytest.skip("mistral-common is installed")
    (tmp_path / "tekken.json").write_text('{"config": {"pattern": "x"}, "vocab": []}')
    error = refused(tmp_path)
    assert "needs mistral-common, which is not installed" in error.message
    assert "pip install mistral-common" in error.hint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "vocab.txt"])
def test_a_byte_order_mark_is_named(name, hf_folder, tmp_path):
    for path in hf_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + (path.read_bytes() if path.exists() else b"word\n"))
    error = refused(tmp_path)
    assert "byte order mark" in error.message and error.where == str(path)
    way_out = error.hint.removeprefix("remove it: ").replace("FILE", str(path))
    subprocess.run(["bash", "-c", way_out], check=True)
    if name == "vocab.txt":
        assert path.read_bytes() == b"word\n"
    assert load_tokenizer(str(tmp_path)).end_of_document == 1


@pytest.fixture
def like_llama(hf_folder, tmp_path):
    """A function: the same vocabulary, in a tokenizer that puts something around every text by itself."""

    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    def save(template: str, **tokens: str):
        backend = Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        folder = tmp_path / f"tokenizer-{len(list(tmp_path.iterdir()))}"
        given = {"bos_token": "<s>", "eos_token": "</s>", **tokens}
        PreTrainedTokenizerFast(tokenizer_object=backend, **given).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize(
    ("template", "choice", "begins"),
    [
        ("<s> $A", "auto", (0,)),
        ("<s> $A </s>", "auto", (0,)),
        ("$A", "auto", ()),
        ("$A </s>", "auto", ()),
        ("<s> $A", "never", ()),
        ("$A", "always", (0,)),
        ("<s> <s> $A", "auto", (0, 0)),
    ],
)
def test_documents_begin_as_the_tokenizer_begins_a_text(template, choice, begins, like_llama, tmp_path):
    folder = like_llama(template)
    tokenizer = load_tokenizer(str(folder), choice)
    assert tokenizer.begin_of_document == begins
    assert (tokenizer.begins_with, tokenizer.ends_with) == (" ".join(["<s>"] * len(begins)), "</s>")
    assert not {0, 1} & set(tokenizer.encode("the cat").tolist())
    words = tokenizer.encode("the cat").tolist()
    assert tokenizer.encode_prompt("the cat") == [*begins, *words], "nothing behind a prompt"
    assert tokenizer.encode_prompt("") == [*begins] or [1]

    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\n{"text": ""}\n{"text": "<s>the cat"}\n')
    data = prepare(str(tmp_path / "a.jsonl"), str(folder), 2, 0, tmp_path / "cache", begin=choice)
    spelled = [0, *words, 1] if len(begins) < 2 else [0, 0, 0, *words, 1]
    tokens = np.concatenate(
        [data.train.rows(np.array([row])).input_ids[0] for row in range(len(data.train))]
    ).tolist()
    wanted = [*begins, *words, 1, *spelled]  # what a text spells itself is not put in front of it again
    assert tokens == wanted[: len(tokens)] and len(tokens) >= len(wanted) - 1
    assert data.tokens == len(wanted) and data.empty_documents == 1
    assert (data.summary()["begins_with"], data.summary()["ends_with"]) == (tokenizer.begins_with, "</s>")


def test_tokens_are_cached_for_what_documents_begin_with(like_llama, tmp_path):
    folder = like_llama("<s> $A")
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    found = {
        choice: prepare(str(tmp_path / "a.txt"), str(folder), 4, 0, tmp_path / "cache", begin=choice)
        for choice in ("never", "auto", "always")
    }
    assert found["auto"].tokens == found["never"].tokens + 1
    assert found["auto"].fingerprint == found["always"].fingerprint != found["never"].fingerprint
    assert found["auto"].folder == found["always"].folder != found["never"].folder


def test_a_begin_token_that_is_not_there_is_refused(like_llama):
    with pytest.raises(DstrainError, match="no begin-of-sequence token"):
        load_tokenizer("bytes", "always")
    with pytest.raises(DstrainError, match="no begin-of-sequence token"):
        load_tokenizer(str(like_llama("$A", bos_token=None)), "always")


@pytest.mark.parametrize(("template", "begins"), [("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", [])])
def test_generate_continues_what_a_document_begins_with(template, begins, like_llama):
    from transformers import AutoTokenizer

    from dstrain.exporting.generate import _prompt_ids

    tokenizer = AutoTokenizer.from_pretrained(like_llama(template))
    words = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert _prompt_ids(tokenizer, "the cat") == [*begins, *words]
    assert _prompt_ids(tokenizer, "<s>the cat") == [0, *words]
    assert _prompt_ids(tokenizer, "") == (begins or [1])
