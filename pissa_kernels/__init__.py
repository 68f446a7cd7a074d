"""PiSSA for PEFT: the exact principal adapter for the price of a rough sketch.

The names listed in ``__all__`` are the public ones. Importing this package imports torch and nothing heavier: no PEFT,
no Triton, no question to a GPU.
"""

from . import ops
from ._version import __version__
from .peft.initialize import pissa_init
from .peft.original import original_model
from .peft.patch import PatchedPeft, patch_peft, unpatch_peft
from .peft.save import save_pissa
from .pissa import Decomposition, decompose
from .report import LayerReport, Report
from .svd.driver import truncated_svd
from .svd.result import Certificate, TruncatedSVD

__all__ = [
    "Certificate",
    "Decomposition",
    "LayerReport",
    "PatchedPeft",
    "Report",
    "TruncatedSVD",
    "__version__",
    "decompose",
    "ops",
    "original_model",
    "patch_peft",
    "pissa_init",
    "save_pissa",
    "truncated_svd",
    "unpatch_peft",
]
