"""What of a conversation is trained: against marks in templates, in small ones here, and in those that TRL trains with.

TRL's come from its wheel, which is fetched: they are in the heavy test.
"""

import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from transformers import AutoTokenizer

from dstrain.data.chat.corpus import template_text
from dstrain.data.chat.formats import read_record
from dstrain.data.chat.template import ChatTemplate, Encoded, chatml
from dstrain.data.tokenizing.tokenizers import ByteTokenizer, load_tokenizer
from dstrain.errors import DstrainError


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **others):
    return {"role": "assistant", "content": content, **others}


SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "its name"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CONVERSATIONS = {
    "one turn": {"messages": [user("Hello?"), assistant("Good day.")]},
    "two turns": {"messages": [user("Hello?"), assistant("Good day."), user("And now?"), assistant("Bye.")]},
    "system": {"messages": [SYSTEM, user("Hello?"), assistant("Good day."), user("More"), assistant("Bye.")]},
    "thinking": {
        "messages": [
            user("Hello?"),
            assistant("Good day.", reasoning_content="Think well."),
            user("More"),
            assistant("Bye.", reasoning_content="Done."),
        ]
    },
    "tools": {
        "tools": TOOLS,
        "messages": [
            user("Weather?"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "It is sunny there"},
            assistant("Sunny."),
        ],
    },
}
BYTES = ByteTokenizer()
MARKED = chatml(BYTES)


def without_marks(template):
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)


def encode(record, template, tokenizer=BYTES, train_on="assistant", **more):
    kind = "messages" if "messages" in record else "prompt-completion"
    [found] = ChatTemplate(tokenizer, source=template, train_on=train_on, **more).encode_batch(
        [read_record(record, kind)]
    )
    return found


def trained_text(found, tokenizer=BYTES):
    """What is trained, each turn on its own."""
    assert isinstance(found, Encoded), found
    edges = np.flatnonzero(np.diff(found.trained.astype(int))) + 1
    parts = zip(np.split(found.ids, edges), np.split(found.trained, edges), strict=True)
    return [tokenizer.token_text(ids) for ids, trained in parts if trained[0]]


END = "<|endoftext|>\n"


@pytest.mark.parametrize("template", [MARKED, without_marks(MARKED)], ids=["marks", "prefixes"])
def test_the_assistants_turns_are_trained_with_their_stop_token(template):
    record = CONVERSATIONS["system"]
    found = encode(record, template)
    assert BYTES.token_text(found.ids).startswith(
        "<|im_start|>system\nBe brief.<|endoftext|>\n<|im_start|>user\nHello?"
    )
    assert trained_text(found) == [f"Good day.{END}", f"Bye.{END}"]
    assert trained_text(encode(record, template, train_on="last")) == [f"Bye.{END}"]
    assert encode(record, template, train_on="all").trained.all()


@pytest.mark.parametrize("template", [MARKED, without_marks(MARKED)], ids=["marks", "prefixes"])
def test_without_the_stop_token_the_same_words_are_trained(template):
    record = CONVERSATIONS["system"]
    found = encode(record, template, train_stop_token=False)
    assert trained_text(found) == ["Good day.", "Bye."]
    assert trained_text(encode(record, template, train_on="last", train_stop_token=False)) == ["Bye."]
    whole = encode(record, template, train_on="all", train_stop_token=False)
    turns = len(f"{END}") - len("<|endoftext|>") + 1  # the token itself, and the line end behind it
    assert (~whole.trained).sum() == 2 * turns
    alone = encode({"prompt": "a", "completion": "b"}, template, train_stop_token=False)
    assert trained_text(alone) == ["b"]
    assert ChatTemplate(BYTES, source=template, train_stop_token=False).fingerprint not in (
        ChatTemplate(BYTES, source=template).fingerprint,
        ChatTemplate(BYTES, source=template, train_on="last").fingerprint,
    )


def test_without_stop_tokens_turns_must_be_found_and_need_none():
    rewrites = (
        "{%- for m in messages -%}{{ m.role + ':' + (m.content if loop.last or m.role != 'assistant' else '...') }}"
        "{{ eos_token }}{%- endfor -%}{%- if add_generation_prompt -%}assistant:{%- endif -%}"
    )
    record = CONVERSATIONS["system"]
    assert isinstance(encode(record, rewrites, train_on="all"), Encoded)
    refused = encode(record, rewrites, train_on="all", train_stop_token=False)
    assert isinstance(refused, DstrainError) and "changes how the chat template writes it" in refused.message
    outside = (
        "{%- for m in messages -%}{{ m.role + ':' }}{%- if m.role == 'assistant' -%}{% generation %}{{ m.content }}"
        "{% endgeneration %}{%- else -%}{{ m.content }}{%- endif -%}{{ eos_token }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}assistant:{%- endif -%}"
    )
    assert isinstance(encode(record, outside), DstrainError)
    assert trained_text(encode(record, outside, train_stop_token=False)) == ["Good day.", "Bye."]


@pytest.mark.parametrize("template", [MARKED, without_marks(MARKED)], ids=["marks", "prefixes"])
def test_what_messages_say_themselves(template):
    messages = [
        user("a"),
        assistant("b", weight=0),
        user("c"),
        assistant("d"),
        user("e"),
        assistant("f", train=False),
    ]
    assert trained_text(encode({"messages": messages}, template)) == [f"d{END}"]
    nothing = encode({"messages": messages}, template, train_on="last")
    assert isinstance(nothing, DstrainError) and "no turn of this conversation is trained" in nothing.message


def test_a_prompt_and_its_completion():
    found = encode({"prompt": "2 + 2 =", "completion": " 4"}, MARKED)
    assert BYTES.token_text(found.ids) == "2 + 2 = 4<|endoftext|>"
    assert trained_text(found) == [" 4<|endoftext|>"]


REFUSED = {
    # It writes an earlier answer in another way than it was given.
    "drops what was thought before": (
        "{%- for m in messages -%}[{{ m.role }}]{{ 'hm' if m.role == 'assistant' and loop.last }}{{ m.content }}"
        "<|endoftext|>{%- endfor -%}{%- if add_generation_prompt -%}[assistant]{%- endif -%}",
        "two turns",
        "messages[1]: what follows a turn changes how the chat template writes it",
    ),
    "answers do not begin as prompts end": (
        "{%- for m in messages -%}[{{ m.role }}]{{ m.content }}<|endoftext|>{%- endfor -%}"
        "{%- if add_generation_prompt -%}[assistant]<think>{%- endif -%}",
        "one turn",
        "messages[1]: the chat template does not begin an answer as its generation prompt does: '<think>' alone",
    ),
    "no stop token": (
        "{%- for m in messages -%}{{ m.role }}: {{ m.content }}\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}assistant: {%- endif -%}",
        "one turn",
        "no stop token ends the assistant's turn, which ends with ' Good day.'",
    ),
    "the stop token belongs to the next turn": (
        "{%- for m in messages -%}<|endoftext|>[{{ m.role }}]{%- if m.role == 'assistant' -%}{%- generation -%}"
        "{{ m.content }}{%- endgeneration -%}{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}",
        "two turns",
        "no stop token ends the assistant's turn",
    ),
    "drops a role": (
        "{%- for m in messages if m.role != 'system' -%}[{{ m.role }}]{{ m.content }}<|endoftext|>{%- endfor -%}",
        "system",
        "messages[0]: the chat template drops what system says",
    ),
    "raises": (
        "{{ raise_exception('only one turn') }}",
        "one turn",
        "the chat template refuses this conversation: only one turn",
    ),
    "is no template": ("{% if %}", "one turn", "the chat template refuses this conversation"),
    "marks a part of the turns": (
        "{%- for m in messages -%}{%- if m.content == 'Bye.' -%}{%- generation -%}{{ m.content }}<|endoftext|>"
        "{%- endgeneration -%}{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}",
        "two turns",
        "the chat template marks 1 parts as the assistant's, of 2 turns",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_can_not_be_trained_with(name):
    template, conversation, words = REFUSED[name]
    train_on = "assistant"
    record = CONVERSATIONS[conversation]
    if name == "marks a part of the turns":
        record = {
            "messages": [
                *record["messages"][:3],
                assistant("Bye.", weight=1),
                user("x"),
                assistant("y", weight=0),
            ]
        }
        words = "the chat template marks 1 parts as the assistant's, of 3 turns"
    found = encode(record, template, train_on=train_on)
    assert isinstance(found, DstrainError) and words in found.message, found
    assert found.hint or "refuses" in words


def test_the_last_turn_alone_needs_less():
    """A template that writes earlier answers without their thoughts is exact for the last one."""
    template, conversation, _ = REFUSED["drops what was thought before"]
    found = encode(CONVERSATIONS[conversation], template, train_on="last")
    assert trained_text(found) == ["hmBye.<|endoftext|>"]


def tokenizer_with(tokens, folder, template=None):
    """Bytes, and special tokens, as a folder."""
    BYTES.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<eos>", "bos_token": "<bos>"})
    tokenizer.add_tokens(sorted(tokens), special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder), "never")


def test_a_token_across_the_border(tmp_path):
    """The space in front of the answer and the answer's first letters are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = {**alphabet, "ĠG": len(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "G")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), "never")
    template = (
        "{%- for m in messages -%}{{ m.role }}:{{ ' ' }}{{ m.content }}{{ eos_token }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}assistant:{{ ' ' }}{%- endif -%}"
    )
    found = encode(CONVERSATIONS["one turn"], template, tokenizer)
    assert isinstance(found, DstrainError) and "a token lies across the border" in found.message
    assert "G" in found.message
    before = template.replace("assistant:{{ ' ' }}", "assistant:")
    assert trained_text(encode(CONVERSATIONS["one turn"], before, tokenizer), tokenizer) == [
        " Good day.<eos>"
    ]


def test_begin_twice(tmp_path):
    template = (
        "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}"
        "{% generation %}{{ messages[1].content }}<eos>{% endgeneration %}"
    )
    found = encode(CONVERSATIONS["one turn"], template, tokenizer_with([], tmp_path))
    assert isinstance(found, DstrainError) and "begin-of-sequence token twice" in found.message


def test_which_template(tmp_path):
    tokenizer = tokenizer_with(["<|im_end|>"], tmp_path / "one", MARKED)
    assert template_text(None, tokenizer) == MARKED
    assert "'<|im_end|>'" in template_text("chatml", tokenizer)
    file = tmp_path / "own.jinja"
    file.write_text("own")
    assert template_text(str(file), tokenizer) == "own"
    named = tokenizer_with([], tmp_path / "two", {"default": "a", "rag": "b"})
    assert (template_text(None, named), template_text("rag", named)) == ("a", "b")
    for name, among in (("nothing", "default, rag"), (str(tmp_path), "default, rag")):
        with pytest.raises(DstrainError) as refused:
            template_text(name, named)
        assert among in (refused.value.hint or "") and refused.value.where == name
    with pytest.raises(DstrainError, match="has no chat template"):
        template_text(None, tokenizer_with([], tmp_path / "three"))


MARKS = "{% generation %}{{ m.content }}<|endoftext|>{% endgeneration %}"
LOST = {
    "a tool's call": (
        MARKED.replace("{%- if tools -%}", "{%- if false -%}"),
        CONVERSATIONS["tools"],
        "the chat template drops the tool 'weather'",
    ),
    "a tool's call without tools": (
        MARKED,
        {"messages": CONVERSATIONS["tools"]["messages"]},
        "messages[1]: the chat template drops the call of 'weather'",
    ),
    "tools": (MARKED, CONVERSATIONS["tools"], "ChatML has no form for tools"),
    "thoughts": (MARKED, CONVERSATIONS["thinking"], "messages[1]: the chat template drops reasoning_content"),
    "answers": (
        "{%- for m in messages if m.role != 'assistant' -%}[{{ m.role }}]{{ m.content }}<|endoftext|>{%- endfor -%}",
        CONVERSATIONS["two turns"],
        "where the assistant says 'Good day.'",
    ),
    "all": ("", CONVERSATIONS["two turns"], "the tokenizer has no chat template"),
    "the answer, by a mark around the question": (
        "{%- for m in messages -%}{%- if m.role == 'user' -%}"
        + MARKS
        + "{%- else -%}{{ m.content }}{%- endif -%}"
        "{%- endfor -%}",
        CONVERSATIONS["two turns"],
        "messages[0]: the chat template marks what user says as the assistant's",
    ),
    "the border, by a mark around all": (
        "{% generation %}{%- for m in messages -%}{{ m.content }}<|endoftext|>{%- endfor -%}{% endgeneration %}",
        CONVERSATIONS["one turn"],
        "messages[0]: the chat template marks what user says as the assistant's",
    ),
    "the place, by a mark in a macro": (
        "{%- macro say(m) -%}{{ '<|endoftext|>' }}" + MARKS + "{%- endmacro -%}"
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{ say(m) }}{%- else -%}{{ m.content }}{%- endif -%}"
        "{%- endfor -%}",
        CONVERSATIONS["one turn"],
        "",
    ),
    "an answer that begins a turn": (
        MARKED,
        {"messages": [user("Hi"), assistant("yes<|endoftext|>\n<|im_start|>user")]},
        "messages[1] spells the special token '<|endoftext|>'",
    ),
    "the stop token, by an option": (
        MARKED,
        {**CONVERSATIONS["one turn"], "chat_template_kwargs": {"continue_final_message": True}},
        "chat_template_kwargs can't set 'continue_final_message'",
    ),
    "a zero": ("{{ 1 / 0 }}", CONVERSATIONS["one turn"], "the chat template refuses this conversation"),
    "a loop": (
        "{% for i in range(10 ** 9) %}{% endfor %}",
        CONVERSATIONS["one turn"],
        "the chat template refuses this conversation",
    ),
    "characters": (
        MARKED,
        {"messages": [user("Hi"), assistant("yes", reasoning_content="\ud800")]},
        "drops reasoning_content",
    ),
}


@pytest.mark.parametrize(
    ("name", "train_on"),
    # Where all is trained, it is no matter what is marked.
    [(name, how) for name in LOST for how in ("assistant", "all") if how != "all" or "by a mark" not in name],
)
def test_nothing_is_lost_in_silence(name, train_on):
    template, record, words = LOST[name]
    found = encode(record, template, train_on=train_on)
    assert isinstance(found, DstrainError) and words in found.message, found
    assert found.hint


def test_all_but_what_a_message_leaves_out():
    messages = [user("a"), assistant("b", weight=0), user("c"), assistant("d")]
    found = encode({"messages": messages}, MARKED, train_on="all")
    left_out = BYTES.token_text(found.ids[~found.trained])
    assert left_out == f"b{END}"


def test_the_stop_tokens_are_known():
    for train_on in ("assistant", "last", "all"):
        template = ChatTemplate(BYTES, source=MARKED, train_on=train_on)
        template.encode_batch([read_record(CONVERSATIONS["two turns"], "messages")])
        assert template.stop_tokens == {BYTES.end_of_document}


def test_a_template_finds_no_date_and_draws_nothing():
    """Tokens of another day would be other tokens."""
    date = (
        "{%- if strftime_now is defined -%}{{ strftime_now('%Y') }}{%- else -%}no date{%- endif -%}"
        + without_marks(MARKED)
    )
    found = encode(CONVERSATIONS["one turn"], date)
    assert BYTES.token_text(found.ids).startswith("no date<|im_start|>")
    with pytest.raises(DstrainError, match="random numbers"):
        encode(CONVERSATIONS["one turn"], "{{ [1, 2] | random }}" + MARKED)


def test_a_tokenizer_that_begins_every_text_with_a_space(tmp_path):
    """As Llama 2's: what stands behind a special token begins with one, too."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = {
        letter: number
        for number, letter in enumerate(sorted({*"\u2581abcdefghijklmnopqrstuvwxyzGHBANDSIT[]/.?<>0xF"}))
    }
    fallback = {f"<0x{byte:02X}>": len(letters) + byte for byte in range(256)}
    vocabulary = {**letters, **fallback, "<unk>": 999, "\u2581G": 1000}
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=[("\u2581", "G")], byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), "never")
    template = (
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}{%- endfor -%}"
    )
    found = encode(CONVERSATIONS["two turns"], template, tokenizer)
    assert [text.strip() for text in trained_text(found, tokenizer)] == ["Good day.</s>", "Bye.</s>"]


@pytest.fixture(scope="module")
def trl_templates(tmp_path_factory):
    """TRL's chat templates by name."""
    folder = tmp_path_factory.mktemp("trl")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        folder,
        "trl==1.16.0",
    ]
    subprocess.run(command, check=True, timeout=300)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jinja")]
        return {name.split("/")[-1].removesuffix(".jinja"): archive.read(name).decode() for name in names}


_SPECIAL = re.compile(r"<[|\uff5c][^|\uff5c<>'\"{}]+[|\uff5c]>|<\|?[a-z_/]+\|?>|\[/?[A-Z_]+\]|</?s>")
# Conversations that a template refuses by itself (a role, tools), or whose tools' answers it drops, are no matter here.
_THEIR_OWN = ("the chat template refuses this conversation", "the chat template drops")


# After a tool's answer its generation prompt is empty, so a model that is asked begins the turn itself; the marks leave
# that out.
_OWN_PROMPT = {("diffusion_gemma_training", "tools")}


@pytest.mark.heavy
def test_trls_templates(trl_templates, tmp_path):
    """With each template that TRL trains with: its marks say what is trained, or without them prefixes do.

    They agree but for two things. A mark may begin before the answer, with what the generation prompt says already (a
    role header, an empty thought): a prefix does not train what the model is given. And a prefix goes on to the end of
    the turn's white space.
    """
    compared, refused = 0, {}
    training = {name: text for name, text in trl_templates.items() if name.endswith("_training")}
    assert len(training) >= 30
    for number, (name, template) in enumerate(sorted(training.items())):
        tokenizer = tokenizer_with({*_SPECIAL.findall(template)}, tmp_path / str(number))
        for kind, record in CONVERSATIONS.items():
            marks = encode(record, template, tokenizer)
            if isinstance(marks, DstrainError):
                if not any(words in marks.message for words in _THEIR_OWN):
                    refused[name, kind] = marks.message
                continue
            for source in (without_marks(template), trl_templates[name.removesuffix("_training")]):
                prefixes = encode(record, source, tokenizer)
                if isinstance(prefixes, DstrainError) or not np.array_equal(marks.ids, prefixes.ids):
                    continue
                compared += 1
                if (name, kind) in _OWN_PROMPT:
                    continue
                assert_same_but_for_prompts(marks, prefixes, tokenizer, (name, kind))
    assert compared >= 140
    assert not refused


def assert_same_but_for_prompts(marks, prefixes, tokenizer, what):
    marked, by_prefix = trained_text(marks, tokenizer), trained_text(prefixes, tokenizer)
    more = prefixes.trained & ~marks.trained
    assert not tokenizer.token_text(prefixes.ids[more]).strip(), what
    less = marks.trained & ~prefixes.trained
    assert len(marked) <= len(by_prefix), what
    for first in np.flatnonzero(np.diff(np.concatenate([[0], less.astype(int)])) == 1):
        begins_a_turn = (
            first == 0 or not marks.trained[first - 1] or tokenizer.is_special(int(marks.ids[first]))
        )
        assert begins_a_turn, (what, marked, by_prefix)
