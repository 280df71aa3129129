"""Make tiny random bases, each once per process; this file stands in for another."""

import tempfile
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

KINDS = (
    *("llama", "llama-tied", "qwen2", "qwen3", "gpt2", "neox", "phi3", "gemma2", "padded", "bare", "chat", "mixtral"),
)
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEAR = dict.fromkeys(KINDS, LLAMA) | {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n", "é", "è", "ñ", "á"]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_FOLDER = tempfile.TemporaryDirectory(prefix="soak-bases-")


@cache
def base_of(kind: str) -> Path:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    own = {"eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 256}
    if kind != "bare":
        own |= {"pad_token": "<pad>", "bos_token": "<s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own)
    if kind == "chat":
        fast.chat_template = CHAT
    tied = kind in ("llama-tied", "gpt2", "gemma2")
    common = {"vocab_size": len(vocabulary) + 29 * (kind == "padded"), "tie_word_embeddings": tied}
    common |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 256}
    heads = {"num_key_value_heads": 2}
    if kind == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **drop, **common)
    elif kind == "neox":
        config = GPTNeoXConfig(**sizes, **common)
    elif kind == "phi3":
        config = Phi3Config(num_key_value_heads=4, original_max_position_embeddings=256, **sizes, **common)
    elif kind == "gemma2":
        config = Gemma2Config(head_dim=8, **heads, **sizes, **common)
    elif kind == "qwen3":
        config = Qwen3Config(head_dim=8, **heads, **sizes, **common)
    elif kind == "qwen2":
        config = Qwen2Config(**heads, **sizes, **common)
    elif kind == "mixtral":
        config = MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **heads, **sizes, **common)
    else:
        config = LlamaConfig(**heads, **sizes, **common)
    torch.manual_seed(KINDS.index(kind))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(4)
            elif name.endswith("bias"):
                weight.normal_(0, 0.2)
    folder = Path(_FOLDER.name, kind)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
