"""Bases whose checkpoints hold a vision tower beside the language model: experts move the language model alone.

`test_architectures` compares numbers of each step; here the public functions read and write wrappers, with a tokenizer.
"""

import json
from functools import partial

import peft
import pytest
import torch
import transformers
from architectures import TOWERS, WRAPPERS
from conftest import SIZES, build_tokenizer
from testbed import served
from testbed.peft_adapters import PEFT_WARNINGS

from modular_experts import LoRAExpert, SparseExpert, TaskMixture, apply, evaluate, fit, generate, open_expert, route
from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.injection import find_sites, inject
from modular_experts.interop.peft import export
from modular_experts.interop.servers import export_for
from modular_experts.language_model import language_model, layers_of
from modular_experts.routing.centroid import Centroid

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]

# The language model of the first is loaded out of its files, and `AutoModelForCausalLM` does not know the last.
OFTEN = ("Qwen3.5", "Gemma 3 with vision", "SmolVLM")
LORA = partial(LoRAExpert, rank=2)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def write_wrapper(family, place, **changes):
    kind, text = WRAPPERS[family]
    config = transformers.AutoConfig.for_model(kind, text_config={**text, **SIZES, **changes}, **TOWERS)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).eval().save_pretrained(place)
    build_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module", params=OFTEN)
def wrapper(request, tmp_path_factory):
    return write_wrapper(request.param, tmp_path_factory.mktemp("wrapper") / "base")


@pytest.fixture(scope="module")
def library(wrapper, task_files):
    how = {"steps": 4, "keep_inputs": 8, "trainer": QUIET, "learning_rate": 0.02}
    for name in ("upper", "reverse"):
        data = TaskMixture(task_files[name], batch_size=4)
        fit(wrapper, data, LORA, "all-linear", wrapper.parent / "library" / name, **how)
    return wrapper.parent / "library"


def test_all_linear_and_patterns_take_the_language_model_alone(wrapper) -> None:
    inside = f"{language_model(Base.open(wrapper).load()) or 'model'}."
    for pattern in ("all-linear", "q_proj", ".*proj"):
        fresh = Base.open(wrapper).load()
        taken = inject(fresh, LORA, pattern)
        assert taken
        assert all(name.startswith(inside) for name in taken)


def test_a_layer_of_the_tower_gets_an_expert_only_by_a_name_that_fits_no_other(tmp_path, task_files, caplog) -> None:
    base = write_wrapper("Gemma 3 with vision", tmp_path / "base")
    tower = [site.name for site in find_sites(Base.open(base).load()) if site.outside_of_text]
    (named,) = [name for name in tower if name.endswith("layers.0.self_attn.q_proj")]
    data = TaskMixture(task_files["upper"], batch_size=4)
    fit(base, data, LORA, [named, "o_proj"], tmp_path / "a", steps=1, trainer=QUIET)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text for text in told if "learns nothing" in text] == [
        f"the loss does not depend on {named}.weight, so its expert learns nothing: leave it out"
    ]


def test_experts_are_measured_routed_applied_and_answer(wrapper, library, task_files, tmp_path) -> None:
    names = ["upper", "reverse"]
    data = TaskMixture([task_files[name] for name in names], batch_size=4)
    routed = route([library / name for name in names], library / "routed", Centroid(), data=data)
    models = {name: str(library / name) for name in names} | {"routed": str(routed.path)}
    table = evaluate(str(wrapper), models, data, max_new_tokens=4)
    assert {row["model"] for row in table.rows} == set(models)
    check = apply([library / "upper"], tmp_path / "full")
    assert check.largest_difference < 1e-4
    answer = generate(str(wrapper), "upper ban:", [library / "upper"], 6)
    assert generate(str(tmp_path / "full"), "upper ban:", [], 6) == answer


def test_peft_loads_an_export_into_either_class(wrapper, library, tmp_path) -> None:
    base = Base.open(wrapper)
    ids = torch.arange(40).view(2, 20) % 90 + 3
    for name, whole in (("as-text", False), ("as-wrapper", base.wrapper is not None)):
        export(library / "upper", tmp_path / name, "lora", wrapper=whole)
        with applied(model := base.load("float32"), library / "upper"), torch.no_grad():
            wanted = model(input_ids=ids).logits
        if whole:
            model = transformers.AutoModelForImageTextToText.from_pretrained(wrapper)
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / name).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted)
        # Adapters of both namings are read as the same expert.
        back = open_expert(tmp_path / name, wrapper)
        expert = open_expert(library / "upper")
        assert set(back) == set(expert)
        for weight in expert:
            torch.testing.assert_close(back[weight].dense(), expert[weight].dense())


def test_a_server_gets_the_names_of_the_class_that_it_loads(wrapper, library, tmp_path) -> None:
    export_for([library / "upper"], tmp_path, "vllm")
    targets = json.loads((tmp_path / "upper" / "adapter_config.json").read_text())["target_modules"]
    declared = transformers.AutoModelForImageTextToText.from_pretrained(wrapper)
    assert set(targets) <= {name for name, _ in declared.named_modules()}


def test_a_base_that_is_loaded_whole_has_no_other_names(tmp_path, tiny_llama_dir, task_files) -> None:
    data = TaskMixture(task_files["upper"], batch_size=4)
    expert = fit(tiny_llama_dir, data, LORA, "q_proj", tmp_path / "a", steps=1, trainer=QUIET)
    with pytest.raises(ValueError, match="wrapper is for a base whose files hold more than"):
        export(expert.path, tmp_path / "out", wrapper=True)


def test_a_layer_of_a_tower_is_never_taken_for_one_of_the_language_model(tmp_path) -> None:
    model = Base.open(write_wrapper("Gemma 3 with vision", tmp_path / "base")).structure.model
    proper = "model.language_model.layers.0.self_attn.q_proj"
    known = {
        proper: proper,
        "model.layers.0.self_attn.q_proj": proper,
        "language_model.model.layers.0.self_attn.q_proj": proper,
        "language_model.lm_head": "lm_head",
        "model.vision.layers.0.self_attn.q_proj": None,
    }
    assert layers_of(known, model) == known


@pytest.mark.parametrize("family", ["Gemma 3 with vision", "SmolVLM", "Mistral 3"])
def test_a_wrapper_is_served_as_generate_answers(family, tmp_path) -> None:
    base = write_wrapper(family, tmp_path / "base")
    library = tmp_path / "library"
    library.mkdir()
    engine, models, tokenizer = served.opened(base, library)
    sites = find_sites(engine.model)
    shapes = Base.open(base).structure.shapes
    weights = [site.weight for site in sites if not (site.by_name_only or site.outside_of_text)]
    served.write(base, library / "lora", "lora", shapes={name: shapes[name] for name in weights})
    asked = [(prompt, model) for prompt in ("upper ban:", "first") for model in ("base", "lora")]
    engine.check_base()
    texts = served.texts_of(engine, models, tokenizer, asked)
    assert texts == [served.generated(base, library, *one) for one in asked]


def test_a_sparse_merge_of_matrices_keeps_the_tower(tmp_path, task_files) -> None:
    base = write_wrapper("Qwen3.5-MoE", tmp_path / "base")
    data = TaskMixture(task_files["upper"], batch_size=4)
    expert = fit(base, data, SparseExpert, "all-linear", tmp_path / "a", steps=1, trainer=QUIET)
    assert any(name.endswith("]") for name in expert)
    assert apply([expert], tmp_path / "full").largest_difference < 1e-4
    after = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "full")
    before = transformers.AutoModelForImageTextToText.from_pretrained(base)
    tower = dict(before.model.visual.named_parameters())
    assert tower
    for name, weight in after.model.visual.named_parameters():
        assert torch.equal(weight, tower[name])
