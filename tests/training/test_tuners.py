"""Lightning's finders of learning rates and batch sizes work, and a run after them is the run with their value."""

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import LearningRateFinder
from testbed.runs import mixture, module, trainer

from modular_experts.experts import LoRAExpert, SparseExpert

# The finders load a checkpoint of their own, and warn of models in evaluation mode.
pytestmark = pytest.mark.filterwarnings("ignore")


def run(base, files, folder, expert, *callbacks, rate=None, rows=4):
    seed_everything(0, verbose=False)
    trained, data = module(base, expert, learning_rate=rate), mixture(files, base, batch_size=rows)
    trainer(folder, *callbacks).fit(trained, data)
    return trained, data


def same(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("expert", [LoRAExpert, SparseExpert])
def test_a_found_rate_trains_as_the_same_rate_typed_in(expert, tiny_llama_dir, task_files, tmp_path):
    finder = LearningRateFinder(num_training_steps=40, min_lr=1e-4, max_lr=0.1)
    found, _ = run(tiny_llama_dir, task_files, tmp_path, expert, finder)
    assert 1e-4 < found.learning_rate < 0.1
    typed, _ = run(tiny_llama_dir, task_files, tmp_path, expert, rate=found.learning_rate)
    assert same(found, typed)
