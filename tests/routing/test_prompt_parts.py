"""Prompts that are read whole and cut: a cut prompt reads like the prompt without its front."""

import torch
from conftest import build_model
from testbed.padded_rows import ROWS, padded

from modular_experts.data.batch import IGNORED
from modular_experts.routing.prompts import prompt_vectors
from modular_experts.statistics.take import DEPTHS, name_of, prompts


def test_a_part_is_read_as_the_prompt_without_its_front() -> None:
    model = build_model("llama").double()
    batches = []
    for rows in (ROWS[:3], [*ROWS[3:], [50]]):
        batch = padded([[*row, 90, 91] for row in rows], "right")
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for number, row in enumerate(rows):
            labels[number, len(row) : len(row) + 2] = 90
        batches.append(batch | {"labels": labels})
    found, whole = prompts(model, batches, [], parts=True), prompts(model, batches, [])
    rows, cuts = [*ROWS, [50]], []
    for number, row in enumerate(rows):
        cuts.append(min(int(0.75 * len(row) * ((number + 1) * (5**0.5 - 1) / 2 % 1)), len(row) - 1))
        alone = prompt_vectors(model, torch.tensor([row[cuts[-1] :]]), None, DEPTHS)
        for depth, vector in zip(DEPTHS, alone, strict=True):
            values = found[name_of(depth)].values
            torch.testing.assert_close(values[2 * number + 1], vector[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(values[2 * number], whole[name_of(depth)].values[number])
    assert max(cuts) > 0
    assert min(cuts) == 0
