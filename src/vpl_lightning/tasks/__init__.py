"""The two phases as LightningModules."""

from vpl_lightning.decoder import DecoderSpec
from vpl_lightning.inference import InferenceSpec
from vpl_lightning.predictions import PredictionSpec
from vpl_lightning.tasks.base import SegmentationTask
from vpl_lightning.tasks.decoder import DecoderModule
from vpl_lightning.tasks.losses import LossSpec
from vpl_lightning.tasks.optimizers import OptimizerSpec
from vpl_lightning.tasks.vision_prototype import VisionPrototypeModule

__all__ = [
    "DecoderModule",
    "DecoderSpec",
    "InferenceSpec",
    "LossSpec",
    "OptimizerSpec",
    "PredictionSpec",
    "SegmentationTask",
    "VisionPrototypeModule",
]
