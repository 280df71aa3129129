"""Selection: which units compete, beside which other experts, on whose support; and its record."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed import runs

from modular_experts.base.apply import apply
from modular_experts.callbacks import ExportExpert, MaskSchedule
from modular_experts.deltas import BlockSparse, Dense, Sparse
from modular_experts.experts import FullExpert, MaskedExpert, SparseExpert
from modular_experts.injection import expert_layers
from modular_experts.library import open_expert
from modular_experts.masks import (
    SNIP,
    ChangeMagnitude,
    ConnectionSensitivity,
    DenseThenSparse,
    FisherInformation,
    GradientMagnitude,
    GraSP,
    GrowAndDrop,
    RandomScore,
    Reselect,
    Score,
    SelectOnce,
    WeightMagnitude,
)
from modular_experts.merger.merged import merge
from modular_experts.methods import TIES
from modular_experts.selection.avoid import count_others
from modular_experts.selection.scoring import selectable_layers
from modular_experts.training.module import ExpertModule

SPARSE = partial(SparseExpert, keep_ratio=0.1)
MASKED = partial(MaskedExpert, keep_ratio=0.1)
UNITS = {
    "element": {"keep_ratio": 0.1},
    "block": {"keep_ratio": 0.3, "granularity": "block", "block_size": 5},  # it divides no side of a weight
    "row": {"keep_ratio": 0.2, "granularity": "row"},
    "column": {"keep_ratio": 0.2, "granularity": "column"},
}


class Watch(MaskSchedule):
    """Keeps the supports after each step, by the names of the weights."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.supports: list[dict[str, list[int]]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.supports.append({n: la.expert.support_units().tolist() for n, la in expert_layers(pl_module.model)})

    def sizes(self) -> set[tuple[int, ...]]:
        return {tuple(len(support) for support in step.values()) for step in self.supports}


def even(weight, gradient, delta):
    """A score in which weights are alike on average, so that each keeps some entries, and none its own share."""
    return gradient.abs() / gradient.abs().mean()


class Spy(Score):
    """Any function of (weight, gradient, delta) as a score; keeps what it returned, by place of weight or change."""

    def __init__(self, score: Callable) -> None:
        self.score, self.seen, self.calls = score, {}, 0

    def __call__(self, weight, gradient, delta):
        self.calls += 1
        found = self.score(weight, gradient, delta)
        owner = delta.values if isinstance(delta, Dense) else weight
        self.seen[owner.data_ptr()] = found.double().numpy().copy()
        return found

    def of(self, module: Any) -> dict[str, np.ndarray]:
        layers = expert_layers(module.model)
        return {n: self.seen[getattr(layer.expert, "change", layer.matrix).data_ptr()] for n, layer in layers}


def _tiles(scores: np.ndarray, height: int, width: int, norm: bool = False) -> np.ndarray:
    """Return a tile's sum or norm of each tile by slicing them out one after the other."""
    tiles = [
        scores[top : top + height, left : left + width]
        for top in range(0, scores.shape[0], height)
        for left in range(0, scores.shape[1], width)
    ]
    return np.array([np.sqrt((tile**2).sum()) if norm else tile.sum() for tile in tiles])


def _unit_scores(name: str, scores: np.ndarray, norm: bool = False) -> np.ndarray:
    tile = {"element": (1, 1), "block": (5, 5), "row": (1, scores.shape[1]), "column": (scores.shape[0], 1)}
    return _tiles(scores, *tile[name], norm=norm)


def _highest(scores: dict[str, np.ndarray], k: int) -> dict[str, list[int]]:
    """Return the k highest of all, by one stable sort."""
    names = sorted(scores)
    flat = [(name, place) for name in names for place in range(scores[name].size)]
    best = np.argsort(-np.concatenate([scores[name] for name in names]), kind="stable")[:k]
    kept = sorted(flat[place] for place in best)
    return {name: [place for other, place in kept if other == name] for name in names}


def _share(units: str, name: str) -> int:
    """Return how many units a layer would keep by itself: of tiles, by the share of the entries."""
    height, width = (32, 32) if "q_proj" in name else (32, 48)
    tile = {"element": 1, "block": 25, "row": width, "column": height}[units]
    return int(UNITS[units]["keep_ratio"] * height * width / tile)


def _entries(path: Path) -> dict[str, set[int]]:
    """Return the flat entries that a stored expert keeps, in the base's orientation."""
    stored = open_expert(path)
    return {name: set(stored[name].support().tolist()) for name in stored}


def _record(path: Path) -> dict[str, Any]:
    return json.loads((path / "expert.json").read_text())


@pytest.mark.parametrize(
    ("scope", "units"), [("global", "element"), ("block", "element"), ("block", "block"), ("global", "row")]
)
def test_the_highest_units_of_all_weights_or_of_each_transformer_block_are_kept(
    scope: str, units: str, tiny_llama_dir, task_files, tmp_path
) -> None:
    kind = partial(SparseExpert, **UNITS[units])
    spy = Spy(even)
    watch = Watch(score=spy, rule=SelectOnce(), scope=scope)
    module, _, _ = runs.fit(tiny_llama_dir, task_files, tmp_path, kind, watch, max_steps=1)
    scores = {name: _unit_scores(units, found) for name, found in spy.of(module).items()}
    wanted: dict[str, list[int]] = {}
    for block in [""] if scope == "global" else ["model.layers.0.", "model.layers.1."]:
        part = {name: found for name, found in scores.items() if name.startswith(block)}
        wanted |= _highest(part, sum(_share(units, name) for name in part))
    assert watch.supports == [wanted]
    assert len({len(support) for support in wanted.values()}) > 2, "the counts of weights say what competed"


@pytest.mark.parametrize(
    ("scope", "rule"),
    [("block", Reselect(every=2, until=1.0)), ("global", GrowAndDrop(every=2, until=1.0, replace=0.5))],
)
def test_counts_stay_when_supports_are_chosen_again_and_moments_have_their_size(
    scope: str, rule, tiny_llama_dir, task_files, tmp_path
) -> None:
    watch = Watch(score=even, rule=rule, scope=scope)
    module, trainer, _ = runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, watch, max_steps=6)
    assert watch.selections == 3
    assert watch.supports[1] != watch.supports[2]
    ever = {(name, unit) for step in watch.supports for name, units in step.items() for unit in units}
    assert watch.shares(module)["ever_trained"] == len(ever) / 5120
    (sizes,) = watch.sizes()
    assert sum(sizes) == 2 * (102 + 153)
    assert 0 not in sizes
    assert len({*sizes, 102, 153}) > 4, "none but perhaps one keeps its own share"
    for _, layer in expert_layers(module.model):
        state = trainer.optimizers[0].state[layer.expert.values]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == layer.expert.values.shape
        assert layer.expert.kept_units == layer.expert.values.shape[0]
        assert layer.expert.anchor.shape == layer.expert.values.shape


def test_how_layers_are_grouped_for_scoring_does_not_show(tiny_llama_dir, task_files, tmp_path) -> None:
    """A layer outside a group runs its kernel while the others are scored, and must not keep it for its new size."""
    settings = {"score": even, "rule": SelectOnce(), "scope": "global"}
    first, second = Watch(**settings), Watch(**settings, accumulator_mib=0)
    _, _, losses = runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, first, max_steps=3)
    _, _, others = runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, second, max_steps=3)
    assert first.supports == second.supports
    assert losses == others
    assert (first.passes, second.passes) == (4, 4 * 4)


def _square_only(weight, gradient, delta):
    """A score that leaves nothing for weights that are not square."""
    return (gradient.abs() + 1e-12) * float(weight.shape[0] == weight.shape[1])


@pytest.mark.parametrize(
    ("type_", "units"),
    [(SparseExpert, "element"), (SparseExpert, "block"), (MaskedExpert, "column"), (MaskedExpert, "element")],
)
def test_a_weight_that_ends_without_entries_trains_exports_merges_and_applies(
    type_: type, units: str, tiny_llama_dir, task_files, tmp_path
) -> None:
    kind, library = partial(type_, **UNITS[units]), tmp_path / "library"
    rule = Reselect(every=2, until=1.0)
    for name, seed in (("a", 0), ("b", 1)):
        schedule = MaskSchedule(score=_square_only, rule=rule, scope="global", seed=seed)
        export = ExportExpert(str(library), name)
        module, _, losses = runs.fit(tiny_llama_dir, task_files, tmp_path, kind, schedule, export, max_steps=5)
        assert np.isfinite(losses).all()
    stored = open_expert(library / "a")
    kept = {name: stored[name].support_size for name in stored}
    assert [count == 0 for name, count in kept.items()] == ["down_proj" in name for name in kept]
    assert all(not layer.expert.support_units().numel() for n, layer in expert_layers(module.model) if "down" in n)
    merged = merge([library / "a", library / "b"], TIES(), tmp_path / "merged")
    for name in merged:
        assert bool(merged[name].dense().any()) == ("q_proj" in name)
    check = apply([tmp_path / "merged"], tmp_path / "checkpoint", base=tiny_llama_dir)
    assert check.largest_difference < 1e-4


def test_a_masked_weight_that_is_kept_whole_stays_whole_when_others_grow_and_drop(
    tiny_llama_dir, task_files, tmp_path
) -> None:
    """It looks like one that has never been masked."""
    watch = Watch(score=_square_only, rule=GrowAndDrop(every=2, until=1.0), scope="global")
    kind = partial(MaskedExpert, keep_ratio=0.5)
    runs.fit(tiny_llama_dir, task_files, tmp_path, kind, watch, max_steps=6)
    assert watch.selections == 2
    assert [tuple(map(len, step.values())) for step in watch.supports[2:]] == [(512, 1024, 0, 1024)] * 4


@pytest.mark.parametrize(("block_score", "units"), [("sum", "block"), ("norm", "row"), ("norm", "block")])
def test_a_unit_is_scored_by_the_sum_or_the_norm_of_its_entries(
    block_score: str, units: str, tiny_llama_dir, task_files, tmp_path
) -> None:
    """The score is signed, so that the two are not alike."""
    spy = Spy(lambda weight, gradient, delta: gradient.clone())
    watch = Watch(score=spy, rule=SelectOnce(), block_score=block_score)
    kind = partial(SparseExpert, **UNITS[units])
    module, _, _ = runs.fit(tiny_llama_dir, task_files, tmp_path, kind, watch, max_steps=1)
    other = 0
    for name, found in spy.of(module).items():
        kept = watch.supports[0][name]
        scores = {norm: _unit_scores(units, found, norm=norm) for norm in (False, True)}
        assert kept == _highest({"": scores[block_score == "norm"]}, len(kept))[""]
        other += kept != _highest({"": scores[block_score != "norm"]}, len(kept))[""]
    assert other > 2


@pytest.fixture(scope="module")
def neighbours(tiny_llama_dir, task_files, tmp_path_factory) -> Path:
    """A library of experts that keep entries, tiles, and a few entries."""
    folder = tmp_path_factory.mktemp("neighbours")
    kinds = {
        "entries": SPARSE,
        "few": partial(SparseExpert, keep_ratio=0.004),
        "tiles": partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=8),
        "rows": partial(SparseExpert, keep_ratio=0.1, granularity="row"),
        "half": partial(SparseExpert, keep_ratio=0.6),
        "full": FullExpert,
    }
    for name, kind in kinds.items():
        export = ExportExpert(str(folder / "library"), name, monitor=None)
        schedule = MaskSchedule(score=even, rule=SelectOnce(), scope="global" if name == "entries" else "layer")
        runs.fit(tiny_llama_dir, task_files, folder, kind, schedule, export, max_steps=2)
    return folder / "library"


def _beside(base: Path, files: dict[str, Path], folder: Path, kind: Callable, **settings: Any) -> Path:
    """Train an expert beside others and return where it is stored; `steps` and more are taken out of the settings."""
    steps, export = settings.pop("steps", 4), ExportExpert(str(folder / "out"), "mine", overwrite=True, monitor=None)
    runs.fit(base, files, folder, kind, MaskSchedule(**settings), export, max_steps=steps)
    return export.target


AVOIDING = {
    "entries beside entries": (SPARSE, "entries"),
    "entries beside tiles": (SPARSE, "tiles"),
    "entries beside rows": (SPARSE, "rows"),
    "tiles beside tiles": (partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=8), "tiles"),
    "tiles beside rows": (partial(SparseExpert, keep_ratio=0.1, granularity="block", block_size=4), "rows"),
    "tiles beside few entries": (partial(SparseExpert, keep_ratio=0.2, granularity="block", block_size=5), "few"),
    "masked entries beside entries": (MASKED, "entries"),
}


@pytest.mark.parametrize(
    ("scope", "case"), [*zip(["layer", "global"] * 4, AVOIDING, strict=False), ("global", "entries beside entries")]
)
def test_what_is_avoided_is_not_kept_and_the_record_says_so(
    scope: str, case: str, neighbours, tiny_llama_dir, task_files, tmp_path
) -> None:
    kind, other = AVOIDING[case]
    rule = Reselect(every=2, until=1.0) if kind is MASKED else GrowAndDrop(every=2, until=1.0, replace=0.8)
    place = _beside(tiny_llama_dir, task_files, tmp_path, kind, rule=rule, scope=scope, avoid=[str(neighbours / other)])
    mine, theirs = _entries(place), _entries(neighbours / other)
    assert mine.keys() == theirs.keys()
    assert sum(map(len, mine.values())) > 100
    assert not any(mine[name] & theirs[name] for name in mine)
    assert _record(place)["costs"]["overlap"] == 0.0


@pytest.mark.parametrize("units", ["element", "block"])
def test_a_penalty_divides_the_scores_and_lowers_the_overlap_that_the_record_tells(
    units: str, neighbours, tiny_llama_dir, task_files, tmp_path
) -> None:
    theirs, overlaps, kind = _entries(neighbours / "entries"), [], partial(SparseExpert, **UNITS[units])
    for penalty in (None, 1.0, 30.0):
        spy, export = Spy(even), ExportExpert(str(tmp_path), f"mine-{penalty}", monitor=None)
        settings = {"avoid": [str(neighbours / "entries")], "penalty": penalty} if penalty else {}
        watch = Watch(score=spy, rule=SelectOnce(), **settings)
        module, _, _ = runs.fit(tiny_llama_dir, task_files, tmp_path, kind, watch, export, max_steps=1)
        shared = kept = 0.0
        for name, found in spy.of(module).items():
            others = np.zeros_like(found)
            others.reshape(-1)[sorted(theirs[name])] = 1.0
            others = _unit_scores(units, others) / (25 if units == "block" else 1)
            scores = _unit_scores(units, found) / (1 + (penalty or 0) * others)
            wanted = _highest({"": scores}, _share(units, name))[""]
            assert watch.supports[0][name] == wanted
            shared, kept = shared + others[wanted].sum(), kept + len(wanted)
        overlaps.append(shared / kept)
        assert _record(export.target)["costs"].get("overlap") == (penalty and pytest.approx(overlaps[-1], rel=1e-5))
    assert overlaps[0] > overlaps[1] > overlaps[2]
    assert overlaps[2] < 0.5 * overlaps[0]


def test_of_a_tile_that_others_keep_in_part_the_part_counts(neighbours) -> None:
    few, tiles, full = (open_expert(neighbours / name) for name in ("few", "tiles", "full"))
    name = "model.layers.1.mlp.down_proj.weight"
    expert = SparseExpert(torch.zeros(32, 48), granularity="block", block_size=5)
    layer = SimpleNamespace(expert=expert, matrix=torch.zeros(32, 48), oriented=lambda delta: delta)
    wanted = np.zeros(7 * 10)
    for other in (few, tiles, full):
        kept = np.zeros((32, 48))
        kept.reshape(-1)[other[name].support().numpy()] = 1.0
        wanted += _tiles(kept, 5, 5) / 25 if other is not full else 1.0
    found = count_others(name, layer, [few, tiles, full])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    assert not count_others("another.weight", layer, [few, tiles]).any()


@pytest.mark.parametrize(
    ("scope", "free", "units", "kept"), [("layer", 615, 1536, 921), ("global", 2050, 5120, 2 * (614 + 921))]
)
def test_experts_that_leave_too_little_are_refused(
    scope: str, free: int, units: int, kept: int, neighbours, tiny_llama_dir, task_files, tmp_path
) -> None:
    kind = partial(SparseExpert, keep_ratio=0.6)
    with pytest.raises(ValueError, match=f"leave {free:,} of {units:,} units free, and {kept:,} are to be kept"):
        _beside(tiny_llama_dir, task_files, tmp_path, kind, scope=scope, avoid=[str(neighbours / "half")])
    row = partial(SparseExpert, keep_ratio=0.1, granularity="column")
    with pytest.raises(ValueError, match="leave 0 of"):
        _beside(tiny_llama_dir, task_files, tmp_path, row, scope=scope, avoid=[str(neighbours / "rows")])


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        ("entries", partial(SparseExpert, keep_ratio=0.3)),
        ("tiles", partial(SparseExpert, keep_ratio=0.9, granularity="block", block_size=8)),
        ("entries", partial(MaskedExpert, keep_ratio=0.3)),
        ("tiles", partial(MaskedExpert, keep_ratio=0.3, granularity="block", block_size=8)),
    ],
)
def test_a_support_is_shared_as_it_is(other: str, kind, neighbours, tiny_llama_dir, task_files, tmp_path) -> None:
    place = _beside(tiny_llama_dir, task_files, tmp_path, kind, support=str(neighbours / other), steps=6)
    assert _entries(place) == _entries(neighbours / other)
    mine, theirs = open_expert(place), open_expert(neighbours / other)
    assert all(mine[name].dense().ne(0).any() for name in mine)
    assert all(not torch.equal(mine[name].dense(), theirs[name].dense()) for name in mine)
    costs = _record(place)["costs"]
    assert (costs["selections"], costs["selection_passes"]) == (0, 0)


class Rewound(Watch):
    """Looks at dense changes and moments on both sides of the one selection."""

    before: dict[str, np.ndarray]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        layers = dict(expert_layers(pl_module.model))
        self.before = {name: layer.expert.change.detach().double().numpy().copy() for name, layer in layers.items()}
        done = self.selections
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.selections > done:
            self.step, self.changes = trainer.global_step, self.before
            self.after = {name: layer.expert.change.detach().clone() for name, layer in layers.items()}
            states = [trainer.optimizers[0].state.get(layer.expert.change, {}) for layer in layers.values()]
            self.moments = [float(state["exp_avg_sq"].sum()) if state else 0.0 for state in states]


@pytest.mark.parametrize("rewind", [True, False])
def test_lottery_tickets_are_the_most_changed_entries_trained_anew_from_the_base(
    rewind: bool, tiny_llama_dir, task_files, tmp_path
) -> None:
    look = Rewound(score=ChangeMagnitude(), rule=DenseThenSparse(dense=0.5, rewind=rewind))
    module, trainer, _ = runs.fit(tiny_llama_dir, task_files, tmp_path, MASKED, look, max_steps=8)
    assert (look.step, look.selections, look.passes) == (4, 1, 0)
    for name, layer in expert_layers(module.model):
        expert, size = layer.expert, look.changes[name].size
        assert np.abs(look.changes[name]).min() > 0, "all of it was trained"
        wanted = _highest({"": np.abs(look.changes[name]).reshape(-1)}, int(0.1 * size))[""]
        assert expert.support_units().tolist() == wanted
        assert bool(look.after[name].any()) is not rewind
        outside = torch.ones(size, dtype=torch.bool)
        outside[wanted] = False
        hidden = expert.change.detach().view(-1)[outside]
        assert bool(hidden.any()) is not rewind
        steps = trainer.optimizers[0].state[expert.change]["step"]
        assert int(steps) == (4 if rewind else 8)
        assert expert.change.detach().view(-1)[~outside].ne(0).all()
    assert all((moment == 0.0) is rewind for moment in look.moments)


SCORES = [
    GradientMagnitude(),
    SNIP(),
    ConnectionSensitivity("absolute"),
    FisherInformation(),
    GraSP(),
    WeightMagnitude(),
    WeightMagnitude(smallest=True),
    ChangeMagnitude(),
    RandomScore(),
]


@pytest.mark.parametrize("units", ["element", "block"])
def test_the_same_seed_twice_gives_the_same_supports_whatever_the_score(
    units: str, tiny_llama_dir, task_files, tmp_path
) -> None:
    def made(noise: int) -> ExpertModule:
        torch.manual_seed(noise)  # the module's first, random support
        module = runs.module(tiny_llama_dir, partial(SparseExpert, **UNITS[units]))
        module.configure_model()
        module.trainer = runs.trainer(tmp_path)
        module.trainer.datamodule = data
        return module

    def chosen(score: Score, seed: int, scope: str, noise: int) -> dict[str, list[int]]:
        torch.manual_seed(noise)  # where the process's random numbers are
        module = modules[noise]
        schedule = MaskSchedule(score=score, seed=seed, batches=2, scope=scope)
        found = schedule.choose(module.trainer, module, selectable_layers(module.model), 0, 1, resize=True)
        return {name: kept.tolist() for name, kept in found.items()}

    data = runs.mixture(task_files, tiny_llama_dir)
    data.setup("fit")
    modules = {noise: made(noise) for noise in (1, 2)}
    for score in SCORES:
        for scope in ("layer", "global"):
            first = chosen(score, 0, scope, noise=1)
            assert first == chosen(score, 0, scope, noise=2), score
            same = score.statistic == "none" and not isinstance(score, RandomScore)
            same = same or isinstance(score, ConnectionSensitivity)  # nothing has changed yet, so all scores are zero
            assert (first == chosen(score, 1, scope, noise=1)) is same, score


GPT2 = conftest.TARGETS["gpt2"]


@pytest.mark.parametrize(
    ("scope", "units"), [("global", "element"), ("layer", "row"), ("global", "column"), ("layer", "block")]
)
def test_weights_stored_the_other_way_round_are_avoided_and_shared_alike(
    scope: str, units: str, tiny, task_files, tmp_path
) -> None:
    def train(name: str, **settings: Any) -> Path:
        export = ExportExpert(str(tmp_path / "library"), name, monitor=None)
        module = runs.module(tiny("gpt2"), partial(SparseExpert, **UNITS[units]), modules=GPT2)
        trainer = runs.trainer(tmp_path, export, MaskSchedule(seed=0, **settings), max_steps=2)
        trainer.fit(module, runs.mixture(task_files, tiny("gpt2"), seed=0))
        return export.target

    first = train("first", rule=SelectOnce(), scope=scope)
    beside = train("beside", rule=SelectOnce(), scope=scope, avoid=[str(first)])
    shared = train("shared", support=str(first))
    stored = open_expert(first)
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    kinds = {"row": ("column", 1), "column": ("row", 0)}
    if units in kinds:
        delta = stored["transformer.h.0.attn.c_attn.weight"]
        assert delta.tile[kinds[units][1]] == 1, "an output of the layer is a stored column"
    theirs, mine = _entries(first), _entries(beside)
    assert not any(theirs[name] & mine[name] for name in theirs)
    assert _record(beside)["costs"]["overlap"] == 0.0
    assert _entries(shared) == theirs
    assert sum(map(len, mine.values())) > 100
    form = Sparse if units == "element" else BlockSparse
    assert all(isinstance(open_expert(shared)[name], form) for name in theirs)


@pytest.mark.parametrize(
    ("scope", "score", "passes"),
    [("layer", None, 2), ("global", FisherInformation(), 2), ("layer", GraSP(), 6), ("global", WeightMagnitude(), 0)],
)
def test_the_record_holds_what_training_and_selections_cost(
    scope: str, score, passes: int, tiny_llama_dir, task_files, tmp_path
) -> None:
    settings = {"rule": GrowAndDrop(every=2, until=1.0), "score": score, "scope": scope, "batches": 2, "steps": 5}
    place = _beside(tiny_llama_dir, task_files, tmp_path, SPARSE, **settings)
    costs, kept = _record(place)["costs"], sum(map(len, _entries(place).values()))
    assert kept == 2 * (102 + 153)
    assert costs["optimizer_bytes"] == 8 * kept
    assert (costs["selections"], costs["selection_passes"]) == (3, 3 * passes)
    assert costs["selection_seconds"] > 0
    assert "overlap" not in costs


def _resumable(base: Path, files: dict[str, Path], folder: Path, kind: Callable, ckpt: Path | None) -> tuple:
    torch.manual_seed(0 if ckpt is None else 99)  # a resumed run must not depend on its own first supports
    rule = GrowAndDrop(every=3, until=0.9, replace=0.4)
    watch = Watch(score=Spy(even), rule=rule, scope="global", leavers="stash", seed=0)
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = runs.module(base, kind)
    trainer = runs.trainer(folder, watch, saving, max_steps=10, enable_checkpointing=True)
    trainer.fit(module, runs.mixture(files, base, seed=0), ckpt_path=ckpt)
    return module, trainer, watch


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_resumed_from_any_step_keeps_the_counts_and_ends_with_the_same_supports_and_values(
    tiny_llama_dir, task_files, tmp_path
) -> None:
    units = "element"
    kind = partial(SparseExpert, **UNITS[units])
    module, _, watch = _resumable(tiny_llama_dir, task_files, tmp_path / "whole", kind, None)
    whole = {name: layer.expert for name, layer in expert_layers(module.model)}
    assert all(expert.kept_units != _share(units, name) for name, expert in whole.items()), "all have been resized"
    assert watch.selections == 3
    for step, selections in ((1, 2), (3, 2), (7, 0)):  # at the steps 3 and 6
        ckpt = tmp_path / "whole" / f"step={step}.ckpt"
        rest, _, again = _resumable(tiny_llama_dir, task_files, tmp_path / str(step), kind, ckpt)
        assert again.supports == watch.supports[step:]
        assert again.selections == 3
        assert again.score.calls <= 4 * (selections + 1), "a first choice, which the checkpoint replaces, is made once"
        for name, layer in expert_layers(rest.model):
            assert torch.equal(layer.expert.values, whole[name].values)
            assert layer.expert.kept_units == whole[name].kept_units
        assert again.shares(rest) == watch.shares(module)


def test_a_checkpoint_of_a_choice_among_all_weights_is_tested_in_a_fresh_module(
    tiny_llama_dir, task_files, tmp_path
) -> None:
    units = "row"
    kind = partial(SparseExpert, **UNITS[units])
    schedule = MaskSchedule(score=even, rule=SelectOnce(), scope="global")
    module, trainer, _ = runs.fit(tiny_llama_dir, task_files, tmp_path, kind, schedule)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.test(module, runs.mixture(task_files, tiny_llama_dir), verbose=False)
    fresh = runs.module(tiny_llama_dir, kind)
    data = runs.mixture(task_files, tiny_llama_dir)
    runs.trainer(tmp_path).test(fresh, data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert fresh.results["tasks"] == module.results["tasks"]
    pairs = list(zip(expert_layers(module.model), expert_layers(fresh.model), strict=True))
    for (name, trained), (_, loaded) in pairs:
        assert trained.expert.kept_units == loaded.expert.kept_units
        assert torch.equal(trained.expert.indices, loaded.expert.indices)
        assert torch.equal(trained.matrix, loaded.matrix), name
    assert any(layer.expert.kept_units != _share(units, name) for (name, layer), _ in pairs)


@pytest.mark.parametrize(
    ("kind", "settings", "steps"),
    [
        (SPARSE, {}, 1),
        (SPARSE, {"rule": SelectOnce()}, 3),
        (SPARSE, {"scope": "global", "batches": 2}, 1),
        (partial(SparseExpert, **UNITS["block"]), {}, 1),
        (MASKED, {}, 3),
        (MASKED, {"rule": DenseThenSparse(0.5, rewind=True)}, 3),
        (partial(MaskedExpert, dense_start=False), {}, 3),
    ],
    ids=["default", "once", "global", "tiles", "masked", "dense-start", "random-start"],
)
def test_a_second_fit_begins_with_all_that_the_first_trained(
    kind, settings, steps, tiny_llama_dir, task_files, tmp_path
) -> None:
    """With a rate of zero from there on, whatever changes was thrown away."""
    rate = 1e-2
    module = runs.module(tiny_llama_dir, kind, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=rate))
    schedule = MaskSchedule(**settings)
    data = runs.mixture(task_files, tiny_llama_dir)
    runs.trainer(tmp_path, schedule, max_steps=6).fit(module, data)
    trained = {name: delta.dense().clone() for name, delta in module.task_vector()}
    assert any(dense.any() for dense in trained.values())
    # `GrowAndDrop` exchanges entries at the second of few steps.
    rate = 0.0
    runs.trainer(tmp_path, schedule, max_steps=steps).fit(module, data)
    assert all(torch.equal(delta.dense(), trained[name]) for name, delta in module.task_vector())
