"""Experts that act on answers alone: equal to a dense model with a mask by token, trained, stored, asked, refused."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model, build_tokenizer
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed import runs
from testbed.other_experts import GatedExpert
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MambaConfig

from modular_experts import FullExpert, LoRAExpert, SparseExpert, inject, open_expert
from modular_experts.data import TaskMixture
from modular_experts.data.batch import IGNORED, Collator, Example, Tokens
from modular_experts.evaluation import batch_losses
from modular_experts.evaluation.generation import generate_tokens
from modular_experts.evaluation.likelihood import answer_logits
from modular_experts.experts import MaskedExpert
from modular_experts.injection import eject, expert_layers, named_experts, task_vector, write_experts
from modular_experts.injection.answer_only import AnswerOnly
from modular_experts.injection.attach import attached
from modular_experts.injection.save import save_expert
from modular_experts.training.preferences import DPO

KINDS: dict[str, Callable[[Tensor], Any]] = {
    "lora": partial(LoRAExpert, rank=2),
    "entries": partial(SparseExpert, keep_ratio=0.2),
    "tiles": partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=8),
    "rows": partial(SparseExpert, keep_ratio=0.3, granularity="row"),
    "masked": partial(MaskedExpert, keep_ratio=0.2),
}
# Prompt and answer of rows; the last is a filler, and the first prompt is its own last token.
ROWS = [([5], [6, 7, 8]), ([9, 10, 11, 12, 13, 15, 16, 17], [14]), ([20, 21, 22], [23, 24]), ([30, 31], [])]


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "neox": {},
    # Tokens see the three before them, and the cache keeps no more.
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
}


def base_of(architecture: str = "llama") -> Any:
    return build_model(architecture, **ARCHITECTURES[architecture]).double()


def equipped(architecture: str, kind: str) -> Any:
    """Return a model in float64 with experts that move all linear layers by much."""
    model = base_of(architecture)
    inject(model, KINDS[kind], "all-linear")
    for _, expert in named_experts(model):
        for parameter in expert.parameters():
            nn.init.normal_(parameter, std=0.3)
    write_experts(model)
    return model


def batch_of(rows: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    tokens = [Tokens(torch.tensor([*prompt, *answer]), len(prompt)) for prompt, answer in rows]
    tasks = ["a" if answer else "" for _, answer in rows]
    return Collator(0, texts=False)(
        [Example(task, "", None, one) for task, one in zip(tasks, tokens, strict=True)]  # type: ignore[arg-type]
    )


class Reference:
    """The base with dense changes of its weights, which move the tokens of a mask alone."""

    def __init__(self, base: Any, deltas: dict[str, Tensor]) -> None:
        self.base = base.requires_grad_(False)
        self.deltas = {name: delta.clone().requires_grad_() for name, delta in deltas.items()}

    def logits(self, ids: list[int], prompt: int) -> Tensor:
        """Return the logits `(length, vocabulary)` of a row whose tokens from the last of its prompt on are moved."""
        active = torch.arange(len(ids)) >= prompt - 1
        with self._moving(active):
            return self.base(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    @contextmanager
    def _moving(self, active: Tensor) -> Iterator[None]:
        def move(delta: Tensor, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            oriented = delta if isinstance(layer, nn.Linear) else delta.T
            return output + F.linear(inputs[0], oriented) * active[:, None]

        layers = {name: self.base.get_submodule(name.removesuffix(".weight")) for name in self.deltas}
        hooks = [layer.register_forward_hook(partial(move, self.deltas[name])) for name, layer in layers.items()]
        yield
        for hook in hooks:
            hook.remove()

    def losses(self) -> Tensor:
        """Return the summed loss of each of `ROWS`."""
        sums = []
        for prompt, answer in ROWS:
            logits = self.logits([*prompt, *answer], len(prompt))[len(prompt) - 1 : -1]
            sums.append(F.cross_entropy(logits, torch.tensor(answer, dtype=torch.long), reduction="sum"))
        return torch.stack(sums)


def reference_of(model: Any, base: Any) -> Reference:
    return Reference(base, {name: delta.dense().double() for name, delta in task_vector(model)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_are_those_of_a_mask_by_token(architecture: str, kind: str) -> None:
    model = equipped(architecture, kind)
    reference = reference_of(model, base_of(architecture))
    AnswerOnly(model)

    losses, counts = batch_losses(model, batch_of(ROWS))
    expected = reference.losses()

    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-9)
    assert counts.tolist() == [3, 1, 2, 0]
    whole = [
        F.cross_entropy(model_logits[len(prompt) - 1 : -1], torch.tensor(answer), reduction="sum")
        for prompt, answer in ROWS[1:3]
        for model_logits in [_of_whole_rows(architecture, kind, [*prompt, *answer])]
    ]
    # A model whose experts move prompts, too, has other losses.
    assert (torch.stack(whole) - expected[1:3]).abs().min() > 1e-3

    losses.sum().backward()
    dense = torch.autograd.grad(expected.sum(), list(reference.deltas.values()))
    by_name = dict(zip(reference.deltas, dense, strict=True))
    layers = dict(expert_layers(model))
    for name, layer in layers.items():
        gradient = layer.oriented(by_name[name]) if layer.is_transposed else by_name[name]  # type: ignore[arg-type]
        _assert_gradients(layer.expert, gradient)


def _of_whole_rows(architecture: str, kind: str, ids: list[int]) -> Tensor:
    return equipped(architecture, kind)(input_ids=torch.tensor([ids]), use_cache=False).logits[0]  # type: ignore[no-any-return]


def _assert_gradients(expert: Any, dense: Tensor) -> None:
    """Compare the gradients of what an expert trains with those that its dense delta `(out, in)` would give."""
    if isinstance(expert, SparseExpert):
        own = expert.delta(dense, lambda: dense)
        kept = type(own)(expert.indices, expert.values.grad, expert.shape).dense().view(-1)
        places = own.support().long()
        torch.testing.assert_close(kept[places], dense.reshape(-1)[places], rtol=0, atol=1e-9)
    elif isinstance(expert, MaskedExpert):
        torch.testing.assert_close(expert.change.grad, dense * expert.mask, rtol=0, atol=1e-9)
    else:
        trained = [parameter for parameter in expert.parameters() if parameter.requires_grad]
        wanted = torch.autograd.grad(expert.delta(dense, lambda: dense).dense(), trained, dense)
        torch.testing.assert_close([parameter.grad for parameter in trained], list(wanted), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["lora", "entries"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_goes_on_as_the_reference_does(architecture: str, kind: str) -> None:
    model = equipped(architecture, kind)
    reference = reference_of(model, base_of(architecture))
    AnswerOnly(model)

    answers = generate_tokens(model, build_tokenizer(), batch_of(ROWS), max_new_tokens=6)

    for (prompt, _), answer in zip(ROWS, answers, strict=True):
        ids = list(prompt)
        for token in answer:
            assert token == int(reference.logits(ids, len(prompt))[-1].argmax())
            ids.append(token)
        assert len(answer) == 6 or answer[-1] == 1
    written = model.generate(torch.tensor([[9, 10, 11]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert written[0, 3] == reference.logits([9, 10, 11], 3)[-1].argmax()


def test_the_base_reads_prompts_and_weights_are_as_before() -> None:
    model = equipped("llama", "entries")
    base = base_of()
    moved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    answers = AnswerOnly(model)
    with answers.base_alone():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
        weights = dict(model.named_parameters())
        assert all(torch.equal(weights[name], tensor) for name, tensor in base.named_parameters())
    answer_logits(model, batch_of(ROWS))
    assert all(torch.equal(tensor, moved[name]) for name, tensor in model.state_dict().items())


def test_a_copy_acts_on_its_own() -> None:
    model = equipped("llama", "lora")
    AnswerOnly(model)
    other = copy.deepcopy(model)
    before = batch_losses(other, batch_of(ROWS))[0]
    for _, expert in named_experts(model):
        for parameter in expert.parameters():
            parameter.data.zero_()
    assert torch.equal(batch_losses(other, batch_of(ROWS))[0], before)
    assert not torch.equal(batch_losses(model, batch_of(ROWS))[0], before)


def test_a_pass_that_does_not_tell_where_the_answer_begins_is_refused_until_the_experts_leave() -> None:
    model = equipped("llama", "entries")
    AnswerOnly(model)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"does not tell where the answer begins; take model\.generate"):
        model(input_ids=ids)
    eject(model)
    assert torch.equal(model(input_ids=ids).logits, base_of()(input_ids=ids).logits)


def test_rows_with_several_answers_are_refused() -> None:
    model = equipped("llama", "lora")
    AnswerOnly(model)
    batch = batch_of([([5, 6], [7, 8, 9, 10])])
    batch["labels"][0, 4] = IGNORED
    with pytest.raises(ValueError, match="give each of the assistant's turns a row of its own"):
        batch_losses(model, batch)


@pytest.mark.parametrize(
    ("kind", "modules", "reason"),
    [
        (FullExpert, "q_proj", r"FullExpert trains the weight itself at model\.layers\.1\.self_attn\.q_proj\.weight"),
        (GatedExpert, "q_proj", "is not a delta: "),
        (partial(SparseExpert, keep_ratio=0.1), "embed_tokens", r"model\.embed_tokens\.weight is not a linear layer's"),
    ],
)
def test_experts_that_cannot_are_refused_and_the_model_stays_as_it_is(kind: Any, modules: str, reason: str) -> None:
    model: Any = build_model("llama")
    inject(model, kind, modules)
    with pytest.raises(ValueError, match=reason):
        AnswerOnly(model)
    model(input_ids=torch.tensor([[5, 6, 7]]))


def test_a_model_does_so_once() -> None:
    model = equipped("llama", "lora")
    AnswerOnly(model)
    with pytest.raises(ValueError, match="do so already"):
        AnswerOnly(model)


def test_a_model_that_loses_its_place_behind_kept_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = equipped("gpt2", "lora")
    forward = model.base_model.forward
    # It then counts places from the cache, padding among them.
    monkeypatch.setattr(model.base_model, "forward", lambda *ids, position_ids=None, **named: forward(*ids, **named))
    with pytest.raises(ValueError, match="GPT2LMHeadModel reads an answer behind kept keys and values otherwise"):
        AnswerOnly(model)
    model(input_ids=torch.tensor([[5, 6, 7]]))


def test_a_model_that_takes_one_token_at_a_time_behind_a_state_is_refused() -> None:
    config = MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, state_size=4)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    inject(model, KINDS["lora"], ["in_proj", "out_proj"])
    with pytest.raises(ValueError, match="MambaForCausalLM reads an answer behind kept keys and values otherwise"):
        AnswerOnly(model)


@pytest.fixture
def fitted(tiny_llama_dir: Path, task_files: dict[str, Path], tmp_path: Path) -> Callable[..., tuple]:
    return partial(runs.fit, tiny_llama_dir, task_files, tmp_path, limit_val_batches=0)


@pytest.mark.parametrize("kind", ["lora", "entries"])
def test_training_takes_the_steps_of_the_reference(
    kind: str, fitted: Callable, tiny_llama_dir: Path, task_files: dict[str, Path]
) -> None:
    module, _, losses = fitted(KINDS[kind], own={"acts_on": "answer", "dtype": "float64"}, max_steps=24)
    assert sum(losses[-4:]) < sum(losses[:4])
    # The loss of the trained model is the reference's with the deltas that come out of it.
    reference = reference_of(module.model.eval(), base_of())
    data = TaskMixture(task_files["upper"], str(tiny_llama_dir), batch_size=4)
    data.setup("test")
    for batch in data.test_dataloader():
        sums, _ = batch_losses(module.model, batch)
        for row, loss in enumerate(sums):
            length = int(batch["attention_mask"][row].sum())
            ids = batch["input_ids"][row, :length].tolist()
            prompt = int((batch["labels"][row] == IGNORED)[:length].sum())
            expected = F.cross_entropy(reference.logits(ids, prompt)[prompt - 1 : -1], torch.tensor(ids[prompt:]))
            torch.testing.assert_close(loss / (length - prompt), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["lora", "entries"])
def test_a_stored_expert_scores_as_the_module_does_and_stands_nowhere_else(
    kind: str, fitted: Callable, tiny_llama_dir: Path, tmp_path: Path, task_files: dict[str, Path]
) -> None:
    module, _, _ = fitted(KINDS[kind], own={"acts_on": "answer"})
    here = save_expert(module.model, tmp_path / "library" / "here", tasks=["upper"], base=str(tiny_llama_dir))
    assert (here.acts_on_answers, here.mergeable, here.record["format"]) == (True, False, "modular-experts/5")
    data = runs.mixture(task_files, tiny_llama_dir)
    (expected,) = runs.trainer(tmp_path).test(module, data, verbose=False)
    stored = runs.module(tiny_llama_dir, None, applied=[str(here.path)])
    (measured,) = runs.trainer(tmp_path).test(stored, data, verbose=False)
    assert measured == pytest.approx(expected, abs=1e-5)

    eject(module.model)
    inject(module.model, KINDS[kind], runs.TARGET)
    rows = save_expert(module.model, tmp_path / "library" / "rows", tasks=["upper"], base=str(tiny_llama_dir))
    assert not rows.acts_on_answers
    base: Any = build_model("llama")
    said = r"here acts on answers alone and .* on prompts, too, so one model cannot take both"
    with pytest.raises(ValueError, match=said):
        attached(base, [here, rows])
    with attached(base, here):
        (layer, *_) = (layer for _, layer in expert_layers(base))
        assert not layer.is_idle
        with pytest.raises(ValueError, match="does not tell where the answer begins"):
            base(input_ids=torch.tensor([[5, 6]]))
    base(input_ids=torch.tensor([[5, 6]]))


def test_equal_numbers_that_act_on_other_tokens_have_another_content_hash(tmp_path: Path, tiny_llama_dir: Path) -> None:
    hashes = set()
    for name in ("answers", "rows"):
        model: Any = build_model("llama")
        torch.manual_seed(0)
        inject(model, KINDS["entries"], "q_proj")
        for _, expert in named_experts(model):
            nn.init.ones_(expert.values)  # type: ignore[arg-type]
        if name == "answers":
            AnswerOnly(model)
        save_expert(model, tmp_path / name, base=str(tiny_llama_dir))
        hashes.add(open_expert(tmp_path / name).content_hash)
    assert len(hashes) == 2


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("kind", ["lora", "entries"])
def test_a_resumed_run_goes_on_bit_for_bit(kind: str, fitted: Callable, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", every_n_train_steps=3)
    how = {"own": {"acts_on": "answer"}, "enable_checkpointing": True}
    whole, _, losses = fitted(KINDS[kind], saving, **how)
    half = tmp_path / "step=3.ckpt"
    resumed, _, rest = fitted(KINDS[kind], saving, ckpt=half, **how)
    assert rest == losses[3:]
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    with pytest.raises(ValueError, match="trained with acts_on=answer, and acts_on=row is set now"):
        fitted(KINDS[kind], saving, ckpt=half, enable_checkpointing=True)


def test_preferences_are_learned_from_answers(tmp_path: Path, tiny_llama_dir: Path) -> None:
    from conftest import write_rows

    rows = [
        {"prompt": f"{word} is", "chosen": word[0], "rejected": word[1] * 2, "split": "train"}
        for word in ("xa", "yb", "za", "wb")
    ]
    data = TaskMixture(write_rows(tmp_path / "pairs.jsonl", rows), str(tiny_llama_dir), batch_size=4)
    losses = runs.Losses()
    module = runs.module(tiny_llama_dir, KINDS["entries"], loss=DPO(0.5), learning_rate=1e-2, acts_on="answer")
    runs.trainer(tmp_path, losses, max_steps=6, limit_val_batches=0).fit(module, data)
    assert losses.steps[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses.steps[-1] < losses.steps[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gradient_checkpointing": True}, "acts_on='answer' does not go with gradient_checkpointing=True"),
        ({"shard_base": True}, "acts_on='answer' does not go with shard_base=True"),
        ({"applied": ["library/x"]}, "does not go with applied="),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        runs.module(Path("base"), KINDS["lora"], acts_on="answer", **settings)


def test_rows_are_not_packed(fitted: Callable) -> None:
    with pytest.raises(ValueError, match="prompts are read apart from answers, so rows are not packed"):
        fitted(KINDS["lora"], own={"acts_on": "answer"}, data={"packing": True})


def test_a_base_alone_has_no_answers_to_act_on(tiny_llama_dir: Path, tmp_path: Path, task_files: dict) -> None:
    module = runs.module(tiny_llama_dir, None, acts_on="answer")
    with pytest.raises(ValueError, match="is for the experts of `expert=` and `modules=`; a stored one knows it"):
        runs.trainer(tmp_path).test(module, runs.mixture(task_files, tiny_llama_dir), verbose=False)
