"""What may know what: the layers of the package, read from its imports, those inside of functions included."""

import ast
import functools
import graphlib
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from testbed.forked import ended, forked
from testbed.without_systems import work_without_each_system

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "modular_experts"

# Room -> layer. A room imports rooms of its own layer and below; `experts` and `methods` know nothing of each other.
# The front doors `__init__` and `__main__` import nothing before it is asked for.
LAYERS = {
    **dict.fromkeys(["deltas", "discovery", "language_model", "native", "masks", "places", "progress", "text"], 0),
    **dict.fromkeys(["experts", "methods", "routing"], 1),
    **dict.fromkeys(["base", "library", "injection"], 2),
    **dict.fromkeys(["training", "selection", "data", "evaluation", "merging", "reports"], 3),
    **dict.fromkeys(["interop", "serving", "study", "testing"], 3),
    "cli": 4,
    "systems": 5,
}
STRANGERS = {"experts", "methods"}
# Rooms below layer 3 -> what they use beside torch. `base` imports transformers inside of functions only.
BESIDE_TORCH = {
    "base": {"huggingface_hub", "numpy", "transformers"},
    "library": {"huggingface_hub", "yaml"},
    "native": {"numpy"},
}
# Outside package -> the rooms that may import it, beside the packages of every layer: the standard library and torch.
OUTSIDE = {
    "safetensors": {"base", "interop", "library"},
    "triton": {"native"},
    "gguf": {"interop"},
    "bitsandbytes": {"base"},
    "torchao": {"base"},
}
FRONT_DOORS = {"modular_experts", "modular_experts.__main__"}
VAGUE = {"base_utils", "common", "helpers", "misc", "tools", "util", "utils"}


@functools.cache
def sources() -> dict[str, str]:
    """Return each module's source by its dotted name; for a package, of its `__init__`."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    return {names[file]: file.read_text(encoding="utf-8") for file in files}


@functools.cache
def imports(source: str) -> set[str]:
    """Return the dotted names that a source imports anywhere; of `from a import b`, both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            found |= {"." * node.level + name} | {f"{'.' * node.level}{name}.{alias.name}" for alias in node.names}
    return found - {"__future__"}


def offences(modules: Mapping[str, str]) -> list[str]:
    """Return one sentence for each import that the layers forbid."""
    found = []
    for module, source in modules.items():
        for name in sorted(imports(source)):
            problem = _own(module, name) if name.partition(".")[0] == "modular_experts" else _outside(module, name)
            if problem:
                found.append(f"{module} imports {name}: {problem}")
    return found


def _own(module: str, name: str) -> str | None:
    """Say what is wrong with importing a module of ours."""
    room, other = _room(module), _room(name)
    if other in ("", "__version__"):
        return None  # the version costs nothing; anything else belongs to a room under another name
    if other == "cli":
        opens = (
            room == "cli" or module == "modular_experts.__main__" or re.fullmatch(r".*\.systems\.\w+\.commands", module)
        )
        return None if opens else "only __main__ opens the command line"
    if module in FRONT_DOORS:
        return "a front door imports no room by itself"
    if other not in LAYERS:
        return "it is no room; name the room, and give a new one its layer"
    if {room, other} == STRANGERS:
        return "experts and methods never know each other"
    return None if LAYERS[other] <= LAYERS[room] else f"layer {LAYERS[room]} knows nothing of layer {LAYERS[other]}"


def _outside(module: str, name: str) -> str | None:
    """Say what is wrong with importing another package."""
    room, package = _room(module), name.partition(".")[0]
    if name.startswith("."):
        return "imports are absolute"
    for guarded, rooms in OUTSIDE.items():
        if f"{name}.".startswith(f"{guarded}."):
            return None if room in rooms else f"only {' and '.join(sorted(rooms))} may"
    if package == "__future__" or package in sys.stdlib_module_names:
        return None
    if module in FRONT_DOORS or module == "modular_experts.cli":
        return "a front door is quick: the standard library only"
    allowed = {"torch", *BESIDE_TORCH.get(room, ())}
    return None if package in allowed or LAYERS[room] >= 3 else f"layer {LAYERS[room]} is torch only"


def _room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def import_graph(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """Return for each module the modules of ours that it imports; importing a package's child is not a use of the
    package.
    """
    graph = {}
    for module, source in modules.items():
        named = imports(source) & modules.keys()
        graph[module] = {
            name for name in named - FRONT_DOORS if not any(child.startswith(f"{name}.") for child in named)
        } - {module}
    return graph


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return a cycle as the modules on it, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def room_graph(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return which rooms import which other rooms."""
    rooms: dict[str, set[str]] = {}
    for module, others in graph.items():
        rooms.setdefault(_room(module), set()).update({_room(other) for other in others} - {_room(module)})
    return rooms


def test_every_room_has_its_layer_and_every_layer_its_rooms() -> None:
    rooms = {_room(module) for module in sources()} - {"", "__main__"}
    assert rooms == LAYERS.keys()


def test_imports_keep_the_layers() -> None:
    assert not offences(sources())


@pytest.mark.parametrize(
    ("module", "line", "sentence"),
    [
        ("experts.lora", "from modular_experts.injection import inject", "layer 1 knows nothing of layer 2"),
        ("experts.lora", "def f():\n    import modular_experts.data", "layer 1 knows nothing of layer 3"),
        ("experts.lora", "from modular_experts.methods.ties import TIES", "never know each other"),
        ("methods.ties", "from modular_experts.experts import Expert", "never know each other"),
        ("methods.ties", "from modular_experts import Expert", "it is no room"),
        ("methods.ties", "from . import method", "imports are absolute"),
        ("methods.ties", "import numpy", "layer 1 is torch only"),
        ("experts.lora", "from lightning.pytorch import Callback", "layer 1 is torch only"),
        ("injection.inject", "import transformers", "layer 2 is torch only"),
        ("merging.merged", "from safetensors.torch import save_file", "only base and interop and library may"),
        ("training.module", "import safetensors", "only base and interop and library may"),
        ("training.module", "from modular_experts.cli.command import guarded", "only __main__ opens"),
        ("cli", "import torch", "standard library only"),
        ("__main__", "import torch", "standard library only"),
        ("__main__", "from modular_experts.deltas import Dense", "imports no room"),
        ("masks", "from modular_experts.deltas import Delta", None),
        ("library.expert", "from safetensors import safe_open", None),
        ("library.record", "import modular_experts\nmodular_experts.__version__", None),
        ("training.save_results", "from lightning.pytorch import Callback", None),
        ("__main__", "from modular_experts.cli.command import guarded", None),
    ],
)
def test_a_forbidden_import_is_caught_and_an_allowed_one_goes_through(module, line, sentence) -> None:
    found = offences({f"modular_experts.{module}": line})
    assert any(sentence in problem for problem in found) if sentence else not found, found


def test_no_import_cycle_between_files_or_rooms_and_one_is_caught() -> None:
    graph = import_graph(sources())
    assert not cycle(graph)
    assert not cycle(room_graph(graph))
    circle = {"modular_experts.a": "import modular_experts.b", "modular_experts.b": "\nfrom modular_experts import a"}
    assert set(cycle(import_graph(circle))) == circle.keys()


def test_no_file_has_a_vague_name() -> None:
    files = [file for folder in ("modular_experts", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert not [file for file in files if VAGUE & {part.removesuffix(".py") for part in file.relative_to(ROOT).parts}]


def test_contributing_shows_every_room_in_its_layer() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", text, re.MULTILINE)
    shown = {room: int(layer) for layer, rooms in rows for room in re.findall(r"`([\w]+)/?`", rooms)}
    assert LAYERS.items() <= shown.items()


PAPERS = re.compile(
    r"\b(TTLoRA\w*|GLoRA\w*|AdaMix\w*|XGB\w*|BoostedLoRA\w*|RECAST\w*|TemplateBanks?|GOAT\w*|HiLo\w*|MoA|LoRAIR\w*"
    r"|MoLoRA\w*|WarmupRestarts|PointLoRA\w*|LoRAHub|GenKnowSub)\b"
)
"""Names of related systems, which only their folders know, and the front door, which lists public names."""


def test_no_file_of_the_core_names_a_paper() -> None:
    core = {module: text for module, text in sources().items() if _room(module) not in ("", "systems")}
    named = {module.partition(".")[2]: found[0] for module, text in core.items() if (found := PAPERS.search(text))}
    assert not named


SHARED = tuple(f"modular_experts.systems.{name}" for name in ("evolution", "molora", "schedules"))
"""Files beside the folders of the systems, which several of them build on."""


def test_no_system_knows_another() -> None:
    graph = import_graph(sources())
    for module in (module for module in graph if _room(module) == "systems"):
        others = {name for name in graph[module] if _room(name) == "systems"}
        folder = ".".join(module.split(".")[:3])
        shared = {name for name in others if name.startswith(SHARED)}
        strange = {name for name in others - shared if not f"{name}.".startswith(f"{folder}.")}
        assert not strange, f"{module} imports {sorted(strange)}"


def test_the_core_works_without_each_system(tmp_path) -> None:
    """First without all of them, where every module of the core is imported, then with all but one.

    A copy of this process imports a copy of the package.
    """
    shutil.copytree(PACKAGE, tmp_path / "modular_experts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kept").mkdir()
    for folder in (tmp_path / "modular_experts" / "systems").iterdir():
        if folder.is_dir():
            shutil.move(folder, tmp_path / "kept")
    assert ended(forked(work_without_each_system, tmp_path)) == 0


# Where an object is made or a file is imported, nothing of the process counts or changes. Modules of torch, which a fit
# makes after it has set its seed, may draw their first values.
STATE = ("os.environ", "os.getenv", "os.getcwd", "Path.cwd", "random.random", "torch.manual_seed", "seed_of_run")
MAY_READ = {"modular_experts/study/slurm_jobs.py"}  # a job takes the folder and the import path of who submits it
MAY_WRITE = {"modular_experts/training/module.py"}  # which drops the advertisements of Lightning's trainers


def readers_of_state(source: str) -> list[str]:
    """Return the constructors that read the environment, the current folder or a seed, with the words."""
    constructors = [
        (kind.name, method)
        for kind in ast.walk(ast.parse(source))
        if isinstance(kind, ast.ClassDef)
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__post_init__", "__new__")
    ]
    return [
        f"{kind}.{method.name} reads {ast.unparse(node)}"
        for kind, method in constructors
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).startswith(STATE)
    ]


def writers_at_import(source: str) -> list[str]:
    """Return the statements of a module that change something outside of it when it is imported."""
    tree = ast.parse(source)
    own = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    found = []
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            changed: list[ast.expr] = [statement.value.func]
        elif isinstance(statement, ast.Assign):
            changed = [target for target in statement.targets if isinstance(target, ast.Attribute | ast.Subscript)]
        elif isinstance(statement, ast.For | ast.With | ast.Try | ast.Delete):
            changed = [ast.Name("a block")]
        else:
            continue
        names = [ast.unparse(target) for target in changed]
        # The systems of papers are imported, so that their classes are known by short names.
        found += [name for name in names if name.partition(".")[0] not in own | {"import_systems"}]
    return found


def test_no_constructor_reads_the_process_and_no_import_changes_it() -> None:
    read, written = [], []
    for file in sorted(PACKAGE.rglob("*.py")):
        source, name = file.read_text(encoding="utf-8"), str(file.relative_to(ROOT))
        if file.parent.name != "cli" and name not in MAY_READ:
            read += [f"{name}: {sentence}" for sentence in readers_of_state(source)]
        if name not in MAY_WRITE:
            written += [f"{name}: {statement}" for statement in writers_at_import(source)]
    assert not read
    assert not written


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("class A:\n    def __init__(self):\n        self.seed = os.environ['SEED']", "A.__init__ reads os.environ"),
        ("class A:\n    def __post_init__(self):\n        self.folder = Path.cwd()", "A.__post_init__ reads Path.cwd"),
        ("class A:\n    def __init__(self, seed=None):\n        self.seed = seed_of_run(seed)", "reads seed_of_run"),
    ],
)
def test_a_constructor_that_reads_the_process_is_caught(source, sentence) -> None:
    assert sentence in readers_of_state(source)[0]


@pytest.mark.parametrize("source", ["log.setLevel(3)", "os.environ['A'] = '1'", "other.setting = 2", "register(hook)"])
def test_a_change_at_import_is_caught(source) -> None:
    assert writers_at_import(source)
