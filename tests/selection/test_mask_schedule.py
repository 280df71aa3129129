"""MaskSchedule: what is kept, when it changes, and what happens to values and moments that move."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from testbed.runs import Watch

from modular_experts.base import Base
from modular_experts.experts import LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import expert_layers
from modular_experts.masks import SNIP, ConnectionSensitivity, GrowAndDrop, RandomScore, Reselect, SelectOnce, top_k
from modular_experts.native.sparse_passes import exchanged_slots
from modular_experts.selection.exchange import Exchange, carry_state
from modular_experts.selection.mask_schedule import MaskSchedule

SPARSE = partial(SparseExpert, keep_ratio=0.1)
BLOCK = partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=8)
MASKED = partial(MaskedExpert, keep_ratio=0.1)


def _changes(watch: Watch) -> list[int]:
    """Return the steps before which any support changed."""
    pairs = list(zip(watch.supports, watch.supports[1:], strict=False))
    return [step + 1 for step, (before, after) in enumerate(pairs) if before != after]


def test_the_first_support_is_the_top_of_the_gradient_of_the_scoring_batches(fitted):
    seen = {}

    class Gradients(SNIP):
        def __call__(self, weight, gradient, delta):
            seen[len(seen)] = gradient.clone()
            return gradient.abs()

    watch = Watch(score=Gradients(), rule=SelectOnce(), batches=3)
    fitted(SPARSE, watch, max_steps=2)
    assert len(seen) == len(watch.supports[0]) == 4
    for gradient, (_, units) in zip(seen.values(), sorted(watch.supports[0].items()), strict=True):
        assert units == top_k(gradient.abs(), len(units)).tolist()
    assert _changes(watch) == []


@pytest.mark.parametrize("kind", [SPARSE, BLOCK])
def test_grow_and_drop_moves_the_support_at_its_steps_only(fitted, kind) -> None:
    watch = Watch(rule=GrowAndDrop(every=3, until=0.75, replace=0.5))
    module, _, _ = fitted(kind, watch, max_steps=12)
    assert _changes(watch) == [3, 6]
    assert watch.selections == 3
    counts = {name: {len(s[name]) for s in watch.supports} for name in watch.supports[0]}
    assert all(len(sizes) == 1 for sizes in counts.values())
    shares = watch.shares(module)
    assert shares["kept"] < shares["ever_trained"] <= 3 * shares["kept"]
    ever = {name: len({unit for s in watch.supports for unit in s[name]}) for name in watch.supports[0]}
    units = sum(layer.expert.units for _, layer in expert_layers(module.model))
    assert shares["ever_trained"] == sum(ever.values()) / units


def test_steps_are_optimizer_steps_whatever_the_accumulation(fitted) -> None:
    watch = Watch(rule=Reselect(every=2, until=1.0), score=RandomScore())
    fitted(SPARSE, watch, max_steps=5, accumulate_grad_batches=3)
    assert _changes(watch) == [6, 12]  # micro-batches; three of them make a step
    assert watch.selections == 3  # one choice per due step, at its first micro-batch
    watch = Watch(rule=Reselect(every=2, until=1.0, unit="micro_batches"), score=RandomScore())
    fitted(SPARSE, watch, max_steps=2, accumulate_grad_batches=3)
    assert _changes(watch) == [2, 4]


def test_the_papers_schedule_starts_dense_and_freezes_after_the_first_epoch(fitted):
    watch = Watch(rule=Reselect(every=2))
    module, _, _ = fitted(MASKED, watch, max_steps=8)  # an epoch is six steps
    kept = [sum(map(len, supports.values())) for supports in watch.supports]
    units = sum(layer.expert.units for _, layer in expert_layers(module.model))
    assert kept[:2] == [units, units]
    assert all(count == int(0.1 * 1024) * 2 + int(0.1 * 1536) * 2 for count in kept[2:])
    assert max(_changes(watch)) <= 5
    assert watch.shares(module)["ever_trained"] == 1.0


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (None, 1),
        (Reselect(until=1.0), 1),
        (Reselect(until=1.0), 4),
        # The two steps of the only epoch have four batches and two, so no choice is due before the last of eight.
        (Reselect(unit="micro_batches"), 4),
    ],
    ids=["first-epoch", "all-steps", "accumulated", "micro-batches"],
)
def test_training_shorter_than_the_interval_still_ends_sparse(rule, parts: int, fitted) -> None:
    watch = Watch(rule=rule)
    module, _, _ = fitted(MASKED, watch, max_steps=2 if parts > 1 else 6, accumulate_grad_batches=parts)
    assert watch.selections == 1
    assert watch.shares(module)["kept"] < 0.11


def test_a_run_resumed_behind_the_freeze_of_a_shorter_training_still_ends_sparse(fitted, tmp_path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "dense.ckpt")

    fitted(MASKED, Watch(rule=Reselect(until=0.5)), Save(), max_steps=12)
    watch = Watch(rule=Reselect(until=0.5))
    module, _, _ = fitted(MASKED, watch, max_steps=6, ckpt=tmp_path / "dense.ckpt")
    assert watch.shares(module)["kept"] < 0.11


def test_each_of_two_kinds_follows_its_own_rule(fitted) -> None:
    kinds = {"q_proj": SPARSE, "v_proj": MASKED}
    supports: dict[str, list[list[int]]] = {}
    for experts in (kinds, *({name: kind} for name, kind in kinds.items())):
        watch = Watch()
        fitted(None, watch, max_steps=16, own={"experts": experts})
        for name in watch.supports[0]:
            supports.setdefault(name, []).append([len(step[name]) for step in watch.supports])
    assert len(supports) == 4
    assert all(beside == alone for beside, alone in supports.values())


def test_masked_expert_is_scored_by_its_whole_change_times_the_gradient(fitted) -> None:
    found = []

    class Check(ConnectionSensitivity):
        def __call__(self, weight, gradient, delta):
            score = super().__call__(weight, gradient, delta)
            found.append((delta.dense() * gradient, score, int((delta.dense() != 0).sum())))
            return score

    watch = Watch(score=Check(), rule=Reselect(every=2))
    fitted(MASKED, watch, max_steps=6)
    assert len(found) == 4 * 2
    for wanted, score, moved in found:
        assert torch.equal(wanted, score)
        assert moved > 0.5 * wanted.numel()  # hidden entries keep their values and still count


def test_a_newcomer_starts_at_the_base_with_zero_moments(fitted, tiny_llama_dir) -> None:
    class Look(Watch):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            before = {n: layer.expert.support_units().clone() for n, layer in expert_layers(pl_module.model)}
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if trainer.global_step != 3:
                return
            for name, layer in expert_layers(pl_module.model):
                expert, state = layer.expert, trainer.optimizers[0].state[layer.expert.values]
                new = ~torch.isin(expert.indices, before[name])
                assert new.any()
                assert not new.all()
                assert not expert.values[new].any()
                assert not state["exp_avg"][new].any()
                assert not state["exp_avg_sq"][new].any()
                assert expert.values[~new].any()
                assert state["exp_avg_sq"][~new].any()
                self.looked = True

    # A choice from passes is made before its step, when a newcomer has not moved yet.
    look = Look(rule=GrowAndDrop(every=3, until=1.0, replace=0.5), batches=4)
    module, _, _ = fitted(SPARSE, look, max_steps=5)
    assert look.looked
    base = Base.open(tiny_llama_dir)
    for name, layer in expert_layers(module.model):  # what left is back at the base, bit for bit
        outside = torch.ones(layer.weight.numel(), dtype=torch.bool)
        outside[layer.expert.indices.long()] = False
        wanted = base.weight(name).reshape(-1)
        assert torch.equal(layer.weight.reshape(-1)[outside], wanted[outside])


def test_units_that_leave_again_and_again_are_kept_in_mind_once() -> None:
    expert, exchange = SparseExpert(torch.zeros(4, 4), keep_ratio=0.125), Exchange()
    layer = SimpleNamespace(matrix=torch.zeros(4, 4), expert=expert)
    expert.reselect(layer.matrix, torch.tensor([0, 1]))
    for units in [[2, 3], [0, 1]] * 20:
        exchange.move("w", layer, torch.tensor(units), [])
    assert exchange.touched["w"].numel() <= 4 * 2
    assert exchange.ever_trained("w", expert).tolist() == [0, 1, 2, 3]


def test_slots_and_moments_follow_their_entries_and_quantised_moments_do_not_move() -> None:
    slots, left = exchanged_slots(torch.tensor([2, 5, 9]), torch.tensor([1, 5, 9, 11]))
    assert slots.tolist() == [-1, 1, 2, -1]
    assert left.tolist() == [0]
    state = {"step": torch.tensor(4.0), "exp_avg": torch.tensor([1.0, 2.0, 3.0])}
    carry_state(state, torch.zeros(3), torch.tensor([2, -1, 0]))
    assert state["exp_avg"].tolist() == [3.0, 0.0, 1.0]
    assert state["step"] == 4
    # Adafactor keeps sums over the rows and the columns of a tile.
    tiles = torch.nn.Parameter(torch.zeros(3, 2, 2))
    optimizer = torch.optim.Adafactor([tiles])
    tiles.grad = torch.arange(12.0).view(3, 2, 2)
    optimizer.step()
    before = {name: optimizer.state[tiles][name].clone() for name in ("row_var", "col_var")}
    carry_state(optimizer.state[tiles], tiles, torch.tensor([2, -1, 0]))
    for name, value in before.items():
        value[1] = 0
        assert torch.equal(optimizer.state[tiles][name], value[[2, 1, 0]])
    # In 8 bits a zero stands for the lowest number of a block, and neighbours share a scale.
    state = {"state1": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"cannot move to other entries; choose once, with .*SelectOnce"):
        carry_state(state, torch.zeros(3), torch.tensor([2, -1, 0]))


def test_other_experts_are_left_alone(fitted) -> None:
    schedule = MaskSchedule()
    module, _, _ = fitted(LoRAExpert, schedule, max_steps=2)
    assert schedule.selections == 0
    assert schedule.shares(module) == {}
