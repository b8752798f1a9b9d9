"""Prototypes against dense features."""

from vpl_baselines.dense_similarity.adapter import DenseSimilarity

__all__ = ["DenseSimilarity"]
