"""A few prompts of different lengths, and a padded batch of them."""

import torch

ROWS = [[7, 8, 9, 10, 11], [20, 21, 22], [33, 34, 35, 36], [40, 41]]


def padded(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    """Return token ids and their attention mask, with padding on a side."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        own = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[number, own], mask[number, own] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}
