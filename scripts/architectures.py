"""Send a tiny random base of each family of transformers through the package, and write the table of what works.

    python scripts/architectures.py [FAMILY ...]

Without a family it takes all, in about a minute on one thread, and writes docs/results/architectures.md.
"""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from modular_experts.base import Base, verify
from modular_experts.base.apply import applied, apply
from modular_experts.base.structure import weight_of
from modular_experts.evaluation.likelihood import keeps_rows_apart
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.injection import expert_layers, find_sites, inject
from modular_experts.injection.inject import other_sites
from modular_experts.injection.routed import routed
from modular_experts.injection.save import save_expert
from modular_experts.language_model import is_classifier, language_model
from modular_experts.library import StoredExpert, open_expert
from modular_experts.merging.merged import merge

_VOCABULARY = {"vocab_size": 96, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
USUAL = _VOCABULARY | _HEADS | _SIZES
_FOUR = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT = _VOCABULARY | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

_LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
TOWERS = {
    "vision_config": {
        **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
        **{"num_hidden_layers": 2, "depth": 2, "num_heads": 4, "out_hidden_size": 32},
    },
}
_ROPE_3D = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
WRAPPERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Qwen3.5": ("qwen3_5", USUAL | _LINEAR_ATTENTION | {"num_hidden_layers": 4}),
    "Qwen3.5-MoE": (
        "qwen3_5_moe",
        USUAL | _FOUR | _LINEAR_ATTENTION | {"num_hidden_layers": 4, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3-VL": ("qwen3_vl", USUAL | _ROPE_3D),
    "Gemma 3 with vision": ("gemma3", USUAL),
    "Gemma 4": ("gemma4", USUAL | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}),
    "Mistral 3": ("mistral3", USUAL),
    "Llama 4 with vision": (
        "llama4",
        USUAL | _LOCAL | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
    ),
    "GLM-4.5V": (
        "glm4v_moe",
        USUAL
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}},
    ),
    "SmolVLM": ("smolvlm", USUAL),
    "InternVL": ("internvl", USUAL),
    "LLaVA": ("llava", USUAL),
    "PaliGemma": ("paligemma", USUAL),
}
"""Models with a vision tower beside the language model, whose settings stand here."""

_T5 = {"vocab_size": 96, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_T5 |= {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
_BART = {"vocab_size": 96, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 1}
_BART |= {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 256}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}

_BERT = _VOCABULARY | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT |= {"max_position_embeddings": 256, "embedding_size": 32}
CLASSIFIERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "BERT": ("bert", _BERT),
    "RoBERTa": ("roberta", _BERT),
    "XLM-RoBERTa": ("xlm-roberta", _BERT),
    "DistilBERT": ("distilbert", _VOCABULARY | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "ALBERT": ("albert", _BERT),
    "ELECTRA": ("electra", _BERT),
    "DeBERTa v3": ("deberta-v2", _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "MPNet": ("mpnet", _BERT),
    "ModernBERT": ("modernbert", _BERT | {"cls_token_id": 2, "sep_token_id": 3}),
    "Llama that classifies": ("llama", USUAL),
    "Qwen3 that classifies": ("qwen3", USUAL),
}

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama": ("llama", USUAL),
    "Mistral": ("mistral", USUAL),
    "Ministral": ("ministral", USUAL),
    "Qwen2": ("qwen2", USUAL),
    "Qwen3": ("qwen3", USUAL),
    "Gemma 2": ("gemma2", USUAL),
    "Gemma 3": ("gemma3_text", USUAL),
    "OLMo 2": ("olmo2", USUAL),
    "Granite": ("granite", USUAL),
    "SmolLM3": ("smollm3", USUAL),
    "Cohere 2": ("cohere2", USUAL),
    "Phi": ("phi", USUAL),
    "Phi-3": ("phi3", USUAL),
    "StarCoder 2": ("starcoder2", USUAL),
    "GLM 4": ("glm4", USUAL),
    "EXAONE 4": ("exaone4", USUAL),
    "StableLM": ("stablelm", USUAL),
    "GPT-2": ("gpt2", _GPT),
    "GPT-NeoX": ("gpt_neox", USUAL),
    "OPT": ("opt", USUAL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BLOOM": ("bloom", _VOCABULARY | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": ("falcon", _VOCABULARY | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "MPT": ("mpt", _VOCABULARY | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "Mamba": ("mamba", _VOCABULARY | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "Qwen3-Next": (
        "qwen3_next",
        USUAL | _FOUR | _LINEAR_ATTENTION | {"shared_expert_intermediate_size": 16, "num_hidden_layers": 4},
    ),
    "Mixtral": ("mixtral", USUAL | _LOCAL),
    "Qwen2-MoE": ("qwen2_moe", USUAL | _FOUR | {"shared_expert_intermediate_size": 16}),
    "Qwen3-MoE": ("qwen3_moe", USUAL | _FOUR),
    "OLMoE": ("olmoe", USUAL | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": ("gpt_oss", USUAL | _LOCAL),
    "Granite-MoE": ("granitemoe", USUAL | _LOCAL),
    "JetMoE": ("jetmoe", USUAL | _LOCAL | {"kv_channels": 8}),
    "Llama 4": ("llama4_text", USUAL | _LOCAL | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}),
    "DeepSeek-V3": (
        "deepseek_v3",
        USUAL
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
        | {"first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    ),
    "T5": ("t5", _T5),
    "T5 1.1, FLAN-T5": ("t5", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "BART": ("bart", _BART),
    "Pegasus": ("pegasus", _BART),
    **CLASSIFIERS,
    **{family: (kind, {"text_config": text, **TOWERS}) for family, (kind, text) in WRAPPERS.items()},
}
"""The model type and the settings of a tiny base of each family."""

KINDS: Mapping[str, Callable[..., Any]] = {
    "sparse": partial(SparseExpert, keep_ratio=0.1),
    "lora": partial(LoRAExpert, rank=2),
}
IDS = (torch.arange(2 * 20).view(2, 20) * 7 + 3) % 90 + 3


PAGE = Path(__file__).parent.parent / "docs" / "results" / "architectures.md"
STEPS = ("train", "evaluate", "merge", "apply", "route", "embeddings, vectors")
HEAD = """# Architectures

Each line of the table is a tiny random base of two to four blocks. `all-linear` gives experts to its linear layers and
to the matrices of its mixture-of-experts layers: the table has how many of both, and their share of the parameters. Two
experts, sparse entries and a LoRA of rank 2, take six steps, and each compares numbers: *train* (the logits move),
*evaluate* (the stored expert gives the trained logits, and the base comes back bit for bit), *merge* (an average is the
mean of the deltas in float64), *apply* (the checkpoint loads to the logits of the base plus the merge), *route* (each
row of a batch gets its own expert's logits), and *embeddings, vectors* (experts of embeddings, norms and biases get the
gradients of a training of the whole model). {held}

*Packed* tells whether a base keeps rows apart that lie behind one another in a sequence. JetMoE and Llama 4 multiply
the matrices of their mixtures in another way, so these get no expert.

T5, BART and Pegasus have an encoder and a decoder. The eleven from BERT to Qwen3 that classifies are *classifiers*,
without a task head here: their vectors stand in the place of logits. The last twelve are *wrappers*: a vision tower
stands beside the language model, and experts move the language model alone. For them *apply* also loads both classes of
the checkpoint, and compares their logits and the tower bit for bit.
`scripts/architectures.py` makes this page.

"""
HEADS = ("family", "model type", "layers + matrices", "of the parameters", "packed")


class Result(NamedTuple):
    """What `all-linear` takes in a base, and which steps gave the right logits: "yes", or the reason why not."""

    layers: int
    matrices: int
    share: float
    steps: dict[str, str]
    packed: bool

    def line(self, family: str) -> str:
        """Return the family's line of the table."""
        places = f"{self.layers}+{self.matrices}" if self.matrices else str(self.layers)
        counts = [places, f"{self.share:.0%}".replace("%", " %")]
        cells = [family, f"`{FAMILIES[family][0]}`", *counts, "yes" if self.packed else "no"]
        return f"| {' | '.join(cells)} |"

    def failed(self) -> list[str]:
        """Return the steps that do not hold, each with the reason."""
        return [f"{step}: {why}" for step, why in self.steps.items() if why != "yes"]


def tiny_base(family: str, place: Path) -> Base:
    """Save a random base of a family."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    whole: Any = transformers.AutoModelForImageTextToText if family in WRAPPERS else transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        whole = transformers.AutoModelForSeq2SeqLM
    elif family.endswith("that classifies"):
        whole = transformers.AutoModelForSequenceClassification
    elif family in CLASSIFIERS:
        whole = transformers.AutoModelForMaskedLM
    whole.from_config(config).eval().save_pretrained(place)
    return Base.open(place)


def passed_through(family: str, folder: Path) -> Result:
    """Train two kinds of experts on a tiny base, merge, apply, evaluate and route them; compare logits at each step."""
    base = tiny_base(family, folder / "base")
    model = base.load()
    sites = [site for site in find_sites(model) if not site.by_name_only and not site.outside_of_text]
    matrices = sum(site.number is not None for site in sites)
    language = model.get_submodule(language_model(model) or "")
    share = sum(site.matrix.numel() for site in sites) / sum(one.numel() for one in language.parameters())
    steps = dict.fromkeys(STEPS, "not reached")
    for step, reason in _steps(base, folder):
        steps[step] = reason
    return Result(len(sites) - matrices, matrices, share, steps, keeps_rows_apart(model))


def logits(model: Any) -> torch.Tensor:
    return verify.logits(model, IDS)


def _steps(base: Base, folder: Path) -> Iterator[tuple[str, str]]:
    library, step = folder / "library", "train"
    try:
        before = logits(base.load())
        trained = {kind: _trained(base, kind, library / kind) for kind in KINDS}
        assert all((one - before).abs().max() > 1e-3 for one in trained.values()), "training moves no logit"
        yield step, "yes"
        step, fresh = "evaluate", base.load()
        for kind, wanted in trained.items():
            with applied(fresh, library / kind):
                _same(logits(fresh), wanted)
        assert torch.equal(logits(fresh), before), "the base is not as it was"
        yield step, "yes"
        step = "merge"
        merged, experts = merge([library / kind for kind in KINDS], "Average", library / "merged"), _opened(library)
        mean = {name: torch.stack([one[name].dense().double() for one in experts]).mean(0) for name in merged}
        for name, change in mean.items():
            torch.testing.assert_close(merged[name].dense().double(), change, rtol=1e-5, atol=1e-7)
        yield step, "yes"
        step = "apply"
        apply([library / "merged"], folder / "checkpoint")
        again, by_hand = Base.open(folder / "checkpoint").load(), base.load()
        for name, change in mean.items():
            with torch.no_grad():
                weight_of(by_hand, name).add_(change.to(weight_of(by_hand, name).dtype))
        _same(logits(again), logits(by_hand))
        assert _stored_names(folder / "checkpoint") == _stored_names(folder / "base"), "tensors have other names"
        if (folder / "base" / "config.json").read_text().count("vision_config"):
            _check_wrapper(folder, again)
        yield step, "yes"
        step = "route"
        with routed(fresh, [library / kind for kind in KINDS], rows=[0, 1]):
            found = logits(fresh)
        _same(found, torch.stack([one[row] for row, one in enumerate(trained.values())]))
        assert torch.equal(logits(fresh), before), "the base is not as it was"
        yield step, "yes"
        step = STEPS[-1]
        wanted = _trained_others(base, library / "others")
        with applied(fresh, library / "others"):
            _same(logits(fresh), wanted)
        apply([library / "others"], folder / "others")
        _same(logits(Base.open(folder / "others").load()), wanted)
        yield step, "yes"
    except Exception as error:  # the table gives the reason
        logging.getLogger(__name__).info("%s", step, exc_info=True)
        yield step, " ".join(str(error).split())


def _loss(model: Any) -> torch.Tensor:
    """Return the model's own loss, or for a classifier, which learns by a task's head, a number of its vectors."""
    if is_classifier(model):
        return model(input_ids=IDS).logits.pow(3).mean()
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def _trained(base: Base, kind: str, place: Path) -> torch.Tensor:
    model = base.load()
    torch.manual_seed(0)
    inject(model, KINDS[kind], "all-linear")
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_expert(model, place, base=base)
    return logits(model)


def _trained_others(base: Base, place: Path) -> torch.Tensor:
    """Train the embeddings and all vectors for a step, compare the gradients, and return the logits."""
    model, dense = base.load(), base.load()
    embeddings = model.get_input_embeddings().weight
    plan = {
        site.name: FullExpert if site.matrix.dim() == 1 else KINDS["sparse"]
        for site in other_sites(model)
        if site.matrix.dim() == 1 or site.matrix is embeddings
    }
    inject(model, lambda sites: plan)
    for one in (model, dense):
        _loss(one).backward()
    for name, layer in expert_layers(model):
        expert, wanted = layer.expert, dense.get_parameter(name).grad
        if wanted is None:
            assert layer.weight.grad is None
        elif isinstance(expert, SparseExpert):
            torch.testing.assert_close(expert.values.grad, wanted.view(-1)[expert.indices], rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-4, atol=1e-6)
    torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2).step()
    save_expert(model, place, base=base)
    return logits(model)


def _opened(library: Path) -> list[StoredExpert]:
    return [open_expert(library / kind) for kind in KINDS]


def _check_wrapper(folder: Path, again: Any) -> None:
    """Load the whole wrappers: what lies outside of the language model stayed, and the logits are those wanted."""
    before, after = (
        transformers.AutoModelForImageTextToText.from_pretrained(folder / place).eval()
        for place in ("base", "checkpoint")
    )
    # In transformers 5.24 the wrapper of Llama 4 fails on a text alone; it holds a whole causal model.
    _same(logits(after.language_model if after.config.model_type == "llama4" else after), logits(again))
    inside = f"{language_model(after)}."
    for name, weight in before.named_parameters():
        if not name.startswith(inside) and weight is not before.get_output_embeddings().weight:
            assert torch.equal(after.get_parameter(name), weight), f"{name} has changed"


def _stored_names(place: Path) -> set[str]:
    return set(Base.open(place)._files)


def _same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def main() -> None:
    chosen = sys.argv[1:] or list(FAMILIES)
    lines, failed = [], []
    for family in chosen:
        with tempfile.TemporaryDirectory() as place:
            result = passed_through(family, Path(place))
        lines.append(result.line(family))
        failed += [f"{family}, {reason}" for reason in result.failed()]
        print(lines[-1], *result.failed(), flush=True)
    if len(chosen) == len(FAMILIES):
        held = "Every step holds for every family." if not failed else f"Steps that do not hold: {'; '.join(failed)}."
        table = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", *lines]
        PAGE.write_text(HEAD.format(held=held) + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
