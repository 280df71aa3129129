"""Lightning callbacks around `ExpertModule`: schedules of the trained entries, export, results.

`schedule.py` is the contract of callbacks that change the trained entries; `mask_schedule.py` is the schedule of
supports, and `selection/` makes its choices. Open `schedule.py` first.
"""

from modular_experts.callbacks.even_validation import EvenValidation
from modular_experts.callbacks.export_expert import ExportExpert
from modular_experts.callbacks.gradient_mask import GradientMask
from modular_experts.callbacks.mask_schedule import MaskSchedule
from modular_experts.callbacks.progress import LogProgress
from modular_experts.callbacks.results import WritePredictions, WriteResults
from modular_experts.callbacks.schedule import Schedule
from modular_experts.callbacks.train_under_others import TrainUnderOthers

__all__ = ["EvenValidation", "ExportExpert", "GradientMask", "LogProgress", "MaskSchedule", "Schedule"]
__all__ += ["TrainUnderOthers", "WritePredictions", "WriteResults"]
