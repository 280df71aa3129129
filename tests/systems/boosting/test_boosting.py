"""Boosting: rounds whose products add up, chosen blocks, fresh optimizer state, exact resume; one round is a LoRA."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from testbed import runs

from modular_experts.experts import LoRAExpert
from modular_experts.injection import expert_layers
from modular_experts.systems.boosting import BoostedLoRAExpert
from modular_experts.systems.boosting.callback import Boosting, WarmupRestarts
from modular_experts.testing import check_callback, check_expert
from modular_experts.training.learning_rate import Constant, WarmupCosine

RATE = 0.01


def test_the_type_keeps_the_contract() -> None:
    torch.manual_seed(3)
    check_expert(BoostedLoRAExpert, compile=False)


def test_the_callback_keeps_its_state_within_a_fit() -> None:
    check_callback(partial(Boosting, every=2, share=0.5), partial(BoostedLoRAExpert, dropout=0.2))


def layers(module) -> dict:
    return {name: layer.expert for name, layer in expert_layers(module.model)}


class Watch(Callback):
    """Keeps, around each step, the dense deltas, the trained products, the logits and what has optimizer state."""

    def __init__(self) -> None:
        self.before: list[dict] = []
        self.after: list[dict] = []
        self.deltas: list[dict] = []
        self.begun: list[dict] = []
        self.logits: list[torch.Tensor] = []
        self.states: list[set[str]] = []

    def _see(self, module) -> torch.Tensor:
        return module.model(input_ids=torch.arange(5, 15)[None]).logits.detach()

    def _dense(self, module) -> dict:
        moved = module.model.get_parameter
        return {n: one.delta(moved(n), moved(n).detach).dense().detach() for n, one in layers(module).items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        # It stands after Boosting in the list, so a round has begun by now.
        self.begun.append(self._dense(pl_module))
        self.before.append({name: one.up.detach().clone() for name, one in layers(pl_module).items()})
        self.logits.append(self._see(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.after.append({name: one.up.detach().clone() for name, one in layers(pl_module).items()})
        self.deltas.append(self._dense(pl_module))
        self.logits.append(self._see(pl_module))
        (optimizer,) = trainer.optimizers
        self.states.append({n for n, one in layers(pl_module).items() if one.up in optimizer.state})


OWN = {"dtype": "float64", "scheduler": Constant()}
OWN["optimizer"] = partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0, eps=1e-12)
"""A constant rate, and steps of exactly its size."""


@pytest.fixture(scope="module")
def rounds(tiny_llama_dir, task_files, tmp_path_factory) -> tuple:
    """Three rounds of four steps, the last one cut off, in one of the two blocks each."""
    schedule, watch = Boosting(every=4, share=0.5, seed=2), Watch()
    place = tmp_path_factory.mktemp("rounds")
    module, *_ = runs.fit(tiny_llama_dir, task_files, place, BoostedLoRAExpert, schedule, watch, own=OWN, max_steps=10)
    return module, schedule, watch


def blocks(names: set[str]) -> set[str]:
    return {name.split(".self_attn")[0].split(".mlp")[0] for name in names}


def test_a_boost_leaves_the_outputs_and_the_deltas_as_they_are(rounds) -> None:
    _, _, watch = rounds
    for step in (4, 8):
        before, after = watch.logits[2 * step - 1], watch.logits[2 * step]
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
        for name, delta in watch.deltas[step - 1].items():
            torch.testing.assert_close(watch.begun[step][name], delta, rtol=1e-10, atol=1e-14)
    assert (watch.logits[-1] - watch.logits[0]).abs().max() > 1e-4


def test_the_change_of_a_weight_is_the_sum_of_its_boosters(rounds) -> None:
    module, schedule, watch = rounds
    for name, expert in layers(module).items():
        ends = [watch.deltas[3], watch.deltas[7], watch.deltas[9]]
        boosters = [ends[0][name], ends[1][name] - ends[0][name], ends[2][name] - ends[1][name]]
        turns = [any(name.startswith(block) for block in schedule.trained(module, number)) for number in range(3)]
        assert [bool(booster.any()) for booster in boosters] == turns, "a round leaves the other block as it is"
        weight = module.model.get_parameter(name)
        delta = expert.delta(weight, weight.detach)
        assert delta.rank == max(sum(turns), 1)
        torch.testing.assert_close(delta.dense(), sum(boosters), rtol=1e-10, atol=1e-14)
        assert all(torch.linalg.matrix_rank(one) == turn for one, turn in zip(boosters, turns, strict=True))


def test_the_draws_are_of_the_seed_and_the_round_and_each_block_has_its_turns(rounds) -> None:
    module, schedule, _ = rounds
    drawn = [schedule.trained(module, number) for number in range(40)]
    assert all(len(names) == 1 for names in drawn)
    assert len({name for names in drawn for name in names}) == 2
    assert drawn == [Boosting(share=0.5, seed=2).trained(module, number) for number in range(40)]
    assert drawn != [Boosting(share=0.5, seed=4).trained(module, number) for number in range(40)]
    assert len({frozenset(names) for names in drawn[:3]}) == 2, "the rounds of this test train both blocks"


def test_the_first_step_of_a_round_moves_each_number_by_the_rate_as_its_blocks_alone_hold_state(rounds) -> None:
    module, schedule, watch = rounds
    for step, names in enumerate(watch.states):
        assert blocks(names) == schedule.trained(module, step // 4)
    for step in (0, 4, 8):
        for name in layers(module):
            moved = (watch.after[step][name] - watch.before[step][name]).abs()
            trained = any(name.startswith(block) for block in schedule.trained(module, step // 4))
            # An AdamW without a past divides each gradient by its own size.
            torch.testing.assert_close(moved, torch.full_like(moved, RATE * trained), rtol=1e-5, atol=0)


def test_products_that_a_round_leaves_out_are_skipped_and_change_nothing(rounds, fit_tiny):
    class Whole(BoostedLoRAExpert):
        """Computes its product in every round."""

        def leave_out(self, left_out: bool) -> None:
            pass

    schedule = Boosting(every=4, share=0.5, seed=2)
    whole, *_ = fit_tiny(Whole, schedule, Watch(), own=OWN, max_steps=10)
    state = whole.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in rounds[0].state_dict().items())

    x, weight, seen = torch.randn(5, 4), torch.randn(6, 4), {}
    expert = BoostedLoRAExpert(weight).train()
    for left_out in (False, True):
        expert.leave_out(left_out)
        assert torch.equal(expert(x, weight, None), x @ weight.T)
        seen[left_out] = expert(x, weight, None).requires_grad
    assert seen == {False: True, True: False}, "a backward pass ends where nothing is trained"
    expert.leave_out(False)
    with torch.no_grad():
        expert.up.fill_(1.0)
    expert.leave_out(True)
    moved = expert(x, weight, None) - x @ weight.T
    torch.testing.assert_close(moved, 2.0 * x @ expert.down.T @ expert.up.T, msg="what has learned is never skipped")


def test_one_round_in_all_blocks_is_a_lora_bit_for_bit(fit_tiny) -> None:
    lora, _, wanted = fit_tiny(partial(LoRAExpert, rank=1, alpha=2.0), own=OWN)
    ours, _, found = fit_tiny(BoostedLoRAExpert, Boosting(every=6, share=1.0), own=OWN)
    assert found == wanted
    for name, expert in layers(ours).items():
        assert torch.equal(expert.up, layers(lora)[name].up)
        assert torch.equal(expert.down, layers(lora)[name].down)


def test_boosters_of_more_than_full_rank_become_one_product() -> None:
    for shape in ((6, 4), (4, 6)):
        torch.manual_seed(0)
        weight = torch.zeros(shape, dtype=torch.float64)
        expert, total = BoostedLoRAExpert(weight), torch.zeros(shape, dtype=torch.float64)
        for number in range(7):
            with torch.no_grad():
                expert.up.normal_()
            total += 2.0 * (expert.up @ expert.down).detach()
            assert expert.boost(torch.Generator().manual_seed(number))
            torch.testing.assert_close(expert.delta(weight, weight.detach).dense(), total)
            assert expert.ups.shape[1] <= 4
        assert not expert.boost(torch.Generator().manual_seed(0)), "a product that learned nothing is no booster"


def test_the_rate_rises_again_after_each_restart() -> None:
    shape, smooth = WarmupRestarts(every=10, rise=4, warmup=0.0), WarmupCosine(warmup=0.0)
    shares = [shape.factor(step, 30) / smooth.factor(step, 30) for step in range(25)]
    assert shares[:10] == [1.0] * 10
    assert shares[10:20] == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 6])
    assert shares[20:] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda fit: Boosting(every=0), "every=0, the optimizer steps of a round, must be at least 1"),
        (lambda fit: Boosting(share=0.0), r"share=0.0, .* is outside \(0, 1\]"),
        (lambda fit: Boosting(share=1.5), r"share=1.5, .* is outside \(0, 1\]"),
        (lambda fit: WarmupRestarts(every=8, rise=8), "rise=8, the steps of a rise, must be from 1 to every - 1 = 7"),
        (lambda fit: fit(LoRAExpert, Boosting()), "down_proj.weight has a LoRAExpert; give `expert=BoostedLoRAExpert`"),
    ],
)
def test_settings_that_cannot_be(make, sentence, fit_tiny) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(fit_tiny)


def test_a_round_that_ends_early_leaves_experts_that_train_their_products(tiny_llama_dir, task_files, tmp_path) -> None:
    class Failure(Callback):
        def on_train_batch_end(self, *args) -> None:
            raise OSError("no space left")

    module = runs.module(tiny_llama_dir, BoostedLoRAExpert)
    first = runs.trainer(tmp_path / "first", Boosting(every=4, share=0.5, seed=2), Failure(), max_steps=4)
    with pytest.raises(OSError, match="no space"):
        first.fit(module, runs.mixture(task_files, tiny_llama_dir))
    assert not all(one.up.any() for one in layers(module).values())
    runs.trainer(tmp_path / "second", max_steps=2).fit(module, runs.mixture(task_files, tiny_llama_dir))
    assert all(one.up.any() for one in layers(module).values())
