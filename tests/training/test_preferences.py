"""Preferences: each kind of expert starts at ln 2, the loss is the closed form, and its reference stays the start."""

import json
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import write_rows
from testbed import runs, systems
from testbed.forked import run_on_two_ranks
from testbed.other_experts import GatedExpert

from modular_experts import estimate_fit, open_expert
from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.data import Task, TaskMixture
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.masks import GrowAndDrop
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training import fit as fits
from modular_experts.training.preferences import DPO, PreferenceLoss, at_start

MOVING = partial(MaskSchedule, rule=GrowAndDrop(every=2, until=0.9, replace=0.4))
KINDS: dict[str, list[Any]] = {
    "entries": [partial(SparseExpert, keep_ratio=0.1)],
    "moving entries": [partial(SparseExpert, keep_ratio=0.1), MOVING],
    "tiles": [partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=8)],
    "lora": [partial(LoRAExpert, rank=2)],
    "full": [FullExpert],
    "gated": [GatedExpert],
}
KINDS |= systems.there(
    {
        "boosted": lambda: [
            systems.of("boosting.BoostedLoRAExpert"),
            partial(systems.of("boosting.callback.Boosting"), every=2, share=1.0),
        ],
    }
)
WORDS = ["xa", "yb", "za", "wb", "vab", "uba", "tab", "sa", "rb", "qa", "pb", "na"]


@pytest.fixture
def file(tmp_path, monkeypatch) -> str:
    """Write pairs whose answers have different lengths."""
    monkeypatch.chdir(tmp_path)
    splits = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
    rows = [
        {"prompt": f"{word} is", "chosen": word[0], "rejected": word[-1] * (1 + number % 3), "split": splits[number]}
        for number, word in enumerate(WORDS)
    ]
    write_rows(Path("pairs.jsonl"), rows)
    return "pairs.jsonl"


def fit(base: Path, file: str, expert: Any, *callbacks: Any, steps: int = 6, **settings: Any) -> tuple[Any, Any, list]:
    torch.manual_seed(0)
    losses = runs.Losses()
    module = runs.module(base, expert, **({"loss": DPO(0.5), "learning_rate": 1e-2} | settings))
    made = [make() for make in callbacks]
    trainer = runs.trainer(Path.cwd(), losses, *made, max_steps=steps, limit_val_batches=0)
    trainer.fit(module, TaskMixture(file, str(base), batch_size=4))
    return module, trainer, losses.steps


@torch.no_grad()
def log_probabilities(model: Any, choices: dict) -> torch.Tensor:
    """Return the log-probability of each choice by a pass of its own."""
    sums = []
    for ids, mask, labels in zip(choices["input_ids"], choices["attention_mask"], choices["labels"], strict=True):
        length = int(mask.sum())
        logits = model(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
        sums.append(sum(logits[place - 1, labels[place]] for place in range(1, length) if labels[place] != -100))
    return torch.stack(sums)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_starts_at_ln_2_and_its_reference_stays_the_base(kind, one_block, file) -> None:
    module, trainer, losses = fit(one_block, file, *KINDS[kind])
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 1e-3
    choices = next(iter(trainer.datamodule.val_dataloader()))["choices"]
    base = log_probabilities(Base.open(one_block).load(), choices)
    before = {name: one.clone() for name, one in module.model.state_dict().items()}
    assert (log_probabilities(module.model, choices) - base).abs().max() > 1e-3
    with at_start(module.model, module._start):
        torch.testing.assert_close(log_probabilities(module.model, choices), base)
    after = module.model.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items())


@pytest.mark.parametrize("kind", ["entries", "lora", "full"])
def test_the_loss_is_the_closed_form_in_float64_and_that_of_trl(kind, one_block, file) -> None:
    module, trainer, _ = fit(one_block, file, *KINDS[kind], dtype="float64", steps=3)
    batch = next(iter(trainer.datamodule.train_dataloader()))
    base, moved = Base.open(one_block).load("float64"), Base.open(one_block).load("float64")
    for name, delta in module.task_vector():
        moved.get_parameter(name).data += delta.dense()
    p, q = (log_probabilities(model, batch["choices"]).tolist() for model in (moved, base))
    assert batch["choices"]["correct"].tolist() == [True, False] * 4
    # By arithmetic of its own: -log of the Bradley-Terry probability of the chosen answer.
    odds = [(math.exp(p[n]) / math.exp(q[n])) / (math.exp(p[n + 1]) / math.exp(q[n + 1])) for n in range(0, 8, 2)]
    losses = [-math.log(odd**0.5 / (1 + odd**0.5)) for odd in odds]
    sums, counts = module.batch_losses(module.model, batch)
    assert sums.tolist() == pytest.approx(losses, rel=1e-6)
    assert counts.tolist() == [1] * 4
    module.trainer = trainer
    assert module.loss(batch).item() == pytest.approx(sum(losses) / 4, rel=1e-6)
    # TRL 1.16, `DPOTrainer._compute_loss` with loss_type sigmoid and f_divergence reverse_kl.
    chosen, rejected = (torch.tensor(p[n::2]) - torch.tensor(q[n::2]) for n in (0, 1))
    assert sums.tolist() == pytest.approx((-F.logsigmoid(0.5 * (chosen - rejected))).tolist(), rel=1e-4)


def test_a_target_is_compared_with_each_other_choice(one_block, file) -> None:
    write_rows(
        Path("three.jsonl"), 2 * [{"input": "a is", "target": "b", "choices": ["a", "b", "c"], "split": "train"}]
    )

    class Margins(PreferenceLoss):
        def of(self, margins):
            return margins

    module = runs.module(one_block, LoRAExpert, loss=Margins())
    module.configure_model()
    data = TaskMixture("three.jsonl", str(one_block))
    data.learn_choices()
    data.setup("fit")
    module.prepare_experts(data)
    batch, base = next(iter(data.train_dataloader())), Base.open(one_block).load()
    for parameter in module.model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    sums, counts = module.batch_losses(module.model, batch)
    gain = log_probabilities(module.model, batch["choices"]) - log_probabilities(base, batch["choices"])
    assert counts.tolist() == [2, 2]
    assert sums.tolist() == pytest.approx((2 * gain[1::3] - gain[0::3] - gain[2::3]).tolist(), abs=1e-5)


def test_rows_of_pairs_are_read_and_tokenised_with_one_prompt(one_block, file) -> None:
    rows, problems = Task(path=file).read()
    assert not problems
    assert (rows[1].input, rows[1].target, rows[1].choices) == ("yb is", "y", ("y", "bb"))
    Path("bad.jsonl").write_text('{"input": "a", "chosen": "b", "rejected": "b"}\n{"input": "a", "chosen": "b"}\n')
    _, problems = Task(path="bad.jsonl").read()
    assert "needs two or more different texts" in problems[0]
    assert "the row has no 'rejected'" in problems[1]
    data = TaskMixture(file, str(one_block))
    data.setup("fit")
    assert "choices" not in next(iter(data.train_dataloader()))
    data.learn_choices()
    assert len(next(iter(data.train_dataloader()))["choices"]["input_ids"]) == 16


def test_a_fit_without_preferences_on_the_same_data_is_the_fit_on_data_of_its_own(one_block, file) -> None:
    def losses(data: TaskMixture, **settings: Any) -> list[float]:
        torch.manual_seed(0)
        found = runs.Losses()
        trainer = runs.trainer(Path.cwd(), found, max_steps=2, limit_val_batches=0, accumulate_grad_batches=2)
        trainer.fit(runs.module(one_block, partial(LoRAExpert, rank=2), **settings), data)
        return found.steps

    used, own = (TaskMixture(file, str(one_block), batch_size=2, packing=False) for _ in range(2))
    compared = losses(used, loss=DPO())
    assert losses(used) == losses(own)
    assert losses(used, loss=DPO()) == compared


@pytest.mark.parametrize("kind", ["entries", "lora"])
def test_a_resumed_training_has_the_same_reference_and_goes_on(kind, one_block, file) -> None:
    expert = KINDS[kind][0]
    _, trainer, first = fit(one_block, file, expert, steps=3)
    trainer.save_checkpoint("half.ckpt")
    module = runs.module(one_block, expert, loss=DPO(0.5))
    again = runs.trainer(Path.cwd(), more := runs.Losses(), max_steps=6, limit_val_batches=0)
    torch.manual_seed(1)
    again.fit(module, TaskMixture(file, str(one_block), batch_size=4), ckpt_path="half.ckpt", weights_only=False)
    choices = next(iter(again.datamodule.val_dataloader()))["choices"]
    with at_start(module.model, module._start):
        base = log_probabilities(Base.open(one_block).load(), choices)
        torch.testing.assert_close(log_probabilities(module.model, choices), base)
    assert len(first) == len(more.steps) == 3
    assert max(more.steps) < math.log(2)


def test_the_command_trains_on_pairs_validates_by_the_loss_and_records_it(one_block, file, capsys) -> None:
    words = ["fit", "--base", str(one_block), "--tasks", file, "--expert", "LoRAExpert", "--modules", "q_proj"]
    words += ["--steps", "4", "--learning_rate", "0.02", "--out", "library/pairs"]
    assert main([*words, "--loss", "DPO", "--loss.beta", "0.3"]) == 0
    err = capsys.readouterr().err
    assert "'prompt' is the input, 'chosen' is the target" in err
    record = open_expert("library/pairs").record
    assert record["hyperparameters"]["loss"] == {
        "class_path": "modular_experts.training.preferences.DPO",
        "init_args": {"beta": 0.3},
    }
    assert record["scores"]["val_loss"] < math.log(2)
    assert main([*words, "--overwrite", "--loss", "DPO", "--loss.beta", "0"]) != 0
    assert "beta=0.0 must be a positive number" in capsys.readouterr().err


def test_its_memory_is_measured_by_steps_and_not_predicted_from_shapes(one_block, file, monkeypatch) -> None:
    settings = (one_block, file, partial(LoRAExpert, rank=2), "q_proj", "library/pairs")
    how: dict[str, Any] = {"model": {"loss": DPO(0.5)}, "steps": 4, "batch_size": 4}
    with pytest.raises(ValueError, match="a fit with a loss of preferences cannot be predicted; a dry run without a"):
        estimate_fit(*settings, **how, fit_into="8GB")
    found = estimate_fit(*settings, **how)
    assert (found.predicted, found.length.total_steps) == (False, 4)
    monkeypatch.setattr(fits.Run, "is_large", lambda self: True)
    assert not estimate_fit(*settings, **how).predicted


def train_in(ranks: int, base: Path, packing: bool, shard_base: bool = False) -> None:
    """Train on five pairs, validate on three, and write what was trained and the losses."""
    torch.manual_seed(0)
    place: dict[str, Any] = {}
    if ranks > 1:
        place = {"devices": ranks, "strategy": "ddp"}
        warnings.simplefilter("ignore")  # Lightning's, of values that are equal in all processes
    how = {"dtype": "float64", "learning_rate": 1e-2, "shard_base": shard_base}
    module = runs.module(base, partial(LoRAExpert, rank=2), loss=DPO(), **how)
    trainer = runs.trainer(Path.cwd(), max_steps=4, **place)
    data: dict[str, Any] = {"batch_size": 4, "eval_batch_size": 2, "seed": 0, "packing": packing}
    trainer.fit(module, runs.mixture({"few": Path("few.jsonl")}, base, **data))
    found = {name: one.detach() for name, one in module.named_parameters() if one.requires_grad}
    torch.save(found | trainer.callback_metrics, f"{ranks}-{trainer.global_rank}.pt")
    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.parametrize("packing", [False, True])
def test_two_processes_train_what_one_trains_though_one_has_batches_of_fillers_alone(
    one_block, tmp_path, monkeypatch, packing: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} is", "chosen": "yes", "rejected": "no" * (1 + n % 2), "split": "train"} for n in range(5)]
    write_rows(tmp_path / "few.jsonl", [*rows, *({**row, "split": "validation"} for row in rows[:3])])
    train_in(1, one_block, packing)
    run_on_two_ranks(train_in, 2, one_block, packing, True)
    one, *two = (torch.load(f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert {"loss", "val_loss"} <= one.keys()
    for rank in two:
        torch.testing.assert_close(rank, one, rtol=1e-6, atol=1e-9)


def test_an_expert_with_a_loss_of_its_own_is_refused(one_block, file) -> None:
    for own in systems.there({"adamix": lambda: systems.of("ada_mix.AdaMixExpert")}).values():
        with pytest.raises(ValueError, match="AdaMixExpert has a loss of its own, so DPO cannot train it"):
            fit(one_block, file, own)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_with_one_answer_are_refused_before_the_base_is_read(one_block, file, monkeypatch, split) -> None:
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    alone = [{"input": one["prompt"], "target": one["chosen"], "split": one["split"]} for one in rows]
    pairs = [one | {"choices": [one["target"], "other"]} for one in alone]
    write_rows(
        Path("one.jsonl"), [one if one["split"] == split else pair for one, pair in zip(alone, pairs, strict=True)]
    )
    monkeypatch.setattr(Base, "load", lambda *given: pytest.fail("the base is read"))
    with pytest.raises(ValueError, match="a loss of preferences compares answers, and rows of one have one each; give"):
        fit(one_block, "one.jsonl", partial(LoRAExpert, rank=2))


def test_conversations_in_chosen_and_rejected_are_compared_in_their_last_turn(one_block, tmp_path) -> None:
    tokenizer = Base.open(one_block).tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<a>{% endif %}"

    def said(*turns: str) -> list[dict]:
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]

    forms = {
        "text": {"prompt": "q", "chosen": said("q", "yes")[1:], "rejected": said("q", "no no")[1:]},
        "list": {"prompt": said("q"), "chosen": said("q", "yes")[1:], "rejected": said("q", "no no")[1:]},
        "whole": {"chosen": said("q", "yes"), "rejected": said("q", "no no")},
        # As UltraFeedback has it: the conversations begin with the prompt.
        "both": {"prompt": "q", "chosen": said("q", "yes"), "rejected": said("q", "no no")},
    }
    for name, row in forms.items():
        write_rows(tmp_path / f"{name}.jsonl", [row | {"split": split} for split in ("train", "train", "validation")])
        data = TaskMixture(str(tmp_path / f"{name}.jsonl"), tokenizer, batch_size=2)
        data.learn_choices()
        data.setup("fit")
        choices = next(iter(data.train_dataloader()))["choices"]
        assert (choices["row"].tolist(), choices["correct"].tolist()) == ([0, 0, 1, 1], [True, False] * 2)
        for ids, mask, labels, answer in zip(
            *(choices[key] for key in ("input_ids", "attention_mask", "labels")), ["yes", "no no"] * 2, strict=True
        ):
            assert tokenizer.decode(ids[mask.bool()]) == f"<u>q<a>{answer}{tokenizer.eos_token}"
            assert tokenizer.decode(ids[labels != -100]) == f"{answer}{tokenizer.eos_token}"
    unlike = {"chosen": said("q", "yes"), "rejected": said("p", "no")}
    for row in (unlike, {"chosen": said("q", "yes"), "rejected": said("q", "yes")}):
        _, problems = Task(path=str(write_rows(tmp_path / "bad.jsonl", [row]))).read()
        assert "'chosen' and 'rejected' must differ in the assistant's last message alone" in problems[0]
    row = {"prompt": None, "chosen": said("", "yes")[1:], "rejected": said("", "no")[1:]}
    _, problems = Task(path=str(write_rows(tmp_path / "bad.jsonl", [row]))).read()
    assert "'prompt' must be text, not None" in problems[0]
    # A system message is no prompt.
    row = {"prompt": "q"} | {
        key: [{"role": "system", "content": "s"}, *said("q", text)[1:]]
        for key, text in (("chosen", "a"), ("rejected", "b"))
    }
    ((found,), _) = Task(path=str(write_rows(tmp_path / "system.jsonl", [row]))).read()
    assert found.messages[0] == said("q")[0]
    # Answers may differ in more than their texts.
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<a>{% endif %}"
    row = {"prompt": "q", "split": "train"} | {
        key: [*said("q"), {"role": "assistant", "content": "I look.", "tool_calls": [call]}]
        for key, call in (("chosen", "day"), ("rejected", "night"))
    }
    data = TaskMixture(str(write_rows(tmp_path / "calls.jsonl", [row, row | {"split": "validation"}])), tokenizer)
    data.learn_choices()
    data.setup("fit")
    choices = next(iter(data.train_dataloader()))["choices"]
    texts = [tokenizer.decode(ids[ids != tokenizer.pad_token_id]) for ids in choices["input_ids"]]
    assert texts == [f"<u>q<a>I look.['{call}']{tokenizer.eos_token}" for call in ("day", "night")]
    (asked,) = data.validation_examples(targets=False)["calls"]
    assert (tokenizer.decode(asked.tokens.ids), asked.choices) == ("<u>q<a>", ())
    # An answer may be a list in JSON, and is a conversation only if it holds messages.
    row = {"prompt": "q", "chosen": "[1, 2]", "rejected": "[]"}
    ((found,), _) = Task(path=str(write_rows(tmp_path / "lists.jsonl", [row]))).read()
    assert (found.target, found.choices, found.messages) == ("[1, 2]", ("[1, 2]", "[]"), ())
