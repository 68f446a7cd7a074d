"""The engine: a truncated SVD to a tolerance on the captured energy, with a certificate."""

from .result import Certificate, TruncatedSVD
from .truncated import truncated_svd

__all__ = ["Certificate", "TruncatedSVD", "truncated_svd"]
