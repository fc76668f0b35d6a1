"""µP² SAM for training: `import mup2_fused as mup2` is all that you need.

Parameter groups and initialization for any architecture, the optimizer with compiled kernels where they are built,
loops, and tools for precision and CUDA graphs. mup2_ref.py explains the method and has its formulas.
"""

from mup2_fused.capture import capture
from mup2_fused.compiled_passes import built_with_cuda, compiled, instruction_set
from mup2_fused.groups import init_, param_groups, report
from mup2_fused.loops import accumulate, evaluate, frozen_buffers, train_epoch
from mup2_fused.optimizer import SAM
from mup2_fused.precision import seen_perturbation
from mup2_fused.theory import exponents, predict
from mup2_ref import MLP, ROLES, Exponents, Prediction

__version__ = "0.1.0"
__all__ = [
    "MLP",
    "ROLES",
    "SAM",
    "Exponents",
    "Prediction",
    "accumulate",
    "built_with_cuda",
    "capture",
    "compiled",
    "evaluate",
    "exponents",
    "frozen_buffers",
    "init_",
    "instruction_set",
    "param_groups",
    "predict",
    "report",
    "seen_perturbation",
    "train_epoch",
]
