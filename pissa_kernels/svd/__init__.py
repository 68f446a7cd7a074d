"""The engine: a truncated SVD to a tolerance on the captured energy, with a certificate."""

from .driver import truncated_svd
from .result import Certificate, TruncatedSVD

__all__ = ["Certificate", "TruncatedSVD", "truncated_svd"]
