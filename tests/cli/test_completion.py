"""What `completion` prints completes words in bash, and a JSON schema takes the configs and refuses mistakes."""

import json
import subprocess
from collections.abc import Callable

import pytest
from jsonschema import Draft202012Validator
from testbed.scripts import BENCHMARKS

from modular_experts.__main__ import main
from modular_experts.cli.commands import VERBS
from modular_experts.cli.completion import config_schema
from modular_experts.methods import METHODS
from modular_experts.study.parser import load_yaml

CONFIGS = {
    "fit": ["configs/fit", "configs/gpu"],
    "merge": ["configs/merge"],
    "search": ["configs/search"],
    "study": ["configs/study", "benchmarks/studies"],
}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., set[str]]:
    script = tmp_path_factory.mktemp("shell") / "completion.sh"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text="", **_: printed.append(text))
        assert main(["completion", "bash"]) == 0
    script.write_text("\n".join(printed))

    def complete(*words: str) -> set[str]:
        typed = " ".join(f"'{word}'" for word in ("modular-experts", *words))
        line = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _modular_experts"
        command = ["bash", "-c", f'{line}; echo "${{COMPREPLY[@]}}"']
        return {*subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()}

    return complete


def test_bash_completes_commands_options_and_classes(complete: Callable[..., set[str]]) -> None:
    assert complete("") == {*VERBS}
    assert complete("se") == {"search", "serve"}
    assert complete("fit", "--ba") == {"--base", "--batch_size"}
    assert {"--method", "--tune"} <= complete("merge", "--")
    assert complete("merge", "--method", "") >= {*METHODS}
    assert "SparseExpert" in complete("fit", "--base", "x", "--expert", "Sp")
    assert complete("export", "--for", "") == {"llama.cpp", "sglang", "vllm"}
    # A path is completed by bash itself.
    assert complete("fit", "--base", "libr") == set()


def test_zsh_reads_what_bash_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out


@pytest.mark.parametrize("verb", CONFIGS)
def test_the_schema_of_a_command_takes_its_configs(verb: str) -> None:
    schema = config_schema(verb)
    Draft202012Validator.check_schema(schema)
    files = [file for folder in CONFIGS[verb] for file in sorted((BENCHMARKS.parent / folder).glob("*.yaml"))]
    assert files
    for file in files:
        errors = Draft202012Validator(schema).iter_errors(load_yaml(file.read_text()))
        assert not [error.message for error in errors], file


MISTAKES = [
    ("bse: runs/base", "bse"),
    ("steps: ten", "ten"),
    ("expert: SparseExprt", "SparseExprt"),
    ("model: {learning_rte: 1}", "learning_rte"),
    ("expert: {class_path: SparseExpert, init_args: {keep_ratoi: 0.1}}", "keep_ratoi"),
    ("expert: {class_path: SparseExpert, granularity: entry}", "entry"),
    ("trainer: {callbacks: [{class_path: EarlyStopping, init_args: {pateince: 3}}]}", "pateince"),
]


@pytest.fixture(scope="module")
def fit_schema() -> Draft202012Validator:
    return Draft202012Validator(config_schema("fit"))


@pytest.mark.parametrize(("config", "wrong"), MISTAKES)
def test_the_schema_refuses_what_fit_refuses(fit_schema: Draft202012Validator, config: str, wrong: str) -> None:
    (error,) = fit_schema.iter_errors(load_yaml(config))
    assert wrong in error.message


def test_the_schema_takes_classes_of_ones_own(fit_schema: Draft202012Validator) -> None:
    own = {"expert": {"class_path": "mine.Expert", "init_args": {"any": 1}}, "model": {"class_path": "mine.Module"}}
    assert fit_schema.is_valid(own | {"x-common": {}, "trainer": {"max_steps": 1}})


def test_an_unknown_command_is_refused_with_a_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "jsonschema", "merg"]) == 2
    assert capsys.readouterr().err == "error: there is no command merg; did you mean merge?\n"


def test_the_command_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "jsonschema", "merge"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(config_schema("merge")))
