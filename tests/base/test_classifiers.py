"""Bases that classify: the experts of a task bring its head, which is chosen by the task and never merged."""

import json
import math
import shutil

import peft
import pytest
import torch
import transformers
from conftest import build_tokenizer
from lightning.pytorch import Trainer
from testbed.classifiers import AUTO, BASES, CLASSIFYING, ENCODER, build
from testbed.peft_adapters import PEFT_WARNINGS

from modular_experts import (
    ATLAS,
    ExpertModule,
    FullExpert,
    LoRAExpert,
    MaskedExpert,
    SparseExpert,
    TaskMixture,
    adapt,
    apply,
    combine,
    distill_into,
    eject,
    evaluate,
    export,
    fit,
    generate,
    merge,
    open_expert,
    route,
    search,
    shrink,
)
from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.data.batch import Collator
from modular_experts.evaluation import batch_losses
from modular_experts.evaluation.generation import generate_texts
from modular_experts.evaluation.gram import gram
from modular_experts.evaluation.streaming import Conversation
from modular_experts.injection import find_sites
from modular_experts.injection.attach import attached
from modular_experts.injection.task_heads import _NAMES, TaskHeads, class_name, class_number, head_state, task_heads
from modular_experts.interop.servers import export_for
from modular_experts.library.form import Form
from modular_experts.library.state import task_of_head
from modular_experts.merging.merged import Merged
from modular_experts.merging.objective import ValidationRows
from modular_experts.merging.remove import remove
from modular_experts.merging.statistics import take_statistics
from modular_experts.routing.centroid import Centroid
from modular_experts.routing.gates import reading
from modular_experts.routing.prompts import prompt_vectors

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
TWO = pytest.mark.parametrize("base", ["bert", "llama"], indirect=True)
WORDS = {"colour": ("red", "green", "blue"), "size": ("big", "small"), "sound": ("loud", "soft", "quiet")}


def rows_of(task, split, count, offset=0):
    words = WORDS[task]
    return [
        {
            "input": f"{words[n % len(words)]} {task} {(n + offset) % 10}",
            "target": f"the {words[n % len(words)]}",
            "split": split,
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    for task in WORDS:
        rows = rows_of(task, "train", 24) + rows_of(task, "validation", 8, 1) + rows_of(task, "test", 9, 2)
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / f"{task}.jsonl" for task in WORDS]


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp("classifier") / "base")


@pytest.fixture(scope="module")
def library(base, data):
    how = {"steps": 30, "keep_inputs": 8, "trainer": QUIET, "learning_rate": 0.02}
    for file in data:
        fit(base, TaskMixture(file, batch_size=8), LoRAExpert, "all-linear", base.parent / "library" / file.stem, **how)
    return base.parent / "library"


def examples_of(base, data):
    mixture = TaskMixture(data)
    mixture.read_for(Base.open(base))
    return [example for own in mixture.examples("test").values() for example in own]


def test_losses_and_answers_are_those_of_each_text_alone(base, data, library) -> None:
    opened = Base.open(base)
    expert = open_expert(library / "colour")
    with attached(model := opened.load("float64"), expert):
        examples = [example for example in examples_of(base, data) if example.task == "colour"]
        batch = Collator(0)(examples)
        sums, counts = batch_losses(model, batch)
        texts = generate_texts(model, opened.tokenizer(), batch)
        state = {name.rpartition(".")[2]: tensor for name, tensor in head_state([expert]).items()}
        names = json.loads(bytes(state["classes"].tolist()))
        assert names == ["the blue", "the green", "the red"]
        for example, loss, count, text in zip(examples, sums, counts, texts, strict=True):
            prompt = example.tokens.ids[None, : example.tokens.prompt].long()
            assert int(prompt[0, -1]) == 1  # a special token that the tokenizer adds
            vectors = vectors_of(model, prompt)
            logits = vectors @ state["weight"].double().T + state.get("bias", torch.zeros(3)).double()
            wanted = -logits.log_softmax(-1)[names.index(example.target)]
            assert int(count) == 1
            torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-9)
            assert text == names[int(logits.argmax())]
    assert not hasattr(model.get_submodule(model.head_place), "expert")


def vectors_of(model, prompt):
    """Return the vector `(width,)` that the head of a prompt alone classifies, as transformers computes it."""
    with torch.no_grad():
        if model.head_place == "task_heads":
            # The class of transformers stands behind ours.
            return type(model).__bases__[1].forward(model, prompt).last_hidden_state[0].mean(0)
        hidden = model.base_model(prompt).last_hidden_state[0]
        return torch.relu(model.pre_classifier(hidden[0])) if hasattr(model, "pre_classifier") else hidden[-1]


@TWO
def test_training_learns_each_kind_of_expert(base, data, tmp_path) -> None:
    for kind in (SparseExpert, FullExpert, MaskedExpert, LoRAExpert):
        mixture = TaskMixture(data[0], batch_size=8)
        fit(base, mixture, kind, "all-linear", tmp_path / kind.__name__, steps=60, trainer=QUIET, learning_rate=0.02)
        table = evaluate(None, {"own": str(tmp_path / kind.__name__)}, TaskMixture(data[0]))
        assert table.mean("loss", model="own") < 0.95 * math.log(3), kind
        assert open_expert(tmp_path / kind.__name__).record["kind"] == kind.__name__


@TWO
def test_one_expert_learns_several_tasks_and_answers_each_by_its_own_head(base, data, tmp_path) -> None:
    mixture = TaskMixture(data, batch_size=8)
    fit(base, mixture, LoRAExpert, "all-linear", tmp_path / "all", steps=90, trainer=QUIET, learning_rate=0.005)
    table = evaluate(None, {"all": str(tmp_path / "all")}, TaskMixture(data))
    assert table.mean("loss", model="all", task="colour") < 0.95 * math.log(3)
    assert table.mean("loss", model="all", task="size") < 0.95 * math.log(2)
    (tmp_path / "some.jsonl").write_text(json.dumps({"input": "red", "target": "the pink", "split": "test"}))
    with pytest.raises(ValueError, match="no expert has a task head for some, without which a classifier cannot"):
        evaluate(None, {"all": str(tmp_path / "all")}, TaskMixture(tmp_path / "some.jsonl"))
    (tmp_path / "colour.jsonl").write_text(json.dumps({"input": "red", "target": "the pink", "split": "test"}))
    with pytest.raises(
        ValueError, match="the target 'the pink' is not a class that the experts of colour know: the blue, the green"
    ):
        evaluate(None, {"all": str(tmp_path / "all")}, TaskMixture(tmp_path / "colour.jsonl"))


@TWO
def test_a_merge_keeps_the_heads_of_all_tasks_unmerged(base, data, library, tmp_path) -> None:
    experts = [open_expert(library / task) for task in WORDS]
    merged = merge(experts, "SparseAverage", tmp_path / "merged")
    before = head_state(experts)
    after = head_state([merged])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # An expert of one task takes the heads of the others for their tasks.
    table = evaluate(None, {"merged": str(merged.path), "colour": str(library / "colour")}, TaskMixture(data))
    alone = evaluate(None, {"colour": str(library / "colour")}, TaskMixture(data[0]))
    own = alone.mean("loss", model="colour")
    assert table.mean("loss", model="colour", task="colour") == pytest.approx(own, rel=1e-6)
    merge(experts, "TaskArithmetic", tmp_path / "sum")
    table = evaluate(None, {"written": str(tmp_path / "sum"), "added": experts}, TaskMixture(data))
    assert table.mean("loss", model="written") == pytest.approx(table.mean("loss", model="added"), rel=1e-4)
    left = remove(tmp_path / "sum", library / "colour", tmp_path / "rest")
    assert {task_of_head(name) for name in head_state([left])} == {"size", "sound"}


@TWO
def test_a_route_answers_as_the_expert_of_each_row(base, data, library) -> None:
    mixture = TaskMixture(data)
    made = route([library / task for task in WORDS], library / "routed", Centroid(reject=None), data=mixture)
    alone = {task: str(library / task) for task in WORDS}
    table = evaluate(None, {"routed": str(made.path), **alone}, mixture)
    for task in WORDS:
        own = table.mean("loss", model=task, task=task)
        assert table.mean("loss", model="routed", task=task) == pytest.approx(own, rel=1e-4)
    assert generate(None, "loud sound 3", [str(made.path)]) == "the loud"


def test_gram_matrices_are_of_the_prompts_alone(base, data) -> None:
    model = Base.open(base).load("float64")
    examples = examples_of(base, data)[:5]
    weights = [site.weight for site in find_sites(model) if not site.by_name_only]
    found = gram(model, [Collator(0)(examples[:3]), Collator(0)(examples[3:])], weights)
    inputs = {name: [] for name in weights}
    for name in weights:
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(
            # The layers before the last one read a vector of each row.
            lambda _, given, name=name: inputs[name].append(given[0].detach().flatten(0, -2))
        )
    for example in examples:
        model(input_ids=example.tokens.ids[None, : example.tokens.prompt].long())
    for name, parts in inputs.items():
        rows = torch.cat(parts)
        torch.testing.assert_close(found[name].values, rows.T @ rows / len(rows))


@TWO
def test_a_checkpoint_of_the_merge_loads_with_transformers(base, data, library, tmp_path, caplog) -> None:
    assert apply([library / "colour"], tmp_path / "full").largest_difference < 1e-5
    assert "the checkpoint has no task heads: they stay with the experts" in caplog.text
    assert Base.open(tmp_path / "full").structure.architecture == Base.open(base).structure.architecture


@TWO
def test_generate_names_the_class_and_its_probability(base, data, library, tmp_path, capsys) -> None:
    assert main(["generate", "--experts", str(library / "size"), "small size 4"]) == 0
    answer, share = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert answer == "the small"
    assert 0.4 < float(share.strip("()")) <= 1
    merged = merge([library / task for task in WORDS], "SparseAverage", tmp_path / "merged")
    with pytest.raises(ValueError, match="the experts classify colour, size, sound; name the prompt's task"):
        generate(None, "small size 4", [merged])
    assert generate(None, "small size 4", [merged], data=TaskMixture(data[1])) in ("the small", "the big")
    with pytest.raises(ValueError, match="the base has no task head, so it classifies nothing; name an expert"):
        generate(str(base), "small size 4")
    with pytest.raises(ValueError, match="classifies texts, so there is nothing to talk about"):
        Conversation(Base.open(base), {})


def test_a_row_that_is_too_long_loses_its_end_and_keeps_the_special_tokens(base, tmp_path) -> None:
    rows = [{"input": "a" * 300, "target": "x", "split": split} for split in ("train", "test")]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (example,) = examples_of(base, [tmp_path / "long.jsonl"])
    ids = example.tokens.ids[: example.tokens.prompt].tolist()
    assert (len(ids), ids[0], ids[-1]) == (99, 1, 1)


def test_rows_of_several_tasks_get_logits_of_their_own_classes_alone() -> None:
    torch.manual_seed(0)
    heads = TaskHeads(4, {"a": ["x", "y"], "b": ["y", "z", "w"]})
    again = TaskHeads.of_state(heads.state())
    assert again.classes == {"a": ["x", "y"], "b": ["y", "z", "w"]}
    x = torch.randn(3, 4)
    with reading(None, ["b", "a", "b"]):
        logits = again.after((x,), {}, None)
    columns = again.columns(torch.tensor([class_number(name) for name in "yyw"]), ["b", "a", "b"])
    for row, (head, place) in enumerate([(1, 0), (0, 1), (1, 2)]):
        own = heads.heads[head](x[row]).log_softmax(-1)[place]
        torch.testing.assert_close(logits[row].log_softmax(-1)[columns[row]], own)
    assert (logits > -1e3).sum(1).tolist() == [3, 2, 3]
    with pytest.raises(ValueError, match="there is no task head for c, only for a, b"), reading(None, ["c"]):
        again.after((x[:1],), {}, None)


def test_two_names_of_one_number_are_refused(monkeypatch) -> None:
    number = class_number("one")
    assert class_name(number) == "one"
    monkeypatch.setitem(_NAMES, number, "another")
    with pytest.raises(ValueError, match="the classes 'another' and 'one' have the same checksum"):
        class_number("one")


@TWO
def test_one_expert_learns_what_all_predict(base, data, library, tmp_path) -> None:
    experts = [library / task for task in WORDS]
    how = {"steps": 60, "trainer": QUIET, "learning_rate": 0.01, "batch_size": 8}
    made = distill_into(experts, tmp_path / "one", LoRAExpert, "all-linear", data, **how)
    assert head_state([made]).keys() == head_state([open_expert(place) for place in experts]).keys()
    merged = merge(experts, "SparseAverage", tmp_path / "merged")
    table = evaluate(None, {"one": str(made.path), "merged": str(merged.path)}, TaskMixture(data))
    assert table.mean("loss", model="one") < table.mean("loss", model="merged")


@TWO
def test_searches_choices_and_smaller_forms_keep_the_heads(base, data, library, tmp_path) -> None:
    experts = [open_expert(library / task) for task in WORDS]
    mixture = TaskMixture(data)
    found = search(experts, ATLAS(steps=4), ValidationRows(mixture, rows=4), tmp_path / "searched")
    assert head_state([found.expert]).keys() == head_state(experts).keys()
    (small,) = shrink([experts[0]], ValidationRows(TaskMixture(data[0])), tmp_path / "small", Form("bfloat16"), bound=9)
    assert all(torch.equal(head_state([small.expert])[name], of) for name, of in head_state([experts[0]]).items())
    with pytest.raises(ValueError, match="classifies by task heads, and no expert has one for a new task; train one"):
        adapt(experts[:2], data[2], tmp_path / "adapted")


@TWO
def test_combine_compares_ways_on_rows(base, data, library, tmp_path) -> None:
    done = combine([library / task for task in WORDS], tmp_path / "combined", TaskMixture(data))
    assert len(done.ways) > 1
    assert all(way.kept > 0 for way in done.ways)


@pytest.fixture(scope="module")
def classifying(tmp_path_factory):
    """A base whose class has a last layer, and its model with three classes in transformers alone."""
    place = build("llama", tmp_path_factory.mktemp("peft") / "base")
    return place, lambda: CLASSIFYING.from_pretrained(place, num_labels=3, ignore_mismatched_sizes=True).eval()


def logits_with(base, expert, text, tasks):
    opened = Base.open(base)
    ids = opened.tokenizer()(text, return_tensors="pt")["input_ids"]
    with attached(model := opened.load("float32"), expert), reading(tasks=tasks), torch.no_grad():
        return ids, model(input_ids=ids).logits


def test_an_exported_adapter_has_the_head_in_peft(classifying, data, tmp_path, caplog) -> None:
    base, plain = classifying
    how = {"steps": 10, "trainer": QUIET, "learning_rate": 0.02}
    fit(base, TaskMixture(data[0], batch_size=8), LoRAExpert, "all-linear", tmp_path / "colour", **how)
    export(tmp_path / "colour", tmp_path / "adapter")
    assert "gives the logits of these classes: the blue, the green, the red" in caplog.text
    ids, wanted = logits_with(base, open_expert(tmp_path / "colour"), "red colour 3", ["colour"])
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(plain(), tmp_path / "adapter")(input_ids=ids).logits
    heads = TaskHeads(32, {"colour": ["the blue", "the green", "the red"]})
    columns = heads.columns(torch.tensor([class_number(name) for name in heads.classes["colour"]]), ["colour"] * 3)
    torch.testing.assert_close(found[0], wanted[0][columns], rtol=1e-5, atol=1e-6)


def test_an_adapter_that_peft_trained_brings_its_head(classifying, tmp_path) -> None:
    base, plain = classifying
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trained = peft.get_peft_model(plain(), config).eval()
    torch.nn.init.normal_(trained.get_submodule("base_model.model.score.modules_to_save.default").weight)
    trained.save_pretrained(tmp_path / "sounds")
    expert = open_expert(tmp_path / "sounds", str(base))
    ids, found = logits_with(base, expert, "loud sound 3", ["sounds"])
    with torch.no_grad():
        wanted = trained(input_ids=ids).logits
    heads = TaskHeads(32, {"sounds": ["LABEL_0", "LABEL_1", "LABEL_2"]})
    columns = heads.columns(torch.tensor([class_number(f"LABEL_{n}") for n in range(3)]), ["sounds"] * 3)
    torch.testing.assert_close(found[0][columns], wanted[0], rtol=1e-5, atol=1e-6)
    assert generate(None, "loud sound 3", [expert]) == f"LABEL_{int(wanted.argmax())}"


def test_a_checkpoint_brings_the_classes_of_its_tasks(tmp_path, data, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = build("bert", tmp_path / "base")
    common = ["--base", str(base), "--expert", "LoRAExpert", "--modules", "all-linear"]
    tasks = ["--tasks", *map(str, data[:2])]
    assert main(["fit", *common, *tasks, "--steps", "4"]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert main(["test", "--base", str(base), "--tasks", str(data[1]), "--ckpt_path", str(checkpoint)]) == 0
    how = {"base": str(base), "expert": LoRAExpert, "modules": "all-linear", "weights_only": True}
    module = ExpertModule.load_from_checkpoint(checkpoint, **how)
    assert {task: len(names) for task, names in task_heads(module.model).classes.items()} == {"colour": 3, "size": 2}
    assert {name for name in module.state_dict() if "task_heads" in name} <= module._trained
    # A fit goes on with the same heads, and a dry run makes its own.
    assert main(["fit", *common, *tasks, "--steps", "6", "--ckpt_path", str(checkpoint), "--out", "library/more"]) == 0
    assert main(["fit", *common, *tasks, "--steps", "6", "--dry_run"]) == 0
    assert main(["fit", *common, *tasks, "--steps", "6", "--dry_run", "--fit_into", "1GB"]) == 1


def test_look_shows_the_class_of_a_row(tmp_path, data, capsys) -> None:
    base = build("bert", tmp_path / "base")
    assert main(["look", "--base", str(base), "--tasks", str(data[0])]) == 0
    assert "|[the red]" in capsys.readouterr().out


def test_borrowed_heads_count_in_what_is_known_of_a_comparison(tmp_path, data) -> None:
    base = build("bert", tmp_path / "base")
    for seed in (0, 1):
        how = {"seed": seed, "steps": 9, "trainer": QUIET}
        fit(base, TaskMixture(data[0]), LoRAExpert, "all-linear", tmp_path / f"e{seed}", **how)
    first, second = (str(tmp_path / f"e{seed}") for seed in (0, 1))
    out = tmp_path / "out"
    evaluate(str(base), {"base": [], "e": first}, TaskMixture(data[0]), out=out)
    found = evaluate(str(base), {"base": [], "e": second}, TaskMixture(data[0]), out=out, overwrite=True)
    wanted = evaluate(str(base), {"base": [], "e": second}, TaskMixture(data[0]))
    assert found.mean("loss", model="base") == wanted.mean("loss", model="base")
    half = evaluate(str(base), {"half": [open_expert(first) * 0.5]}, TaskMixture(data[0]))
    assert half.mean("loss", model="half") > 0
    (tmp_path / "texts.txt").write_text("a long text " * 40)
    with pytest.raises(ValueError, match="forgetting measures losses of texts, which a classifier does not predict"):
        evaluate(str(base), {"base": [], "e": first}, TaskMixture(data[0]), forgetting=tmp_path / "texts.txt")


def test_the_head_of_what_was_trained_on_top_answers(tmp_path, data, caplog) -> None:
    base = build("bert", tmp_path / "base")
    how = {"steps": 9, "trainer": QUIET, "learning_rate": 0.01}
    fit(base, TaskMixture(data[0]), LoRAExpert, "all-linear", tmp_path / "lower", **how)
    how["model"] = {"applied": [str(tmp_path / "lower")]}
    fit(base, TaskMixture(data[0]), LoRAExpert, "all-linear", tmp_path / "top", **how)
    lower, top = open_expert(tmp_path / "lower"), open_expert(tmp_path / "top")
    for order in ([lower, top], [top, lower]):
        state = head_state(order)
        assert all(torch.equal(state[name], of) for name, of in head_state([top]).items())
    merge([lower, top], "Average", tmp_path / "both")
    assert "lower and top have task heads for colour each, and the merge keeps one of them" in caplog.text


def test_ejected_heads_do_not_start_the_next_fit(tmp_path, data) -> None:
    base = build("bert", tmp_path / "base")
    model = Base.open(base).load("float32")
    fit(model, TaskMixture(data[0]), LoRAExpert, "all-linear", tmp_path / "first", steps=4, trainer=QUIET)
    eject(model)
    with pytest.raises(ValueError, match="the base has no task head"):
        task_heads(model)
    module = ExpertModule(str(base), "all-linear", LoRAExpert)
    Trainer(max_steps=2, accelerator="cpu", **QUIET).fit(module, TaskMixture(data[0]))
    assert {group["lr"] for group in module.make_optimizer().param_groups} == {LoRAExpert.learning_rate}
    with pytest.raises(ValueError, match="the module has heads for colour, and not for 'the big' of size; train a new"):
        Trainer(max_steps=2, accelerator="cpu", **QUIET).fit(module, TaskMixture(data[1]))


@TWO
def test_what_no_classifier_does_is_refused_with_a_sentence(tmp_path, data, library, base) -> None:
    with pytest.raises(ValueError, match="a classifier reads a text and no demonstrations before it; leave shots out"):
        evaluate(None, {"colour": str(library / "colour")}, TaskMixture(data[0], shots=2))
    talk = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "the red"}]
    (tmp_path / "colour.jsonl").write_text(json.dumps({"messages": talk, "split": "test"}))
    with pytest.raises(ValueError, match="a classifier answers a text with a class; write rows of input and target"):
        evaluate(None, {"colour": str(library / "colour")}, TaskMixture(tmp_path / "colour.jsonl"))
    with pytest.raises(ValueError, match="classifies by task heads, which no server takes; export it for PEFT"):
        export_for([library / "colour"], tmp_path / "served", "vllm")
    described = {"base": str(base), "tasks": {"held_in": [str(data[0])], "held_out": [str(data[1])]}}
    described |= {"experts": {"lora": {"expert": "LoRAExpert"}}, "fit": {"modules": "all-linear"}}
    (tmp_path / "study.yaml").write_text(json.dumps(described))
    assert main(["study", "--config", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "study")]) != 0


@TWO
def test_fisher_information_takes_each_row_by_its_own_head(base, data, library) -> None:
    for task in ("colour", "size"):
        shutil.rmtree(library / task / "statistics", ignore_errors=True)
    experts = [library / "colour", library / "size"]
    take_statistics(experts, "fisher", TaskMixture(data[:2]))
    merged = Merged(experts, "Fisher")
    assert all(torch.isfinite(merged[name].dense()).all() for name in merged)


@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_a_router_reads_the_states_that_the_model_has(kind, tmp_path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **ENCODER)
    CLASSIFYING.from_config(config).eval().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    model = Base.open(tmp_path).load("float32")
    ids = torch.randint(5, 90, (2, 9))
    (found,) = prompt_vectors(model, ids, torch.ones_like(ids), [1.0])
    with torch.no_grad():
        wanted = model.base_model(ids, output_hidden_states=True).hidden_states[-1][:, 1:].sum(1)
    torch.testing.assert_close(found, torch.nn.functional.normalize(wanted, dim=1), rtol=1e-4, atol=1e-5)


def test_an_encoder_that_cannot_leave_out_padding_is_refused(tmp_path) -> None:
    AUTO.from_config(transformers.AutoConfig.for_model("fnet", **ENCODER)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="FNetModel takes no attention_mask, which batches need; take another encoder"):
        Base.open(tmp_path).structure  # noqa: B018 - it makes the model
