"""Put a merge method around another one, as `KnOTS`, `CoreSpace` and `SVC` do."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from modular_experts.deltas import Delta
from modular_experts.methods.method import Context, MergeMethod, Needs

Back = Callable[[Delta], Delta]


@dataclass(frozen=True)
class Wrapper(MergeMethod):
    """A merge method around another one. Subclass it as a frozen dataclass, and write `around`.

    Statistics, a first look at all weights and experts for single tasks are the inner method's, and pass through.
    `merge --tune` calls a setting of the inner method `inner.keep`.

    Attributes:
        inner: The method inside.
        scale: Factor of the result, in addition to the inner method's.
        own: The memory that the wrapper needs beside the inner method.
        other_coordinates: Why the inner method may not need statistics of the experts' data: a place where they do not
            exist, such as "in the common basis".
    """

    own = Needs()
    other_coordinates = ""

    inner: MergeMethod
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.other_coordinates and (kind := self.inner.needs.statistics) is not None:
            raise ValueError(
                f"{type(self).__name__}: {type(self.inner).__name__} needs {kind} statistics of the weights, which do "
                f"not exist {self.other_coordinates}; choose a method that needs deltas only, such as TIES"
            )

    @abstractmethod
    def around(self, deltas: Sequence[Delta]) -> tuple[Sequence[Delta], Back]:
        """Return the deltas that the inner method gets, and a function that makes the result of its merge.

        The function applies `scale`, and rounds to the deltas' widest dtype.
        """

    @property
    def needs(self) -> Needs:
        return self.own + self.inner.needs

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> object:
        return self.inner.prepare(_InnerStream(self, stream))

    @property
    def has_tasks(self) -> bool:
        return self.inner.has_tasks

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        inner_deltas, back = self.around(deltas)
        return back(self.inner.merge(inner_deltas, context))

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        inner_deltas, back = self.around(deltas)
        return back(self.inner.per_task(inner_deltas, expert, context))


@dataclass(frozen=True, eq=False)
class _InnerStream(Iterable[Sequence[Delta]]):
    """A stream of deltas as the inner method of a wrapper gets them."""

    wrapper: Wrapper
    stream: Iterable[Sequence[Delta]]

    def __iter__(self) -> Iterator[Sequence[Delta]]:
        return (self.wrapper.around(deltas)[0] for deltas in self.stream)


def setting_names(method: MergeMethod) -> list[str]:
    """Return the names of a method's settings, such as `inner.keep` in a method inside, but for presets.

    What a preset fills is filled when the method is made, so a change of the preset alone would change nothing.
    """
    if not is_dataclass(method):
        return []
    names = []
    for field in fields(method):
        if field.init and not field.name.startswith("_") and field.name != "preset":
            names.append(field.name)
            value = getattr(method, field.name)
            if isinstance(value, MergeMethod):
                names += [f"{field.name}.{name}" for name in setting_names(value)]
    return names


def with_settings(method: MergeMethod, settings: Mapping[str, Any]) -> MergeMethod:
    """Return a method with some settings changed; `inner.keep` is the `keep` of the method `inner`."""
    own: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {}
    for setting, value in settings.items():
        name, _, rest = setting.partition(".")
        if rest:
            inside.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    for name, changes in inside.items():
        own[name] = with_settings(own.get(name, getattr(method, name)), changes)
    return replace(method, **own) if own else method  # type: ignore[type-var]
