"""Sign experts in the OpenSSF's format for models, and check such signatures, by the package `model-signing`."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modular_experts.library.expert import StoredExpert
from modular_experts.library.record import RECORD_FILE, files_of

SIGNATURE_FILE = "model.sig"
"""The signature beside an expert's record; it covers the record, deltas and state, and no statistics or inputs."""


def signature_of(files: Mapping[str, Path | bytes], key: str | Path) -> bytes:
    """Return the signature of some files of one folder, by their names, with a private key.

    Args:
        key: A file in PEM form with a private key on an elliptic curve, without a password.

    Raises:
        ImportError: `model-signing` is not installed.
        ValueError: The key cannot be read.
    """
    signing = _module("signing")
    if not Path(key).is_file():
        raise ValueError(f"there is no key {str(key)!r}; make one with openssl ecparam -name prime256v1 -genkey -noout")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "expert")
        folder.mkdir()
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                _link(content, folder / name)
        signature = Path(temporary, SIGNATURE_FILE)
        try:
            signing.Config().use_elliptic_key_signer(private_key=key).sign(folder, signature)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{key} is not a private key on an elliptic curve in PEM form, without a password ({error}); make one "
                "with openssl ecparam -name prime256v1 -genkey -noout"
            ) from None
        return signature.read_bytes()


def verify_signature(expert: StoredExpert, key: str | Path) -> None:
    """Raise ValueError unless an expert's record, deltas and state are as the owner of a public key signed them."""
    verifying = _module("verifying")
    signature = expert.path / SIGNATURE_FILE
    if not signature.is_file():
        raise ValueError(f"{expert.place} has no signature ({SIGNATURE_FILE}), which its owner makes in a push")
    if not Path(key).is_file():
        raise ValueError(f"there is no key {str(key)!r}; give the public key of the expert's owner, in PEM form")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:  # the package raises what its parsers do
        advice = "make it of the private one with openssl ec -pubout"
        raise ValueError(f"{key} is not a public key on an elliptic curve in PEM form ({error}); {advice}") from None
    with tempfile.TemporaryDirectory() as temporary:
        # Statistics and inputs, which the signature does not cover, stay outside.
        for name in (RECORD_FILE, *files_of(expert.record)):
            _link(expert.path / name, Path(temporary, name))
        try:
            verifier.verify(temporary, signature)
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{expert.place} is not signed by the owner of {key}: {reason}") from None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _module(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{name}")
    except ImportError as error:
        raise ImportError(f"signatures need model-signing: pip install 'modular-experts[sign]' ({error})") from None
