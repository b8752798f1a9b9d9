"""CAM generators by name: registered in process, or through an entry point of any installed package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from vpl_lightning.cams import BaselineInfo, CAMGenerator
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.errors import ConfigurationError, PluginError

GROUP = "vpl_lightning.baselines"
"""Entry-point group that a package declares to appear in :data:`baselines`."""

G = TypeVar("G", bound=type[CAMGenerator])


class Registry:
    """Maps names to generator classes. Listing imports nothing; looking one up imports that one alone."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._classes: dict[str, type[CAMGenerator]] = {}

    def register(self, name: str) -> Callable[[G], G]:
        """Return a decorator that registers a generator class under ``name``.

        Raises:
            PluginError: If the name is taken, in process or by an installed package; names the first owner.
        """

        def decorate(cls: G) -> G:
            owner = self._owner(name)
            same = owner in (
                f"{cls.__module__}:{cls.__qualname__}",
                f"{cls.__module__.rpartition('.')[0]}:{cls.__qualname__}",
            )
            if owner is not None and not same:
                raise PluginError(f"the baseline name '{name}' is taken by {owner}; choose another one")
            self._classes[name] = cls
            return cls

        return decorate

    def __iter__(self) -> Iterator[str]:
        """Iterate over the known names, sorted, importing none of them."""
        return iter(sorted({*self._classes, *self._entry_points()}))

    def __contains__(self, name: object) -> bool:
        """Tell whether a name is known."""
        return name in self._classes or name in self._entry_points()

    def get(self, name: str) -> type[CAMGenerator]:
        """Return the class registered under ``name``, importing it if need be.

        Raises:
            ConfigurationError: If nobody registered the name; lists those that are known.
            PluginError: If two packages claim the name, or its plug-in cannot be imported.
        """
        if name in self._classes:
            return self._classes[name]
        claims = self._entry_points().get(name)
        if claims is None:
            raise ConfigurationError(f"unknown baseline '{name}'; available: {', '.join(self)}")
        if len(claims) > 1:
            raise PluginError(
                f"the baseline '{name}' is claimed by {claims[0].value} and by {claims[1].value}"
            )
        try:
            loaded = claims[0].load()
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"the baseline '{name}' ({claims[0].value}) cannot be imported: {error!r}"
            ) from error
        if not (inspect.isclass(loaded) and issubclass(loaded, CAMGenerator)) or inspect.isabstract(loaded):
            raise PluginError(f"the baseline '{name}' ({claims[0].value}) is not a concrete CAMGenerator")
        if not isinstance(loaded.info, BaselineInfo):
            raise PluginError(
                f"the baseline '{name}' ({claims[0].value}) has an info that is no BaselineInfo"
            )
        self._classes[name] = loaded
        return loaded

    def create(
        self, name: str, *, encoder: CLIPEncoder, classes: ClassSet | str, **options: object
    ) -> CAMGenerator:
        """Build the generator ``name`` for an encoder and a class set.

        Raises:
            ConfigurationError: If the name or an option is unknown; lists those that are known.
        """
        cls = self.get(name)
        check_options(name, cls, options)
        return cls(encoder, classes, **options)

    def origin(self, name: str) -> str:
        """Return where a name comes from (``module:Class``), importing nothing."""
        return self._owner(name) or ""

    def _owner(self, name: str) -> str | None:
        if name in self._classes:
            cls = self._classes[name]
            return f"{cls.__module__}:{cls.__qualname__}"
        claims = self._entry_points().get(name)
        return claims[0].value if claims else None

    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self._group):
            claims = found.setdefault(point.name, [])
            if point.value not in [claim.value for claim in claims]:
                claims.append(point)
        return found


def check_options(name: str, cls: type[CAMGenerator], options: dict[str, object]) -> None:
    """Refuse options that a generator's constructor does not take, and the lack of those that it needs.

    Raises:
        ConfigurationError: Naming the options and those that exist.
    """
    parameters = [
        p for key, p in inspect.signature(cls).parameters.items() if key not in ("encoder", "classes")
    ]
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
    unknown = [] if takes_any else sorted(set(options) - set(named))
    if unknown:
        raise ConfigurationError(
            f"baseline '{name}' has no option {', '.join(unknown)}; it takes: {', '.join(named) or 'none'}"
        )
    missing = [key for key, p in named.items() if p.default is p.empty and key not in options]
    if missing:
        raise ConfigurationError(f"baseline '{name}' needs the option {', '.join(missing)}")


baselines = Registry(GROUP)
"""The registry of CAM generators."""
