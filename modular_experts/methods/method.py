"""A merge method makes one delta of the deltas that several experts have for one weight; this is its contract.

A method is a pure function with settings. To write one of your own, subclass `MergeMethod` as a frozen dataclass whose
fields are the settings, and define `merge(self, deltas)`.
"""

import functools
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.methods.settings import Checked, Checks, Presets, fill_from_preset, finite, with_table

PROMISES = (
    "Unless its text limits this, a method multiplies its result by `scale`, and by a common positive factor of the "
    "experts; sparse experts merge to a sparse one; and the order of the experts does not matter, if their weights and "
    "statistics go with them."
)
"""The promises of every method, which `check_merge_method` checks."""


@dataclass(frozen=True, eq=False)
class DataStatistic:
    """A statistic of one weight on one expert's data.

    Attributes:
        values: Fisher information in the weight's shape, or the Gram matrix of the layer's inputs, `(in, in)`.
        norm: Euclidean norm of the expert's statistic over all weights together.
        inputs: Dimension of the weight along which the layer's inputs lie: 1 of `(out, in)`, as `nn.Linear` stores its
            weight, 0 of `(in, out)`, as GPT-2's `Conv1D` does.
    """

    values: Tensor
    norm: float = 1.0
    inputs: int = 1


@dataclass(frozen=True, eq=False)
class Context:
    """What a method may know of the weight that it merges, beside the deltas.

    Attributes:
        name: The weight's name.
        statistics: One per expert, of the kind that the method `needs`; an element is None where the kind does not
            describe this weight.
        prepared: What the method's `prepare` returned.
        depth: Where the weight lies, from 0 at the first transformer block to 1 at the last that is merged; 0 outside.
    """

    name: str = ""
    statistics: Sequence[DataStatistic | None] | None = None
    prepared: Any = None
    depth: float = 0.0


@dataclass(frozen=True)
class Needs:
    """What must be gathered and held in memory for a method, beside the deltas and a chunk of the weight: estimates.

    Attributes:
        statistics: Kind of the statistics of the experts' data, such as `gram`.
        together: Whether these are taken of all experts together, and hold only for the merge of exactly these.
        matrices: Number of float64 matrices of the weight's size.
        matrices_per_expert: Number of such matrices for each expert that moves the weight.
        squares: Number of float64 matrices `(in, in)`, such as Gram matrices.
        copies: Number of copies of the single entries that sparse experts keep of the weight.
        inputs: Whether a search on the base and inputs of the tasks finds the merge, and `merge` refuses the method.
    """

    statistics: str | None = None
    matrices: float = 0.0
    matrices_per_expert: float = 0.0
    squares: float = 0.0
    copies: float = 0.0
    together: bool = False
    inputs: bool = False

    def __add__(self, other: "Needs") -> "Needs":
        """Return the needs of two methods that hold their memory at the same time, one around the other."""
        assert not (self.statistics and other.statistics), (self, other)
        held = ("matrices", "matrices_per_expert", "squares", "copies")
        sums = {name: getattr(self, name) + getattr(other, name) for name in held}
        return Needs(self.statistics or other.statistics, together=self.together or other.together, **sums)


class MergeMethod(Checked, ABC):
    """A way to merge experts. Subclass it as a frozen dataclass whose fields are the settings, and write `merge`.

    The fields become options of the command line and are recorded in the merged expert. A list among them that is as
    long as the list of experts holds one value per expert. `merge` may leave out the parameter `context`. A subclass
    inherits the checks and the texts of the settings of the classes above it.

    Attributes:
        checks: What refuses bad settings when a method is made, such as `Checks(ridge=at_least(0))`.
        presets: Values of the settings that are not given, by the name of the setting `preset`.
        scale: Factor of the result.
    """

    checks = Checks(scale=finite)
    presets: ClassVar[Presets] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "presets" in vars(cls):
            cls.__doc__ = with_table(cls.__doc__ or "", cls.presets)
        if "merge" in vars(cls) and len(inspect.signature(cls.merge).parameters) == 2:
            cls.merge = _with_context(cls.merge)  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        if self.presets:
            fill_from_preset(self, self.presets)
        super().__post_init__()

    @abstractmethod
    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        """Return the merged delta of one weight.

        Args:
            deltas: One delta per expert, in the order of the experts, all of the weight's shape. An expert that does
                not move this weight gives `Sparse.zero(shape)`.
            context: The weight's name, statistics of the experts' data, and the result of `prepare`.
        """

    @property
    def needs(self) -> Needs:
        """The statistics and the memory that the method needs; a subclass may also set a plain class attribute."""
        return Needs()

    def prepare(self, stream: Iterable[Sequence[Delta]]) -> object:
        """Look at every weight of every expert, and return what `merge` shall find as `context.prepared`.

        Methods with statistics over the whole expert, such as one threshold for all weights, define this. The stream
        gives the deltas of one weight after another; each iteration reads the experts anew.
        """
        return None

    @property
    def has_tasks(self) -> bool:
        """Whether each expert's task also gets an expert of its own, from `per_task`."""
        return type(self).per_task is not MergeMethod.per_task

    def per_task(self, deltas: Sequence[Delta], expert: int, context: Context | None = None) -> Delta:
        """Return the delta of one weight in the expert that is written for the task of one of the experts, by its
        index.

        Methods that give each task an expert of its own beside the merged one define this.
        """
        return self.merge(deltas, context)


def _with_context(merge: Callable[..., Delta]) -> Callable[..., Delta]:
    @functools.wraps(merge)
    def with_context(self: MergeMethod, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        return merge(self, deltas)

    return with_context


def documentation(kind: type[MergeMethod]) -> tuple[str, dict[str, str]]:
    """Return what the docstring of a method tells, and the text of each of its settings, maybe of a class above it."""
    about = ""
    texts: dict[str, str] = {}
    for part in reversed(kind.__mro__):
        about, *lists = re.split(r"^(?:Args|Attributes):\n", inspect.cleandoc(part.__doc__ or ""), flags=re.MULTILINE)
        for setting, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", "".join(lists), re.MULTILINE):
            texts[setting] = " ".join(text.split())
    settings: list[str] = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    return about.strip(), {setting: texts.get(setting, "") for setting in settings if not setting.startswith("_")}


def known_statistics(method: MergeMethod, context: Context | None, experts: int) -> Sequence[DataStatistic | None]:
    """Return the statistics of a context, one per expert, and refuse another number of them."""
    known = context.statistics if context else None
    if known is None or len(known) != experts:
        number = "got none" if known is None else f"got {len(known)} for {experts} experts"
        raise ValueError(
            f"{type(method).__name__} needs {method.needs.statistics} statistics, one per expert, and {number}; pass "
            "Context(statistics=[...]), or merge stored experts, whose statistics are read from their directories"
        )
    return known


def known_grams(
    method: MergeMethod, context: Context | None, deltas: Sequence[Delta]
) -> tuple[list[Delta], list[Tensor], bool] | None:
    """Return the deltas as `(out, in)`, their experts' Gram matrices `(in, in)`, and whether the weight is stored
    transposed, as `(in, out)`; or None for a weight that is not the matrix of a linear layer.
    """
    known = known_statistics(method, context, len(deltas))
    grams = [gram for gram in known if gram is not None]
    if len(grams) < len(deltas):
        return None
    transposed = grams[0].inputs == 0
    upright = [delta.T for delta in deltas] if transposed else list(deltas)
    return upright, [gram.values for gram in grams], transposed
