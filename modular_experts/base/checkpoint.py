"""Checkpoints: Hugging Face directories of causal language models, found, loaded and told apart.

Only safetensors are read and no code from a checkpoint is run. A base is told from another by its fingerprint, a hash
over the names, shapes and stored bytes of its tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modular_experts.base.files import open_tensors, read_json, weight_files
from modular_experts.base.fingerprint import fingerprint
from modular_experts.library import StoredExpert

__all__ = ["find_base", "fingerprint", "load_base", "load_tokenizer", "quiet", "read_weight", "resolve_base"]

DType = Literal["float32", "bfloat16", "float16", "float64"]
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def resolve_base(base: str | Path, revision: str | None = None) -> Path:
    """Return the directory of a base model, after fetching it if it is a hub id that is not in the cache yet.

    Args:
        base: A directory with `config.json` and safetensors weights, or a hub id such as `HuggingFaceTB/SmolLM2-135M`.
        revision: Branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: It is neither; the sentence says what was looked for and the two ways out.
        ValueError: The directory holds no causal language model in safetensors.
    """
    directory = Path(base).expanduser()
    if not directory.is_dir():
        directory = _from_hub(str(base), revision)
    _check_config(directory)
    return directory


def _from_hub(base: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=_FILES))
    except HFValidationError:
        why = "and it is no hub id, which looks like 'owner/name'"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        why = f"and the hub does not give it as a model id (HTTP {status}; it may be private, gated or misspelt)"
    except OSError:
        offline = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the hub was not reached"
        why = f"and as a hub id it is not in the local cache ({offline})"
    raise FileNotFoundError(
        f"base {base!r} was not found: {Path(base).expanduser().absolute()} is no directory, {why}; "
        "give the directory of a model (config.json and *.safetensors), or a hub id while the hub can be reached"
    )


def _check_config(directory: Path) -> None:
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


def load_base(base: str | Path, dtype: DType | None = None, revision: str | None = None) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, every weight from the checkpoint.

    Args:
        base: A model directory or a hub id.
        dtype: Data type of the weights in memory; as stored if none is given.
        revision: Branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: The base was not found.
        ValueError: It is no causal language model, or its files lack weights, which transformers would fill with noise.
    """
    directory = resolve_base(base, revision)
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


def load_tokenizer(base: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer, with a padding token that is not the end-of-sequence token wherever there is one.

    A tokenizer that pads with its end-of-sequence token, or not at all, gets another token of its vocabulary to pad
    with: a usual name for it, or the unknown token. Only where there is none does padding stay the end-of-sequence
    token; then padding must be told from it by length, never by its number. No token is added. The padding and
    truncation sides stay as they are.

    Raises:
        FileNotFoundError: The base was not found, or has no tokenizer.
        ValueError: The tokenizer has no end-of-sequence token.
    """
    directory = resolve_base(base, revision)
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


def read_weight(directory: str | Path, name: str) -> Tensor:
    """Return one weight of a base as it is stored, without loading the others.

    Args:
        directory: The base's directory.
        name: The parameter's name in the loaded model. A file may call it by another prefix (`h.0...` for
            `transformer.h.0...`); a name that only transformers can translate makes the whole model be loaded.

    Raises:
        ValueError: The model has no such weight.
    """
    names = [name, name.partition(".")[2], *(f"{prefix}.{name}" for prefix in ("model", "transformer", "gpt_neox"))]
    for file in weight_files(Path(directory)):
        with open_tensors(file) as tensors:
            stored = next((known for known in names if known in tensors.keys()), None)  # noqa: SIM118 - not a dict
            if stored:
                return tensors.get_tensor(stored)
    parameters = dict(load_base(directory).named_parameters(remove_duplicate=False))
    if name not in parameters:
        raise ValueError(f"the base in {directory} has no weight {name}")
    return parameters[name].detach()


def find_base(expert: StoredExpert) -> str:
    """Return where an expert's base is: as its record says, or else at the same path or name beside the library."""
    recorded = str(expert.record["base"].get("id"))
    beside = expert.path.parent.parent
    for place in (Path(recorded).expanduser(), beside / recorded, beside / Path(recorded).name):
        if place.is_dir():
            return str(place)
    return recorded


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing a bar and a report: what matters in it is raised."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
