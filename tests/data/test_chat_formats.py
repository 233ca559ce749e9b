"""Records of every format become the same messages, and what is wrong with one is said."""

import json

import pytest

from dstrain.data.chat.formats import Completion, Conversation, read_record, recognise, rename_fields
from dstrain.errors import DstrainError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 10**18 + 1}}}


def message(role, content="x", **others):
    return {"role": role, "content": content, **others}


SAME = [
    {"messages": [USER, ASSISTANT]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
            ASSISTANT,
        ]
    },
    {"conversations": [USER, ASSISTANT]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"conversation": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}], "id": 7},
    {"instruction": "Hi", "input": "", "output": "Hello"},
    {"instruction": "Hi", "output": "Hello"},
]


@pytest.mark.parametrize("record", SAME, ids=json.dumps)
def test_the_same_conversation(record):
    found = read_record(record, recognise(record))
    assert found == Conversation((USER, ASSISTANT), (None, None))


def test_prompt_and_completion():
    record = {"prompt": "2 + 2 =", "completion": " 4"}
    assert read_record(record, recognise(record)) == Completion("2 + 2 =", " 4")
    record = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    found = read_record(record, recognise(record))
    assert found.messages == (USER, ASSISTANT, USER, ASSISTANT)
    assert found.trained == (False, False, False, True)


def test_alpaca_with_input_history_and_system():
    record = {
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
        "instruction": "Translate",
        "input": "Haus",
        "output": "house",
    }
    found = read_record(record, "alpaca")
    assert [one["role"] for one in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert found.messages[3]["content"] == "Translate\nHaus"


def test_tool_calls():
    """Arguments as JSON and as an object, OpenAI's older form, and ShareGPT's."""
    spelled = {**CALL, "function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    answer = {"role": "tool", "content": "3", "tool_call_id": "1"}
    for record in (
        {
            "messages": [USER, message("assistant", None, tool_calls=[CALL]), answer, ASSISTANT],
            "tools": tools,
        },
        {
            "messages": [USER, message("assistant", "", tool_calls=[spelled]), answer, ASSISTANT],
            "tools": json.dumps(tools),
        },
        {
            "messages": [
                USER,
                message("assistant", None, function_call=spelled["function"]),
                answer,
                ASSISTANT,
            ],
            "tools": tools,
        },
    ):
        found = read_record(record, "messages")
        assert found.messages[1]["tool_calls"] == [CALL]
        assert found.messages[1]["content"] == ""
        assert list(found.tools) == tools
    turns = [
        {"from": "human", "value": "Hi"},
        {
            "from": "function_call",
            "value": json.dumps({"name": "add", "arguments": CALL["function"]["arguments"]}),
        },
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "Hello"},
    ]
    found = read_record({"conversations": turns}, "sharegpt")
    assert found.messages[1]["tool_calls"] == [CALL]
    assert found.messages[2]["role"] == "tool"


def test_weights_and_what_a_template_alone_knows():
    record = {
        "messages": [
            USER,
            message("assistant", "a", weight=0),
            USER,
            message("assistant", "b", train=True, mood="calm"),
        ],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    found = read_record(record, "messages")
    assert found.trained == (None, False, None, True)
    assert found.messages[3] == {"role": "assistant", "content": "b", "mood": "calm"}
    assert found.template_options == {"enable_thinking": False}


def test_fields_of_other_names():
    record = {"dialog": [USER, ASSISTANT], "text": "a title"}
    assert read_record(rename_fields(record, {"messages": "dialog"}), "messages").messages == (
        USER,
        ASSISTANT,
    )
    assert recognise(rename_fields({"dialog": [USER, ASSISTANT]}, {"messages": "dialog"})) == "messages"
    assert recognise({"content": "a single string is a text"}) == "text"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "no field"),
        ({"question": "a", "answer": "b"}, "its fields are 'question', 'answer'"),
        ({"text": "a", "messages": [USER, ASSISTANT]}, "could be in the format text or messages"),
        (
            {"instruction": "a", "output": "b", "prompt": "a", "completion": "b"},
            "alpaca or prompt-completion",
        ),
    ],
)
def test_what_is_ambiguous_is_asked_for(record, words):
    with pytest.raises(DstrainError) as refused:
        recognise(record)
    assert words in refused.value.message
    assert refused.value.hint


BAD_MESSAGES = [
    ([], "there are no messages"),
    ("Hi", "holds a string, not a list"),
    (None, "holds null, not a list"),
    ({"role": "user"}, "holds an object, not a list"),
    ([[USER, ASSISTANT]], "messages[0] is an array, not an object"),
    (["Hi", "Hello"], "messages[0] is a string"),
    ([USER], "no message is the assistant's"),
    ([{"content": "Hi"}, ASSISTANT], "messages[0]: there is no 'role'"),
    ([message("asistant"), ASSISTANT], "messages[0]: unknown role 'asistant'"),
    ([message(None), ASSISTANT], "messages[0]: unknown role None"),
    ([message("user", None), ASSISTANT], "messages[0]: 'content' is null"),
    ([USER, message("assistant", None)], "messages[1]: 'content' is null"),
    ([USER, message("assistant", "")], "messages[1]: the assistant says nothing"),
    ([message("user", 5), ASSISTANT], "messages[0].content is a number"),
    ([message("user", {"text": "Hi"}), ASSISTANT], "messages[0].content is an object"),
    ([message("user", ["Hi"]), ASSISTANT], "a part that is not text (a string)"),
    ([message("user", [{"type": "image", "url": "a"}]), ASSISTANT], "a part that is not text (image)"),
    ([message("user", [{"type": "text", "text": 5}]), ASSISTANT], "a part that is not text"),
    (
        [message("tool", "3"), ASSISTANT],
        "messages[0] is a tool's answer, and no message before it calls a tool",
    ),
    ([message("user", "Hi", tool_calls=[CALL]), ASSISTANT], "only the assistant calls tools, not user"),
    ([USER, message("assistant", tool_calls={"a": 1})], "messages[1].tool_calls is an object"),
    ([USER, message("assistant", tool_calls=[{}])], "messages[1].tool_calls[0] has no function with a name"),
    (
        [USER, message("assistant", tool_calls=["add"])],
        "messages[1].tool_calls[0] has no function with a name",
    ),
    ([USER, message("assistant", tool_calls=[{"function": {"name": "a", "arguments": "{"}}])], "is not JSON"),
    (
        [USER, message("assistant", tool_calls=[{"function": {"name": "a", "arguments": [1]}}])],
        "not an object",
    ),
    ([USER, message("assistant", weight=0.5)], "messages[1].weight is 0.5, but must be 0 or 1"),
    ([USER, message("assistant", train="no")], "messages[1].train is a string"),
    ([USER, message("assistant", train=True, weight=0)], "contradict each other"),
    ([USER, message("assistant", reasoning_content=["a"])], "messages[1].reasoning_content is an array"),
    ([USER, message("assistant", "\ud800")], "half a surrogate pair (\\ud800)"),
]


@pytest.mark.parametrize(("messages", "words"), BAD_MESSAGES, ids=[words for _, words in BAD_MESSAGES])
def test_bad_messages(messages, words):
    with pytest.raises(DstrainError) as refused:
        read_record({"messages": messages}, "messages")
    assert words in refused.value.message
    assert refused.value.hint or "surrogate" in words


OTHERS = [
    ("sharegpt", {"conversations": [{"from": "narrator", "value": "a"}]}, "unknown role 'narrator'"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0] has no 'from' and 'value'"),
    ("sharegpt", {"conversations": ["Hi"]}, "conversations[0] has no 'from' and 'value'"),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "b"}]},
        "is null",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "{"}]},
        "the function call is not JSON",
    ),
    ("sharegpt", {"messages": [USER, ASSISTANT]}, "no field 'conversations'"),
    ("messages", {"conversations": [{"from": "human", "value": "Hi"}]}, "there is no 'role'"),
    ("messages", {"text": "Hi"}, "holds null, not a list"),
    ("messages", {"messages": [USER, ASSISTANT], "tools": "["}, "tools is not JSON"),
    ("messages", {"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "'tools' is an object"),
    (
        "messages",
        {"messages": [USER, ASSISTANT], "chat_template_kwargs": 1},
        "'chat_template_kwargs' is a number",
    ),
    ("alpaca", {"instruction": "a"}, "no field 'output'"),
    ("alpaca", {"instruction": "a", "output": 5}, "'output' holds a number"),
    ("alpaca", {"instruction": "a", "output": ""}, "the assistant says nothing"),
    ("alpaca", {"instruction": "a", "output": "b", "input": ["c"]}, "'input' holds an array"),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history[0] is not [question, answer]",
    ),
    ("prompt-completion", {"prompt": "a", "completion": ""}, "'completion' is empty"),
    (
        "prompt-completion",
        {"prompt": "a", "completion": [ASSISTANT]},
        "'prompt' is a string and 'completion' is an array",
    ),
    ("prompt-completion", {"prompt": "a"}, "'completion' is null"),
    ("prompt-completion", {"prompt": [], "completion": []}, "there are no messages"),
    ("text", {"text": 5}, "'text' holds a number"),
    ("text", {"messages": []}, "no field 'text'"),
]


@pytest.mark.parametrize(("name", "record", "words"), OTHERS, ids=[words for _, _, words in OTHERS])
def test_bad_records(name, record, words):
    with pytest.raises(DstrainError) as refused:
        read_record(record, name)
    assert words in refused.value.message
    assert refused.value.hint
