"""The frozen CLIP, and the classes and words that it is asked about."""

from vpl_lightning.clip.class_sets import ClassSet, class_set, named_templates, shipped_class_sets
from vpl_lightning.clip.encoder import CLIPEncoder, DenseKind
from vpl_lightning.clip.preprocess import patch_grid, resize_to_patches

__all__ = [
    "CLIPEncoder",
    "ClassSet",
    "DenseKind",
    "class_set",
    "named_templates",
    "patch_grid",
    "resize_to_patches",
    "shipped_class_sets",
]
