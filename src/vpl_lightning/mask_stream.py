"""Pseudo-masks made beside the accelerator's work: a bounded queue in front of one process a core."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from vpl_lightning.artifacts import (
    ClipESMaps,
    Manifest,
    PatchMaps,
    fingerprint,
    maps_fingerprint,
    mask_fingerprint,
    remove_leftovers,
)
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.mask_worker import MaskJob, MaskWriter, WorkerProcess
from vpl_lightning.masks import MaskConfig
from vpl_lightning.structures import ClassCAMs, ImageArray

QUEUED_PER_WORKER = 2
"""Images that wait for each worker by default: enough to hide the time in which a batch is encoded."""


class PseudoMaskStream:
    """Takes images with their maps and leaves ``<image id>.png`` masks in a folder.

    :meth:`submit` returns at once unless the queue is full, so that decoding, encoding and refining overlap
    while memory stays bounded. Masks do not depend on the number of workers or the order of images. Every
    mask carries the fingerprint of all that it depends on: interrupted work goes on where it stopped,
    outdated masks count as missing, and several processes may fill the same folder with different images.

    Maps travel and count in half precision, as CLIP-ES stores them, so that masks made later from stored maps
    are the same.

    Args:
        folder: Where the masks go.
        config: How maps become masks.
        settings: What the maps depend on (weights, prototypes, generator, data), for manifest and
            fingerprint.
        workers: Processes; 0 works inside :meth:`submit`, None takes one a core that this process may use
            (give each of several ranks on a machine its share).
        queue_size: Images that may wait; None takes two a worker.
        maps_folder: Where the maps are stored as well, a few kB an image; nowhere if None.

    Raises:
        ConfigurationError: If the refiner is not installed or a number means nothing.
    """

    def __init__(
        self,
        folder: str | Path,
        config: MaskConfig | None = None,
        *,
        settings: Mapping[str, Any],
        workers: int | None = None,
        queue_size: int | None = None,
        maps_folder: str | Path | None = None,
    ) -> None:
        config = config or MaskConfig()
        config.check_refiner()
        self.workers = _cores() if workers is None else workers
        waiting = QUEUED_PER_WORKER * max(self.workers, 1) if queue_size is None else queue_size
        if self.workers < 0 or waiting < 1:
            raise ConfigurationError(
                f"workers={workers} must be 0 or more and queue_size={queue_size} 1 or more"
            )
        self.folder = Path(folder)
        self.maps_folder = None if maps_folder is None else Path(maps_folder)
        own = config.settings(settings)
        _open_folder(self.folder, own)
        if self.maps_folder is not None:
            _open_folder(self.maps_folder, settings)
        self._writer = MaskWriter(
            folder=str(self.folder.absolute()),
            config=config,
            fingerprint=fingerprint(own),
            maps_folder=None if self.maps_folder is None else str(self.maps_folder.absolute()),
            maps_fingerprint=fingerprint(settings),
        )
        self._jobs: queue.Queue[MaskJob | None] = queue.Queue(waiting)
        self._threads: list[threading.Thread] = []
        self._failure: DataError | None = None
        self._lock = threading.Lock()
        self._closed = False
        self.submitted = 0
        """Images taken so far."""
        self.written = 0
        """Masks written so far."""

    def done_ids(self) -> set[str]:
        """Return the images whose mask, and maps if stored, are whole and were made from these settings."""
        return {
            image_id
            for image_id in finished_masks(self.folder, self._writer.fingerprint)
            if self.maps_folder is None
            or maps_fingerprint(self.maps_folder / f"{image_id}.safetensors") == self._writer.maps_fingerprint
        }

    def submit(self, image_id: str, image: ImageArray, maps: ClassCAMs) -> None:
        """Have the mask of an image made; waits while the queue is full.

        Args:
            image_id: Name of the files.
            image: As decoded; must not be written to afterwards.
            maps: Of the image, on any device. PAMR runs on that device, everything else in the workers.

        Raises:
            DataError: If the maps do not fit, or an earlier image failed; names the image.
        """
        if self._closed:
            raise DataError(f"{image_id}: the stream of masks is closed")
        self._raise_failure()
        if image.dtype != np.uint8 or image.shape != (*maps.size, 3):
            raise DataError(
                f"{image_id}: maps of {maps.size} pixels need a uint8 RGB image of that size, "
                f"got {image.dtype} {image.shape}"
            )
        job = MaskJob(
            image_id,
            np.ascontiguousarray(image),
            maps.classes.cpu().numpy().astype(np.int64),
            maps.cams.detach().cpu().numpy().astype(np.float16),
            maps.affinity.detach().cpu().numpy().astype(np.float16),
        )
        self.submitted += 1
        device = maps.affinity.device
        if self.workers == 0 or (self._writer.config.refiner == "pamr" and device.type != "cpu"):
            try:
                self._writer.write(job, device=str(device))
            except DataError as error:
                raise DataError(f"{image_id}: {error}") from error
            self._count()
            return
        if not self._threads:
            self._start()
        self._jobs.put(job)

    def close(self) -> None:
        """Wait until every mask is written and end the workers.

        Raises:
            DataError: If an image failed; names the first.
        """
        self._end()
        self._raise_failure()

    def __enter__(self) -> PseudoMaskStream:
        """Return the stream."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the stream; after an error drop what still waits."""
        if kind is None:
            self.close()
            return
        self._fail(DataError(f"given up after {kind.__name__}"))
        self._end()

    def _start(self) -> None:
        for index in range(self.workers):
            worker = WorkerProcess(self._writer)
            thread = threading.Thread(target=self._feed, args=(worker,), name=f"masks-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _end(self) -> None:
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _feed(self, worker: WorkerProcess) -> None:
        """Hand jobs to one worker; after a failure only empty the queue, so that nobody waits for ever."""
        while (job := self._jobs.get()) is not None:
            if self._failure is None:
                error = worker.write(job)
                if error is None:
                    self._count()
                else:
                    self._fail(DataError(f"{job.image_id}: {error}"))
        worker.close()

    def _count(self) -> None:
        with self._lock:
            self.written += 1

    def _fail(self, error: DataError) -> None:
        with self._lock:
            self._failure = self._failure or error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def finished_masks(folder: str | Path, wanted: str) -> set[str]:
    """Return the ids of the whole masks in ``folder`` that carry the fingerprint ``wanted``."""
    folder = Path(folder)
    return {
        path.relative_to(folder).with_suffix("").as_posix()
        for path in folder.rglob("*.png")
        if mask_fingerprint(path) == wanted
    }


def as_class_cams(maps: ClipESMaps | PatchMaps) -> ClassCAMs:
    """Return maps that were read from a file as a generator would have returned them.

    CLIP-ES stores the refined maps alone, at image size; they then stand for the raw ones too.
    """
    if isinstance(maps, ClipESMaps):
        classes, cams, affinity, size = (
            maps.keys,
            maps.attn_highres,
            maps.attn_highres,
            maps.attn_highres.shape[1:],
        )
    else:
        classes, cams, affinity, size = maps
    return ClassCAMs(
        torch.tensor(classes),
        torch.tensor(cams, dtype=torch.float32),
        torch.tensor(affinity, dtype=torch.float32),
        (int(size[0]), int(size[1])),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if Manifest.match_or_explain(folder, settings) is not None:
        Manifest(settings).write(folder)
