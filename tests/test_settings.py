"""What a typed word and a value of a config mean where an annotation stands."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import pytest
import torch

from modular_experts.experts import Expert
from modular_experts.routing import Centroid
from modular_experts.settings import UsageError, Word, over
from modular_experts.settings.read import read, read_arguments

WORDS = [
    (str, "0123", "0123"),
    (str | None, "0123", "0123"),
    (str | None, "[hello]", "[hello]"),
    (str | None, "no", "no"),
    (str | None, "null", None),
    (str | timedelta | None, "10:00:00:00", "10:00:00:00"),
    (int | str, "12", 12),
    (int | str, "all", "all"),
    (float | list[float], "[0.5, 1]", [0.5, 1.0]),
    (bool | int, "true", True),
    (bool | int, "3", 3),
    (list[int] | str | int, "auto", "auto"),
    (list[int] | str | int, "[0, 1]", [0, 1]),
    (Any, "1e-3", 0.001),
    (Literal[64, 32] | Literal["16-true", "32"], "32", 32),
    (dict[str, list[Any]], "{keep: [0.1, 0.2]}", {"keep": [0.1, 0.2]}),
    (str | list[str], "[qv]_proj", "[qv]_proj"),
    (tuple[float, float], "[0.9, 1]", (0.9, 1.0)),
    (bool, "no", False),
]


@pytest.mark.parametrize(("hint", "word", "meant"), WORDS)
def test_a_typed_word_is_a_text_where_one_may_stand_and_yaml_elsewhere(hint: Any, word: str, meant: Any) -> None:
    found = read("--x", hint, Word(word)).make()
    assert (found, type(found)) == (meant, type(meant))


def test_a_factory_gets_its_first_arguments_later_and_its_settings_have_all_defaults() -> None:
    found = read("--expert", Callable[[torch.Tensor], Expert], {"class_path": "LoRAExpert", "init_args": {"rank": 3}})
    defaults = {"alpha": 16.0, "rank_stabilized": False, "dropout": 0.0}
    assert found.plain == {"class_path": "modular_experts.LoRAExpert", "init_args": {"rank": 3, **defaults}}
    assert found.make()(torch.ones(8, 8)).rank == 3


WRONG = [(int, 1.5), (int, True), (list[int], 3), (float, "much"), (str, True)]
WRONG += [(tuple[int, int], [1]), (tuple[int, int], [1, 2, 3])]


@pytest.mark.parametrize(("hint", "value"), WRONG)
def test_a_value_of_another_type_is_refused_by_its_option(hint: Any, value: Any) -> None:
    with pytest.raises(UsageError, match=r"^--x must (be|have) "):
        read("--x", hint, value)
    with pytest.raises(UsageError, match=r"type str, got True; YAML reads yes and no as .*, so write them in quotes"):
        read("--x", list[str], Word("[yes, no]"))


def test_an_argument_without_annotation_has_the_one_of_the_base_class() -> None:
    class Own(Centroid):
        def __init__(self, select=None):
            super().__init__(select=select)

    made = read_arguments("--router.", Own, {"select": {"class_path": "TopK", "init_args": {"k": 2}}}).make()
    assert made["select"].k == 2


def test_a_name_that_only_type_checkers_know_stands_for_anything() -> None:
    """As in WandbLogger, which imports `Run` of wandb so."""

    class Logger:
        def __init__(self, project: str = "experts", run: "OnlyForTypeCheckers | None" = None) -> None: ...  # noqa: F821

    assert read_arguments("--x.", Logger, {"project": "mine", "run": 3}).plain == {"project": "mine", "run": 3}
    with pytest.raises(UsageError, match=r"--x\.project must be"):
        read_arguments("--x.", Logger, {"project": [1]})


def test_a_class_need_not_be_given_what_it_gives_its_base_itself() -> None:
    class Base:
        def __init__(self, name: str, size: int = 1) -> None: ...

    class Own(Base):
        def __init__(self, rate: float, **more: Any) -> None:
            super().__init__("own", **more)

    assert read_arguments("--x.", Own, {"rate": 2}).plain == {"rate": 2.0, "size": 1}
    with pytest.raises(UsageError, match=r"--x\.rate must be given"):
        read_arguments("--x.", Own, {"size": 2})


def test_what_a_logger_of_others_refuses_is_one_sentence_and_a_bug_of_ones_own_class_is_shown() -> None:
    class Refusal(Exception):
        pass

    class Refused:
        def __init__(self, place: str) -> None:
            raise Refusal("file store is\nin maintenance mode")

    with pytest.raises(Refusal):
        read("--trainer.logger", Refused, {"place": "x"}).make()
    Refused.__module__ = "lightning.pytorch.loggers.refused"
    with pytest.raises(UsageError, match=r"^--trainer\.logger: Refused cannot be made: file store is in maintenance"):
        read("--trainer.logger", Refused, {"place": "x"}).make()


def test_settings_of_a_class_that_are_a_text_get_a_sentence() -> None:
    given = {"class_path": "LoRAExpert", "init_args": "rank"}
    with pytest.raises(UsageError, match=r"^--expert: a class is written as its name or as .*, got .*'rank'"):
        read("--expert", Callable[[torch.Tensor], Expert], given)
    assert over(given, {"init_args": {"rank": 3}}) == given | {"init_args": {"rank": 3}}
