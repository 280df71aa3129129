"""Each expert is written in the smallest form whose loss stays within the bound, and in no other."""

import pytest
import torch
from testbed.random_deltas import random_delta
from testbed.searching import NAMES, objective_on, random_experts, same_bits, state

from modular_experts.deltas import Dense
from modular_experts.library import make_record, open_expert, open_statistics, write_expert, write_statistics
from modular_experts.library.form import Form
from modular_experts.library.packing import pack
from modular_experts.merging.shrink import candidates_of, check_form, forms_for, shrink
from modular_experts.methods.method import DataStatistic


@pytest.fixture(scope="module")
def objective(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files, sharpness=20)


@pytest.fixture
def experts(objective, tmp_path):
    """An expert of each form, trained on the first task."""
    base = {"id": "base", "revision": None, "fingerprint": "f" * 64}
    for number, deltas in enumerate(random_experts(objective)):
        record = make_record("SparseExpert", base, tasks=["upper"])
        write_expert(tmp_path / f"library/{number}", deltas.items(), record)
    return [open_expert(tmp_path / f"library/{number}") for number in range(4)]


def _loss(objective, expert) -> float:
    return objective.losses_with({name: expert[name] for name in expert}, tasks=["upper"])["upper"]


def test_the_smallest_form_within_the_bound_is_written(objective, experts, tmp_path) -> None:
    bound = 1e-2
    before = state(objective.model)
    done = list(shrink(experts, objective, tmp_path / "small", bound=bound))
    assert same_bits(objective.model, before)
    for one in done:
        sizes = [tried.bytes for tried in one.tried]
        assert sizes == sorted(sizes)
        assert one.before.loss == pytest.approx(_loss(objective, one.source))
        *missed, last = one.tried
        assert all(tried.loss > one.before.loss + bound for tried in missed)
        assert last.bytes < one.before.bytes
        if one.chosen is None:
            assert last.loss > one.before.loss + bound
            assert not (tmp_path / "small" / one.source.name).exists()
            continue
        assert one.chosen is last
        written = open_expert(tmp_path / "small" / one.source.name)
        assert written.record["encoding"] == last.form.encoding
        assert _loss(objective, written) == pytest.approx(last.loss, abs=1e-6)
        assert last.loss <= one.before.loss + bound
        assert sum(written.stored_bytes().values()) == last.bytes < one.before.bytes
        assert written.record["source"]["content_hash"] == one.source.content_hash
        assert written.record["scores"] == {"val_loss": last.loss, "val_loss/upper": last.loss}
        assert written.record["parents"] == one.source.record["parents"]
    assert any(one.chosen for one in done)


def test_a_form_that_is_left_early_is_one_that_loses_too_much(objective, experts, tmp_path) -> None:
    whole = list(shrink(experts, objective, tmp_path / "whole", bound=1e-2))
    early = list(shrink(experts, objective, tmp_path / "early", bound=1e-2, stops_early=True))
    for full, left in zip(whole, early, strict=True):
        assert [tried.form for tried in full.tried] == [tried.form for tried in left.tried]
        assert left.chosen == full.chosen
    assert any(tried.loss == float("inf") for left in early for tried in left.tried)


def test_experts_of_several_kinds_share_a_form_and_own_forms_cut_what_they_like(experts) -> None:
    both = Form(keep=0.5, rank=2)
    check_form(both, experts)
    own = type("Own", (Form,), {})
    for form in (own(keep=0.5), own(rank=2)):
        check_form(form, experts)
        with pytest.raises(ValueError, match=r"would leave .* whole"):
            check_form(Form(keep=form.keep, rank=form.rank), experts)


@pytest.mark.parametrize("kind", ["Dense", "LowRank", "Sparse", "BlockSparse"])
def test_candidates_share_their_cuts_and_have_the_bytes_of_what_is_written(kind) -> None:
    deltas = {f"{n}": random_delta(kind, (40, 36), n, torch.float32, share=0.5) for n in range(3)}
    if kind == "Dense":  # one that takes fewer bytes as a sparse delta loses directions too
        deltas["few"] = Dense(random_delta("Sparse", (40, 36), 4, torch.float32, share=0.1).dense())
    found = candidates_of(deltas, forms_for(deltas))
    assert {form for form, _, _ in found} == {*forms_for(deltas)}
    assert [size for _, _, size in found] == sorted(size for _, _, size in found)
    for form, cut, size in found:
        assert size == sum(one.nbytes for delta in cut.values() for one in pack(delta, form.encoding)[0].values())
        for name, delta in deltas.items():
            torch.testing.assert_close(cut[name].dense(), form.cut(delta).dense(), rtol=0, atol=2e-5)


def test_statistics_of_inputs_are_those_of_the_smaller_expert_too(objective, experts, tmp_path) -> None:
    statistic = {"depth 0": DataStatistic(torch.rand(3, 2), 1.0, 1)}
    for kind in ("prompts", "gram"):
        write_statistics(experts[0], kind, statistic.items(), {"upper": 3}, {"split": "train"})
    (one,) = shrink(experts[:1], objective, tmp_path / "small", Form("int8"), bound=10.0)
    stored = open_statistics(one.expert, "prompts")
    assert torch.equal(stored["depth 0"].values, statistic["depth 0"].values)
    assert (stored.facts["tasks"], stored.facts["data"]) == ({"upper": 3}, {"split": "train"})
    with pytest.raises(FileNotFoundError, match="has no gram statistics"):
        open_statistics(one.expert, "gram")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bound": -1.0}, "bound=-1.0 must be at least 0"),
        ({"out": "library"}, "would be replaced by its shrunk form"),
        ({"twice": True}, "two experts are called 0; shrink them into two libraries"),
        ({"to": Form(rank=2)}, "so the form rank 2, float32 would leave .*0 whole; give it another one"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(objective, experts, tmp_path, change, sentence) -> None:
    chosen = experts[:1]
    if change.get("twice"):
        write_expert(tmp_path / "other/0", chosen[0], chosen[0].record)
        chosen = [*chosen, open_expert(tmp_path / "other/0")]
    change = {name: value for name, value in change.items() if name != "twice"}
    out = tmp_path / change.pop("out", "small")
    with pytest.raises(ValueError, match=sentence):
        list(shrink(chosen, objective, out, **change))


def test_an_expert_without_a_finite_loss_or_of_other_tasks_is_not_judged(objective, experts, tmp_path) -> None:
    huge = {"lm_head.weight": Dense(torch.full(objective.model.lm_head.weight.shape, 3e38))}
    write_expert(tmp_path / "library/huge", huge, experts[0].record)
    with pytest.raises(ValueError, match="huge has no finite loss on upper"):
        list(shrink([tmp_path / "library/huge"], objective, tmp_path / "small"))
    record = make_record("SparseExpert", {"id": "base", "fingerprint": "f" * 64}, tasks=["dates"])
    write_expert(tmp_path / "library/other", [(NAMES[0], experts[0][NAMES[0]])], record)
    with pytest.raises(ValueError, match="was trained on dates, and the data has upper, reverse"):
        list(shrink([tmp_path / "library/other"], objective, tmp_path / "small"))
