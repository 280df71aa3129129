"""Experts of weights beyond plain linear layers: matrices of mixture-of-experts bases, tied embeddings, vectors."""

import copy
import pickle
from functools import partial
from pathlib import Path

import conftest
import pytest
import torch
import transformers
from lightning.pytorch import Callback
from testbed import runs
from testbed.mixture_bases import mixture
from testbed.other_experts import BiasExpert, GatedExpert
from torch import Tensor, nn

from modular_experts.base import Base
from modular_experts.base.apply import applied, apply
from modular_experts.base.structure import split_slice, weight_of
from modular_experts.deltas import Dense
from modular_experts.evaluation import likelihood
from modular_experts.experts import Expert, FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import eject, expert_layers, find_sites, inject, task_vector
from modular_experts.library import open_expert
from modular_experts.masks import SelectOnce
from modular_experts.merging.combination import Combination
from modular_experts.merging.fisher_information import fisher
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.learning_rate import ConstantRate
from modular_experts.training.train_under_others import TrainUnderOthers


def test_all_linear_leaves_out_gates_and_routers() -> None:
    shared = mixture("qwen2_moe")
    names = inject(shared, partial(LoRAExpert, rank=2), "all-linear")
    assert any(name.endswith("shared_expert.up_proj.weight") for name in names)
    assert not any("shared_expert_gate" in name for name in names)
    # JetMoE's router is a linear layer.
    routers = {site.name for site in find_sites(mixture("jetmoe")) if site.layer == "layer"}
    assert len(routers) == 4
    assert not any(name.endswith("router.layer.weight") for name in inject(mixture("jetmoe"), LoRAExpert, "all-linear"))
    assert len(inject(mixture("jetmoe"), partial(LoRAExpert, rank=2), "router.layer")) == 4


def test_a_subclass_takes_experts_if_its_forward_pass_is_a_linear_layers() -> None:
    config = transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    assert {name.split(".")[-2] for name in inject(model, partial(LoRAExpert, rank=2), "all-linear")} == {
        *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    }
    torch.testing.assert_close(model(ids).logits, before)

    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * input @ self.weight.T + self.bias

    assert not find_sites(nn.Sequential(Doubled(2, 3), Scaled(2, 3)))


KINDS = {
    "element": partial(SparseExpert, keep_ratio=0.1),
    "block": partial(SparseExpert, keep_ratio=0.4, granularity="block", block_size=8),
    "row": partial(SparseExpert, keep_ratio=0.2, granularity="row"),
    "masked": partial(MaskedExpert, keep_ratio=0.2, dense_start=False),
    "lora": partial(LoRAExpert, rank=2),
}
SLICED = ["mixtral", "gpt_oss"]
"""The first stores its matrices as `(out, in)`, the other as `(in, out)`."""
IDS = (torch.arange(40).view(2, 20) * 7) % 90 + 3


@pytest.fixture(scope="module")
def saved(tiny) -> Path:
    """A tiny Mixtral on disk, whose files hold a tensor for each matrix of each expert."""
    return tiny("mixtral")


def check_gradients(expert: Expert, wanted: Tensor) -> None:
    """Compare the gradients of an expert's parameters with those that follow from the whole weight's gradient."""
    exact = {"rtol": 1e-9, "atol": 1e-12}
    if isinstance(expert, LoRAExpert):
        torch.testing.assert_close(expert.up.grad, expert.scale * wanted @ expert.down.T, **exact)
        torch.testing.assert_close(expert.down.grad, expert.scale * expert.up.T @ wanted, **exact)
    elif isinstance(expert, MaskedExpert):
        torch.testing.assert_close(expert.change.grad, wanted * expert.mask, **exact)
    else:
        kept = expert._read(wanted.contiguous(), expert.indices)
        torch.testing.assert_close(expert.values.grad, kept, **exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", SLICED)
def test_gradients_are_those_of_dense_autograd(base: str, kind: str) -> None:
    model, dense = mixture(base).double(), mixture(base).double()
    dense.set_experts_implementation("eager")  # the grouped product takes no float64
    names = inject(model, KINDS[kind], "all-linear")
    assert sum("[" in name for name in names) == 2 * 2 * 4
    runs.take_steps(model, IDS, 1)  # moves values and factors away from zero
    with torch.no_grad():
        for name, delta in task_vector(model):
            delta.add_to(weight_of(dense, name))
    dense(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in expert_layers(model):
        if "[" not in name:
            continue
        whole, number = split_slice(name)
        wanted = dense.get_parameter(whole).grad[number]
        check_gradients(layer.expert, wanted.T if layer.is_transposed else wanted)


def test_patterns_name_all_matrices_or_one_and_full_experts_are_refused() -> None:
    assert len(inject(mixture("mixtral"), KINDS["lora"], "experts.down_proj")) == 8
    assert len(inject(mixture("mixtral"), KINDS["lora"], r".*layers\.1\..*gate_up_proj\[[02]\]")) == 2
    names = inject(mixture("mixtral"), KINDS["lora"], "down_proj[3]|q_proj")
    assert [name.rpartition(".")[2] for name in names] == ["down_proj[3]", "weight"] * 2
    with pytest.raises(ValueError, match=r"down_proj\[0\] is one of several matrices in a parameter, which FullExpert"):
        inject(mixture("mixtral"), FullExpert, "down_proj")
    with pytest.raises(ValueError, match=r"down_proj\[0\] has no bias, and BiasExpert moves one"):
        inject(mixture("mixtral"), BiasExpert, "down_proj")


def test_an_expert_of_a_matrix_that_no_token_reaches_costs_nothing() -> None:
    class Counting(LoRAExpert):
        calls = 0

        def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            self.calls += 1
            return super().forward(x, weight, bias)

    config = transformers.AutoConfig.for_model("mixtral", **conftest.GROUPED, num_local_experts=16)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    inject(model, partial(Counting, rank=2), "experts.down_proj")
    model(input_ids=IDS[:1, :3], labels=IDS[:1, :3]).loss.backward()
    experts = [layer.expert for _, layer in expert_layers(model)]
    idle = [expert for expert in experts if not expert.calls]
    assert 8 <= len(idle) < len(experts)  # three tokens go to two of sixteen experts each
    assert all(expert.up.grad is None for expert in idle)
    assert all(expert.calls == 1 for expert in experts if expert not in idle)


def trained(base: Path, files, folder: Path, plan, *callbacks: Callback, ckpt=None, task="upper", **settings) -> tuple:
    """Train the experts of a plan; return the module, the trainer and the losses of the steps."""
    how = {"own": {"experts": plan, "scheduler": ConstantRate()}, "data": {"seed": 0}, "limit_val_batches": 0}
    return runs.fit(base, {task: files[task]}, folder, None, *callbacks, ckpt=ckpt, **how, **settings)


def check_resumed(fit, expert: Path, folder: Path) -> nn.Module:
    """Train, and again in two parts with the same losses; return the model whose expert was exported."""
    export = ExportExpert(str(expert.parent), expert.name, monitor=None)
    module, _, losses = fit(MaskSchedule(rule=SelectOnce()), export)
    assert all(torch.isfinite(torch.tensor(losses)))
    _, trainer, start = fit(MaskSchedule(rule=SelectOnce()), max_steps=3)
    trainer.save_checkpoint(folder / "a.ckpt")
    *_, end = fit(MaskSchedule(rule=SelectOnce()), ckpt=folder / "a.ckpt")
    assert start + end == losses
    return module.model.eval()


def test_a_run_resumes_and_its_expert_gives_the_same_logits(saved, task_files, tmp_path) -> None:
    plan, expert = {"all-linear": KINDS["element"]}, tmp_path / "library/mine"
    fit = partial(trained, saved, task_files, tmp_path, plan)
    model, fresh = check_resumed(fit, expert, tmp_path), Base.open(saved).load()
    before = fresh(IDS).logits
    with applied(fresh, expert):
        torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(fresh(IDS).logits, before)
    assert len([name for name in open_expert(expert) if "[" in name]) == 16
    below, *_ = fit(TrainUnderOthers([str(expert)], count=1), task="reverse", max_steps=2)
    eject(below.model)
    torch.testing.assert_close(below.model(IDS).logits, before, rtol=0, atol=0)


def test_statistics_and_combinations_take_matrices(saved) -> None:
    base = Base.open(saved)
    model, names = base.load(), [name for name in base.structure.shapes if name.endswith("[2]")]
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    found = fisher(model, [batch], [*names, "model.norm.weight"])
    wanted = torch.zeros(())
    for row in IDS:
        model.zero_grad()
        dense = model.requires_grad_(True)
        log_likelihoods = dense(row[None]).logits[0, :-1].log_softmax(-1)[range(19), row[1:]]
        log_likelihoods.sum().backward()
        wanted = wanted + dense.model.layers[1].mlp.experts.down_proj.grad[2].square() / 2
    torch.testing.assert_close(found["model.layers.1.mlp.experts.down_proj[2]"].values, wanted, rtol=1e-3, atol=1e-9)
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    change = torch.ones(before.shape[1:])
    with Combination(model, [{"model.layers.0.mlp.experts.down_proj[1]": Dense(change)}]) as combination:
        combination.move_to(torch.tensor([[0.5]]))
        moved = model.model.layers[0].mlp.experts.down_proj - before
        torch.testing.assert_close(moved, torch.stack([0 * change, 0.5 * change, 0 * change, 0 * change]))
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, before)


def tied() -> transformers.PreTrainedModel:
    return conftest.build_model("llama", tie_word_embeddings=True)


OTHERS = KINDS | {"full": FullExpert}
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("kind", OTHERS)
def test_one_expert_of_a_tied_tensor_gets_the_gradient_of_both_uses(kind: str, parts: bool, monkeypatch) -> None:
    model, dense = tied().double(), tied().double()
    base = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    names = inject(model, {"embed_tokens": OTHERS[kind], "input_layernorm|norm": FullExpert})
    assert [name for name in names if "norm" not in name] == [EMBEDDINGS]
    runs.take_steps(model, IDS, 1)
    with torch.no_grad():
        for name, delta in task_vector(model, base.__getitem__):
            delta.add_to(dense.get_parameter(name))
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    if parts:  # the head is called several times in a pass, and again in backward
        monkeypatch.setattr(likelihood, "HEAD_BYTES", 0)
        monkeypatch.setattr(likelihood, "PART", 8)
    for one in (model, dense):
        likelihood.batch_losses(one, batch)[0].sum().backward()
    wanted, layers = dense.get_parameter(EMBEDDINGS).grad, dict(expert_layers(model))
    if kind == "full":
        torch.testing.assert_close(layers[EMBEDDINGS].weight.grad, wanted, rtol=1e-9, atol=1e-12)
    else:
        check_gradients(layers[EMBEDDINGS].expert, wanted)
    norm = "model.norm.weight"
    wanted = dense.get_parameter(norm).grad
    torch.testing.assert_close(layers[norm].weight.grad, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", OTHERS)
def test_experts_of_any_weight_are_converted_with_the_model(kind: str) -> None:
    """As Lightning does with `precision="64-true"`."""
    model = tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(IDS).logits.double()
    inject(model, {"embed_tokens|q_proj": OTHERS[kind], "input_layernorm|norm|down_proj": FullExpert})
    model.double()
    torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-5, atol=1e-5)
    eject(model, before.__getitem__)
    torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_bias_trains_beside_each_kind_of_expert_of_its_weight(kind: str) -> None:
    model, dense = conftest.build_model("qwen2").double(), conftest.build_model("qwen2").double()
    inject(model, {"k_proj": OTHERS[kind], "k_proj.bias": FullExpert})
    for one in (model, dense):
        one(input_ids=IDS, labels=IDS).loss.backward()
    for name in (f"model.layers.{number}.self_attn.k_proj.bias" for number in (0, 1)):
        wanted = dense.get_parameter(name).grad
        torch.testing.assert_close(model.get_parameter(name).grad, wanted, rtol=1e-9, atol=1e-12)


COPIED = {f"{base} {kind}": (base, kind, torch.float32) for base, kind in zip(SLICED * 3, KINDS, strict=False)}
COPIED |= {
    f"tied {kind}": ("tied", kind, dtype)
    for kind, dtype in zip(OTHERS, [torch.float32, torch.bfloat16] * 3, strict=True)
}


@pytest.mark.parametrize(("base", "kind", "dtype"), COPIED.values(), ids=COPIED)
def test_copies_go_on_working_and_experts_leave_the_base_behind(base, kind, dtype) -> None:
    model = tied().to(dtype) if base == "tied" else mixture(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(IDS).logits
    tied_plan = {"embed_tokens": OTHERS[kind], "input_layernorm|norm": FullExpert}
    inject(model, tied_plan if base == "tied" else {"all-linear": KINDS[kind]})
    assert before.keys() <= model.state_dict().keys()
    torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-6, atol=1e-6)
    runs.take_steps(model, IDS)
    wanted = model(IDS).logits
    assert wanted.dtype == dtype
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, wanted)
    if base != "tied":
        names = inject(model, LoRAExpert, "all-linear")
        assert names == [name for name, _ in expert_layers(model)]
    eject(model, *([before.__getitem__] if base == "tied" else []))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(IDS).logits, plain)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def saved_tied(tiny) -> Path:
    return tiny("llama", tie_word_embeddings=True)


def test_a_run_of_a_tied_tensor_resumes_and_its_checkpoint_gives_the_same_logits(saved_tied, task_files, tmp_path):
    expert, plan = tmp_path / "library/mine", {"embed_tokens": FullExpert}
    fit = partial(trained, saved_tied, task_files, tmp_path, plan)
    model = check_resumed(fit, expert, tmp_path)
    assert list(open_expert(expert)) == [EMBEDDINGS]
    apply([expert], tmp_path / "checkpoint")
    found = Base.open(tmp_path / "checkpoint").load()
    assert found.lm_head.weight is found.model.embed_tokens.weight
    torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tied", "modules", "batches"),
    [(False, "all-linear", "step"), (True, "embed_tokens", "step"), (True, "embed_tokens", 1)],
)
def test_a_support_is_chosen_by_the_gradient_of_a_matrix_or_of_both_uses_of_a_tied_tensor(
    tied, modules, batches, saved, saved_tied, task_files, tmp_path
) -> None:
    base, schedule = saved_tied if tied else saved, MaskSchedule(batches=batches)
    module, *_ = trained(base, task_files, tmp_path, {modules: KINDS["element"]}, schedule, max_steps=1)
    dense, data = Base.open(base).load(), runs.mixture({"upper": task_files["upper"]}, base, seed=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    dense(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
    layers = {name: layer.expert for name, layer in expert_layers(module.model) if "[" in name or name == EMBEDDINGS}
    assert len(layers) == (1 if tied else 16)
    for name, expert in layers.items():
        whole, number = split_slice(name)
        gradient = dense.get_parameter(whole).grad
        size = (gradient if number is None else gradient[number]).abs().flatten()
        # A pass of its own draws its own rows, and no token may have reached a matrix.
        if batches == "step" and size.any():
            assert size[expert.indices].min() >= size.topk(expert.kept_units).values.min() * 0.999
        assert not size.any() or expert.values.abs().max() > 0


def test_what_no_linear_layer_multiplies_refuses_experts_that_cannot_move_it() -> None:
    for expert, modules, sentence in (
        (KINDS["lora"], "input_layernorm", r"layernorm\.weight has shape \(32,\); such a parameter takes a FullExpert"),
        (GatedExpert, "embed_tokens", "is not a linear layer's weight, and GatedExpert has no delta"),
        (KINDS["lora"], "lm_head", r"\(tied\): name model\.embed_tokens for an expert that moves both"),
    ):
        with pytest.raises(ValueError, match=sentence):
            inject(tied(), expert, modules)
    # A pattern that matches a linear layer takes nothing else.
    assert "lm_head.weight" not in inject(tied(), KINDS["lora"], "(?!lm_head$).*")
    assert inject(mixture("mixtral"), KINDS["lora"], "mlp.gate") == [
        f"model.layers.{n}.mlp.gate.weight" for n in (0, 1)
    ]
    assert inject(conftest.build_model("qwen2"), FullExpert, "layers.0.self_attn.q_proj.bias") == [
        "model.layers.0.self_attn.q_proj.bias"
    ]
