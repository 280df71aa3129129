"""Turn records into rows: an input text and a target text, or a conversation, perhaps with a split and choices."""

import json
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from string import Formatter
from typing import Any

from modular_experts.data.sources import Record
from modular_experts.text import did_you_mean, nearest

SPLITS = ("train", "validation", "test")
_SPLIT_ALIASES = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation"}
CHAT_ROLES = ("system", "user", "assistant", "tool")
Tools = list[Any] | None
"""JSON schemas of functions that an assistant may call, each a dict."""


@dataclass(frozen=True)
class Row:
    """One example; `split` is None if the data does not name one, `where` is its place (`file:line`).

    In a conversation, `target` is the assistant's last turn, and `input` the text of all before; `answers` are the
    messages of its `choices`, if they hold more than a text, and the chat template gets its `tools`. Only `predict`
    takes a row whose target is None.
    """

    input: str
    target: str | None
    split: str | None = None
    choices: tuple[str, ...] = ()
    where: str = ""
    messages: tuple[dict[str, str], ...] = ()
    answers: tuple[dict[str, str], ...] = ()
    tools: Tools = None


@dataclass(frozen=True)
class RowForm:
    """A form that rows come in: the columns that people give `input` and `target`, or the column `messages`."""

    columns: Mapping[str, str]
    optional: str | None = None

    def __str__(self) -> str:
        if "messages" in self.columns:
            return f"{self.columns['messages']!r} is the conversation, and the assistant's turns are the target"
        more = f" and {self.optional!r} are" if self.optional else " is"
        return f"{self.columns['input']!r}{more} the input, {self.columns['target']!r} is the target"


OWN = RowForm({"input": "input", "target": "target"})
FORMS = (
    OWN,
    RowForm({"messages": "messages"}),
    RowForm({"input": "prompt", "target": "completion"}),
    RowForm({"input": "instruction", "target": "output"}, optional="input"),
    RowForm({"input": "question", "target": "answer"}),
    *[RowForm({"input": prompt, "target": "chosen", "rejected": "rejected"}) for prompt in ("prompt", "input")],
    RowForm({"messages": "chosen", "rejected": "rejected"}),
)


def recognise(columns: Collection[str]) -> RowForm:
    """Return the form of rows with these columns; `input` and `target` beat every other form."""
    names = [{*form.columns.values()} for form in FORMS]
    fitting = [own for own in names if own <= {*columns}]
    # A conversation in `chosen` and `rejected` may have a prompt of its own.
    wanted = [own for own in fitting if not any(own < one for one in fitting)]
    whole = [form for form, own in zip(FORMS, names, strict=True) if own in wanted]
    if OWN in whole:
        return OWN
    # Rows without targets: of Alpaca's two columns of input, `input` is the optional one.
    found = whole or [
        form for form in FORMS[1:] if {own for key, own in form.columns.items() if key != "target"} <= set(columns)
    ]
    if not found and "input" in columns:
        return OWN
    if len(found) == 1:
        return found[0]
    listed = ", ".join(map(repr, columns))
    if found:
        setting = ", ".join(f"{key}: {column}" for key, column in found[0].columns.items())
        problem = "can be read in more than one way; name those to take"
    else:
        known = ", ".join("/".join(form.columns.values()) for form in FORMS)
        setting = "input: {}, target: {}".format(*[*map(str, columns), "...", "..."][:2])
        problem = f"have no known form ({known}); name your own"
    raise ValueError(
        f"the columns {listed} {problem} in the task, such as --tasks '{{path: FILE, columns: {{{setting}}}}}'"
    )


def content_hash(rows: Iterable[Row]) -> str:
    """Return a hash of the contents of rows, in their order: neither their places nor their splits count."""
    digest = blake2b(digest_size=16)
    for row in rows:
        held = {name: value for name, value in vars(row).items() if value and name not in ("split", "where")}
        digest.update(
            json.dumps(held, ensure_ascii=False, sort_keys=True, default=str).encode(errors="surrogatepass") + b"\n"
        )
    return digest.hexdigest()


@dataclass(frozen=True)
class RowReader:
    """Turns records into rows.

    Args:
        columns: The data's column for `input`, `target`, `messages`, `tools`, `split` or `choices`, if it has another
            name. With one for `rejected`, the choices are the target and its text.
        template, choices: As for `Task`.
        optional: A column whose text follows the input, after an empty line, where a row has it.
        targets: Whether every row needs a target.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    choices: Sequence[str] = ()
    optional: str | None = None
    targets: bool = True

    def read(self, records: Iterable[Record]) -> tuple[list[Row], list[str]]:
        """Return the good rows, and one sentence for each bad one."""
        rows, problems = [], []
        for record in records:
            try:
                if record.problem is not None:
                    raise BadRow(record.problem)
                if not isinstance(record.values, Mapping):
                    raise BadRow(f"a row is an object with 'input' and 'target', not {reprlib.repr(record.values)}")
                rows.append(self._row(record.values, record.where))
            except BadRow as problem:
                problems.append(f"{record.where}: {problem}")
        return rows, problems

    def _row(self, values: Mapping[str, Any], where: str) -> Row:
        split, column = self._split(values), self.columns.get("messages", self.columns.get("target", "target"))
        if not ("messages" in self.columns or ("rejected" in self.columns and _is_conversation(values.get(column)))):
            text = self._input(values)
            lacks = not self.targets and values.get(self.columns.get("target", "target")) in (None, "")
            target = None if lacks else self._text(values, "target")
            return Row(text, target, split, self._choices(values, target), where)
        pair, before, messages = list[dict[str, str]](), list[dict[str, str]](), self._messages(values, column)
        prompt = self.columns.get("input")
        if prompt and _is_conversation(values.get(prompt)):
            before = self._messages(values, prompt)
        elif prompt and [one["role"] for one in messages if one["role"] != "system"][:1] != ["user"]:
            # Else the conversation begins with the prompt itself.
            before = [{"role": "user", "content": self._text(values, "input")}]
        messages = before + messages
        if "rejected" in self.columns:
            other = before + self._messages(values, self.columns["rejected"])
            pair = [messages[-1], other[-1]]
            if other[:-1] != messages[:-1] or pair[0] == pair[1] or pair[1]["role"] != "assistant":
                both = f"{column!r} and {self.columns['rejected']!r}"
                raise BadRow(f"{both} must differ in the assistant's last message alone")
        target = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
        if target is None and self.targets:
            raise BadRow(
                f"the conversation ends with a message of role {messages[-1]['role']!r}; to learn or to score, it must "
                "end with the assistant's (predict answers such a row)"
            )
        before = messages if target is None else messages[:-1]
        if not any(message["role"] != "assistant" for message in before):
            raise BadRow("the conversation starts with the assistant; a message of the user comes before")
        lines = [f"{message['role']}: {message['content']}" for message in before]
        text = before[0]["content"] if len(before) == 1 else "\n".join(lines)
        choices = tuple(message["content"] for message in pair)
        more = any(message.keys() > {"role", "content"} for message in pair)
        answers = tuple(pair) if more else ()
        return Row(text, target, split, choices, where, tuple(messages), answers, self._tools(values))

    def _text(self, values: Mapping[str, Any], key: str) -> str:
        column = self.columns.get(key, key)
        if column not in values:
            raise BadRow(_no_column(column, values))
        return _checked(column, values[column])

    def _input(self, values: Mapping[str, Any]) -> str:
        if self.template is None:
            text = self._text(values, "input")
            if self.optional is None:
                return text
            more = values.get(self.optional) or ""
            return f"{text}\n\n{_checked(self.optional, more)}\n" if more else f"{text}\n"
        known = dict(values) | {key: values[column] for key, column in self.columns.items() if column in values}
        for name in template_fields(self.template):
            if name not in known:
                raise BadRow(f"the template has {{{name}}}, but {_no_column(name, known)}")
            if known[name] is None:
                raise BadRow(f"the template has {{{name}}}, which is null here")
        return _checked("input", self.template.format_map(known))

    def _messages(self, values: Mapping[str, Any], column: str) -> list[dict[str, str]]:
        if column not in values:
            raise BadRow(_no_column(column, values))
        listed = _listed(values[column])
        if not isinstance(listed, list | tuple) or not listed:
            raise BadRow(f"{column!r} must be a list of messages, not {reprlib.repr(listed)}")
        messages = []
        for number, message in enumerate(listed, 1):
            if not isinstance(message, Mapping):
                raise BadRow(f"message {number} must be {{role: ..., content: ...}}, not {reprlib.repr(message)}")
            for key in ("role", "content"):
                if key not in message:
                    raise BadRow(f"message {number}: {_no_column(key, message).replace('the row', 'it', 1)}")
            role = message["role"]
            if role not in CHAT_ROLES:
                near = did_you_mean(str(role), CHAT_ROLES)
                raise BadRow(f"message {number}: role {reprlib.repr(role)} is not one of {', '.join(CHAT_ROLES)}{near}")
            content = _checked(f"content of message {number}", message["content"])
            # The template may read more, such as `tool_calls`; a table gives each message every key.
            more = {key: one for key, one in message.items() if one is not None}
            messages.append(more | {"role": role, "content": content})
        return messages

    def _tools(self, values: Mapping[str, Any]) -> Tools:
        column = self.columns.get("tools", "tools")
        if not (tools := _listed(values.get(column))):
            return None
        if not isinstance(tools, list | tuple) or not all(isinstance(one, Mapping) for one in tools):
            how = "to leave it out, give the task another column: columns: {tools: other}"
            raise BadRow(f"{column!r} must be a list of JSON schemas of functions, not {reprlib.repr(tools)}; {how}")
        return [dict(one) for one in tools]

    def _split(self, values: Mapping[str, Any]) -> str | None:
        split = values.get(self.columns.get("split", "split"))
        if split is None or split == "":
            return None
        if isinstance(split, str) and (name := _SPLIT_ALIASES.get(split.lower(), split.lower())) in SPLITS:
            return name
        raise BadRow(f"'split' is {reprlib.repr(split)}, not one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")

    def _choices(self, values: Mapping[str, Any], target: str | None) -> tuple[str, ...]:
        column = self.columns.get("choices", "choices")
        choices = values.get(column)
        if target is None:
            return ()
        # In a CSV file, whose targets are texts, numbers are texts here too.
        numbers = {"parse_int": str, "parse_float": str}
        choices = list(self.choices) if choices is None or choices == "" else _listed(choices, **numbers)
        choices = [target, self._text(values, "rejected")] if "rejected" in self.columns else choices
        if not isinstance(choices, list | tuple):
            raise BadRow(f"{column!r} must be a list of texts, not {reprlib.repr(choices)}")
        texts = [_checked(column, choice) for choice in choices]
        if texts and (len(set(texts)) < len(texts) or len(texts) < 2):
            raise BadRow(f"{column!r} needs two or more different texts, not {reprlib.repr(texts)}")
        if texts and target not in texts:
            raise BadRow(f"target {reprlib.repr(target)} is not among its choices {reprlib.repr(texts)}")
        return tuple(texts)


def template_fields(template: str) -> list[str]:
    """Return the columns that a prompt template names, or raise a ValueError if it is malformed."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r} is malformed ({error}); a literal brace is written twice") from error
    for name in names:
        if not name.replace("-", "_").replace(" ", "_").isidentifier():
            raise ValueError(f"template {template!r} has the field {{{name}}}, which is not a plain name of a column")
    return names


def raise_for_bad_rows(problems: Sequence[str]) -> None:
    """Raise a ValueError that counts all bad rows and quotes the first five, if there are any."""
    if problems:
        count = "1 bad row" if len(problems) == 1 else f"{len(problems)} bad rows"
        more = ", the first 5" if len(problems) > 5 else ""
        raise ValueError("\n".join([f"{count} in the task data, so nothing was run{more}:", *problems[:5]]))


def spread_evenly(rows: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of the rows, at even distances over all of them."""
    return [rows[place * len(rows) // count] for place in range(count)] if count < len(rows) else list(rows)


class BadRow(ValueError):
    """A sentence on one record or conversation, for the report of all bad rows."""


def _checked(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{column!r} must be text, not {reprlib.repr(value)}")
    if not value.strip():
        raise BadRow(f"{column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{column!r} holds a lone surrogate, half of a character: {ascii(value)[:60]}") from None
    return value


def _listed(value: Any, **parsers: Any) -> Any:
    """Return the value, or the list that a text holds as JSON: a cell of a CSV file holds only text."""
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            return json.loads(value, **parsers)
    return value


def _is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages; a text is one if it holds messages as JSON."""
    found = _listed(value)
    has_roles = isinstance(found, list) and any(isinstance(one, Mapping) and "role" in one for one in found)
    return has_roles or isinstance(value, list | tuple)


def _no_column(column: str, values: Mapping[str, Any]) -> str:
    names = [str(name) for name in values]
    hint = f"; is {near!r} meant?" if (near := nearest(column, names)) else ""
    return f"the row has no {column!r}, only {', '.join(map(repr, names)) or 'nothing'}{hint}"
