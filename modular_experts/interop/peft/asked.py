"""Ask PEFT for the deltas of any adapter that it can merge into weights.

The delta of a weight is the one that PEFT states (`get_delta_weight`) if PEFT's merge adds it to the weight; else it
is the merged weight minus the base's, as for the types that multiply the weight (OFT, HiRA) or read it. At the end the
logits of base plus deltas must be PEFT's. Tested with every type of peft 0.21 (`docs/reference/peft-types.md`).
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modular_experts.base import Base
from modular_experts.base.files import quiet_transformers
from modular_experts.base.structure import weight_of
from modular_experts.base.verify import difference, fixed_prompts, logits
from modular_experts.deltas import Delta, LowRank
from modular_experts.interop.full_checkpoint import ImportedAdapter, lossless
from modular_experts.interop.peft.files import CONFIG_FILE, NOT_SET, PREFIX, TENSOR_FILE, AdapterFiles, import_peft
from modular_experts.library.record import Record
from modular_experts.text import did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

_NAME = "default"  # of the adapter, in PEFT's model

# Fields that only describe an adapter, or that only training reads. PEFT does not get them: it could take a base or a
# class from them.
_LEFT_OUT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("runtime_config", "task_type"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_core"),
}
# Fields that may hold text: names of modules, and choices from PEFT's own lists. The text of any other field might be
# a file, a model to fetch or a module to import, as it is in `megatron_config` and `shadow_model`.
_TEXT = {
    *("alpha_pattern", "block_size_pattern", "exclude_modules", "feedforward_modules", "lambda_pattern"),
    *("layers_pattern", "modules_to_save", "n_frequency_pattern", "rank_pattern", "target_modules"),
    *("target_parameters", "target_svd_config", "trainable_token_indices", "use_bdlora", "velora_config"),
    *("ab_svd_init", "act_fn", "bias", "config_A_B", "config_C", "config_D_E", "decomposition_method"),
    *("init_lora_weights", "init_weights", "mask_type", "poly_type", "psoft_svd", "variant"),
    "wavelet_family",
}
# What PEFT raises for a wrong field, a tensor of another shape, or a form that it does not support.
_REFUSALS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError)


def ask_peft(adapter: str | Path | AdapterFiles, base: str | Path | Base, tolerance: float = 1e-3) -> ImportedAdapter:
    """Read an adapter with PEFT, as deltas of its base.

    A delta of small rank is `LowRank`, one of few entries is `Sparse`, both up to rounding; any other is `Dense`.

    Args:
        adapter: The adapter's directory.
        base: The base's directory or hub id.
        tolerance: Largest accepted difference of a logit between PEFT with the adapter and base plus deltas; where the
            largest logit is above 1, as a share of it.

    Raises:
        ValueError: PEFT is not installed or does not know the type, the type moves no weight, or a setting might lead
            PEFT to other files; in an iteration, PEFT refuses the adapter or its merge, or the logits differ.
    """
    files = adapter if isinstance(adapter, AdapterFiles) else AdapterFiles(adapter)
    config = _configuration(files)
    deltas = AskedDeltas(files, config, Base.open(base), tolerance)
    return ImportedAdapter(deltas, files.config["peft_type"], files.settings())


class AskedDeltas(Iterable[tuple[str, Delta]]):
    """The deltas of an adapter, from PEFT; every iteration loads base and adapter anew."""

    def __init__(self, files: AdapterFiles, config: "PeftConfig", base: Base, tolerance: float) -> None:
        self._files = files
        self._config = config
        self._base = base
        self._tolerance = tolerance
        self.stated = self.measured = 0
        self.largest_difference = float("nan")
        # The tied tensors as base plus delta, under the first of their names that came.
        self._tied: dict[str, Tensor] = {}

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        self.stated = 0
        self.measured = 0
        self._tied = {}
        files = self._files
        model, tuned, prompts, expected = self._load_twice()
        seen = set()
        for name, layer in _layers(tuned, self._base):
            with _asking(files, "merge"):
                stated = _statement(layer)
                # PEFT may adapt both names of a tied tensor, which has moved with the first; the logits tell if alike.
                if not any(getattr(layer.get_base_layer(), "weight", None) is moved for moved in self._tied.values()):
                    layer.merge(adapter_names=[_NAME])
            # The plain layer takes its place, because some types would be merged a second time at the end.
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
            for parameter, merged in layer.get_base_layer().named_parameters():
                full = f"{name}.{parameter}"
                seen.add(full)
                yield from self._deltas(full, merged, stated if parameter == "weight" else None)
        with _asking(files, "merge"):
            whole = tuned.merge_and_unload()
        for name, merged in whole.named_parameters():
            if name not in seen:
                yield from self._deltas(name, merged, None)
        self.__dict__.pop("_plain", None)
        # By now the model is the base plus the deltas in their stored form.
        self.largest_difference, _ = difference(logits(whole, prompts), expected)
        allowed = self._allowed(expected)
        if not self.largest_difference <= allowed:  # written so that NaN is refused too
            for name, moved in self._tied.items():
                if not torch.equal(moved, self._base.weight(name).to(moved.dtype)):
                    self._base.structure.check_untied(name, str(files.directory))
            raise ValueError(
                f"{files.directory} was not imported: its logits by PEFT differ by {self.largest_difference:.3g} from "
                f"those of base plus deltas, and the tolerance is {allowed:.3g}, so it does more than move weights"
            )

    def _allowed(self, expected: Tensor) -> float:
        """Return the tolerance, or as large a share of the largest logit, with which rounding grows."""
        return self._tolerance * max(1.0, expected.abs().max().item())

    def _load_twice(self) -> "tuple[PreTrainedModel, PeftModel, Tensor, Tensor]":
        with _asking(self._files, "load"):
            model, tuned = self._load(seed=1)
            prompts = fixed_prompts(model)
            other = logits(tuned, prompts)
            del model, tuned  # one model in memory at a time
            model, tuned = self._load(seed=0)
            expected = logits(tuned, prompts)
        apart, _ = difference(other, expected)
        if not apart <= self._allowed(expected):
            raise ValueError(
                f"{self._files.directory} has no fixed meaning: PEFT draws numbers while it loads it, "
                f"and the logits of two loads differ by {apart:.3g}; convert it where it was trained, with PEFT's "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        return model, tuned, prompts, expected

    def record(self) -> Record:
        return {
            "read_with": f"peft {metadata.version('peft')}",
            "stated_weights": self.stated,
            "measured_weights": self.measured,
            "largest_difference": self.largest_difference,
        }

    def _load(self, seed: int) -> "tuple[PreTrainedModel, PeftModel]":
        from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        state = dict(self._files.stored)
        model = self._base.load("float32")
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            tuned = PeftModel(model, deepcopy(self._config), _NAME)
        for layer in tuned.modules():
            if isinstance(layer, BaseTunerLayer) and type(layer).merge is BaseTunerLayer.merge:
                raise ValueError("its layers cannot be merged into weights")
        wanted = get_peft_model_state_dict(tuned, adapter_name=_NAME, save_embedding_layers=False).keys()
        report: Any = set_peft_model_state_dict(tuned, state, _NAME)
        for keys, what in ((wanted - state.keys(), "has no"), (set(report.unexpected_keys), "holds the unknown")):
            if keys:
                more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
                raise ValueError(f"{TENSOR_FILE} {what} {min(keys)}{more}")
        return model, tuned

    def _deltas(self, name: str, merged: Tensor, stated: Tensor | None) -> Iterator[tuple[str, Delta]]:
        """Yield the delta of a parameter, or the deltas of the matrices in it that are weights of their own."""
        parts = {f"{name}[{number}]": matrix for number, matrix in enumerate(merged)} if merged.dim() == 3 else {}
        if parts and parts.keys() <= self._base.structure.shapes.keys():
            deltas = [(part, self._delta(part, one, None, weight_of(self._plain, part))) for part, one in parts.items()]
        else:
            deltas = [(name, self._delta(name, merged, stated, self._base.weight(name)))]
        owners = self._base.structure.owners
        yield from ((owners[part], delta) for part, delta in deltas if delta is not None)

    @cached_property
    def _plain(self) -> "PreTrainedModel":
        """The base in memory, for weights that its files hold in parts."""
        return self._base.load("float32")

    def _delta(self, name: str, merged: Tensor, stated: Tensor | None, base: Tensor) -> Delta | None:
        """Return how far a weight moved, and put base plus delta in the merged weight's place."""
        structure = self._base.structure
        source = str(self._files.directory)
        structure.check(name, merged.shape, source)
        before = base.to(merged.dtype)
        moved = merged - before
        owner = structure.owners[name]
        rounding = 2 * torch.finfo(moved.dtype).eps * merged.norm().item()
        if owner in self._tied:
            if (merged - self._tied[owner]).norm().item() > rounding:
                structure.check_untied(name, source)
            return None
        if len(structure.twins(name)) > 1:
            self._tied[owner] = merged
        if not moved.any():
            return None
        if stated is not None and stated.shape == moved.shape and (stated - moved).norm().item() <= rounding:
            delta = exact_form(stated.float())
            self.stated += 1
        else:
            delta = exact_form(moved, rounding)
            self.measured += 1
        merged.copy_(before)
        delta.add_to(merged)
        return delta


def exact_form(difference: Tensor, rounding: float = 0.0) -> Delta:
    """Return a difference in the form that takes the fewest bytes and equals it up to rounding.

    A difference `(out, in)` of rank r is found by its action on 16, then 64, 256, ... random directions: with r of them
    or more, their images span all columns (Halko et al. 2011, "Finding structure with randomness"). `rounding` is the
    Frobenius norm of the rounding in the difference, beside the rounding of its own numbers.
    """
    whole = lossless(difference)
    if difference.ndim != 2:
        return whole
    matrix = difference.double()
    allowed = max(rounding, 8 * torch.finfo(torch.float32).eps * matrix.norm().item())
    draw = torch.Generator().manual_seed(0)
    tried = 16
    most = (whole.nbytes - 1) // (4 * sum(matrix.shape))  # the largest rank that takes fewer bytes
    while most:
        directions = torch.randn(matrix.shape[1], min(tried, *matrix.shape), generator=draw, dtype=torch.float64)
        basis = torch.linalg.qr(matrix @ directions.to(matrix.device)).Q
        core = basis.T @ matrix
        if (matrix - basis @ core).norm().item() <= allowed / 2:
            left, values, right = torch.linalg.svd(core, full_matrices=False)
            rests = values.square().flip(0).cumsum(0).sqrt().flip(0)  # norm of the part that is lost from each rank on
            rank = max(1, int((rests > allowed / 2).count_nonzero()))
            if rank > most:
                break
            up = (basis @ left[:, :rank]) * values[:rank]
            return LowRank(up.float().contiguous(), right[:rank].float().contiguous())
        if tried >= most:
            break
        tried *= 4
    return whole


def _configuration(files: AdapterFiles) -> "PeftConfig":
    """Return PEFT's configuration of an adapter, once PEFT is known to merge its type and to open nothing else."""
    file = files.directory / CONFIG_FILE
    kind = files.config.get("peft_type")
    way = "which reads any type that moves weights: pip install 'modular-experts[peft]'"
    import_peft(f"{files.obstacle()} without PEFT, {way}")
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    known = {str(name.value): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(kind, str) or kind not in known:
        near = did_you_mean(kind, known) if isinstance(kind, str) else ""
        raise ValueError(
            f"{file} has peft_type {kind!r}, which peft {metadata.version('peft')} does not know{near}; newer types "
            "need a newer PEFT: pip install -U peft"
        )
    tuner = next((tuner for name, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if name.value == kind), None)
    if not (isinstance(tuner, type) and issubclass(tuner, BaseTuner) and hasattr(tuner, "tuner_layer_cls")):
        raise ValueError(
            f"{file} has peft_type {kind}, which moves no weight: it adds trained vectors, or chooses among adapters "
            "by the input, so no delta can express it"
        )
    if files.file.name != TENSOR_FILE:
        raise ValueError(f"{files.file} is pickled, and PEFT gets only safetensors; save the adapter again with PEFT")
    assert files.stored  # missing or damaged ones are an error
    settings = {name: value for name, value in files.config.items() if name not in _LEFT_OUT}
    defaults = {field.name: field.default for field in fields(known[kind])}
    for name, value in settings.items():
        if name not in defaults and value not in NOT_SET:
            raise ValueError(f"{file} sets {name} to {value!r}, which peft {metadata.version('peft')} does not know")
        if name not in _TEXT and value != defaults.get(name) and (texts := list(_texts(value))):
            raise ValueError(
                f"{file} sets {name} to {value!r}; PEFT might open or run what {texts[0]!r} names, so it is not loaded"
            )
    with _asking(files, "configure"):
        return known[kind](**{name: value for name, value in settings.items() if name in defaults})


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _layers(tuned: "PeftModel", base: Base) -> Iterator[tuple[str, Any]]:
    """Yield each adapted module of the base with its name; those with adapters inside of adapters are left out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = {name for name, _ in base.structure.model.named_modules()}
    for name, module in list(tuned.named_modules()):
        inside = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
        if inside == [module] and name.removeprefix(PREFIX) in modules:
            yield name.removeprefix(PREFIX), module


def _statement(layer: Any) -> Tensor | None:
    """Return the delta that PEFT states for a layer, or None; some types state a rotation or a product instead."""
    try:
        stated = layer.get_delta_weight(_NAME)
    except (AttributeError, TypeError, RuntimeError):  # it has no such method, one that wants more, or one that fails
        return None
    if not isinstance(stated, Tensor):
        return None
    return (stated.to_dense() if stated.is_sparse else stated).detach()


@contextmanager
def _asking(files: AdapterFiles, what: str) -> Iterator[None]:
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise ValueError(f"PEFT cannot {what} {files.directory}: {error}") from error
    except _REFUSALS as error:
        why = " ".join(str(error).split()) or type(error).__name__
        kind = files.config["peft_type"]
        raise ValueError(f"PEFT cannot {what} {files.directory} ({kind}): {why[:300]}") from error
