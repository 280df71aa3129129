"""Prompts that are read whole and cut: a part reads like the prompt without its instruction, or without its front."""

import pytest
import torch
from conftest import build_model
from testbed.padded_rows import ROWS, padded

from modular_experts.data.batch import IGNORED
from modular_experts.merging.statistics import DEPTHS, GRAMS_NAME, name_of, part_of, prompt_statistics
from modular_experts.routing.prompts import prompt_grams, prompt_vectors


def answered(*parts: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """Return batches of prompts with an answer of two tokens behind each."""
    batches = []
    for rows in parts:
        batch = padded([[*row, 90, 91] for row in rows], "right")
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for number, row in enumerate(rows):
            labels[number, len(row) : len(row) + 2] = 90
        batches.append(batch | {"labels": labels})
    return batches


def test_every_second_part_is_read_as_the_prompt_without_its_front() -> None:
    model = build_model("llama").double()
    rows: list[list[int]] = [*ROWS[1:], ROWS[0], [50]]
    batches = answered(rows[:3], rows[3:])
    found, whole = prompt_statistics(model, batches, parts=True), prompt_statistics(model, batches)
    cuts = []
    for number, row in enumerate(rows):
        cut = min(int(0.75 * len(row) * ((number + 1) * (5**0.5 - 1) / 2 % 1)), len(row) - 1)
        # These prompts share no token, so that the other parts lack nothing.
        cuts.append(cut if number % 2 else 0)
        alone = prompt_vectors(model, torch.tensor([row[cuts[-1] :]]), None, DEPTHS)
        for depth, vector in zip(DEPTHS, alone, strict=True):
            values = found[name_of(depth)].values
            torch.testing.assert_close(values[2 * number + 1], vector[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(values[2 * number], whole[name_of(depth)].values[number])
    assert max(cuts) > 0
    assert min(cuts) == 0


def test_the_other_parts_lack_what_nearly_all_prompts_hold() -> None:
    model = build_model("llama").double()
    # The instruction is 7 8 in front and 9 behind; one prompt of ten has none, and 8 stands in some texts again.
    rows = [[7, 8, 20 + number, 30 + number, *[8] * (number % 3), 40 + number, 9] for number in range(9)]
    rows.append([33, 34, 35])
    found = prompt_statistics(model, answered(rows[:6], rows[6:]), parts=True)
    for number in range(0, 10, 2):
        part = torch.tensor([rows[number][2:-1]])
        torch.testing.assert_close(found[GRAMS_NAME].values[2 * number + 1], prompt_grams(part, None)[0])
        alone = prompt_vectors(model, part, None, [0.5])[0]
        torch.testing.assert_close(found[name_of(0.5)].values[2 * number + 1], alone[0], rtol=1e-5, atol=1e-6)


PARTS = {
    "in front": ([5, 6, 20, 21, 5, 22], [20, 21, 5, 22]),
    "behind": ([20, 21, 22, 5, 6], [20, 21, 22]),
    "the last of equally long ones": ([5, 20, 6, 21], [21]),
    "nothing between": ([5, 6], [6]),
    "no shared token": ([20, 21], [20, 21]),
    "empty": ([], []),
}


@pytest.mark.parametrize(("tokens", "part"), PARTS.values(), ids=PARTS)
def test_a_part_is_the_longest_stretch_between_shared_tokens(tokens: list[int], part: list[int]) -> None:
    assert tokens[part_of(tokens, 0, {5, 6})] == part
