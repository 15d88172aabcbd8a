"""Single import point of DeepSpeed: sets the accelerator, filters warnings, avoids compilation."""

import logging
import warnings

from megagrow.parallel.launch import choose_accelerator

choose_accelerator()
import deepspeed  # noqa: E402
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator  # noqa: E402
from deepspeed.runtime import engine as deepspeed_engine  # noqa: E402
from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: E402
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # noqa: E402
from deepspeed.utils import groups as deepspeed_groups  # noqa: E402
from torch.optim import AdamW  # noqa: E402

from megagrow.parallel.optimizers.muon import MuonWithAdamW  # noqa: E402

# DeepSpeed 0.19 still calls collectives under names that torch 2.13 deprecates.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
# The run logs skipped steps itself, with their numbers.
logging.getLogger("DeepSpeed").addFilter(lambda record: "OVERFLOW" not in record.getMessage())
# DeepSpeed's shared-memory all-reduce is for CPU inference only. Building it requires a compiler
# and most of a minute on every new machine.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Every engine has torch's AdamW or our Muon. To accept it, DeepSpeed would import its own Muon and
# with it torch's compiler: 0.8 s per process, and objects that every garbage collection visits.
deepspeed_engine.is_zero_supported_optimizer = lambda optimizer: isinstance(
    optimizer, AdamW | MuonWithAdamW
)

__all__ = [
    "CPU_Accelerator",
    "DeepSpeedZeroOptimizer",
    "deepspeed",
    "deepspeed_engine",
    "deepspeed_groups",
    "stage3",
    "stage_1_and_2",
]
