"""What the text prototypes are made of: class names, their prompt texts, background words, templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vpl_lightning.errors import ConfigurationError

SHIPPED = Path(__file__).with_name("classes")
TEMPLATES = Path(__file__).with_name("templates.yaml")
DEFAULT_TEMPLATES = "clip_es"
DEFAULT_BACKGROUND = "voc"
DEFAULT_BOX_THRESHOLD = 0.4
"""CLIP-ES's lambda on VOC, a fraction of the map's maximum."""
KEYS = ("name", "foreground", "prompts", "synonyms", "background", "templates", "box_threshold", "variants")
"""Keys of a class set in YAML."""
SLOT = "{}"


@dataclass(frozen=True)
class ClassSet:
    """Classes of a data set and the texts that stand for them.

    Foreground ids run from 0 in the order of ``foreground``; in masks they are 1 to N, and 0 is background.
    """

    name: str
    foreground: tuple[str, ...]
    """Names of the N classes."""
    prompts: tuple[str, ...]
    """Text that fills the templates, one a class; synonyms sit in one text ("backpack,bag")."""
    background: tuple[str, ...]
    """The M words that compete with the classes in the softmax. Empty is allowed, for ablations."""
    templates: tuple[str, ...]
    """Sentences with one ``{}``; the embeddings of several are averaged."""
    box_threshold: float = DEFAULT_BOX_THRESHOLD
    """CLIP-ES's lambda: fraction of the map's maximum above which a patch counts for the affinity's boxes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be a class set."""
        where = f"class set '{self.name}'"
        for key in ("foreground", "prompts", "background", "templates"):
            object.__setattr__(self, key, _texts(getattr(self, key), key, where))
        for key in ("foreground", "templates"):
            if not getattr(self, key):
                raise ConfigurationError(f"{where}: {key} is empty; give at least one")
        for key in ("foreground", "background"):
            repeated = _repeated(getattr(self, key))
            if repeated:
                raise ConfigurationError(f"{where}: {key} names {', '.join(repeated)} twice; keep one")
        if len(self.prompts) != len(self.foreground):
            raise ConfigurationError(
                f"{where}: prompts has {len(self.prompts)} texts for {len(self.foreground)} foreground "
                "classes; give one a class, or leave it out to use the names"
            )
        _check_templates(self.templates, where)
        _threshold(self.box_threshold, where)

    @property
    def num_classes(self) -> int:
        """``N + 1``: the classes of a mask, background included."""
        return len(self.foreground) + 1

    @classmethod
    def from_yaml(cls, path: str | Path) -> ClassSet:
        """Read a class set that a user wrote.

        Only ``foreground`` is required. ``prompts`` is a list, one text a class; ``synonyms`` maps some
        classes to their text instead (a list of synonyms becomes one text, as in CLIP-ES). ``background`` is
        a list of words or the name of a shipped set whose words are borrowed, without those that name one of
        the classes; VOC's are borrowed when it is left out. ``templates`` is a name or a list; ``variants``
        maps names to further synonyms.

        Raises:
            ConfigurationError: Names the file, the key, the value and the fix.
        """
        return cls.from_dict(_read_yaml(Path(path)), name=Path(path).stem, where=str(path))

    @classmethod
    def from_dict(
        cls, value: Mapping[str, Any], *, name: str = "custom", variant: str = "", where: str = "class set"
    ) -> ClassSet:
        """Make a class set of plain values, as YAML or :meth:`to_dict` gives them.

        Args:
            value: See :meth:`from_yaml`.
            name: Used when ``value`` has none.
            variant: One of the value's ``variants``, or empty.
            where: What error messages call the source.

        Raises:
            ConfigurationError: Names the key, the value and the fix.
        """
        unknown = sorted(str(key) for key in set(value) - set(KEYS))
        if unknown:
            raise ConfigurationError(
                f"{where}: unknown key {', '.join(unknown)}; the keys are {', '.join(KEYS)}"
            )
        if "foreground" not in value:
            raise ConfigurationError(f"{where}: no key 'foreground'; list the class names under it")
        foreground = _texts(value["foreground"], "foreground", where)
        prompts = _prompts(value, foreground, variant, where)
        title = str(value.get("name", name))
        return cls(
            name=f"{title}:{variant}" if variant else title,
            foreground=foreground,
            prompts=prompts,
            background=_background(
                value.get("background", DEFAULT_BACKGROUND), {*foreground, *prompts}, where
            ),
            templates=templates(value.get("templates", DEFAULT_TEMPLATES)),
            box_threshold=_threshold(value.get("box_threshold", DEFAULT_BOX_THRESHOLD), where),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that :meth:`from_dict` reads back, for YAML, JSON and fingerprints."""
        return {key: list(part) if isinstance(part, tuple) else part for key, part in asdict(self).items()}

    def with_templates(self, value: str | Iterable[str]) -> ClassSet:
        """Return the same classes with other templates.

        Args:
            value: A name (``clip_es``, ``single``, ``imagenet7``, ``imagenet80``), one template, or several.

        Raises:
            ConfigurationError: If the name is unknown or a template has no ``{}``.
        """
        return replace(self, templates=templates(value))


def class_set(value: str | ClassSet) -> ClassSet:
    """Return a class set by name or file.

    Args:
        value: The name of a shipped set (``voc``, ``coco``, ``shapes``), a name with a variant
            (``coco:clip_es_verbatim``: CLIP-ES's own spelling "sknowboard"), the path of a YAML file, or a
            class set.

    Raises:
        ConfigurationError: If it is none of these; lists what there is.
    """
    if isinstance(value, ClassSet):
        return value
    if Path(value).is_file():
        return ClassSet.from_yaml(value)
    name, _, variant = value.partition(":")
    known = shipped_class_sets()
    if name not in known:
        raise ConfigurationError(
            f"classes: '{value}' is neither a shipped class set ({', '.join(known)}) nor a YAML file that "
            "exists"
        )
    return ClassSet.from_dict(
        _read_yaml(SHIPPED / f"{name}.yaml"), variant=variant, where=f"class set '{name}'"
    )


def shipped_class_sets() -> tuple[str, ...]:
    """Return the names of the shipped class sets."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def templates(value: str | Iterable[str]) -> tuple[str, ...]:
    """Return templates by name, or as given.

    Raises:
        ConfigurationError: If a name is unknown; lists those that are known.
    """
    if not isinstance(value, str):
        return _texts(value, "templates", "class set")
    if SLOT in value:
        return (value,)
    named = named_templates()
    if value not in named:
        raise ConfigurationError(
            f"templates: '{value}' is unknown; choose one of {', '.join(named)}, or write a sentence with "
            f"{SLOT}"
        )
    return named[value]


@cache
def named_templates() -> dict[str, tuple[str, ...]]:
    """Return the shipped templates by name."""
    return {name: tuple(texts) for name, texts in _read_yaml(TEMPLATES).items()}


def _prompts(
    value: Mapping[str, Any], foreground: tuple[str, ...], variant: str, where: str
) -> tuple[str, ...]:
    if "prompts" in value and "synonyms" in value:
        raise ConfigurationError(
            f"{where}: give prompts (one text a class) or synonyms (some classes), not both"
        )
    synonyms = dict(_mapping(value.get("synonyms", {}), "synonyms", where))
    variants = _mapping(value.get("variants", {}), "variants", where)
    if variant and variant not in variants:
        raise ConfigurationError(
            f"{where} has no variant '{variant}'; it has: {', '.join(map(str, variants)) or 'none'}"
        )
    synonyms.update(_mapping(variants[variant], "variants", where) if variant else {})
    for name in synonyms:
        if name not in foreground:
            raise ConfigurationError(
                f"{where}: synonyms names '{name}', which is not among the foreground classes"
            )
    base = _texts(value.get("prompts", foreground), "prompts", where)
    if not synonyms:
        return base
    joined = {
        name: text if isinstance(text, str) else ",".join(_texts(text, "synonyms", where))
        for name, text in synonyms.items()
    }
    return tuple(joined.get(name, prompt) for name, prompt in zip(foreground, base, strict=True))


def _background(value: Any, taken: set[str], where: str) -> tuple[str, ...]:
    if not isinstance(value, str):
        return _texts(value, "background", where)
    if value not in shipped_class_sets():
        raise ConfigurationError(
            f"{where}: background is '{value}'; list the words, or borrow those of "
            f"{', '.join(shipped_class_sets())}"
        )
    words = _texts(_read_yaml(SHIPPED / f"{value}.yaml")["background"], "background", value)
    return tuple(word for word in words if word not in taken)


def _mapping(value: Any, key: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{where}: {key} is {value!r}; write a mapping of class names to texts")
    return value


def _texts(value: Any, key: str, where: str) -> tuple[str, ...]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise ConfigurationError(f"{where}: {key} is {value!r}; write a list of texts")
    texts = tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ConfigurationError(f"{where}: {key} holds {text!r}, which is not a text; put it in quotes")
    return texts


def _check_templates(values: tuple[str, ...], where: str) -> None:
    for template in values:
        if template.count(SLOT) != 1:
            raise ConfigurationError(
                f"{where}: templates holds {template!r}; write {SLOT} once where the class goes"
            )


def _threshold(value: Any, where: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ConfigurationError(f"{where}: box_threshold is {value!r}; choose a number in [0, 1)")
    return float(value)


def _repeated(texts: tuple[str, ...]) -> list[str]:
    return sorted({text for text in texts if texts.count(text) > 1})


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"classes: {path} cannot be read: {error.strerror}; check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"classes: {path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"classes: {path} holds {type(value).__name__}; write a mapping with 'foreground'"
        )
    return value
