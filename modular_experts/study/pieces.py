"""Cut a study into pieces of work, each named by its work and by a digest of all that its result depends on.

A digest covers the settings of the piece with the code, files and experts that they name, the base, the rows of the
piece's tasks, and the digests of the pieces that it needs. So a change of the study gives new keys to the pieces that
depend on it, and to no others.
"""

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from modular_experts.base import Base
from modular_experts.language_model import is_classifier
from modular_experts.library import open_expert
from modular_experts.library.result_key import result_key, texts_in
from modular_experts.library.statistics import OF_INPUTS
from modular_experts.reports.json_lines import Key, key_text
from modular_experts.reports.results import Facts
from modular_experts.study.apart import MergeEntry
from modular_experts.study.merges import choose, combine_and_test
from modular_experts.study.piece import Piece
from modular_experts.study.plan import BASE, Study, base_name, groups
from modular_experts.study.short_forms import stored_in
from modular_experts.study.work import do, measure_experts, put, take, test, train

Stage = Literal["experts", "statistics", "settings", "merges", "tests"]
"""What `only` of `run_study` holds; the key of a piece begins with one of them."""


def pieces_of(study: Study, out: Path, only: Collection[str] = ()) -> list[Piece]:
    """Return the pieces of a study in the directory `out`, in the order in which they may run.

    `only` are the stages to return, with all that they need; by default every stage.
    """
    kept: list[Piece] = []
    needed: set[Key] = set()
    for piece in reversed(_Plan(study, out).pieces):
        if not only or piece.key[0] in only or piece.key in needed:
            kept.append(piece)
            needed.update(piece.needs)
    return kept[::-1]


class _Plan:
    def __init__(self, study: Study, out: Path) -> None:
        self.out = out
        self.pieces: list[Piece] = []
        self.rows = [study.data, study.max_new_tokens, study.dtype, study.metrics]
        of_seeds = {seed: study.at(seed) for seed in study.seeds}
        same = all((other.base, other.tasks) == (study.base, study.tasks) for other in of_seeds.values())
        for number, (seed, self.study) in enumerate(of_seeds.items()):
            opened = Base.open(self.study.base)
            self.base = opened.identity
            if is_classifier(opened.structure.model):
                # Without experts it has no task head, so the base is not tested.
                asked = {"matrix": study.matrix, "held_out": study.held_out, "base_shots": study.base_shots}
                if wrong := [name for name, value in asked.items() if value]:
                    raise ValueError(
                        f"{wrong[0]} tests models on tasks for which they have no task head, as {self.study.base} "
                        f"classifies; leave {wrong[0]} out"
                    )
            elif not same:
                self._test_base((BASE, seed), seed)
            elif number == 0:
                self._test_base((BASE,), None)
            for kind, configs in self.study.joint.items():
                # The longest pieces go first, so that no process does one while the others have nothing left to do.
                name = study.joint_name(kind, seed)
                own = [*study.held_in]
                trained = self._train(configs, own, name, (kind, "all"), seed)
                self._test(kind, (name,), [*study.tasks], (kind, seed), [trained], seed=seed, own=own)
            for kind in study.experts:
                self._experts_of(kind, seed)

    def _test_base(self, words: Key, seed: int | None) -> None:
        whole = self.study
        self._test(BASE, (), [*whole.tasks], words, [], seed=seed)
        for shots in whole.base_shots:
            self.study = replace(whole, data=whole.data | {"shots": shots})
            self._test(base_name(shots), (), [*whole.tasks], (*words, f"{shots}-shot"), [], seed=seed)
        self.study = whole

    def _experts_of(self, kind: str, seed: int) -> None:
        study = self.study
        trained: dict[str, Key] = {}
        for task in study.held_in:
            name = study.name(kind, task, seed)
            trained[task] = self._train(study.experts[kind], [task], name, (kind, task), seed)
            tested = [*study.tasks] if study.matrix else [task]
            self._test(name, (name,), tested, (kind, task, seed), [trained[task]], kind=kind, seed=seed, own=[task])
        statistics: dict[str, Key] = {}
        for of in sorted(set[str]().union(*(way.statistics for way in study.merges[kind]))):
            # Inputs do not depend on `eval_limit`.
            read = dict(study.data)
            if of in OF_INPUTS:
                read.pop("eval_limit", None)
            statistics[of] = self._add(("statistics", kind, of, seed), take, (kind, of, seed), [read], trained.values())
        for name, path in study.measures.items():
            measured = (kind, name, seed)
            self._add(("statistics", *measured), measure_experts, measured, [path, [*study.held_in]], trained.values())
        self._combine(kind, seed, trained, statistics)

    def _combine(self, kind: str, seed: int, trained: Mapping[str, Key], statistics: Mapping[str, Key]) -> None:
        study = self.study
        whole: dict[str, Key] = {}
        chosen: dict[tuple[str, int], Key] = {}

        def needed(way: MergeEntry, tasks: Sequence[str]) -> list[Key]:
            return [trained[task] for task in tasks] + [statistics[of] for of in sorted(way.statistics)]

        for way, count in itertools.product(study.merges[kind], study.counts):
            several = groups(study, kind, count, seed)
            if way.tune is not None:
                members = [group.own for group in several]
                tasks = list(itertools.chain(*members))
                chosen[way.name, count] = self._add(
                    ("settings", kind, way.name, count, seed),
                    choose,
                    (way, several),
                    [asdict(way), members, study.settings_of(tasks), study.data, study.dtype],
                    needed(way, tasks),
                )
            for group in several:
                needs = needed(way, group.own)
                made = way.name
                if way.fallback and group.is_whole:
                    needs.append(whole[way.fallback.name])
                elif way.fallback:
                    # The merge of all experts is in the library; a merge of a few is made anew beside the route.
                    made = way.fallback.name
                if way.of:
                    needs.append(whole[way.of.name])
                tuned = [chosen[made, count]] if (made, count) in chosen else []
                key = ("merges", kind, way.name, count, group.number, seed)
                settings = [asdict(way), group.own, study.settings_of(group.tested), self.rows]
                whole[way.name] = self._add(key, combine_and_test, (way, group), settings, [*needs, *tuned], tuned)

    def _train(
        self, configs: Sequence[Facts], tasks: Sequence[str], name: str, words: tuple[str, str], seed: int
    ) -> Key:
        if place := stored_in(configs):
            expert = open_expert(Path(place, *tasks), self.study.base)
            return self._add(("experts", *words, seed), put, (expert.path, name), [expert.content_hash], [])
        # Also what is not there yet: the first run must not train what a second one refuses.
        written = [Path(os.path.abspath(self.out), part) for part in ("library", "runs")]
        for path in texts_in(configs):
            named = Path(os.path.abspath(os.path.expanduser(path)))
            if any(map(named.is_relative_to, written)):
                raise ValueError(
                    f"experts.{words[0]} names {path}, where this study writes itself, so its content is not known "
                    "before the study runs; name an expert of another directory"
                )
        settings = [configs, self.study.data, self.study.dtype, self.study.settings_of(tasks), seed]
        return self._add(("experts", *words, seed), train, (configs, tasks, name, seed), settings, [])

    def _test(
        self,
        title: str,
        experts: Sequence[str],
        tasks: Sequence[str],
        words: Key,
        needs: Sequence[Key],
        **about: object,
    ) -> None:
        settings = [self.study.settings_of(tasks), self.rows]
        self._add(("tests", *words), test, (title, experts, tasks, about), settings, needs)

    def _add(
        self,
        key: Key,
        function: Callable[..., Facts],
        arguments: tuple[object, ...],
        settings: Sequence[object],
        needs: Iterable[Key],
        given: Sequence[Key] = (),
    ) -> Key:
        needs = tuple(needs)
        full = (*key, result_key(self.base, key_text(key), settings, [need[-1] for need in needs])[:16])
        self.pieces.append(Piece(full, do, (function, self.study, self.out, *arguments), needs, tuple(given)))
        return full


def title_of(key: Key) -> str:
    """Return the key of a piece without its digest, as people read it."""
    return key_text(key[:-1])
