"""PiSSA for PEFT: the exact principal adapter at the price of a rough sketch.

The public names are those in ``__all__``. Importing the package imports torch and nothing heavier: neither PEFT nor
Triton nor safetensors, and it does not query a GPU.
"""

from . import ops
from ._version import __version__
from .checkpoint.findings import Finding, Verification
from .checkpoint.outcome import CheckpointReport
from .checkpoint.run import init_checkpoint
from .checkpoint.verify import verify_checkpoint
from .convert.convert import convert_adapter
from .convert.report import ConversionReport
from .merge.run import merge_checkpoint
from .peft.injection.first_process import share_initial
from .peft.layers.initialize import pissa_init
from .peft.original import original_model
from .peft.patch import PatchedPeft, patch_peft, unpatch_peft
from .peft.saving.distributed_state import PissaState
from .peft.saving.save import save_pissa
from .pissa import Decomposition, decompose
from .report import LayerReport, Report
from .svd import Certificate, TruncatedSVD, truncated_svd

__all__ = [
    "Certificate",
    "CheckpointReport",
    "ConversionReport",
    "Decomposition",
    "Finding",
    "LayerReport",
    "PatchedPeft",
    "PissaState",
    "Report",
    "TruncatedSVD",
    "Verification",
    "__version__",
    "convert_adapter",
    "decompose",
    "init_checkpoint",
    "merge_checkpoint",
    "ops",
    "original_model",
    "patch_peft",
    "pissa_init",
    "save_pissa",
    "share_initial",
    "truncated_svd",
    "unpatch_peft",
    "verify_checkpoint",
]
