"""Fetch a checkpoint from the hub, and keep transformers quiet. Only safetensors are read; no code from them runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from modular_experts.base.files import weight_files
from modular_experts.library.record import read_json

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]


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

    Raises:
        FileNotFoundError: It is not a hub id, or the hub does not give it. The sentence calls it `what`, such as
            `base`, and ends with the advice.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        found = huggingface_hub.snapshot_download(
            place, revision=revision, allow_patterns=list(patterns), local_files_only=local_only
        )
        return Path(found)
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
