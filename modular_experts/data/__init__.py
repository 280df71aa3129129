"""Read, check and tokenise the rows of tasks, and mix them into batches.

`batch.py` defines a batch, and the protocol of all that training asks of its data; no model and no expert is loaded
here. `sources.py` reads files and the hub, and `tokenised.py` tells what is read when. Open `mixture.py` first.
"""

from modular_experts.data.batch import Batch, DataSource, is_filler, prompts_of
from modular_experts.data.epoch import Equal, Mixing, Proportional, Temperature
from modular_experts.data.inputs import Inputs
from modular_experts.data.mixture import TaskMixture
from modular_experts.data.sources import TaskSource
from modular_experts.data.tasks import Task

__all__ = ["Batch", "DataSource", "Equal", "Inputs", "Mixing", "Proportional", "Task", "TaskMixture", "TaskSource"]
__all__ += ["Temperature", "is_filler", "prompts_of"]
