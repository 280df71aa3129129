"""What the `model` of a request may be, and every mistake."""

import gc
import logging
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from testbed import served

from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.cli.option_names import as_options
from modular_experts.evaluation.streaming import generate
from modular_experts.injection.attach import attached
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.routing import Arrow, Centroid, KernelRidge, TopK
from modular_experts.serving.models import Models, UnknownModelError


@pytest.fixture
def library(tiny_llama_dir, tmp_path) -> Path:
    return served.make_library(tiny_llama_dir, tmp_path / "library")


def models_of(base: Path, library: Path, auto: str | None = None) -> Models:
    return Models(library, fingerprint(base), str(base), auto)


def test_a_sum_adds_experts_up_and_names_them(library, tiny_llama_dir) -> None:
    models = models_of(tiny_llama_dir, library)
    for name, shown, weights in (
        ("base", "base", {}),
        ("lora", "lora", {"lora": 1}),
        ("lora+0.5*dense", "lora+0.5*dense", {"lora": 1, "dense": 0.5}),
        ("-0.5 * dense + lora", "-0.5*dense+lora", {"dense": -0.5, "lora": 1}),
        ("lora+lora", "2*lora", {"lora": 2}),
        ("base+lora", "lora", {"lora": 1}),
        ("100000*lora+.00001*dense", "100000*lora+0.00001*dense", {"lora": 100000, "dense": 0.00001}),
    ):
        choice = models.find(name)
        assert choice.name == shown
        assert {expert.name: weight for expert, weight in choice.experts} == weights
        assert choice.confidence is None
        assert models.find(choice.name) == choice


def test_what_is_no_model_is_refused_with_what_is_near(library, tiny_llama_dir) -> None:
    models = models_of(tiny_llama_dir, library)
    for name, sentence in (
        ("tile", "there is no model 'tile'; did you mean tiles?"),
        ("qqqq", "there is no model 'qqqq'; there are base, answers"),
        ("../library/lora", "'../library/lora' names no model; give the name of one, or a sum such as 'a+0.5*b'"),
        ("lora/../dense", "names no model"),
        ("lora\0", "names no model"),
        (".hidden", "names no model"),
        ("", "names no model"),
        ("lora+", "names no model"),
        ("1e9*lora", "names no model"),
        ("9" * 400 + "*lora", "names no model"),
        ("a+" * 4000, "names no model"),
        ("auto", "'auto' names no model here: the library has no route"),
    ):
        with pytest.raises(UnknownModelError) as error:
            models.find(name)
        assert sentence in str(error.value), name
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["2*base", "lora+.5*base", "-1*base+lora"])
def test_the_base_takes_no_number(name: str, library, tiny_llama_dir) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name!r} gives the base a number; give it to experts")):
        models_of(tiny_llama_dir, library).find(name)


def test_experts_come_go_and_are_replaced_without_a_restart(library, tiny_llama_dir, caplog) -> None:
    models = models_of(tiny_llama_dir, library)

    def listed() -> list[str]:
        return [one.name for one in models.listed()]

    assert listed() == ["base", *sorted(served.FORMS | served.ON_ANSWERS)]
    served.write(tiny_llama_dir, library / "new", "tiles", 9)
    assert listed() == ["base", *sorted([*served.FORMS, *served.ON_ANSWERS, "new"])]
    before = models.find("new").members[0].content_hash
    opened = weakref.ref(models.find("new").members[0])
    served.write(tiny_llama_dir, library / "new", "tiles", 10, overwrite=True)
    assert models.find("new").members[0].content_hash == open_expert(library / "new").content_hash != before
    gc.collect()
    assert opened() is None, "a replaced expert keeps its file open"
    shutil.rmtree(library / "new")
    assert "new" not in listed()
    with pytest.raises(UnknownModelError, match="there is no model 'new'"):
        models.find("new")
    # Another base's expert, a damaged one, and names that mean something else.
    for name in ("foreign", "base", "auto"):
        of = {"id": "elsewhere", "revision": None, "fingerprint": "0" * 64}
        write_expert(library / name, dict(open_expert(library / "lora").items()), make_record("LoRAExpert", of))
    shutil.copytree(library / "lora", library / "damaged")
    (library / "damaged" / "expert.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert listed() == listed() == ["base", *sorted(served.FORMS | served.ON_ANSWERS)]
    assert len([line for line in caplog.messages if line.startswith("damaged is not served")]) == 1
    with pytest.raises(ValueError, match="foreign was trained on another base"):
        models.find("foreign")
    served.write(tiny_llama_dir, library / "new", "tiles", 9)
    assert "new" in listed()
    shutil.rmtree(library / "new")
    (library / "foreign").rename(library / "new")
    assert "new" not in listed()
    assert models.find("base").members == []


@pytest.fixture
def routed(tiny_llama_dir, task_files, tmp_path):
    """A library of the experts of two tasks, and a function that puts them behind a router."""
    library = tmp_path / "routed"
    return library, served.router_of(tiny_llama_dir, library, task_files, seed=0)


def test_a_route_chooses_by_the_prompt_as_its_router_does(routed, tiny_llama_dir) -> None:
    library, make = routed
    make(Centroid(reject=None))
    make(KernelRidge(reject=None, select=TopK(2)), "both")
    models, found = models_of(tiny_llama_dir, library, "route"), Base.open(str(tiny_llama_dir))
    reader, tokenizer = found.load("float32"), found.tokenizer()
    for prompt, expert in (("upper dot:", "upper"), ("reverse dot:", "reverse")):
        ids = tokenizer(prompt)["input_ids"]
        for name in ("route", "auto"):
            choice, _ = models.find(name).choose(reader, served.plainly(ids))
            assert choice.name == expert
            assert 0.5 < choice.confidence <= 1
            assert choice.notice is None
            assert "x-expert-notice" not in choice.headers
        both, _ = models.find("both").choose(reader, served.plainly(ids))
        with torch.no_grad(), attached(reader, library / "both") as there:
            reader(torch.tensor([ids]))
            gates = there.current.gates
        names = [["upper", "reverse"][number] for number in gates.ids[0]]
        weights = {one.name: weight for one, weight in both.experts}
        assert weights == pytest.approx(dict(zip(names, gates.weights[0].tolist(), strict=True)), abs=1e-5)
        assert both.confidence == pytest.approx(1, abs=1e-5)


def test_a_rejected_prompt_takes_the_fallback_or_the_base(routed, tiny_llama_dir, caplog) -> None:
    library, make = routed
    served.write(tiny_llama_dir, library / "spare", "tiles", 3)
    make(Centroid(reject=0.9))
    make(Centroid(reject=0.9), "spared", fallback=library / "spare")
    models, reader = models_of(tiny_llama_dir, library), Base.open(str(tiny_llama_dir)).load("float32")
    for name, expected in (("route", "base"), ("spared", "spare")):
        route = models.find(name)
        choice, _ = route.choose(reader, served.plainly([90, 7, 80, 9, 70], len(route.members)))
        assert (choice.name, choice.confidence) == (expected, None)
        notice = f"no expert takes this prompt; {'the base' if expected == 'base' else expected} answers"
        assert choice.notice == choice.headers["x-expert-notice"] == notice
    assert [one.name for one in models.find("spared").members] == ["upper", "reverse", "spare"]
    make(Centroid(reject=None), "all")
    sentences = {
        "all": [],
        "route": ["no expert takes this prompt; the base answers"],
        "spared": ["no expert takes this prompt; spare answers"],
    }
    for name, expected_sentences in sentences.items():
        caplog.clear()
        generate(tiny_llama_dir, "zq xj", library / name, max_new_tokens=2)
        assert [line for line in caplog.messages if "no expert" in line] == expected_sentences


def test_routes_that_cannot_be_served_say_so(routed, tiny_llama_dir) -> None:
    library, make = routed
    make(Centroid())
    models = models_of(tiny_llama_dir, library)
    assert models.auto == "route"
    with pytest.raises(ValueError, match="'upper\\+route' adds a route to something"):
        models.find("upper+route")
    make(Arrow(), "tokens")
    assert models.auto == "route"
    assert "tokens" not in [model.name for model in models.listed()]
    with pytest.raises(ValueError, match="tokens chooses for each token and layer"):
        models.find("tokens")
    make(Centroid(), "second")
    assert models.auto is None, "there are two"
    assert as_options(models.why_no_auto).endswith("the routes route, second; choose one, such as --auto route")
    assert models.find("route").members
    # The router knows the expert that was there.
    served.write(tiny_llama_dir, library / "upper", "lora", 9, overwrite=True)
    with pytest.raises(ValueError, match="is not the expert that route was made with"):
        models.find("route")
    with pytest.raises(UnknownModelError, match="there is no model 'rout'; did you mean route"):
        models_of(tiny_llama_dir, library, "rout")
