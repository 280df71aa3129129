"""A trained mixture that comes back from a library, and what is refused."""

import pytest
import torch
from conftest import build_model

from modular_experts.base.files import fingerprint
from modular_experts.injection.attach import attached
from modular_experts.library import make_record, open_expert, write_expert


def test_a_state_of_a_class_that_is_not_built_in_is_refused(tiny_llama_dir, tmp_path):
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    record = make_record("Mine", base, not_mergeable_because="it looks at the input")
    write_expert(tmp_path / "library/mine", {}, record, state={"w/x": torch.ones(2)})
    sentence = "mine cannot be added to its base, because it looks at the input, and its record names neither a plan"
    with pytest.raises(ValueError, match=sentence):
        attached(build_model("llama"), open_expert(tmp_path / "library/mine"))
