"""Data sets: images with image-level tags, masks where there are any, and what the tasks read."""

from vpl_lightning.data.base import SegmentationDataModule
from vpl_lightning.data.batches import EvaluationBatch, TrainingBatch
from vpl_lightning.data.coco import COCODataModule
from vpl_lightning.data.folder import TaggedFolderDataModule
from vpl_lightning.data.images import Sample, TaggedImages, read_image
from vpl_lightning.data.index import Entry, TaggedIndex
from vpl_lightning.data.samplers import TrainingSampler, UnpaddedDistributedSampler
from vpl_lightning.data.shapes import ShapesDataModule
from vpl_lightning.data.transforms import Augmentation
from vpl_lightning.data.voc import VOCDataModule

__all__ = [
    "Augmentation",
    "COCODataModule",
    "Entry",
    "EvaluationBatch",
    "Sample",
    "SegmentationDataModule",
    "ShapesDataModule",
    "TaggedFolderDataModule",
    "TaggedImages",
    "TaggedIndex",
    "TrainingBatch",
    "TrainingSampler",
    "UnpaddedDistributedSampler",
    "VOCDataModule",
    "read_image",
]
