"""The stream of masks: same bytes whatever the workers and after any kill, errors that name the image."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.masks.mask_run import images_and_maps, run
from vpl_lightning import mask_stream, mask_worker
from vpl_lightning.artifacts import (
    Manifest,
    mask_fingerprint,
    read_clip_es,
    read_maps,
    read_mask,
    write_clip_es,
)
from vpl_lightning.errors import ConfigurationError, DataError
from vpl_lightning.functional.crf import CRFConfig, dense_crf
from vpl_lightning.mask_stream import PseudoMaskStream, as_class_cams, finished_masks
from vpl_lightning.masks import MaskConfig, make_mask
from vpl_lightning.structures import ClassCAMs

SETTINGS = {"prototypes": "abc"}
ROOT = Path(__file__).parents[2]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def stream(folder, config=None, **options):
    return PseudoMaskStream(folder, config, settings=SETTINGS, **{"workers": 0, **options})


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Masks and maps of an undisturbed run without workers."""
    folder = tmp_path_factory.mktemp("expected")
    run(folder, workers=0)
    return contents(folder / "masks"), contents(folder / "maps")


def test_a_mask_is_the_crf_of_the_refined_maps(tmp_path):
    image_id, image, maps = next(images_and_maps())
    with stream(tmp_path, MaskConfig(crf="weclip", power=2.0)) as masks:
        masks.submit(image_id, image, maps)
    half = ClassCAMs(maps.classes, maps.cams, maps.affinity.half().float(), maps.size)
    refined = half.refined.numpy()
    scores = np.concatenate([(1 - refined.max(0, keepdims=True)) ** 2, refined])
    marginals = dense_crf(image, scores, "weclip")
    labels = np.array([0, *(maps.classes.numpy() + 1)])[marginals.argmax(0)]
    labels[marginals.max(0) < 0.95] = 255
    mask = read_mask(tmp_path / f"{image_id}.png")
    assert (mask == labels).mean() > 0.999
    assert set(np.unique(mask)) >= {0, 255}


def test_without_a_crf_nothing_is_given_up():
    _, image, maps = next(images_and_maps())
    affinity, classes = maps.affinity.numpy(), maps.classes.numpy()
    plain = make_mask(image, affinity, classes, MaskConfig(refiner="none"))
    refined = maps.refined.numpy()
    scores = np.concatenate([1 - refined.max(0, keepdims=True), refined])
    assert (plain == np.array([0, *(classes + 1)])[scores.argmax(0)]).mean() > 0.999
    smooth = make_mask(image, affinity, classes, MaskConfig(refiner="pamr"))
    assert 255 not in smooth
    assert 0.5 < (smooth == plain).mean() < 1
    assert 255 in make_mask(image, affinity, classes, MaskConfig(refiner="none", confidence=0.95))


@pytest.mark.parametrize("workers", [1, 2])
def test_same_bytes_with_workers_and_in_any_order(tmp_path, expected, workers):
    run(tmp_path, workers=workers, backwards=True)
    assert (contents(tmp_path / "masks"), contents(tmp_path / "maps")) == expected
    assert Manifest.match_or_explain(tmp_path / "masks", MaskConfig().settings(SETTINGS)) is None


def test_two_ranks_may_fill_one_folder(tmp_path, expected):
    items = list(images_and_maps())
    options = {"workers": 1, "maps_folder": tmp_path / "maps"}
    with stream(tmp_path / "masks", **options) as one, stream(tmp_path / "masks", **options) as other:
        for index, item in enumerate(items):
            (one, other)[index % 2].submit(*item)
    assert (contents(tmp_path / "masks"), contents(tmp_path / "maps")) == expected
    assert one.done_ids() == other.done_ids() == {item[0] for item in items}


def test_pamr_is_the_same_in_a_worker(tmp_path):
    image_id, image, maps = next(images_and_maps())
    for workers in (0, 1):
        with stream(tmp_path / str(workers), MaskConfig(refiner="pamr"), workers=workers) as masks:
            masks.submit(image_id, image, maps)
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


def test_masks_from_stored_maps_are_the_same(tmp_path, expected):
    run(tmp_path / "first", workers=0)
    with stream(tmp_path / "again") as masks:
        for image_id, image, _ in images_and_maps():
            maps = as_class_cams(read_maps(tmp_path / "first" / "maps" / f"{image_id}.safetensors"))
            masks.submit(image_id, image, maps)
    assert contents(tmp_path / "again") == expected[0]


def test_maps_of_clip_es_make_masks(tmp_path):
    image_id, image, maps = next(images_and_maps())
    write_clip_es(tmp_path / "a.npy", maps.classes.numpy(), maps.refined.numpy())
    found = as_class_cams(read_clip_es(tmp_path / "a.npy"))
    assert (found.size, found.classes.tolist()) == (maps.size, maps.classes.tolist())
    for name, each in (("ours", maps), ("theirs", found)):
        with stream(tmp_path / name) as masks:
            masks.submit(image_id, image, each)
    ours, theirs = (read_mask(tmp_path / name / f"{image_id}.png") for name in ("ours", "theirs"))
    assert (ours == theirs).mean() > 0.995


def test_only_whole_masks_of_these_settings_are_done(tmp_path, expected):
    run(tmp_path, workers=0)
    masks, maps = tmp_path / "masks", tmp_path / "maps"
    names = sorted(path.stem for path in masks.glob("*.png"))
    with stream(masks, maps_folder=maps) as again:
        assert again.done_ids() == set(names)
        assert (again.submitted, again.written) == (0, 0)
    (masks / f"{names[0]}.png").write_bytes((masks / f"{names[0]}.png").read_bytes()[:-7])
    (maps / f"{names[1]}.safetensors").unlink()
    assert stream(masks, maps_folder=maps).done_ids() == set(names[2:])
    assert stream(masks).done_ids() == set(names[1:])
    changed = MaskConfig(power=2.0)
    assert (
        Manifest.match_or_explain(masks, changed.settings(SETTINGS)) == "masks.power changed from 1.0 to 2.0"
    )
    assert stream(masks, changed).done_ids() == set()
    assert Manifest.match_or_explain(masks, changed.settings(SETTINGS)) is None
    assert finished_masks(masks, mask_fingerprint(masks / f"{names[3]}.png")) == set(names[1:])


def test_settings_that_a_mask_does_not_depend_on_leave_it_valid():
    assert MaskConfig(crf="weclip").settings({}) == MaskConfig(crf="afa").settings({})
    assert MaskConfig(confidence=0.95).settings({}) == MaskConfig().settings({})
    assert MaskConfig(refiner="none", crf="toco").settings({}) == MaskConfig(refiner="none").settings({})
    assert MaskConfig(crf=CRFConfig(iterations=5)).settings({}) != MaskConfig(crf=CRFConfig()).settings({})


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_name_the_image(tmp_path, workers):
    image_id, image, maps = next(images_and_maps())
    wrong = ClassCAMs(torch.tensor([1, 254]), maps.cams, maps.affinity, maps.size)
    with pytest.raises(DataError, match="second: class ids"):  # noqa: PT012, SIM117
        with stream(tmp_path, workers=workers) as masks:
            masks.submit(image_id, image, maps)
            masks.submit("second", image, wrong)
            masks.close()
    assert [path.stem for path in tmp_path.glob("*.png")] == [image_id]
    with pytest.raises(DataError, match="closed"):
        masks.submit("third", image, maps)
    with stream(tmp_path) as masks, pytest.raises(DataError, match=r"third: maps of .* float64"):
        masks.submit("third", image / 2, maps)


def test_later_images_are_refused_after_an_error(tmp_path):
    _, image, maps = next(images_and_maps())
    blocked = tmp_path / "blocked.png"
    blocked.mkdir()
    with pytest.raises(DataError, match=r"blocked: .*IsADirectoryError"):  # noqa: PT012
        masks = stream(tmp_path, workers=1, queue_size=1)
        for name in ("blocked", *map(str, range(1000))):
            masks.submit(name, image, maps)
    with pytest.raises(DataError, match="blocked"):
        masks.close()
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*.partial"))


def test_a_dead_worker_is_named(tmp_path, monkeypatch):
    image_id, image, maps = next(images_and_maps())
    started = []

    class Watched(mask_worker.WorkerProcess):
        def __init__(self, writer):
            super().__init__(writer)
            started.append(self.process)

    monkeypatch.setattr(mask_stream, "WorkerProcess", Watched)
    masks = stream(tmp_path, workers=1)
    masks.submit(image_id, image, maps)
    while masks.written < 1:
        time.sleep(0.01)
    started[0].kill()
    started[0].wait()
    masks.submit("lost", image, maps)
    with pytest.raises(DataError, match="lost: the process that was making its mask ended with exit code -9"):
        masks.close()


def test_closes_while_somebody_else_holds_the_pipe(tmp_path, monkeypatch):
    """As a data loader's forked workers do, which inherit every file of the process."""
    image_id, image, maps = next(images_and_maps())
    held = []

    class Held(mask_worker.WorkerProcess):
        def __init__(self, writer):
            super().__init__(writer)
            held.append(os.dup(self.process.stdin.fileno()))

    monkeypatch.setattr(mask_stream, "WorkerProcess", Held)
    with stream(tmp_path, workers=1) as masks:
        masks.submit(image_id, image, maps)
    os.close(held[0])
    assert masks.done_ids() == {image_id}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_without_classes_is_background(tmp_path, workers):
    _, image, maps = next(images_and_maps())
    empty = ClassCAMs(maps.classes[:0], maps.cams[:0], maps.affinity[:0], maps.size)
    with stream(tmp_path, workers=workers, maps_folder=tmp_path / "maps") as masks:
        masks.submit("empty", image, empty)
    assert not read_mask(tmp_path / "empty.png").any()
    assert as_class_cams(read_maps(tmp_path / "maps" / "empty.safetensors")).refined.shape == (0, *maps.size)


def test_an_error_in_the_loop_drops_what_waits(tmp_path):
    _, image, maps = next(images_and_maps())
    with pytest.raises(ZeroDivisionError), stream(tmp_path, workers=1, queue_size=50) as masks:  # noqa: PT012
        for number in range(40):
            masks.submit(str(number), image, maps)
        raise ZeroDivisionError
    assert masks.written < 40
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("masks-")]


def test_the_queue_is_bounded(tmp_path, monkeypatch):
    """With a worker that never answers, no more images are taken than wait and are under way."""
    _, image, maps = next(images_and_maps())
    gate = threading.Event()

    class Waiting:
        def __init__(self, writer):
            pass

        def write(self, job):
            gate.wait(30)

        def close(self):
            pass

    monkeypatch.setattr(mask_stream, "WorkerProcess", Waiting)
    masks = stream(tmp_path, workers=2, queue_size=3)
    taken = []

    def submit():
        for number in range(9):
            masks.submit(str(number), image, maps)
            taken.append(number)

    thread = threading.Thread(target=submit)
    thread.start()
    deadline = time.monotonic() + 10
    while len(taken) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    thread.join(0.3)
    assert len(taken) == 5
    gate.set()
    thread.join()
    masks.close()
    assert masks.written == 9


def test_numbers_that_mean_nothing_are_refused(tmp_path):
    for options in ({"workers": -1}, {"queue_size": 0}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            stream(tmp_path, **options)
    assert stream(tmp_path, workers=None).workers >= 1


def test_worker_protocol(tmp_path):
    image_id, image, maps = next(images_and_maps())
    arrays = [image, maps.classes.numpy(), maps.cams.half().numpy(), maps.affinity.half().numpy()]
    config = MaskConfig(crf=CRFConfig(iterations=2))
    writer = mask_worker.MaskWriter(folder=str(tmp_path), config=config, fingerprint="f")
    jobs = io.BytesIO()
    mask_worker.send(jobs, {"id": image_id}, arrays)
    mask_worker.send(jobs, {"id": "bad"}, [arrays[0], arrays[1] + 300, *arrays[2:]])
    mask_worker.send(jobs, {"id": "odd"}, [arrays[0], arrays[1], arrays[2], arrays[3][None]])
    mask_worker.send(jobs, {"id": "cut"}, arrays)
    values = json.loads(json.dumps(writer.to_json()))
    answers = io.BytesIO()
    mask_worker.serve(mask_worker.MaskWriter.from_json(values), io.BytesIO(jobs.getvalue()[:-3]), answers)
    first, second, third = answers.getvalue().splitlines()
    assert json.loads(first)["error"] is None
    assert "class ids" in json.loads(second)["error"]
    assert "Error(" in json.loads(third)["error"]
    assert [path.name for path in tmp_path.iterdir()] == [f"{image_id}.png"]


def test_the_worker_needs_no_torch():
    program = (
        "import sys; sys.argv.append('{}'); import vpl_lightning.mask_worker, vpl_lightning.functional.crf; "
        "vpl_lightning.functional.crf.check_densecrf(); print('torch' in sys.modules); "
        "import vpl_lightning.structures; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_resumes_after_sigkill_with_the_same_bytes(tmp_path, expected):
    """Kill the run three times at random moments, with its worker and without, then let it get through."""
    dice = random.Random(4)
    command = [sys.executable, "-m", "tests.masks.mask_run", str(tmp_path)]
    killed, written = 0, []
    for _ in range(4):
        child = subprocess.Popen(command, start_new_session=True, cwd=ROOT)
        if killed < 3:
            before = len(list(tmp_path.glob("masks/*.png")))
            while child.poll() is None and len(list(tmp_path.glob("masks/*.png"))) <= before:
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.05))
        else:
            child.wait()
        if child.poll() is not None:
            break
        (os.kill if killed == 1 else os.killpg)(child.pid, signal.SIGKILL)
        child.wait()
        killed += 1
        written.append(len(list(tmp_path.glob("masks/*.png"))))
        for path in tmp_path.glob("masks/*.png"):
            assert path.read_bytes() == expected[0][path.name]
    assert child.returncode == 0
    assert killed == 3
    assert written == sorted(written)
    assert (contents(tmp_path / "masks"), contents(tmp_path / "maps")) == expected


def test_refined_maps_are_resized_as_the_structure_does():
    maps = torch.rand(2, 6, 9)
    cams = ClassCAMs(torch.tensor([0, 1]), maps, maps, (48, 70))
    torch.testing.assert_close(cams.refined, F.interpolate(maps[None], (48, 70), mode="bilinear")[0])
