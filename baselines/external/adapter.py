"""Maps from a command of an outside checkout, run as a subprocess a batch."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vpl_lightning.artifacts import read_clip_es
from vpl_lightning.cams import BaselineInfo, CAMGenerator
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.errors import ConfigurationError, DataError, PluginError
from vpl_lightning.structures import ClassCAMs, EncodedImages, ImageArray

PLACEHOLDERS = ("images", "labels", "prototypes", "output")
NEEDED = ("{images}", "{output}")
STDERR_LINES = 20
"""Last lines of a failed command's error output that the message repeats."""
RANGE_TOLERANCE = 1e-3
"""How far a map may leave [0, 1]: the files hold half precision."""


class External(CAMGenerator):
    """Hands images, tags and prototypes to a command in files, and reads its maps in CLIP-ES's format.

    Args:
        encoder: The frozen CLIP; its joint space is that of the prototypes.
        classes: Class set.
        command: Program and arguments. ``{images}`` (folder of PNG files), ``{labels}`` (JSON),
            ``{prototypes}`` (``.npy``) and ``{output}`` (folder for ``<image>.npy``) are replaced by paths.
        folder: Where the command runs, such as the checkout; None: here.
        timeout: Seconds after which a batch is given up.
    """

    info = BaselineInfo(
        paper="whatever the command implements",
        origin="an outside checkout, run as a subprocess; none comes with this library",
        licence="MIT (this adapter); the command's own",
    )

    def __init__(
        self,
        encoder: CLIPEncoder,
        classes: ClassSet | str,
        *,
        command: Sequence[str],
        folder: str | None = None,
        timeout: float = 3600.0,
    ) -> None:
        super().__init__(encoder, classes)
        missing = [name for name in NEEDED if not any(name in word for word in command)]
        if isinstance(command, str) or missing:
            raise ConfigurationError(
                f"command={command!r} must be a list of words that holds {', '.join(NEEDED)}; "
                "{labels} and {prototypes} are the other placeholders"
            )
        if timeout <= 0:
            raise ConfigurationError(f"timeout={timeout} must be a positive number of seconds")
        self.command, self.folder, self.timeout = list(command), folder, timeout

    @torch.no_grad()
    def localise(
        self, images: Sequence[ImageArray], encoded: EncodedImages, labels: Sequence[Tensor]
    ) -> list[ClassCAMs]:
        """Make the maps of images that share a patch grid; one run of the command.

        Raises:
            PluginError: If the command fails, takes too long, or leaves no usable maps.
        """
        names = [f"{index:06d}" for index in range(len(images))]
        with tempfile.TemporaryDirectory(prefix="vpl_external_") as folder:
            paths = self._hand_over(Path(folder), names, images, labels)
            self._run(paths)
            found = [
                self._read(paths["output"] / f"{name}.npy", ids)
                for name, ids in zip(names, labels, strict=True)
            ]
        return [
            ClassCAMs(ids, _on_grid(maps, encoded.grid), maps, (image.shape[0], image.shape[1]))
            for image, ids, maps in zip(images, labels, found, strict=True)
        ]

    def _hand_over(
        self, folder: Path, names: Sequence[str], images: Sequence[ImageArray], labels: Sequence[Tensor]
    ) -> dict[str, Path]:
        paths = {
            "images": folder / "images",
            "labels": folder / "labels.json",
            "prototypes": folder / "prototypes.npy",
            "output": folder / "output",
        }
        paths["images"].mkdir()
        paths["output"].mkdir()
        for name, image in zip(names, images, strict=True):
            Image.fromarray(image).save(paths["images"] / f"{name}.png", compress_level=1)
        about = {
            "classes": list(self.classes.foreground),
            "background": list(self.classes.background),
            "labels": {name: ids.tolist() for name, ids in zip(names, labels, strict=True)},
        }
        paths["labels"].write_text(json.dumps(about))
        np.save(paths["prototypes"], self.prototypes.cpu().numpy())
        return paths

    def _run(self, paths: dict[str, Path]) -> None:
        words = list(self.command)
        for name in PLACEHOLDERS:
            words = [word.replace(f"{{{name}}}", str(paths[name])) for word in words]
        try:
            done = subprocess.run(  # noqa: S603 - the user's own command, no shell
                words, cwd=self.folder, timeout=self.timeout, capture_output=True, text=True, errors="replace"
            )
        except subprocess.TimeoutExpired as error:
            raise PluginError(f"external: {words[0]} took more than timeout={self.timeout:g} s") from error
        except OSError as error:
            raise PluginError(f"external: {words[0]} cannot be run: {error}") from error
        if done.returncode != 0:
            tail = "\n".join(done.stderr.splitlines()[-STDERR_LINES:])
            raise PluginError(f"external: {' '.join(words)} ended with exit code {done.returncode}:\n{tail}")

    def _read(self, path: Path, ids: Tensor) -> Float[Tensor, "K H W"]:
        try:
            stored = read_clip_es(path)
        except DataError as error:
            raise PluginError(f"external: the command left no usable maps: {error}") from error
        rows = {key: row for row, key in enumerate(stored.keys.tolist())}
        absent = [label for label in ids.tolist() if label not in rows]
        if absent:
            raise PluginError(f"external: {path.name} has maps of classes {sorted(rows)}, not of {absent}")
        maps = torch.from_numpy(stored.attn_highres[[rows[label] for label in ids.tolist()]]).float()
        if not bool(((maps >= -RANGE_TOLERANCE) & (maps <= 1 + RANGE_TOLERANCE)).all()):
            raise PluginError(
                f"external: maps of {path.name} leave [0, 1] or are not finite ({maps.min()}..{maps.max()})"
            )
        return maps.clamp(0, 1).to(ids.device)


def _on_grid(maps: Float[Tensor, "K H W"], grid: tuple[int, int]) -> Float[Tensor, "K h w"]:
    """Mean of each patch."""
    return F.interpolate(maps[None], grid, mode="area")[0]
