"""Tiny random classifiers of several architectures, whose tokenizer puts end-of-sequence around a text."""

from pathlib import Path

import torch
import transformers
from conftest import SIZES, build_tokenizer
from tokenizers.processors import TemplateProcessing

ENCODER = SIZES | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER |= {"max_position_embeddings": 128, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
AUTO, CLASSIFYING = transformers.AutoModel, transformers.AutoModelForSequenceClassification
MASKED = transformers.AutoModelForMaskedLM
# The type of a model, and the class that its checkpoint was written by.
BASES = {
    "bert": ("bert", AUTO),
    "roberta": ("roberta", MASKED),
    "distilbert": ("distilbert", CLASSIFYING),
    "llama": ("llama", CLASSIFYING),
}


def build(name: str, place: Path) -> Path:
    """Save a base of `BASES`."""
    kind, auto = BASES[name]
    torch.manual_seed(0)
    model = auto.from_config(transformers.AutoConfig.for_model(kind, **ENCODER)).eval()
    model.save_pretrained(place)
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", 1)]
    )
    tokenizer.model_max_length = 100
    tokenizer.save_pretrained(place)
    return place
