"""The pass that fits a generator: shared over processes, kept on disk, repeated when its settings change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from vpl_baselines.clip_cpal import ClipCPAL

from vpl_lightning.blocks import BlockPlan
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.tasks import generator_bank
from vpl_lightning.tasks.generator_bank import fit_generator, read_bank, write_bank

THINGS = ClassSet.from_dict({"foreground": ["cat", "dog", "boat"], "background": ["sky", "grass"]})
SETTINGS = {"text_scale": 100.0, "blocks": [4, 3]}


class Pictures:
    """Ten small images of two sizes with one or two tags each."""

    ids = tuple(f"p{index}" for index in range(10))

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return len(self.ids)

    def labels(self, index: int) -> list[int]:
        return [index % 3] if index % 2 else [index % 3, (index + 1) % 3]

    def __getitem__(self, index: int) -> dict:
        self.read += 1
        pixels = np.random.default_rng(index).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = pixels.repeat(8, 0).repeat(8 if index % 2 else 7, 1)
        return {"id": self.ids[index], "image": image, "labels": self.labels(index)}


def plan(pictures: Pictures, rank: int = 0, world_size: int = 1) -> BlockPlan:
    return BlockPlan(pictures, size=4, rank=rank, world_size=world_size)


@pytest.fixture
def alone(tiny_encoder: CLIPEncoder, tmp_path: Path) -> dict[str, torch.Tensor]:
    """What one process notes of all pictures."""
    generator = ClipCPAL(tiny_encoder, THINGS)
    fit_generator(generator, plan(Pictures()), tmp_path / "alone", SETTINGS, batch_size=3)
    return generator.bank_state()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_second_run_reads_what_the_first_left(tiny_encoder: CLIPEncoder, tmp_path: Path, alone) -> None:
    pictures = Pictures()
    for run in range(2):
        generator = ClipCPAL(tiny_encoder, THINGS)
        fit_generator(generator, plan(pictures), tmp_path / "bank", SETTINGS, batch_size=3)
        assert pictures.read == 10, f"run {run}"
        assert same(generator.bank_state(), alone)
        assert generator._contexts.keys() == {0, 1, 2}


def test_other_settings_or_a_damaged_file_mean_another_pass(
    tiny_encoder: CLIPEncoder, tmp_path: Path
) -> None:
    pictures, path = Pictures(), tmp_path / "bank"
    fit_generator(ClipCPAL(tiny_encoder, THINGS), plan(pictures), path, SETTINGS, batch_size=3)
    other = {**SETTINGS, "text_scale": 50.0}
    fit_generator(ClipCPAL(tiny_encoder, THINGS), plan(pictures), path, other, batch_size=3)
    assert pictures.read == 20
    path.write_bytes(path.read_bytes()[:50])
    fit_generator(ClipCPAL(tiny_encoder, THINGS), plan(pictures), path, other, batch_size=3)
    assert pictures.read == 30


def test_two_processes_note_what_one_does(
    tiny_encoder: CLIPEncoder, tmp_path: Path, alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[dict[str, torch.Tensor]] = []

    def gather(states):
        noted.extend(states)
        return list(noted)

    monkeypatch.setattr(generator_bank, "gather_list", gather)
    first, second = ClipCPAL(tiny_encoder, THINGS), ClipCPAL(tiny_encoder, THINGS)
    fit_generator(second, plan(Pictures(), 1, 2), tmp_path / "bank", SETTINGS, batch_size=3)
    assert not (tmp_path / "bank").exists(), "the first process writes"
    assert len(second.bank_state()["classes"]) < len(alone["classes"])
    fit_generator(first, plan(Pictures(), 0, 2), tmp_path / "bank", SETTINGS, batch_size=3)
    assert same(first.bank_state(), alone)


def test_a_bank_survives_the_file(tmp_path: Path) -> None:
    state = {"rows": torch.rand(3, 2), "none": torch.zeros(0, 2), "ids": torch.tensor([2**62, 1])}
    write_bank(tmp_path / "bank", state, "made from this")
    assert same(read_bank(tmp_path / "bank", "made from this") or {}, state)
    assert read_bank(tmp_path / "bank", "made from that") is None
    assert read_bank(tmp_path / "absent", "made from this") is None
