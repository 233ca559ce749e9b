"""The formats that records of training data come in, told by their fields, and the conversation in each.

Formats: ``text`` (a document in one field), ``messages`` (OpenAI's chat format), ``sharegpt`` (``from`` and ``value``),
``alpaca`` (instruction, input, output), ``prompt-completion`` (strings, or messages) and ``tokens`` (documents that are
tokenized already: `dstrain.data.token_files.records`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dstrain.errors import DstrainError

TEXT, MESSAGES, SHAREGPT, ALPACA, PROMPT_COMPLETION, TOKENS = (
    *("text", "messages", "sharegpt", "alpaca", "prompt-completion", "tokens"),
)
FORMATS = (TEXT, MESSAGES, SHAREGPT, ALPACA, PROMPT_COMPLETION, TOKENS)

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names, and those of the data sets that came after it.
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "function_call",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of an assistant's message with what it thought."""
_OURS = ("weight", "train")
FIELDS = frozenset(
    {
        *("text", "messages", "conversations", "conversation", "tools", "system", "chat_template_kwargs"),
        *("instruction", "input", "output", "history", "prompt", "completion"),
        *("input_ids", "labels", "attention_mask", "position_ids"),
    }
)
"""All that the formats have names for."""
_FIELDS_OF_FORMATS = frozenset(
    {
        *(
            "messages",
            "conversations",
            "conversation",
            "instruction",
            "input",
            "output",
            "prompt",
            "completion",
        ),
        "input_ids",
    }
)
_TRY = {
    TEXT: '{"text": "..."}',
    MESSAGES: '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    SHAREGPT: '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    ALPACA: '{"instruction": "...", "input": "...", "output": "..."}',
    PROMPT_COMPLETION: '{"prompt": "...", "completion": "..."}',
    TOKENS: '{"input_ids": [17, 4, 256], "labels": [-100, 4, 256]}',
}


@dataclass(frozen=True)
class Conversation:
    """What one record holds.

    Attributes:
        messages: in OpenAI's format, as chat templates read them; arguments of tool calls are objects.
        trained: for each message, whether the record itself says that it is trained; None where it says nothing.
        tools: JSON schemas.
        template_options: more keyword arguments for the chat template.
    """

    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[bool | None, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    template_options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Completion:
    """A text and what shall follow it, which alone is trained."""

    prompt: str
    completion: str


Record = str | Conversation | Completion


def rename_fields(record: Mapping[str, Any], fields: Mapping[str, str]) -> Mapping[str, Any]:
    """The record with the names that its format has for its fields.

    Args:
        fields: format's name -> name in the file.
    """
    if not fields:
        return record
    renamed = {theirs: name for name, theirs in fields.items()}
    return {
        renamed.get(key, key): value for key, value in record.items() if key not in fields or key in renamed
    }


def check_mapped(record: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """Refuse a record without any of the fields that are called otherwise: see `rename_fields`. Raises DstrainError."""
    if fields and not any(theirs in record for theirs in fields.values()):
        name, theirs = next(iter(fields.items()))
        keys = ", ".join(repr(key) for key in list(record)[:12]) or "none"
        raise DstrainError(
            f"this record has no field {theirs!r}, which data_fields names for {name!r}; its fields are {keys}",
            hint="data_fields: {NAME OF THE FORMAT: name in your files}",
        )


def recognise(record: Mapping[str, Any]) -> str:
    """The format of a record, by its fields. One with a single field that is a string is a text.

    Raises:
        DstrainError: it is none that is known, or could be several.
    """
    found = [name for name, fits in _FITS.items() if fits(record)]
    if len(found) == 1:
        return found[0]
    fields = ", ".join(repr(key) for key in list(record)[:12]) or "none"
    if found:
        raise DstrainError(
            f"this record could be in the format {' or '.join(found)} (its fields are {fields})",
            hint=f"say which with data_format, e.g. --set data_format={found[0]}",
        )
    if not found and len(record) == 1:
        [(field, value)] = record.items()
        if isinstance(value, str) and field not in _FIELDS_OF_FORMATS:
            return TEXT
    strings = [key for key, value in record.items() if isinstance(value, str)]
    records = [key for key, value in record.items() if _is_list_of_objects(value) and key.isidentifier()]
    more = ""
    if records:
        more = f"; if the records are the elements of {records[0]!r}: jq -c '.{records[0]}[]' FILE > NEW"
    elif strings:
        more = f"; or name the field that holds the text: --set data_fields.text={strings[0]}"
    raise DstrainError(
        "this line has no field 'text', 'messages', 'conversations', 'instruction', 'prompt' or 'input_ids'; its"
        f" fields are {fields}",
        hint=f"each line is one object: {_TRY[TEXT]}, or {_TRY[MESSAGES]}{more}",
    )


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value[:100])


def _is_sharegpt(record: Mapping[str, Any]) -> bool:
    turns = record.get("conversations", record.get("conversation"))
    return isinstance(turns, list) and not _have_roles(turns)


def _is_messages(record: Mapping[str, Any]) -> bool:
    turns = record.get("conversations", record.get("conversation"))
    return "messages" in record or (isinstance(turns, list) and _have_roles(turns))


def _have_roles(turns: list[Any]) -> bool:
    return bool(turns) and all(isinstance(turn, dict) and "role" in turn for turn in turns)


_FITS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    TEXT: lambda record: "text" in record,
    MESSAGES: _is_messages,
    SHAREGPT: _is_sharegpt,
    ALPACA: lambda record: {"instruction", "output"} <= record.keys(),
    PROMPT_COMPLETION: lambda record: {"prompt", "completion"} <= record.keys(),
    TOKENS: lambda record: "input_ids" in record,
}
_NEEDED: dict[str, tuple[frozenset[str], ...]] = {
    TEXT: (frozenset({"text"}),),
    MESSAGES: (frozenset({"messages"}), frozenset({"conversations"}), frozenset({"conversation"})),
    SHAREGPT: (frozenset({"conversations"}), frozenset({"conversation"})),
    ALPACA: (frozenset({"instruction", "output"}),),
    PROMPT_COMPLETION: (frozenset({"prompt", "completion"}),),
    TOKENS: (frozenset({"input_ids"}),),
}
"""The fields that a record of each format has, in one of these ways."""


def has_fields(names: Iterable[str], format_name: str, fields: Mapping[str, str]) -> bool:
    """Whether columns of these names can be records of a format.

    Args:
        format_name: ``auto`` for any.
        fields: as of `rename_fields`.
    """
    renamed = rename_fields(dict.fromkeys(names), fields).keys()
    wanted = _NEEDED.values() if format_name == "auto" else [_NEEDED.get(format_name, ())]
    return any(needed <= renamed for ways in wanted for needed in ways)


def check_format(record: Mapping[str, Any], format_name: str, first: str) -> None:
    """Refuse a record that could be in another format than the one of its source was told by.

    Args:
        first: the place of that one; empty where the format was named.

    Raises:
        DstrainError: with both places.
    """
    if not first:
        return
    found = [name for name, fits in _FITS.items() if fits(record)]
    if found and found != [format_name]:
        what = (
            f"is in the format {found[0]}"
            if len(found) == 1
            else f"could be in the format {' or '.join(found)}"
        )
        raise DstrainError(
            f"this record {what}, and the one at {first} is in {format_name}",
            hint=f"name a source of one format, or say which is meant with data_format, e.g. --set"
            f" data_format={format_name}",
        )


def read_record(record: Mapping[str, Any], format_name: str, first: str = "") -> Record:
    """What a record of a format holds.

    Args:
        first: as of `check_format`.

    Raises:
        DstrainError: it is in another format, or holds what can't be trained on.
    """
    check_format(record, format_name, first)
    return _READ[format_name](record)


def text_of(record: Mapping[str, Any], field: str = "text") -> str:
    """The document in a record's field. Raises DstrainError where it is not there, or is no text."""
    return _string(record, field, TEXT)


def _messages(record: Mapping[str, Any]) -> Conversation:
    if "messages" not in record:
        record = {**record, "messages": record.get("conversations", record.get("conversation"))}
    messages = _list(record, "messages", MESSAGES)
    if record.get("functions"):
        raise _wrong("'functions' is OpenAI's older name: call them 'tools'", MESSAGES)
    if record.get("system"):
        messages = [{"role": "system", "content": record["system"]}, *messages]
    return _conversation(messages, record)


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    name = "conversation" if "conversations" not in record and "conversation" in record else "conversations"
    turns = _list(record, name, SHAREGPT)
    messages: list[Any] = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise _wrong(f"{name}[{number}] has no 'from' and 'value'", SHAREGPT)
        role = _SHAREGPT_ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise _wrong(f"{name}[{number}]: unknown role {turn['from']!r}", SHAREGPT, set(_SHAREGPT_ROLES))
        own = {key: turn[key] for key in ("weight", "train") if turn.get(key) is not None}
        if role == "function_call":
            messages.append(
                {"role": "assistant", "content": "", "tool_calls": _calls(turn["value"], name, number), **own}
            )
        else:
            messages.append({"role": role, "content": turn["value"], **own})
    return _conversation(messages, record)


def _calls(value: Any, name: str, number: int) -> list[Any]:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise _wrong(f"{name}[{number}]: the function call is not JSON", SHAREGPT) from None
    return [
        {"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])
    ]


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    messages: list[Any] = []
    if record.get("system"):
        messages.append({"role": "system", "content": _string(record, "system", ALPACA)})
    history = record.get("history") or []
    if not isinstance(history, list):
        raise _wrong(f"'history' is {name_of_kind(history)}, not a list", ALPACA)
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise _wrong(f"history[{number}] is not [question, answer]", ALPACA)
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    given = _string(record, "input", ALPACA) if record.get("input") else ""
    question = _string(record, "instruction", ALPACA)
    messages.append({"role": "user", "content": f"{question}\n{given}" if given else question})
    messages.append({"role": "assistant", "content": _string(record, "output", ALPACA)})
    return _conversation(messages, record)


def _prompt_completion(record: Mapping[str, Any]) -> Conversation | Completion:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise _wrong("'completion' is empty: there is nothing to train on", PROMPT_COMPLETION)
        return Completion(
            _string(record, "prompt", PROMPT_COMPLETION), _string(record, "completion", PROMPT_COMPLETION)
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        found = _conversation([*prompt, *completion], record)
        trained = [False] * len(prompt) + [said is not False for said in found.trained[len(prompt) :]]
        return Conversation(found.messages, tuple(trained), found.tools, found.template_options)
    raise _wrong(
        f"'prompt' is {name_of_kind(prompt)} and 'completion' is {name_of_kind(completion)}: both must be strings, or"
        " both messages",
        PROMPT_COMPLETION,
    )


_READ: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    TEXT: text_of,
    MESSAGES: _messages,
    SHAREGPT: _sharegpt,
    ALPACA: _alpaca,
    PROMPT_COMPLETION: _prompt_completion,
}


def _conversation(messages: Sequence[Any], record: Mapping[str, Any]) -> Conversation:
    """Raises DstrainError for messages that no chat template could mean."""
    if not messages:
        raise _wrong("there are no messages", MESSAGES)
    read = [_message(message, number) for number, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message, _ in read):
        raise _wrong("no message is the assistant's, so there is nothing to train on", MESSAGES)
    called = False
    for number, (message, _) in enumerate(read):
        called = called or "tool_calls" in message
        if message["role"] == "tool" and not called:
            raise _wrong(
                f"messages[{number}] is a tool's answer, and no message before it calls a tool", MESSAGES
            )
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _wrong(f"'tools' is {name_of_kind(tools)}, not a list of JSON schemas", MESSAGES)
    options = record.get("chat_template_kwargs")
    if options is not None and not isinstance(options, dict):
        raise _wrong(f"'chat_template_kwargs' is {name_of_kind(options)}, not an object", MESSAGES)
    return Conversation(
        tuple(message for message, _ in read),
        tuple(trained for _, trained in read),
        tuple(tools or ()),
        options,
    )


def _message(message: Any, number: int) -> tuple[dict[str, Any], bool | None]:
    place = f"messages[{number}]"
    if not isinstance(message, dict):
        raise _wrong(f"{place} is {name_of_kind(message)}, not an object", MESSAGES)
    role = "tool" if message.get("role") == "function" else message.get("role")
    if role not in ROLES:
        what = f"unknown role {role!r}" if "role" in message else "there is no 'role'"
        raise _wrong(f"{place}: {what}", MESSAGES, set(ROLES))
    # Fields that are not known here may be known to the chat template.
    read = {key: value for key, value in message.items() if key not in _OURS and value is not None}
    read |= {"role": role, "content": _content(message.get("content"), place)}
    for key in REASONING:
        if key in read and not isinstance(read[key], str):
            raise _wrong(f"{place}.{key} is {name_of_kind(read[key])}, not a string", MESSAGES)
    calls = read.pop("tool_calls", None)
    if "function_call" in read and not calls:  # OpenAI's older form
        calls = [{"function": read.pop("function_call")}]
    if calls:
        if role != "assistant":
            raise _wrong(f"{place}: only the assistant calls tools, not {role}", MESSAGES)
        read["tool_calls"] = _tool_calls(calls, place)
    if read["content"] is None:
        if "tool_calls" not in read:
            raise _wrong(f"{place}: 'content' is null", MESSAGES)
        read["content"] = ""
    if role == "assistant" and not read["content"] and not read.keys() & {"tool_calls", *REASONING}:
        raise _wrong(f"{place}: the assistant says nothing", MESSAGES)
    return read, _said(message, place)


def _content(content: Any, place: str) -> str | None:
    """A string; parts that are text, joined."""
    if content is None:
        return content
    if isinstance(content, str):
        return _encodable(content, f"{place}.content: ")
    if not isinstance(content, list):
        raise _wrong(f"{place}.content is {name_of_kind(content)}, not a string", MESSAGES)
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else name_of_kind(part)
            raise _wrong(f"{place}.content has a part that is not text ({kind})", MESSAGES)
    return _encodable("".join(part["text"] for part in content), f"{place}.content: ")


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise _wrong(f"{place}.tool_calls is {name_of_kind(calls)}, not a list", MESSAGES)
    read = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong(f"{place}.tool_calls[{number}] has no function with a name", MESSAGES)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", f"{place}.tool_calls[{number}].arguments")
        if not isinstance(arguments, dict):
            raise _wrong(
                f"{place}.tool_calls[{number}].arguments is {name_of_kind(arguments)}, not an object",
                MESSAGES,
            )
        if not _finite(arguments):
            raise _wrong(f"{place}.tool_calls[{number}].arguments has a number that is none", MESSAGES)
        read.append(
            {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
        read[-1].pop("name", None)
        read[-1].pop("arguments", None)
    return read


def _finite(value: Any) -> bool:
    """Whether a JSON value can be written again: no number in it is nan or infinite."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def _said(message: Mapping[str, Any], place: str) -> bool | None:
    """Whether a message itself says that it is trained."""
    weight, train = message.get("weight"), message.get("train")
    if train is not None and not isinstance(train, bool):
        raise _wrong(f"{place}.train is {name_of_kind(train)}, not true or false", MESSAGES)
    if weight is not None and weight not in (0, 1):
        raise _wrong(f"{place}.weight is {weight!r}, but must be 0 or 1", MESSAGES)
    if (train or weight) and message.get("role") != "assistant":
        raise _wrong(
            f"{place} asks to be trained, and is not the assistant's; train_on: all trains every token",
            MESSAGES,
        )
    said = bool(weight) if weight is not None else None
    if train is None:
        return said
    if said is not None and said != train:
        raise _wrong(
            f"{place}: weight {weight!r} and train {str(train).lower()} contradict each other", MESSAGES
        )
    return train


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _wrong(f"{place} is not JSON: {error}", MESSAGES) from None
    except RecursionError:
        raise _wrong(f"{place} is not JSON: it is nested too deeply", MESSAGES) from None


def _string(record: Mapping[str, Any], field: str, format_name: str) -> str:
    if field not in record:
        keys = ", ".join(repr(key) for key in list(record)[:12]) or "none"
        raise _wrong(f"this line has no field {field!r}; its fields are {keys}", format_name)
    value = record[field]
    if not isinstance(value, str):
        keys = ", ".join(repr(key) for key in list(record)[:12])
        raise _wrong(
            f"the field {field!r} holds {name_of_kind(value)}, not a string (fields: {keys})", format_name
        )
    return _encodable(value)


def _list(record: Mapping[str, Any], field: str, format_name: str) -> list[Any]:
    value = record.get(field)
    if not isinstance(value, list):
        keys = ", ".join(repr(key) for key in list(record)[:12])
        what = (
            f"the field {field!r} holds {name_of_kind(value)}, not a list"
            if field in record
            else f"no field {field!r}"
        )
        raise _wrong(f"{what} (fields: {keys})", format_name)
    return value


def _encodable(text: str, place: str = "") -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise DstrainError(
            f"{place}character {error.start} is half a surrogate pair ({escape}), which UTF-8 can't encode"
        ) from None
    return text


def _wrong(message: str, format_name: str, choices: set[str] | None = None) -> DstrainError:
    if choices:
        return DstrainError(message, hint=f"one of {', '.join(sorted(choices))}")
    return DstrainError(message, hint=f"each line is one object: {_TRY[format_name]}")


def name_of_kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
