"""Bases with an encoder and a decoder: the encoder reads the prompt, and the decoder predicts the target."""

import pytest
import torch
import transformers
from architectures import FAMILIES
from conftest import SIZES, build_tokenizer
from testbed import served
from testbed.peft_adapters import PEFT_WARNINGS
from tokenizers.processors import TemplateProcessing

from modular_experts import LoRAExpert, TaskMixture, apply, evaluate, export, fit, generate, merge, open_expert, route
from modular_experts.base import Base
from modular_experts.data.batch import IGNORED, Collator, encoder_inputs
from modular_experts.evaluation import answer_logits, batch_losses
from modular_experts.evaluation.generation import generate_texts
from modular_experts.evaluation.gram import gram
from modular_experts.injection import find_sites
from modular_experts.routing.centroid import Centroid

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
KINDS = ("t5", "bart")


def build(kind, place):
    _, sizes = FAMILIES[kind.upper()]
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **SIZES})
    torch.manual_seed(0)
    transformers.AutoModelForSeq2SeqLM.from_config(config).eval().save_pretrained(place)
    tokenizer = build_tokenizer()
    # An encoder reads end-of-sequence behind a text, as T5's does.
    end = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.backend_tokenizer.post_processor = end
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp("encoder-decoder") / "base")


@pytest.fixture(scope="module")
def data(task_files):
    return [task_files[name] for name in ("upper", "reverse")]


@pytest.fixture(scope="module")
def library(base, data):
    how = {"steps": 12, "keep_inputs": 8, "trainer": QUIET, "learning_rate": 0.02}
    for file in data:
        fit(base, TaskMixture(file, batch_size=4), LoRAExpert, "all-linear", base.parent / "library" / file.stem, **how)
    return base.parent / "library"


def examples_of(base, data, count=5):
    mixture = TaskMixture(data)
    mixture.read_for(Base.open(base))
    return mixture.examples("test")["upper"][:count]


def test_the_loss_is_the_models_own_for_each_row_alone(base, data) -> None:
    model = Base.open(base).load("float64")
    examples = examples_of(base, data)
    sums, counts = batch_losses(model, Collator(0)(examples))
    for example, found, count in zip(examples, sums, counts, strict=True):
        ids = example.tokens.ids.long()
        prompt, target = ids[: example.tokens.prompt], ids[example.tokens.prompt :]
        assert int(prompt[-1]) == 1  # the special token that the tokenizer adds
        own = model(input_ids=prompt[None], labels=target[None], use_cache=False).loss
        assert int(count) == len(target)
        torch.testing.assert_close(found / count, own, rtol=1e-6, atol=0)


def test_the_decoder_reads_what_follows_the_prompt_even_where_it_learns_only_some_of_it() -> None:
    ids = torch.tensor([[5, 6, 1, 7, 8, 9], [5, 1, 7, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 7, -100, 9], [-100, -100, 7, 1, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    divided = encoder_inputs({"input_ids": ids, "labels": labels, "attention_mask": mask}, start=3)
    assert divided.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert divided.ids[0].tolist() == [5, 6, 1]
    assert divided.decoder_ids.tolist()[0] == [3, 7, 8]
    assert divided.decoder_ids.tolist()[1][:2] == [3, 7]
    assert divided.labelled.tolist() == [[True, False, True], [True, True, False]]
    following = torch.tensor([[7, 8, 9], [7, 1, 0]])
    assert following[divided.labelled].tolist() == labels[labels != IGNORED].tolist()


def test_logits_of_labelled_tokens_are_in_the_order_of_their_labels(base, data) -> None:
    model = Base.open(base).load("float64")
    batch = Collator(0)(examples_of(base, data))
    logits, labels = answer_logits(model, batch)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses.sum(), batch_losses(model, batch)[0].sum())


def test_answers_are_those_of_transformers_for_each_prompt_alone(base, data, library) -> None:
    model = Base.open(base).load("float64")
    tokenizer = Base.open(base).tokenizer()
    examples = examples_of(base, data)
    answers = generate_texts(model, tokenizer, Collator(0)(examples), 6)
    for example, answer in zip(examples, answers, strict=True):
        ids = tokenizer(example.input, return_tensors="pt")["input_ids"]
        own = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=1, forced_bos_token_id=None)
        assert tokenizer.decode(own[0, 1:], skip_special_tokens=True).strip() == answer
    prompt = examples[0].input
    assert generate(str(base), prompt, (), 6, dtype="float64") == answers[0]


def test_training_learns_and_the_stored_expert_has_the_trained_losses(base, data, library) -> None:
    table = evaluate(str(base), {"upper": str(library / "upper")}, TaskMixture(data[0]), max_new_tokens=4)
    own = evaluate(str(base), {"base": []}, TaskMixture(data[0]), max_new_tokens=4)
    assert table.mean("loss", model="upper") < own.mean("loss", model="base") - 0.2


def test_gram_matrices_count_the_tokens_that_each_layer_reads(base, data) -> None:
    model = Base.open(base).load("float64")
    examples = examples_of(base, data)
    weights = [site.weight for site in find_sites(model) if not site.by_name_only]
    found = gram(model, [Collator(0)(examples[:3]), Collator(0)(examples[3:])], weights)
    inputs = {name: [] for name in weights}
    for name in weights:
        layer = model.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0][0].detach()))
    for example in examples:
        ids = example.tokens.ids.long()
        model(input_ids=ids[None, : example.tokens.prompt], labels=ids[None, example.tokens.prompt :], use_cache=False)
    for name, parts in inputs.items():
        rows = torch.cat(parts)
        torch.testing.assert_close(found[name].values, rows.T @ rows / len(rows))


def test_merges_and_checkpoints_answer_alike(base, data, library, tmp_path) -> None:
    merged = merge([library / "upper", library / "reverse"], "Average", tmp_path / "merged")
    assert apply([merged], tmp_path / "full").largest_difference < 1e-4
    assert generate(str(tmp_path / "full"), "upper ban:", (), 6) == generate(str(base), "upper ban:", [merged], 6)


def test_a_router_reads_the_encoder_and_its_choice_holds_in_the_decoder(base, data, library) -> None:
    names = ["upper", "reverse"]
    mixture = TaskMixture(data)
    made = route([library / name for name in names], library / "routed", Centroid(reject=None), data=mixture)
    found = evaluate(str(base), {"routed": str(made.path), "upper": str(library / "upper")}, mixture, max_new_tokens=6)
    chosen = evaluate(str(base), {"upper": str(library / "upper")}, TaskMixture(data[0]), max_new_tokens=6)
    wanted = chosen.mean("loss", model="upper")
    assert found.mean("loss", model="routed", task="upper") == pytest.approx(wanted, rel=1e-4)
    assert found.mean("loss", model="upper", task="reverse") != pytest.approx(
        found.mean("loss", model="routed", task="reverse"), rel=1e-3
    )
    answer = generate(str(base), "upper ban:", [made], 6)
    assert answer == generate(str(base), "upper ban:", [library / "upper"], 6)


def test_peft_loads_an_export_with_its_own_task_type(base, library, tmp_path) -> None:
    export(library / "upper", tmp_path / "adapter")
    assert '"task_type": "SEQ_2_SEQ_LM"' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    back = open_expert(tmp_path / "adapter", base)
    assert set(back) == set(open_expert(library / "upper"))


def test_a_server_refuses_an_encoder_decoder(base, library) -> None:
    with pytest.raises(ValueError, match="is not a causal language model, and requests are batched for these alone"):
        served.opened(base, library)


def test_shared_embeddings_are_not_untied(base, tmp_path) -> None:
    with pytest.raises(ValueError, match="has an encoder, which shares the embeddings"):
        Base.open(base).untie(tmp_path / "untied")
