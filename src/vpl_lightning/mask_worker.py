"""The process that refines and writes pseudo-masks: numpy, the CRF and a PNG encoder, but no torch.

It is a plain child process that reads jobs from its standard input and ends with it. So it dies with its
parent, even a killed one, needs no guard in the user's main module and starts in a fraction of torch's import
time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jaxtyping import Float16, Int64, UInt8

from vpl_lightning.artifacts.maps import write_maps
from vpl_lightning.artifacts.palette import write_mask
from vpl_lightning.errors import VPLError
from vpl_lightning.functional.crf import CRFConfig
from vpl_lightning.masks import MaskConfig, make_mask

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which libraries are told to use one thread; there is a process a core already."""

NICENESS = 5
"""Of the workers, so that on a CPU the encoder's threads go first; little, since others may share the machine."""


class MaskJob(NamedTuple):
    """One image and its maps, as small as they can travel."""

    image_id: str
    """Name of the files, without their suffix."""
    image: UInt8[np.ndarray, "H W 3"]
    """As decoded."""
    classes: Int64[np.ndarray, " K"]
    """0-based foreground ids."""
    cams: Float16[np.ndarray, "K h w"]
    """Raw maps on the patch grid; only stored."""
    affinity: Float16[np.ndarray, "K r s"]
    """Refined maps, from which the mask is made."""


@dataclass(frozen=True, kw_only=True)
class MaskWriter:
    """Makes and writes the mask of one image after the other.

    Attributes:
        folder: Where the masks go.
        config: The settings.
        fingerprint: Of all that the masks depend on; kept inside each.
        maps_folder: Where the maps go as well; nowhere if None.
        maps_fingerprint: Of all that the maps depend on.
    """

    folder: str
    config: MaskConfig
    fingerprint: str
    maps_folder: str | None = None
    maps_fingerprint: str | None = None

    def write(self, job: MaskJob, *, device: str = "cpu") -> None:
        """Write the mask, and before it the maps if they are wanted, each whole or not at all."""
        if self.maps_folder is not None:
            write_maps(
                Path(self.maps_folder) / f"{job.image_id}.safetensors",
                classes=job.classes,
                cams=job.cams,
                affinity=job.affinity,
                size=(job.image.shape[0], job.image.shape[1]),
                fingerprint=self.maps_fingerprint,
            )
        labels = make_mask(job.image, job.affinity, job.classes, self.config, device=device)
        write_mask(Path(self.folder) / f"{job.image_id}.png", labels, fingerprint=self.fingerprint)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MaskWriter:
        """Rebuild the writer on the other side of a pipe."""
        config = dict(values["config"])
        if isinstance(config["crf"], dict):
            config["crf"] = CRFConfig(**config["crf"])
        return cls(**{**values, "config": MaskConfig(**config)})


def send(sink: IO[bytes], head: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write a line of JSON and the bytes of arrays."""
    layout = [[array.dtype.str, list(array.shape)] for array in arrays]
    sink.write(json.dumps({**head, "arrays": layout}).encode() + b"\n")
    for array in arrays:
        sink.write(array.tobytes())
    sink.flush()


def receive(source: IO[bytes]) -> tuple[dict[str, Any], list[np.ndarray]] | None:
    """Read what :func:`send` wrote; None at the end of the stream, be it in the middle of a message."""
    line = source.readline()
    if not line.endswith(b"\n"):
        return None
    head: dict[str, Any] = json.loads(line)
    arrays = []
    for code, shape in head.pop("arrays"):
        dtype = np.dtype(code)
        wanted = dtype.itemsize * int(np.prod(shape))
        content = source.read(wanted)
        if len(content) < wanted:
            return None
        arrays.append(np.frombuffer(content, dtype).reshape(shape))
    return head, arrays


def serve(writer: MaskWriter, source: IO[bytes], sink: IO[bytes]) -> None:
    """Write the masks of jobs until one has no id or the source ends; answer each by its error or none."""
    while (message := receive(source)) is not None and message[0]["id"] is not None:
        head, (image, classes, cams, affinity) = message
        error = None
        try:
            writer.write(MaskJob(head["id"], image, classes, cams, affinity))
        except VPLError as problem:
            error = str(problem)
        except Exception as problem:
            error = repr(problem)
        send(sink, {"error": error})


def main() -> None:
    """Serve the parent process over standard input and output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    serve(MaskWriter.from_json(json.loads(sys.argv[1])), sys.stdin.buffer, answers)


class WorkerProcess:
    """The parent's end: the same interpreter and module path, one thread, no copy of the main module.

    Args:
        writer: What the worker writes, and where.
    """

    def __init__(self, writer: MaskWriter) -> None:
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from vpl_lightning.mask_worker import main; main()"
        )
        self.process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-c", program, json.dumps(writer.to_json())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **dict.fromkeys(THREADS, "1")},
        )

    def write(self, job: MaskJob) -> str | None:
        """Have a mask written and return what went wrong, if anything did."""
        answer = None
        if self.process.stdin is not None and self.process.stdout is not None:
            with suppress(BrokenPipeError):
                send(
                    self.process.stdin, {"id": job.image_id}, [job.image, job.classes, job.cams, job.affinity]
                )
                answer = receive(self.process.stdout)
        if answer is None:
            self.process.kill()
            return f"the process that was making its mask ended with exit code {self.process.wait()}"
        error: str | None = answer[0]["error"]
        return error

    def close(self) -> None:
        """Tell the worker to end, since forks of this process may hold its input open, and wait for it."""
        with suppress(BrokenPipeError):
            if self.process.stdin is not None:
                send(self.process.stdin, {"id": None})
        self.process.communicate()
