"""Fetch a checkpoint and load it through transformers.

Only safetensors are read, and no code from a checkpoint runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from modular_experts.base.files import read_json, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DType", "fetch", "fetch_from_hub", "load_model", "load_tokenizer", "quiet"]

DType = Literal["float32", "bfloat16", "float16", "float64"]

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def fetch(place: str | Path, revision: str | None = None, local_only: bool = False) -> Path:
    """Return the directory of a causal language model, after fetching a hub id that is not in the cache yet.

    Args:
        place: A directory with `config.json` and safetensors weights, or a hub id such as `HuggingFaceTB/SmolLM2-135M`.
        revision: Branch, tag or commit of a hub id.
        local_only: Look for a hub id in the local cache only.

    Raises:
        FileNotFoundError: There is no such directory, and the hub does not give it.
        ValueError: The directory does not hold a causal language model in safetensors.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    directory = Path(place).expanduser()
    if not directory.is_dir():
        advice = "give the directory of a model (config.json and *.safetensors), or a hub id while the hub is reachable"
        directory = fetch_from_hub("base", str(place), revision, _FILES, advice, local_only)
    config = read_json(directory / "config.json", "so it is not the directory of a model")
    kind, classes = config.get("model_type"), config.get("architectures") or []
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(kind))
    names = [causal] if isinstance(causal, str) else list(causal or [])
    if not names:
        raise ValueError(f"{directory} is a {kind!r} model; only causal language models that transformers knows work")
    if classes and not set(classes) & set(names):
        wanted = " or ".join(names)
        raise ValueError(f"{directory} is a {classes[0]}; only causal language models work, here {wanted}")
    weight_files(directory)
    return directory


def fetch_from_hub(
    what: str, place: str, revision: str | None, patterns: Sequence[str], advice: str, local_only: bool = False
) -> Path:
    """Return the local directory of a hub repository, after fetching what is not in the cache yet.

    Args:
        what: What the error's sentence calls it, such as `base`.
        place: The hub id.
        revision: Branch, tag or commit.
        patterns: Patterns of the files to fetch.
        advice: The end of the error's sentence, what to do.
        local_only: Look in the local cache only.

    Raises:
        FileNotFoundError: It is not a hub id, or the hub does not give it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                place, revision=revision, allow_patterns=list(patterns), local_files_only=local_only
            )
        )
    except HFValidationError:
        why = "and it is not a hub id, which looks like 'owner/name'"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        why = f"and the hub does not give it under that id (HTTP {status}; it may be private, gated or misspelt)"
    except OSError:
        offline = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the hub was not reached"
        why = f"and as a hub id it is not in the local cache ({offline})"
    raise FileNotFoundError(
        f"{what} {place!r} was not found: {Path(place).expanduser().absolute()} is not a directory, {why}; {advice}"
    )


def load_model(directory: Path, dtype: DType | None = None) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, every weight from the checkpoint.

    Raises:
        ValueError: The files lack weights, which transformers would fill with noise.
    """
    from transformers import AutoModelForCausalLM

    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype) if dtype else "auto",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported with the missing ones, in one sentence
        )
    model, report = loaded
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ValueError(
            f"the files in {directory} do not hold these weights of {type(model).__name__} in the right shape: "
            f"{', '.join(absent[:4])}{f' and {len(absent) - 4} more' if len(absent) > 4 else ''}"
        )
    return model


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and choose a padding token that differs from the end-of-sequence token where one exists.

    `Base.tokenizer` documents the choice.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{directory} has no tokenizer, such as tokenizer.json; copy the tokenizer's files into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except json.JSONDecodeError as error:
        raise ValueError(f"a tokenizer file in {directory} is damaged: it is not valid JSON ({error})") from error
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer in {directory} has no eos_token (end of sequence); add it in tokenizer_config.json"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        vocabulary = tokenizer.get_vocab()
        usual = (token for token in (*_PAD_TOKENS, tokenizer.unk_token) if token in vocabulary)
        tokenizer.pad_token = next((token for token in usual if token != tokenizer.eos_token), tokenizer.eos_token)
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and reports; what matters in them is raised as an error."""
    import transformers

    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
