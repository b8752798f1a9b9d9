"""Settings from which a configuration file builds the frozen CLIP and the CAM generator."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vpl_lightning.cams import CAMGenerator
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.clip.class_sets import templates
from vpl_lightning.errors import ConfigurationError
from vpl_lightning.registry import baselines, check_options


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Where the frozen CLIP comes from. Without any source: the tiny CLIP that the package carries.

    Attributes:
        checkpoint: A file: OpenAI's archive or state dict, an open_clip state dict, or safetensors.
        open_clip: An open_clip model name, such as ``ViT-B-16-quickgelu``.
        pretrained: The tag or file of ``open_clip``'s weights, such as ``openai``; None for random weights.
        factory: ``module:function`` that returns a :class:`CLIPEncoder`, called with ``factory_options``.
        factory_options: Keyword arguments of the factory.
        quick_gelu: The activation of ``checkpoint`` where the file does not tell.
        attention_blocks: Last blocks whose attention the affinity averages (CLIP-ES: 8).
        precision: Arithmetic of the frozen blocks; the last block and all maps are float32.
    """

    checkpoint: str | None = None
    open_clip: str | None = None
    pretrained: str | None = None
    factory: str | None = None
    factory_options: Mapping[str, Any] = field(default_factory=dict)
    quick_gelu: bool | None = None
    attention_blocks: int = 8
    precision: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        """Refuse contradictory sources."""
        sources = {key: getattr(self, key) for key in ("checkpoint", "open_clip", "factory")}
        given = [key for key, value in sources.items() if value]
        if len(given) > 1:
            raise ConfigurationError(f"encoder: give one of {', '.join(given)}, not {len(given)}")
        if self.pretrained and not self.open_clip:
            raise ConfigurationError(f"encoder.pretrained={self.pretrained!r} needs encoder.open_clip")
        if self.factory and ":" not in self.factory:
            raise ConfigurationError(f"encoder.factory={self.factory!r} must be 'module:function'")
        if self.attention_blocks < 1:
            raise ConfigurationError(f"encoder.attention_blocks={self.attention_blocks} must be at least 1")

    def build(self) -> CLIPEncoder:
        """Load the encoder.

        Raises:
            WeightsError: If the weights cannot be read as a CLIP vision transformer.
            ConfigurationError: If the factory cannot be found or returns something else.
        """
        if self.factory:
            return self._call_factory(self.factory)
        options: dict[str, Any] = {"attention_blocks": self.attention_blocks, "precision": self.precision}
        if self.checkpoint:
            return CLIPEncoder.from_checkpoint(self.checkpoint, quick_gelu=self.quick_gelu, **options)
        if self.open_clip:
            return CLIPEncoder.from_open_clip(self.open_clip, pretrained=self.pretrained, **options)
        return CLIPEncoder.embedded(**options)

    def _call_factory(self, factory: str) -> CLIPEncoder:
        module, _, function = factory.partition(":")
        try:
            build = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigurationError(f"encoder.factory={factory!r} cannot be imported: {error}") from error
        encoder = build(**self.factory_options)
        if not isinstance(encoder, CLIPEncoder):
            raise ConfigurationError(
                f"encoder.factory={factory!r} returned {type(encoder).__name__}, not a CLIPEncoder"
            )
        return encoder


@dataclass(frozen=True, kw_only=True)
class GeneratorSpec:
    """Which registered CAM generator to use, and its own options.

    Attributes:
        name: A name that ``vpl baselines`` lists.
        options: Keyword arguments of that generator.
        templates: Prompts of the text prototypes instead of the class set's: ``single`` (the paper's single
            prompt), ``clip_es``, the ensembles ``imagenet7`` and ``imagenet80``, or sentences with ``{}``.
    """

    name: str = "clip_es"
    options: Mapping[str, Any] = field(default_factory=dict)
    templates: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse unknown templates; the generator is not imported yet."""
        if self.templates is not None:
            templates(self.templates)

    def check(self) -> None:
        """Import the generator, and refuse unknown names and options.

        Raises:
            ConfigurationError: Naming what is unknown.
            PluginError: If it cannot be imported.
        """
        check_options(self.name, baselines.get(self.name), dict(self.options))

    def build(self, encoder: CLIPEncoder, classes: ClassSet) -> CAMGenerator:
        """Build the generator."""
        if self.templates is not None:
            classes = classes.with_templates(self.templates)
        return baselines.create(self.name, encoder=encoder, classes=classes, **self.options)


def settings_of(spec: Any) -> dict[str, Any]:
    """Return a settings dataclass as plain values, for fingerprints and records."""
    return asdict(spec)
