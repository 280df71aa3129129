"""Find prompts that a person can try on the server's page: inputs that experts keep of their training."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from modular_experts.data.chat import prompt_text
from modular_experts.library import StoredExpert
from modular_experts.library.kept_inputs import Prompt

MOST = 6
"""How many prompts the page offers at most."""
MOST_CHARACTERS = 200
"""The longest prompt that the page offers."""
LOOKED_AT = 32
"""How many kept inputs of a task are read to find a short one."""


def sample_prompts(experts: Iterable[StoredExpert], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return a short prompt of each task whose inputs an expert keeps (`keep_inputs=`), at most `MOST`, by task.

    A prompt of a chat comes without its template, so that a person can send it as a message.
    """
    template = _around_message(tokenizer)
    samples: dict[str, str] = {}
    for expert in experts:
        if len(samples) >= MOST:
            break
        for task, prompts in expert.inputs().items():
            texts = (_text(prompt, tokenizer, template) for prompt in prompts[:LOOKED_AT])
            short = next((text for text in texts if text and len(text) <= MOST_CHARACTERS), None)
            if short is not None:
                samples.setdefault(task, short)
    return dict(list(samples.items())[:MOST])


def _around_message(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Return the text that the chat template writes before and behind a user's only message; None without one."""
    if tokenizer.chat_template is None:
        return None
    mark = "\N{BULLSEYE}"
    before, _, behind = prompt_text(tokenizer, [{"role": "user", "content": mark}]).partition(mark)
    return before, behind


def _text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, template: tuple[str, str] | None) -> str | None:
    """Return a kept prompt as a person would write it; None for a chat of several messages."""
    text = str(tokenizer.decode(prompt.ids.tolist(), clean_up_tokenization_spaces=False))
    if template is not None and text.startswith(template[0]) and text.endswith(template[1]):
        text = text.removeprefix(template[0]).removesuffix(template[1])
    # Special tokens that are left belong to other messages of a chat.
    if any(token in text for token in tokenizer.all_special_tokens):
        return None
    return text.strip() or None
