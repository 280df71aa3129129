"""Tiny random models of every named architecture, with a character tokenizer, and task files that no one has seen."""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.metadata
import json
import logging
import os
import shutil
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Python would look for garbage among a million objects of imported modules while the tests are collected, and again and
# again while they run (`pytest_collection_finish`).
if "pytest" in sys.modules:
    gc.disable()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where Triton is installed, torch.compile would start processes that compile for a GPU.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
from testbed.clusters import cluster, slurm_started  # noqa: F401

# The process that hands out tests imports this file, too, and needs neither torch nor what takes as long.
if TYPE_CHECKING:
    from testbed.hub_server import Hub
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
SIZES = {"vocab_size": len(CHARACTERS) + 3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | SIZES
GROUPED = WIDE | {"num_key_value_heads": 2, "max_position_embeddings": 256}

CONFIGS = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "phi3": ("Phi3Config", GROUPED),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **SIZES}),
    "gemma2": (
        "Gemma2Config",
        GROUPED | {"head_dim": 8, "final_logit_softcapping": 0.3, "attn_implementation": "eager"},
    ),
    "neox": ("GPTNeoXConfig", WIDE | {"max_position_embeddings": 256}),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4}),
}
TARGETS = {
    "llama": r".*\.(q_proj|down_proj)",
    "qwen2": r".*\.(k_proj|up_proj)",
    "qwen3": r".*\.(o_proj|gate_proj)",
    "phi3": r".*\.(qkv_proj|gate_up_proj)",
    "gpt2": r".*\.(c_attn|c_proj)",
    "neox": r".*\.(query_key_value|dense_4h_to_h)",
}
ARCHITECTURES = sorted(TARGETS)


LONG = """
docs/test_site docs/test_configs docs/test_paper_configs docs/test_notebooks study/test_study study/test_study_killed
bench/test_studies bench/test_scripts merging/test_combine training/test_module training/test_ddp
training/test_sharded methods/test_merge_battery systems/test_own_system training/test_callback_battery
tests/test_architecture laws/test_pieces laws/test_call_twice laws/test_same_training soak/test_soak
"""
"""Files that take more than ten seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with long files, so that at the end no process of `make test` works on one alone."""
    long = {f"{name}.py" for name in LONG.split()}
    items.sort(key=lambda item: "/".join(item.path.parts[-2:]) not in long)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)


def pytest_collectstart() -> None:
    """Set up a process that runs tests, before it imports the first of them."""
    _set_up()


@functools.cache
def _set_up() -> None:
    import hypothesis
    import torch

    torch.set_num_threads(1)
    # Lightning reads the metadata of all installed packages for each trainer.
    importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
    # For each kind of GPU that is not there, torch writes the stack of whoever sets a seed: a millisecond each time.
    for kind in (torch.cuda, torch.xpu, torch.mtia):
        if not kind.is_available():
            kind.manual_seed_all = lambda seed: None
    # How long an example takes says nothing on a busy machine. Each run draws other examples, most of them in CI.
    examples = 100 if os.environ.get("CI") else 10
    hypothesis.settings.register_profile("untimed", deadline=None, max_examples=examples)
    hypothesis.settings.load_profile("untimed")


def build_model(architecture: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a random model in evaluation mode."""
    import torch
    import transformers

    name, sizes = CONFIGS[architecture]
    config = getattr(transformers, name)(**sizes)
    config.update(changes)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters: `<pad>` is 0, `<eos>` is 1, `<unk>` is 2."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=256
    )


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep fingerprints of test models out of the user's cache, and compile for all processes of the tests once."""
    place = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(place.parent if "PYTEST_XDIST_WORKER" in os.environ else place))
        yield


@pytest.fixture(autouse=True)
def _trusts_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a test trusts: a later study would tell its pieces of a module that is gone."""
    from modular_experts.library import described

    monkeypatch.setattr(described, "_TRUSTED", dict(described._TRUSTED))


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """Undo what a benchmark, which is a program of its own, does to the log of its process."""
    loggers = [logging.getLogger(name) for name in ("modular_experts", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        if logger.level != level:  # `setLevel` goes through hundreds of loggers
            logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the directory of a tiny saved model of an architecture, with changes of its settings, made once."""
    root = tmp_path_factory.mktemp("bases")

    def directory(architecture: str, **changes: object) -> Path:
        path = root / "-".join([architecture, *(f"{name}-{value}" for name, value in changes.items())])
        if not path.exists():
            build_model(architecture, **changes).save_pretrained(path)
            build_tokenizer().save_pretrained(path)
        return path

    return directory


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


@pytest.fixture(scope="session")
def one_block(tiny: Callable[..., Path]) -> Path:
    """A Llama of one block, for tests that need no second block, which takes as long again."""
    return tiny("llama", num_hidden_layers=1)


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def hub_server() -> Iterator[tuple[Hub, str]]:
    """One hub on this machine, and its address, for all tests, because a client takes a while to connect."""
    from testbed.hub_server import serving

    with serving() as started:
        yield started


@pytest.fixture
def hub(hub_server: tuple[Hub, str], monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub, which the client of this process asks."""
    from testbed.hub_server import point_client

    found, address = hub_server
    found.reset()
    point_client(monkeypatch, address)
    return found


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three tasks over short words, 24 rows each: 12 to train on, 6 for validation, 6 for the test."""
    folder = tmp_path_factory.mktemp("tasks")
    words = [first + middle + last for first in "bdf" for middle in "aeio" for last in "nt"]
    answers = {"upper": str.upper, "reverse": lambda word: word[::-1], "first": lambda word: word[0]}
    splits = ["train", "train", "validation", "test"]
    return {
        name: write_rows(
            folder / f"{name}.jsonl",
            [
                {"input": f"{name} {word}:", "target": answer(word), "split": splits[number % 4]}
                for number, word in enumerate(words)
            ],
        )
        for name, answer in answers.items()
    }


@pytest.fixture
def fit_tiny(tiny_llama_dir: Path, task_files: dict[str, Path], tmp_path: Path) -> Callable:
    """`testbed.runs.fit` on the tiny Llama, the three tasks and a folder of the test."""
    from testbed import runs

    return functools.partial(runs.fit, tiny_llama_dir, task_files, tmp_path)


@pytest.fixture
def fitted(fit_tiny: Callable) -> Callable:
    """`fit_tiny` without validation."""
    return functools.partial(fit_tiny, limit_val_batches=0)


@pytest.fixture
def two_task_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task_files: dict[str, Path]) -> Path:
    """The directory in which a user types commands: the current one, with the tasks `a.jsonl` and `b.jsonl`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    shutil.copy(task_files["upper"], "a.jsonl")
    shutil.copy(task_files["reverse"], "b.jsonl")
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command; return its exit code, and what it wrote to stdout and to stderr."""

    from modular_experts.__main__ import main

    # A busy machine takes longer than the few seconds after which long work shows lines.
    monkeypatch.setattr("modular_experts.reports.progress.QUIET_SECONDS", 600.0)

    def command(*argv: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def done(run: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run a command that succeeds without a word on stderr; return what it printed."""

    def command(*argv: object) -> str:
        code, out, err = run(*argv)
        assert (code, err) == (0, ""), argv
        return out

    return command


@pytest.fixture
def refused(run: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run a command that fails with exit code 1; return what it wrote to stderr."""

    def command(*argv: object) -> str:
        code, _, err = run(*argv)
        assert code == 1, argv
        return err

    return command
