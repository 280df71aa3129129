"""Make tiny random bases, once in a process: `base_of("llama")` is a folder that transformers can load.

Their tokenizer reads single characters, or bytes for Qwen 2. Weights are larger than those that transformers draws, so
that models and rows have losses that differ.
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
"""Tokens that fit into each base."""
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "é", "è", "ñ", "á"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = WIDE | {"num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "tie_word_embeddings": True}
QUIET_GPT2 = GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "gpt2": ("GPT2Config", QUIET_GPT2),
    "neox": ("GPTNeoXConfig", WIDE | {"max_position_embeddings": CONTEXT}),
    "phi3": ("Phi3Config", GROUPED | {"num_key_value_heads": 4, "original_max_position_embeddings": CONTEXT}),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    # The model has more rows of embeddings than the tokenizer has tokens.
    "padded": ("LlamaConfig", GROUPED),
    # The tokenizer has neither a token for padding nor one for the start.
    "bare": ("LlamaConfig", GROUPED | {"num_hidden_layers": 1}),
    "chat": ("LlamaConfig", GROUPED | {"num_hidden_layers": 1}),
    "mixtral": ("MixtralConfig", GROUPED | {"num_hidden_layers": 1, "num_local_experts": 4}),
}
KINDS = tuple(CONFIGS)
TIED = ("llama-tied", "gpt2", "gemma2")
"""Bases whose output layer is the table of embeddings."""
_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEAR: dict[str, list[str]] = dict.fromkeys(KINDS, _LLAMA) | {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    # Its other matrices are slices of tensors of three dimensions.
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
"""The ends of the names of the linear layers of each base."""


@functools.cache
def base_of(kind: str) -> Path:
    """Return the folder of a base; the same kind always has the same weights."""
    folder = _root() / kind
    tokenizer = _tokenizer(kind)
    name, sizes = CONFIGS[kind]
    unused = 29 if kind == "padded" else 0
    vocabulary = {"vocab_size": len(tokenizer) + unused}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, name)(**{"tie_word_embeddings": False} | sizes | vocabulary | ends)
    state = torch.random.get_rng_state()
    torch.manual_seed(KINDS.index(kind))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight_name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            elif weight_name.endswith("bias"):
                parameter.normal_(0, 0.2)
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def _root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="soak-bases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    # transformers reads any tokenizer of a Qwen 2 as one of bytes.
    is_of_bytes = kind == "qwen2"
    units = sorted(pre_tokenizers.ByteLevel.alphabet()) if is_of_bytes else CHARACTERS
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *units])}
    if is_of_bytes:
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "bare":
        names = {"eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **names)
    if kind == "chat":
        fast.chat_template = CHAT_TEMPLATE
    return fast
