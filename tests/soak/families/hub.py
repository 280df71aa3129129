"""Push random experts to a hub on this machine, damage them here and there, and pull any commit."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from testbed.hub_server import Hub, point_client, serving

from modular_experts import open_expert, route
from modular_experts.library import write_statistics
from modular_experts.library.pull import pull
from modular_experts.library.push import push as push_experts
from modular_experts.methods.method import DataStatistic
from modular_experts.routing import Constant
from soak import bases, experts
from soak.case import Case

REPO = "someone/experts"
Files = dict[str, bytes]
"""Contents by path."""
Experts = dict[str, Files]
"""The files of each expert of a library."""


def hub_case(case: Case) -> None:
    """Push a library that changes, pull commits into new libraries and over old ones, and compare every byte."""
    with pytest.MonkeyPatch.context() as patch, serving() as (hub, address):
        point_client(patch, address)
        owner = Owner(case, hub)
        for _ in range(case.random.randint(1, 4)):
            owner.change()
            owner.push()
        case.note(base=owner.kind, commits=len(owner.commits))
        for number in range(3):
            pull_twice(case, owner.commits, case.folder / f"pulled{number}")
        pull_damaged(case, owner)


push = partial(push_experts, license="mit")


class Owner:
    """Someone with a library and a repository; `commits` has the experts that each push should have left there."""

    def __init__(self, case: Case, hub: Hub) -> None:
        self.case, self.hub, self.library = case, hub, case.folder / "library"
        self.kind = case.random.choice(bases.KINDS)
        self.commits: dict[str, Experts] = {}
        self.there: Experts = {}

    def change(self) -> None:
        """Write some experts anew, perhaps with statistics, and a route over them if there are several."""
        case, draw = self.case, self.case.random
        for name in draw.sample("abc", draw.randint(1, 3)):
            place = self.library / name
            shutil.rmtree(place, ignore_errors=True)
            experts.random_expert(case, self.kind, place, encoding=draw.choice(experts.ENCODINGS))
            if case.chance(0.4):
                expert, value = open_expert(place), draw.random()
                fisher = [(weight, DataStatistic(torch.full(expert[weight].shape, value), 1.0, 1)) for weight in expert]
                write_statistics(expert, "fisher", fisher, {name: 3}, {})
        places = sorted(place for place in self.library.iterdir() if place.name != "routed")
        if len(places) > 1:
            route(places, self.library / "routed", Constant([draw.random() for _ in places]), overwrite=True)

    def push(self) -> None:
        """Push some experts, a damaged one first, and look at what the hub then holds."""
        case, draw = self.case, self.case.random
        places = sorted(self.library.iterdir())
        # With three there is a route, which needs the experts behind it as they are.
        if len(places) < 3:
            places = draw.sample(places, draw.randint(1, len(places)))
        statistics = case.chance(0.5)
        file = draw.choice([file for place in places for file in sorted(place.glob("*.safetensors"))])
        content = file.read_bytes()
        file.write_bytes(flipped(case, content))
        refused(case, ValueError, lambda: push(places, REPO, overwrite=True), f"a damaged {file} was pushed")
        file.write_bytes(content)

        wanted, clash = dict(self.there), False
        for place in places:
            files, before = published(place, statistics), self.there.get(place.name, {})
            is_other = before.get("expert.json", files["expert.json"]) != files["expert.json"]
            wanted[place.name] = files if is_other else before | files
            clash = clash or is_other
        if clash:
            refused(case, FileExistsError, lambda: push(places, REPO), "a push replaced an expert unasked")
        planned = push(places, REPO, overwrite=True, statistics=statistics, dry_run=True)
        same(case, self.seen(), self.there, "the hub after refused and dry pushes")
        pushed = push(places, REPO, overwrite=clash, statistics=statistics)
        case.need(planned.files == pushed.files, "a dry run shows other files than the push writes")
        same(case, self.seen(), wanted, "the hub")
        self.there = self.commits[self.hub.repositories[REPO].branches["main"]] = wanted

    def seen(self) -> Experts:
        repository = self.hub.repositories.get(REPO)
        return grouped(repository.files()) if repository else {}


def pull_twice(case: Case, commits: dict[str, Experts], library: Path) -> None:
    """Pull a commit into an empty library, then perhaps damage an expert there, and pull another commit over it."""
    draw = case.random
    here: Experts = {}
    for _ in range(2):
        commit, there = draw.choice(list(commits.items()))
        names = None if case.chance(0.4) else draw.sample(sorted(there), draw.randint(1, len(there)))
        statistics = case.chance(0.5)
        if here and case.chance(0.5):
            name = draw.choice(sorted(here))
            file = draw.choice([path for path in sorted(whole(here[name], False)) if path != "expert.json"])
            here[name] = {**here[name], file: flipped(case, here[name][file])}
            (library / name / file).write_bytes(here[name][file])
        wanted = set(there if names is None else names)
        if "routed" in wanted:
            wanted |= {parent["name"] for parent in json.loads(there["routed"]["expert.json"])["parents"]}
        others = {name for name in wanted if whole(here.get(name, {}), False) != whole(there[name], False)}
        ask = (REPO, library, names, commit)
        if others & here.keys():
            refused(case, FileExistsError, lambda: pull(*ask), "a pull replaced an expert unasked")  # noqa: B023
            same(case, read(library), here, "a library after a refused pull")
        pull(*ask, overwrite=True, statistics=statistics)
        here |= {name: whole(there[name], statistics) for name in others}
        same(case, read(library), here, "the library")


def pull_damaged(case: Case, owner: Owner) -> None:
    """Damage one expert in the repository; pulling it ends in a sentence, and the commit before stays whole."""
    draw = case.random
    repository = owner.hub.repositories[REPO]
    before, tree = repository.branches["main"], repository.files()
    name = draw.choice(sorted(owner.there))
    file = draw.choice(sorted(whole(owner.there[name], False)))
    content = owner.there[name][file]
    ways = {"cut": content[: draw.randrange(len(content))], "other": draw.randbytes(len(content))}
    if file != "expert.json":
        ways["flipped"] = flipped(case, content)
    way = draw.choice(sorted(ways))
    case.note(damaged=file, way=way)
    repository.commit("main", tree | {f"{name}/{file}": ways[way]}, "damaged")
    library = case.folder / "damaged"
    refused(case, ValueError, lambda: pull(REPO, library, [name]), f"a {way} {file} was pulled")
    case.need(not library.exists(), f"a {way} {file} left something behind")
    pull(REPO, library, revision=before, statistics=True)
    same(case, read(library), owner.there, "the commit before a damaged one")


def published(place: Path, statistics: bool) -> Files:
    """Return the files of an expert as the hub should get them, where no path of this machine names the base."""
    files = whole(read(place.parent)[place.name], statistics)
    record = json.loads(files["expert.json"])
    record["base"]["id"] = Path(record["base"]["id"]).name
    record["license"] = "mit"
    return files | {"expert.json": (json.dumps(record, indent=2) + "\n").encode()}


def read(library: Path) -> Experts:
    files = [path for path in library.rglob("*") if path.is_file()]
    return grouped({str(path.relative_to(library)): path.read_bytes() for path in files})


def grouped(files: Mapping[str, bytes]) -> Experts:
    """Divide files by the folder, and leave out what lies in none, such as a card."""
    by_folder: Experts = {}
    for path, content in files.items():
        name, slash, rest = path.partition("/")
        if slash:
            by_folder.setdefault(name, {})[rest] = content
    return by_folder


def whole(files: Files, statistics: bool) -> Files:
    """Return the files of an expert, with its statistics or without."""
    return {path: content for path, content in files.items() if statistics or "/" not in path}


def flipped(case: Case, content: bytes) -> bytes:
    """Flip one bit."""
    changed = bytearray(content)
    changed[case.random.randrange(len(content))] ^= 1 << case.random.randrange(8)
    return bytes(changed)


def same(case: Case, ours: Experts, wanted: Experts, text: str) -> None:
    differ = sorted(name for name in ours.keys() | wanted.keys() if ours.get(name) != wanted.get(name))
    case.need(not differ, f"{text} has other files of {differ}")


def refused(case: Case, kind: type[Exception], call: Callable[[], object], text: str) -> None:
    """Raise `Mismatch` with the text unless a call ends with an exception of a kind."""
    try:
        call()
    except kind:
        return
    case.need(False, text)


FAMILIES = {"hub": hub_case}
