"""Renders conversations with a tokenizer's chat template, and finds which tokens of them are trained.

Where a template has ``{% generation %}`` marks, they say what the assistant writes. Where it has none, an assistant's
turn is what the rendering of the messages up to it adds to the rendering of those before it with a generation prompt:
what the model sees when it is to answer, and what it shall have written then. What either says is checked for each
conversation, as text and as tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dstrain.data.chat.formats import REASONING, Completion, Conversation
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.errors import DstrainError
from dstrain.strict_json import to_json

_CHATML_TEMPLATE = """\
{%- if tools -%}{{- raise_exception('ChatML has no form for tools') -}}{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + END + '\\n' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + END + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
BYTES_TEMPLATE = """\
{%- if tools -%}{{- raise_exception('the template for bytes has no form for tools') -}}{%- endif -%}
{%- for message in messages -%}
    {{- message['role'] + ': ' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}
"""
"""For the tokenizer of bytes, to which each letter of a mark is a token."""
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RANDOM = re.compile(r"\|\s*random\b")
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)
_OTHER_TEMPLATE = "chat_template: a template that writes it"
_MARKED_TEMPLATE = "chat_template: a template with {% generation %} around each turn of the assistant"
_SHOWN = 40
_PROBE = Conversation(
    ({"role": "user", "content": "What is asked."}, {"role": "assistant", "content": "What is answered."}),
    (None, None),
)
# Arguments of the renderer, which a record has no say in.
_NOT_FOR_RECORDS = frozenset({
    "conversations", "messages", "tools", "documents", "chat_template", "return_assistant_tokens_mask",
    "continue_final_message", "add_generation_prompt",
})  # fmt: skip


def chatml(tokenizer: Tokenizer) -> str:
    """The ChatML template, whose turns end with ``<|im_end|>`` where that is a token, else as documents end."""
    end = "<|im_end|>" if tokenizer.is_token("<|im_end|>") else tokenizer.ends_with
    return _CHATML_TEMPLATE.replace("END", repr(end))


@dataclass(frozen=True)
class Encoded:
    """A record's tokens, ``[n]``, and which of them are to be predicted, bool ``[n]``."""

    ids: np.ndarray
    trained: np.ndarray


Span = tuple[int, int]


@dataclass(frozen=True)
class _Rendered:
    """A text, and parts of it as character positions in their order.

    Attributes:
        trained: what is trained.
        turns: of that, what ends with a stop token.
    """

    text: str
    trained: tuple[Span, ...]
    turns: tuple[Span, ...] = ()


class ChatTemplate:
    """A template and the tokenizer that it belongs to.

    Args:
        source: the Jinja template. One that asks for today's date finds none, and takes its own default.
        train_on: ``assistant``: what the assistant writes; ``last``: its last turn; ``all``: every token.
        train_stop_token: whether the token that ends a turn is trained with it, and what follows that in the turn.

    Attributes:
        stop_tokens: the tokens that ended the turns which were encoded so far.
        conversations: how many of the encoded records were rendered.

    Raises:
        DstrainError: the template draws random numbers.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, source: str, train_on: str = "assistant", train_stop_token: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(tokenizer.special_tokens)
        self.source = source
        if _RANDOM.search(source):
            raise DstrainError(
                "the chat template draws random numbers: what is trained would differ each time",
                where="chat_template",
                hint="chat_template: a template without the filter random",
            )
        # Tokens must not depend on the day that they are made on.
        self._rendered_source = source.replace("strftime_now", "no_date_here")
        self._marked = bool(_MARK.search(source))
        self._train_on = train_on
        self._train_stop_token = train_stop_token
        self.stop_tokens: set[int] = set()
        self.conversations = 0
        self._special = _any_of(tokenizer.special_texts)
        self._ends: dict[str, int] = {}  # the tokens that special texts are
        self._in_parts = self._wants_parts()

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides tokens and what is trained, besides the tokenizer."""
        without = [] if self._train_stop_token else ["without stop tokens"]
        content = to_json([self.source, sorted(self._variables.items()), self._train_on, *without])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def prompt_ids(self, text: str, system: str = "") -> list[int]:
        """The tokens of a conversation in which a user has said this, and the assistant is to answer.

        Raises:
            DstrainError: the template refuses it.
        """
        messages: list[Mapping[str, Any]] = [{"role": "user", "content": text}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        record = Conversation(tuple(messages), (None,) * len(messages))
        rendered, _ = self._apply(record, messages, add_generation_prompt=True)
        [ids] = self._tokenizer.encode_rendered([rendered])
        return [int(token) for token in ids]

    def encode_batch(self, records: Sequence[Conversation | Completion]) -> list[Encoded | DstrainError]:
        """The tokens of each record; the error of one that can't be trained on as it is."""
        rendered: list[_Rendered | DstrainError] = []
        for record in records:
            try:
                rendered.append(self._render(record))
            except DstrainError as error:
                rendered.append(error)
        fine = [one for one in rendered if isinstance(one, _Rendered)]
        trained = iter(_trained_tokens(self._tokenizer, fine, with_stops=self._train_stop_token))
        found: list[Encoded | DstrainError] = []
        for record, one in zip(records, rendered, strict=True):
            encoded = one if isinstance(one, DstrainError) else next(trained)
            if isinstance(encoded, Encoded):
                try:
                    encoded = self._checked(record, one, encoded)
                except DstrainError as error:
                    encoded = error
            found.append(encoded)
        return found

    # --- text

    def _render(self, record: Conversation | Completion) -> _Rendered:
        if isinstance(record, Completion):
            text = record.prompt + record.completion
            whole = (0 if self._train_on == "all" else len(record.prompt), len(text))
            return _Rendered(text, (whole,))
        self.conversations += 1
        self._check_contents(record)
        text, marks = self._apply(record, record.messages)
        turns = [number for number, message in enumerate(record.messages) if message["role"] == "assistant"]
        left_out = [number for number in turns if record.trained[number] is False]
        if self._train_on == "all":
            return self._all_but(record, text, marks, turns, left_out)
        wanted = [number for number in turns if number not in left_out]
        if self._train_on == "last":
            wanted = [number for number in wanted if number == turns[-1]]
        if not wanted:
            raise DstrainError(
                "no turn of this conversation is trained",
                hint="remove it, or set its messages' weight or train",
            )
        spans = self._spans(record, text, marks, turns, wanted)
        self._check_text(record, text, marks if self._marked else [spans[number] for number in wanted])
        for number in wanted:
            self._check_turn(record, number, text[slice(*spans[number])])
        chosen = tuple(spans[number] for number in wanted)
        return _Rendered(text, chosen, chosen)

    def _all_but(
        self, record: Conversation, text: str, marks: list[Span], turns: list[int], left_out: list[int]
    ) -> _Rendered:
        """Every token, but for the turns that the record itself leaves out."""
        self._check_text(record, text, [])
        try:
            spans = self._spans(record, text, marks, turns, turns)
        except DstrainError:
            if left_out or not self._train_stop_token:
                raise
            return _Rendered(text, ((0, len(text)),))
        for number in turns:
            self._check_turn(record, number, text[slice(*spans[number])])
        edges = [0, *(edge for number in left_out for edge in spans[number]), len(text)]
        trained = [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]
        return _Rendered(
            text, tuple(trained), tuple(spans[number] for number in turns if number not in left_out)
        )

    def _spans(
        self, record: Conversation, text: str, marks: list[Span], turns: list[int], wanted: list[int]
    ) -> dict[int, Span]:
        """Where each wanted turn begins and ends."""
        if not self._marked:
            return {number: self._turn(record, number, text) for number in wanted}
        if len(marks) != len(turns):
            marks = _joined(marks)
        if len(marks) != len(turns):
            raise DstrainError(
                f"the chat template marks {len(marks)} parts as the assistant's, of {len(turns)} turns",
                hint=_MARKED_TEMPLATE,
            )
        return dict(zip(turns, marks, strict=True))

    def _turn(self, record: Conversation, number: int, text: str) -> Span:
        """Where the assistant's message of that number begins and ends."""
        before, _ = self._apply(record, record.messages[:number], add_generation_prompt=True)
        through = text
        if number + 1 < len(record.messages):
            through, _ = self._apply(record, record.messages[: number + 1])
            # Some templates end a conversation with a token, which is not there while it goes on.
            end = self._variables.get("eos_token", "")
            if end and through.endswith(end) and not text.startswith(through):
                through = through[: -len(end)]
        for part, whole, what in (
            (through, text, "what follows a turn changes how the chat template writes it"),
            (before, through, "the chat template does not begin an answer as its generation prompt does"),
        ):
            if not whole.startswith(part):
                at = next(
                    (at for at, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole)
                )
                raise DstrainError(
                    f"messages[{number}]: {what}: {part[at : at + _SHOWN]!r} alone, {whole[at : at + _SHOWN]!r} in the"
                    " conversation",
                    hint=_MARKED_TEMPLATE + ("" if self._train_on == "last" else "; or train_on: last"),
                )
        without, _ = self._apply(record, record.messages[:number])
        header = before[len(without) :].strip() if before.startswith(without) else ""
        if header and through[len(before) :].rstrip().endswith(header):
            raise DstrainError(
                f"messages[{number}]: the chat template goes on behind the turn with {header[-_SHOWN:]!r}",
                hint=_MARKED_TEMPLATE,
            )
        return len(before), len(through)

    def _check_contents(self, record: Conversation) -> None:
        """What a message says must be text: a special token in it would begin or end a turn."""
        for number, message in enumerate(record.messages):
            found = self._special.search(message["content"]) if self._special else None
            if found:
                raise DstrainError(
                    f"messages[{number}] spells the special token {found.group()!r}, which would be read as one",
                    hint="remove it from the text",
                )
        if unknown := sorted(
            (_NOT_FOR_RECORDS | self._variables.keys()) & (record.template_options or {}).keys()
        ):
            raise DstrainError(
                f"chat_template_kwargs can't set {unknown[0]!r}", hint="remove it from chat_template_kwargs"
            )

    def _check_text(self, record: Conversation, text: str, answers: Sequence[Span]) -> None:
        """What others say must stand outside of the answers, and what tools there are somewhere.

        Of the answers themselves see `_check_turn`.
        """
        edges = [0, *(edge for span in answers for edge in span), len(text)]
        outside = "\0".join(text[first:last] for first, last in zip(edges[::2], edges[1::2], strict=True))
        dense = ""
        for number, message in enumerate(record.messages):
            content = message["content"].strip()
            if message["role"] == "assistant" or not content or content in outside:
                continue
            dense = dense or _dense(outside)
            if not any(_dense(spelled) in dense for spelled in _as_json(content)):
                raise DstrainError(
                    f"messages[{number}]: the chat template drops what {message['role']} says"
                    if content not in text
                    else f"messages[{number}]: the chat template marks what {message['role']} says as the assistant's",
                    hint="chat_template: a template that knows this role; or remove these messages",
                )
        for tool in record.tools:
            name = str(tool.get("function", tool).get("name", ""))
            if name not in text:
                raise DstrainError(f"the chat template drops the tool {name!r}", hint=_OTHER_TEMPLATE)

    def _check_turn(self, record: Conversation, number: int, written: str) -> None:
        """What the assistant says, calls and thinks must stand in its turn."""
        message = record.messages[number]
        said = _THOUGHT.sub("", message["content"]).strip()
        if said and said not in written:
            raise DstrainError(
                f"messages[{number}]: the chat template writes {written[:_SHOWN]!r} where the assistant says"
                f" {said[:_SHOWN]!r}",
                hint=_MARKED_TEMPLATE if self._marked else _OTHER_TEMPLATE,
            )
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in written:
                raise DstrainError(
                    f"messages[{number}]: the chat template drops the call of {call['function']['name']!r}",
                    hint=_OTHER_TEMPLATE,
                )
        for name in REASONING:
            if (thought := str(message.get(name, "")).strip()) and thought not in written:
                raise DstrainError(
                    f"messages[{number}]: the chat template drops {name}",
                    hint=f"{_OTHER_TEMPLATE}; or remove {name} from the messages",
                )

    # --- tokens

    def _checked(self, record: Conversation | Completion, rendered: Any, encoded: Encoded) -> Encoded:
        ids = encoded.ids
        if isinstance(record, Completion):
            begin = np.array(self._tokenizer.begin_before(ids), dtype=ids.dtype)
            end = np.array([self._tokenizer.end_of_document], dtype=ids.dtype)
            return Encoded(
                np.concatenate([begin, ids, end]),
                np.concatenate([np.zeros(begin.size, bool), encoded.trained, [self._train_stop_token]]),
            )
        twice = self._tokenizer.begin_of_sequence
        if twice is not None and ids[:2].tolist() == [twice, twice]:
            raise DstrainError(
                "the chat template writes the begin-of-sequence token twice",
                hint="remove one from the chat template",
            )
        if not encoded.trained[1:].any():
            raise DstrainError(
                "nothing of this conversation would be trained",
                hint="remove it, or use another chat_template",
            )
        for first, last in rendered.turns:
            self._note_stop(rendered.text[first:last])
        return encoded

    def _note_stop(self, turn: str) -> None:
        """Each turn must end with a token that is no text, or the model never learns to stop."""
        end = turn.rstrip()[-_SHOWN:]
        for found in self._special.finditer(end) if self._special else ():
            if found.end() == len(end):
                end = found.group()
        last = self._ends.get(end)
        if last is None:
            [ids] = self._tokenizer.encode_rendered([end])
            last = int(ids[-1]) if ids.size else -1
            if self._tokenizer.is_special(last):
                self._ends[end] = last
        if not self._tokenizer.is_special(last):
            if (
                not self._train_stop_token
            ):  # a template that leaves it out of the turn gives what is asked for
                return
            raise DstrainError(
                f"no stop token ends the assistant's turn, which ends with {turn[-_SHOWN:]!r}: the model would"
                " never learn to stop",
                hint="chat_template: a template that ends the assistant's turns with a special token of its own",
            )
        self.stop_tokens.add(last)

    # --- the template itself

    def _wants_parts(self) -> bool:
        """Whether the template reads contents as lists of parts, as those of models that see images do."""
        for in_parts in (False, True):
            self._in_parts = in_parts
            try:
                text, _ = self._apply(_PROBE, _PROBE.messages)
            except DstrainError:
                continue
            if all(str(message["content"]) in text for message in _PROBE.messages):
                return in_parts
        return False

    def _as_written(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message as the template reads it."""
        if self._in_parts:
            return {**message, "content": [{"type": "text", "text": message["content"]}]}
        return dict(message)

    def _apply(
        self,
        record: Conversation,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """The text, and the spans that the template marks."""
        if not self.source:
            raise DstrainError("the tokenizer has no chat template", hint="chat_template: chatml, or a file")
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            render: Any = render_jinja_template  # annotated as a str, but returns two lists
            texts, marks = render(
                conversations=[[self._as_written(message) for message in messages]],
                tools=[dict(tool) for tool in record.tools] or None,
                chat_template=self._rendered_source,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=add_generation_prompt,
                **{**self._variables, **(record.template_options or {})},
            )
            text = str(texts[0])
            text.encode()
        except Exception as error:  # whatever the code of a template raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise DstrainError(
                f"the chat template refuses this conversation: {reason}",
                hint="change the conversation, or use another chat_template",
            ) from error
        spans = [(int(first), int(last)) for first, last in (marks[0] if marks else [])]
        return text, [span for span in spans if span[0] < span[1]]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Spans without those that begin where another one ends: a turn may be marked in parts."""
    joined: list[Span] = []
    for first, last in spans:
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, last))
    return joined


def _trained_tokens(
    tokenizer: Tokenizer, rendered: Sequence[_Rendered], *, with_stops: bool
) -> Iterator[Encoded | DstrainError]:
    """The tokens of each text, and those of them that lie in what is trained.

    Two things must hold, or what is trained is not what the model is asked for later: no token lies across a border,
    and the text in front of the last answer has, alone, the tokens that it has in the whole.
    """
    if not with_stops:  # whose places must be known
        yield from _trained_by_places(tokenizer, rendered, with_stops=False)
        return
    plain = tokenizer.encode_trained([one.text for one in rendered], [one.trained for one in rendered])
    others = [one for one, found in zip(rendered, plain, strict=True) if found is None]
    with_places = _trained_by_places(tokenizer, others, with_stops=True)
    for found in plain:
        yield next(with_places) if found is None else Encoded(*found)


def _trained_by_places(
    tokenizer: Tokenizer, rendered: Sequence[_Rendered], *, with_stops: bool
) -> Iterator[Encoded | DstrainError]:
    prompts = [one.text[: one.trained[-1][0]] for one in rendered]
    encoded = tokenizer.encode_with_places([one.text for one in rendered])
    alone = tokenizer.encode_rendered(prompts)
    for one, prompt, (ids, places) in zip(rendered, alone, encoded, strict=True):
        trained = np.zeros(ids.size, bool)
        wrong = None
        for first, last in one.trained:
            inside = (places[:, 0] >= first) & (places[:, 0] < last)
            across = np.zeros(ids.size, bool)
            for border in (first, last):
                across |= (places[:, 0] < border) & (places[:, 1] > border)
            if across.any():
                wrong = wrong or int(np.flatnonzero(across)[0])
            trained |= inside
        for first, last in () if with_stops else one.turns:
            turn = np.flatnonzero((places[:, 0] >= first) & (places[:, 0] < last))
            stops = [number for number, at in enumerate(turn) if tokenizer.is_special(int(ids[at]))]
            if stops:  # where there is none, that is an error later
                trained[turn[stops[-1] :]] = False
        if wrong is None and not np.array_equal(ids[: prompt.size], prompt):
            wrong = prompt.size - 1
        if wrong is None:
            yield Encoded(ids, trained)
            continue
        shown = tokenizer.token_text(ids[max(0, wrong - 1) : wrong + 2])
        yield DstrainError(
            f"a token lies across the border of what is trained, near {shown!r}",
            hint="the text before an answer must end where a token ends: look at the chat template's and the"
            " prompt's last characters",
        )


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    words = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words))) if words else None


def _dense(text: str) -> str:
    return re.sub(r"\s", "", text)


def _as_json(content: str) -> Iterator[str]:
    """How a template may have written a text: inside of a JSON string, or, a tool's answer, as JSON anew."""
    yield content
    yield json.dumps(content, ensure_ascii=False)[1:-1]
    yield json.dumps(content)[1:-1]
    try:
        value = json.loads(content)
        yield json.dumps(value, ensure_ascii=False)
        yield json.dumps(value)
    except (ValueError, RecursionError):
        return
