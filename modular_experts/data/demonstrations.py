"""Draw demonstrations, the training rows of a task that stand before its other rows, and list a task's labels."""

import random
from collections import Counter
from collections.abc import Sequence

from modular_experts.data.rows import Message, Row

MOST_LABELS = 100
"""The most different targets of a task whose targets are labels."""
ROWS_OF_LABEL = 3
"""The fewest training rows of a label, on average."""


def drawn(rows: Sequence[Row], training: Sequence[Row], shots: int, seed: int) -> list[list[Row]]:
    """Return for each row `shots` training rows in a random order, or all where there are fewer.

    None of them has the input of the row, whose answer it would tell. The draw depends on the seed, the input of the
    row and the training rows alone, so that it is the same for every model.
    """
    copies = Counter(row.input for row in training)
    demonstrations = []
    for row in rows:
        count = min(shots + copies[row.input], len(training))
        sample = random.Random(f"{seed} {row.input}").sample(range(len(training)), count)
        others = [training[number] for number in sample if training[number].input != row.input]
        demonstrations.append(others[:shots])
    return demonstrations


def as_turns(demonstrations: Sequence[Row]) -> list[Message]:
    """Return demonstrations as messages of a conversation; what the system says in one of them is left out."""
    turns: list[Message] = []
    for row in demonstrations:
        texts = ({"role": "user", "content": row.input}, {"role": "assistant", "content": str(row.target)})
        turns += [message for message in row.messages or texts if message["role"] != "system"]
    return turns


def behind_turns(row: Row, demonstrations: Sequence[Row]) -> tuple[Message, ...]:
    """Return the messages of a conversation, with demonstrations behind the message of the system."""
    system = tuple(message for message in row.messages[:1] if message["role"] == "system")
    return (*system, *as_turns(demonstrations), *row.messages[len(system) :])


def labels_of(training: Sequence[Row]) -> tuple[str, ...]:
    """Return the different targets of training rows, sorted, if they are labels, which come again; else nothing."""
    labels = {str(row.target) for row in training}
    few = 2 <= len(labels) <= MOST_LABELS and ROWS_OF_LABEL * len(labels) <= len(training)
    return tuple(sorted(labels)) if few else ()
