"""Quantization of neural networks as a tabular benchmark of OptunaHub."""

from ._quantune_tables import Problem


__all__ = ["Problem"]
