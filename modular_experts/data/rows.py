"""Turn records into rows: an input text and a target text, or a conversation, perhaps with a split and choices."""

import json
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from string import Formatter
from typing import Any, TypeVar

from modular_experts.data.sources import Record
from modular_experts.text import did_you_mean, nearest

SPLITS = ("train", "validation", "test")
_SPLIT_ALIASES = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation"}
CHAT_ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]
Tools = list[Any] | None
"""JSON schemas of functions that an assistant may call, each a dict."""
Values = Mapping[str, object]
"""The columns of a record."""
Item = TypeVar("Item")


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
    messages: tuple[Message, ...] = ()
    answers: tuple[Message, ...] = ()
    tools: Tools = None


@dataclass(frozen=True)
class RowForm:
    """A form that rows come in: the columns that people give `input` and `target`, or the column `messages`."""

    columns: Mapping[str, str]
    optional: str | None = None

    def names(self, target: bool = True) -> set[str]:
        """Return the names of its columns, or of all but the target."""
        return {column for key, column in self.columns.items() if target or key != "target"}

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
    fitting = [form for form in FORMS if form.names() <= {*columns}]
    # A conversation in `chosen` and `rejected` may have a prompt of its own, so the form with more columns counts.
    fitting = [form for form in fitting if not any(form.names() < other.names() for other in fitting)]
    if OWN in fitting:
        return OWN
    if not fitting:
        # Rows without targets: of Alpaca's two columns of input, `input` is the optional one.
        fitting = [form for form in FORMS if form != OWN and form.names(target=False) <= {*columns}]
    if not fitting and "input" in columns:
        return OWN
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        setting = ", ".join(f"{key}: {column}" for key, column in fitting[0].columns.items())
        problem = "can be read in more than one way; name those to take"
    else:
        known = ", ".join("/".join(form.columns.values()) for form in FORMS)
        setting = "input: {}, target: {}".format(*[*map(str, columns), "...", "..."][:2])
        problem = f"have no known form ({known}); name your own"
    listed = ", ".join(map(repr, columns))
    raise ValueError(
        f"the columns {listed} {problem} in the task, such as `tasks={{path: FILE, columns: {{{setting}}}}}`"
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
        rows = []
        problems = []
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

    def _row(self, values: Values, where: str) -> Row:
        split = self._split(values)
        if "messages" in self.columns:
            return self._conversation(values, self.columns["messages"], split, where)
        target_column = self._column("target")
        if "rejected" in self.columns and _is_conversation(values.get(target_column)):
            return self._conversation(values, target_column, split, where)
        text = self._input(values)
        target = None
        if self.targets or values.get(target_column) not in (None, ""):
            target = self._text(values, "target")
        return Row(text, target, split, self._choices(values, target), where)

    def _conversation(self, values: Values, column: str, split: str | None, where: str) -> Row:
        messages = self._messages(values, column)
        prompt = self._prompt(values, messages)
        messages = prompt + messages
        pair: list[Message] = []
        if "rejected" in self.columns:
            rejected = prompt + self._messages(values, self.columns["rejected"])
            pair = [messages[-1], rejected[-1]]
            if rejected[:-1] != messages[:-1] or pair[0] == pair[1] or pair[1]["role"] != "assistant":
                both = f"{column!r} and {self.columns['rejected']!r}"
                raise BadRow(f"{both} must differ in the assistant's last message alone")
        target = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
        if target is None and self.targets:
            raise BadRow(
                f"the conversation ends with a message of role {messages[-1]['role']!r}; to learn or to score, it must "
                "end with the assistant's (predict answers such a row)"
            )
        before = messages if target is None else messages[:-1]
        if all(message["role"] == "assistant" for message in before):
            raise BadRow("the conversation starts with the assistant; a message of the user comes before")
        text = "\n".join(f"{message['role']}: {message['content']}" for message in before)
        if len(before) == 1:
            text = before[0]["content"]
        has_more = any(message.keys() > {"role", "content"} for message in pair)
        return Row(
            text,
            target,
            split,
            choices=tuple(message["content"] for message in pair),
            where=where,
            messages=tuple(messages),
            answers=tuple(pair) if has_more else (),
            tools=self._tools(values),
        )

    def _prompt(self, values: Values, messages: Sequence[Message]) -> list[Message]:
        """Return the messages of a column of prompts, unless there is none, or the conversation begins with them."""
        column = self.columns.get("input")
        if column is None:
            return []
        if _is_conversation(values.get(column)):
            return self._messages(values, column)
        roles = [message["role"] for message in messages if message["role"] != "system"]
        if roles[:1] == ["user"]:
            return []
        return [{"role": "user", "content": self._text(values, "input")}]

    def _column(self, key: str) -> str:
        return self.columns.get(key, key)

    def _text(self, values: Values, key: str) -> str:
        column = self._column(key)
        if column not in values:
            raise BadRow(_no_column(column, values))
        return _checked(column, values[column])

    def _input(self, values: Values) -> str:
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

    def _messages(self, values: Values, column: str) -> list[Message]:
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
            more = {key: value for key, value in message.items() if value is not None}
            messages.append(more | {"role": role, "content": content})
        return messages

    def _tools(self, values: Values) -> Tools:
        column = self._column("tools")
        tools = _listed(values.get(column))
        if not tools:
            return None
        if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
            how = "to leave it out, give the task another column: columns: {tools: other}"
            raise BadRow(f"{column!r} must be a list of JSON schemas of functions, not {reprlib.repr(tools)}; {how}")
        return [dict(tool) for tool in tools]

    def _split(self, values: Values) -> str | None:
        split = values.get(self._column("split"))
        if split is None or split == "":
            return None
        if isinstance(split, str) and (name := _SPLIT_ALIASES.get(split.lower(), split.lower())) in SPLITS:
            return name
        raise BadRow(f"'split' is {reprlib.repr(split)}, not one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")

    def _choices(self, values: Values, target: str | None) -> tuple[str, ...]:
        if target is None:
            return ()
        column = self._column("choices")
        choices = values.get(column)
        if "rejected" in self.columns:
            choices = [target, self._text(values, "rejected")]
        elif choices is None or choices == "":
            choices = list(self.choices)
        else:
            # In a CSV file, whose targets are texts, numbers are texts here too.
            choices = _listed(choices, number=str)
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


def spread_evenly(rows: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` of the rows, at even distances over all of them."""
    return [rows[place * len(rows) // count] for place in range(count)] if count < len(rows) else list(rows)


class BadRow(ValueError):
    """A sentence on one record or conversation, for the report of all bad rows."""


def _checked(column: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{column!r} must be text, not {reprlib.repr(value)}")
    if not value.strip():
        raise BadRow(f"{column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{column!r} holds a lone surrogate, half of a character: {ascii(value)[:60]}") from None
    return value


def _listed(value: object, number: type[str] | None = None) -> object:
    """Return the value, or the list that a text holds as JSON: a cell of a CSV file holds only text."""
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            return json.loads(value, parse_int=number, parse_float=number)
    return value


def _is_conversation(value: object) -> bool:
    """Return whether a value is a list; a text is one if it holds messages as JSON."""
    if isinstance(value, list | tuple):
        return True
    messages = _listed(value)
    return isinstance(messages, list) and any(
        isinstance(message, Mapping) and "role" in message for message in messages
    )


def _no_column(column: str, values: Values) -> str:
    names = [str(name) for name in values]
    near = nearest(column, names)
    hint = f"; is {near!r} meant?" if near else ""
    return f"the row has no {column!r}, only {', '.join(map(repr, names)) or 'nothing'}{hint}"
