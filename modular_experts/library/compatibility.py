"""Check that several experts fit together before they are merged, applied or listed as parents."""

import glob
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import TypeVar

import torch

from modular_experts.deltas.task_vector import TaskVector
from modular_experts.library.atomic import new_directory
from modular_experts.library.expert import StoredExpert
from modular_experts.library.names import check_target
from modular_experts.library.opening import is_adapter, open_expert
from modular_experts.library.record import MERGE, RECORD_FILE, ROUTED, Facts, Record, read_record

log = logging.getLogger(__name__)

Vector = TypeVar("Vector", bound=TaskVector)
Item = TypeVar("Item")


def open_experts(
    paths: str | Path | Vector | Sequence[str | Path | Vector],
    mergeable: bool = True,
    base: object = None,
    skip: bool | None = None,
    on_answers: bool = False,
) -> list[StoredExpert | Vector]:
    """Open experts in their order, all before any delta is read; task vectors such as `0.5 * a` stay as they are.

    An opened expert is copied, since a larger base may move it.

    Args:
        paths: One or several directories, PEFT adapters, opened experts or patterns such as `library/*`. A pattern
            stands for the experts and adapters that it matches; for a merge it leaves out merges and routes, which
            consist of other experts, unless the list names them.
        mergeable: Refuse an expert whose deltas are not all that it does.
        base: The base of PEFT adapters, as for `open_expert`.
        skip: Leave out, with a sentence in the log, what cannot be used, such as an adapter of a tied head; None for a
            caller that offers no such choice.
        on_answers: Take experts that act on answers alone, too.

    Raises:
        FileNotFoundError: There is no expert at a place.
        ValueError: The list is empty or names an expert twice, or experts cannot be used; the error names them all.
    """
    named = [paths] if isinstance(paths, str | Path | TaskVector) else paths
    if not named:
        raise ValueError("the list of experts is empty; name at least one, such as '[library/a, library/b]'")
    opened: list[StoredExpert | Vector] = []
    refused: dict[str, ValueError] = {}
    for path in _without_patterns(named, mergeable):
        if isinstance(path, TaskVector) and not isinstance(path, StoredExpert):
            opened.append(path)
            continue
        try:
            expert = copy(path) if isinstance(path, StoredExpert) else open_expert(path, base)
            if mergeable and not (on_answers and expert.acts_on_answers):
                _check_mergeable(expert, offers_skip=skip is not None, alone=len(named) == 1)
            opened.append(expert)
        except ValueError as error:
            place = path.place if isinstance(path, StoredExpert) else path
            refused[str(place)] = error
    if refused:
        _report_refused(refused, len(opened), skip)
    stored = [expert for expert in opened if isinstance(expert, StoredExpert)]
    seen: set[Path] = set()
    for expert in stored:
        if expert.path.resolve() in seen:
            raise ValueError(f"the expert {expert.place} is listed twice; list each expert once")
        seen.add(expert.path.resolve())
    warn_of_missing_parents(stored)
    return opened


def _without_patterns(named: Sequence[Item], mergeable: bool) -> list[Item | str]:
    """Return places and opened experts, each pattern replaced by the places that it matches and no word names."""
    places: list[Item | str] = []
    for word in named:
        if not isinstance(word, str) or not glob.has_magic(word) or os.path.exists(word):
            places.append(word)
            continue
        matched = [place for place in sorted(glob.glob(os.path.expanduser(word))) if place not in named]
        kinds = {place: _kind(Path(place)) for place in matched}
        kept = [place for place, kind in kinds.items() if kind and not (mergeable and kind in (MERGE, ROUTED))]
        left_out = [place for place, kind in kinds.items() if kind and place not in kept]
        if left_out:
            log.warning(
                "%s leaves out %s, which %s of other experts; name what you want among them beside the pattern",
                word,
                ", ".join(left_out),
                "consists" if len(left_out) == 1 else "consist",
            )
        if not kept:
            raise ValueError(f"{word} matches no expert; name directories of experts, or a pattern such as library/*")
        places += kept
    return places


def _kind(place: Path) -> str | None:
    """Return the kind of the expert or PEFT adapter at a place; None for anything else."""
    if is_adapter(place):
        return "PEFT adapter"
    return read_record(place / RECORD_FILE)["kind"] if (place / RECORD_FILE).is_file() else None


def _report_refused(refused: Mapping[str, ValueError], fitting: int, skip: bool | None) -> None:
    """Log which experts are left out if the caller may `skip` them, and raise the error about them otherwise."""
    if skip and fitting:
        for place, error in refused.items():
            log.warning("%s is left out: %s", place, error)
        return
    if len(refused) == 1 and not (skip is False and fitting):
        raise next(iter(refused.values()))
    reasons = "; ".join(f"{place}: {error}" for place, error in refused.items())
    advice = ". Leave them out with `skip=True`" if skip is False and fitting else ""
    raise ValueError(f"{len(refused)} of {len(refused) + fitting} experts cannot be used: {reasons}{advice}")


def warn_of_missing_parents(experts: Sequence[StoredExpert]) -> None:
    """Log a sentence for each expert that was trained on top of others which are not among these."""
    for expert in experts:
        # The deltas of `adapt` and `distill` hold what the parents do.
        is_whole = not {"adapted", "distilled"}.isdisjoint(expert.record["hyperparameters"] or {})
        parents = [] if is_whole or expert.is_routed or expert.is_merge else expert.record["parents"]
        lacking = [parent for parent in parents if not any(other.is_listed_as(parent) for other in experts)]
        missing = ", ".join(str(parent["name"]) for parent in lacking)
        if missing:
            log.warning("%s was trained on top of %s, which is not listed and will be missed", expert.name, missing)


def open_parents(expert: StoredExpert) -> list[StoredExpert]:
    """Open the experts that an expert was made with, which lie beside it; raise if one is missing or has changed."""
    parents = []
    for listed in expert.record["parents"]:
        place = expert.path.parent / str(listed["name"])
        if not place.is_dir():
            raise FileNotFoundError(f"{expert.name} was made with {place.name}, which is missing beside it, at {place}")
        parents.append(_open_beside(place, expert))
        if not parents[-1].is_listed_as(listed):
            raise ValueError(
                f"{place} is not the expert that {expert.name} was made with (its contents are "
                f"{parents[-1].content_hash[:12]}, not {str(listed['content_hash'])[:12]}); make {expert.name} again"
            )
    return parents


def found_beside(expert: StoredExpert, target: Path, overwrite: bool = False) -> StoredExpert | None:
    """Return the expert at a place if it is there already; raise FileExistsError if another one is, which must stay."""
    there = open_expert(target, expert.record["base"]["id"]) if target.is_dir() else None
    if there is not None and there.content_hash == expert.content_hash:
        return there
    if there is not None and not overwrite:
        raise FileExistsError(f"{target} is another expert than {expert.place}; rename the directory of one of them")
    return None


def _open_beside(place: Path, expert: StoredExpert) -> StoredExpert:
    """Open what lies beside an expert; an adapter, for the base of that expert."""
    if expert.base is None and is_adapter(place):
        with suppress(FileNotFoundError):  # then the adapter may name the base where it is
            return open_expert(place, expert.record["base"]["id"])
    return open_expert(place, expert.base)


def put_beside(
    expert: StoredExpert, target: Path, overwrite: bool = False, without: Sequence[str] = ()
) -> StoredExpert:
    """Put an expert `without` some files into another library, with no second copy on the disk where possible."""
    if (there := found_beside(expert, target, overwrite)) is not None:
        return there

    def link(source: str, place: str) -> None:
        try:
            os.link(source, place)
        except OSError:
            shutil.copyfile(source, place)

    with new_directory(check_target(target, overwrite), overwrite) as directory:
        left_out = shutil.ignore_patterns(*without)
        shutil.copytree(expert.path, directory, ignore=left_out, copy_function=link, dirs_exist_ok=True)
    return open_expert(target)


def check_mergeable(experts: Sequence[StoredExpert]) -> None:
    """Raise ValueError for an expert whose deltas are not all that it does."""
    for expert in experts:
        _check_mergeable(expert, offers_skip=False, alone=len(experts) == 1)


def _check_mergeable(expert: StoredExpert, offers_skip: bool, alone: bool) -> None:
    if expert.mergeable:
        return
    advice = "; leave it out of the list"
    if alone:
        advice = "; evaluate, generate and serve use it as it is"
    elif offers_skip:
        advice = ""
    # Experts that act on answers alone are merged among themselves.
    use = "added" if expert.acts_on_answers else "merged or added"
    reason = expert.not_mergeable_because
    raise ValueError(f"{expert.name} cannot be {use} to its base, because {reason}{advice}")


def check_act_alike(experts: Sequence[StoredExpert]) -> bool:
    """Return whether experts act on answers alone; raise ValueError if only some of them do."""
    on_answers = [expert.name for expert in experts if expert.acts_on_answers]
    if on_answers and len(on_answers) < len(experts):
        others = [expert.name for expert in experts if not expert.acts_on_answers]
        raise ValueError(
            f"{on_answers[0]} acts on answers alone and {others[0]} on prompts, too, so one model cannot take "
            "both; name experts of one sort"
        )
    return bool(on_answers)


def common_base(experts: Sequence[StoredExpert]) -> Record:
    """Return the base that the experts' records name; raise ValueError if two have different fingerprints.

    A tied base and its untied copy compute the same, so the copy is the base of both, unless an expert of the tied one
    moves the tensor that is two in the copy.
    """
    first = next((expert for expert in experts if "untied" in expert.record["base"]), experts[0])
    base = first.record["base"]
    for other in experts:
        theirs = other.record["base"]["fingerprint"]
        if theirs != base["fingerprint"] and not _same_untied(other, theirs, base.get("untied")):
            raise ValueError(
                f"{first.name} and {other.name} were trained on different bases and cannot be combined: "
                f"{_base(first)} and {_base(other)}"
            )
    return base


def check_fingerprint(
    experts: Sequence[StoredExpert], fingerprint: str, base: str, untied: Mapping[str, str] | None = None
) -> None:
    """Raise ValueError for an expert of a base of another fingerprint than the one at hand, which errors call `base`.

    `untied` holds the facts that a record keeps about a tied base, if it is an untied copy of one.
    """
    for expert in experts:
        recorded = expert.record["base"]
        if recorded["fingerprint"] == fingerprint and untied and "untied" not in recorded:
            _same_untied(expert, untied["fingerprint"], untied)
        if not (
            recorded["fingerprint"] == fingerprint
            or _same_untied(expert, recorded["fingerprint"], untied)
            or _same_untied(expert, fingerprint, recorded.get("untied"))
        ):
            raise ValueError(
                f"{expert.name} was trained on another base than {base} (fingerprint {fingerprint[:12]}): on "
                f"{_base(expert)}"
            )


def _same_untied(expert: StoredExpert, tied: str, untied: Mapping[str, str] | None) -> bool:
    """Return whether an expert is the same on a tied base, perhaps of the fingerprint `tied`, and on its untied copy.

    `untied` holds the facts that the record of the copy keeps about the tied base; None for any other base.
    """
    if untied is None or untied["fingerprint"] != tied:
        return False
    if not expert.mergeable or {untied["head"], untied["embeddings"]} & set(expert):
        why = f"moves {untied['embeddings']} or {untied['head']}" if expert.mergeable else "is more than deltas"
        raise ValueError(
            f"{expert.name} {why}; these are one tensor in a tied base and two in its untied copy, so it stays with "
            f"{_base(expert)}: make the others experts of that base, too"
        )
    return True


def training_in_common(experts: Sequence[StoredExpert]) -> Record:
    """Return how the experts read rows and held their base in training, as far as all of them did the same."""
    parts = [expert.record.get("training") or {} for expert in experts]
    keys = [key for key in ("max_length", "chat_template", "dtype") if all(key in part for part in parts)]
    return {key: parts[0][key] for key in keys if all(part[key] == parts[0][key] for part in parts)}


def warn_unlike_training(
    experts: Sequence[StoredExpert], reading: Callable[[Iterable[str]], Facts], dtype: str
) -> None:
    """Log a sentence for each expert that meets rows or a base in another form than in its training.

    `reading` tells how rows of tasks are read now, as `TaskMixture.reading_of`.
    """
    for expert in experts:
        trained = expert.record.get("training") or {}
        unlike = []
        now = reading(expert.record["tasks"])
        if "chat_template" in trained and "chat_template" in now and trained["chat_template"] != now["chat_template"]:
            if trained["chat_template"] is None:
                unlike.append("a chat template, which it never saw (`chat_template=True`)")
            elif now["chat_template"] is None:
                unlike.append("no chat template instead of one (`chat_template=True`)")
            else:
                unlike.append("another chat template")
        if now.get("max_length", math.inf) < trained.get("max_length", 0):
            unlike.append(f"{now['max_length']} instead of {trained['max_length']} tokens a row (`max_length=`)")
        if now.get("shots", 0) < trained.get("shots", 0):
            unlike.append(f"{now.get('shots', 0)} instead of {trained['shots']} demonstrations (`shots=`)")
        if dtype != trained.get("dtype", dtype):
            unlike.append(f"a base in {dtype} instead of {trained['dtype']} (`dtype=`)")
        if unlike:
            log.warning("%s is used otherwise than it was trained, with %s", expert.name, ", ".join(unlike))


def union_of_weights(experts: Sequence[StoredExpert]) -> dict[str, torch.Size]:
    """Return the shape of every weight that any of the experts moves, sorted; raise ValueError if two disagree."""
    shapes: dict[str, torch.Size] = {}
    owner: dict[str, str] = {}
    for expert in experts:
        for name, shape in expert.shapes().items():
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"{owner[name]} and {expert.name} disagree on the shape of {name}: "
                    f"{tuple(shapes[name])} and {tuple(shape)}"
                )
            owner.setdefault(name, expert.name)
    return dict(sorted(shapes.items()))


def as_parents(experts: Sequence[StoredExpert]) -> list[Record]:
    """Return the experts as records list parents: by name and content hash, with their tasks and known licences."""
    parents = []
    for expert in experts:
        parent = {"name": expert.name, "content_hash": expert.content_hash, "tasks": expert.record["tasks"]}
        known = {"license": expert.record["license"]} if expert.record.get("license") else {}
        parents.append(parent | known)
    return parents


def parent_ids(parents: Sequence[Facts]) -> list[dict[str, str]]:
    return [{name: parent[name] for name in ("name", "content_hash")} for parent in parents]


def _base(expert: StoredExpert) -> str:
    base = expert.record["base"]
    return f"{base.get('id')} (fingerprint {base['fingerprint'][:12]})"
