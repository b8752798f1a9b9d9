"""Where the samples of phase 1 are kept: in memory, or in files that appear whole or not at all."""

from vpl_lightning.store.memory import MemorySamples
from vpl_lightning.store.samples import SampleSource, balanced_statistics, objective_from
from vpl_lightning.store.shards import FeatureStore

__all__ = ["FeatureStore", "MemorySamples", "SampleSource", "balanced_statistics", "objective_from"]
