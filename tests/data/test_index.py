"""Ids, files and tags in arrays."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpl_lightning.data.index import Entry, TaggedIndex
from vpl_lightning.errors import DataError

names = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="/\0"), min_size=1, max_size=12
)
entries = st.dictionaries(names, st.lists(st.integers(0, 79), max_size=4), max_size=12).map(
    lambda tags: [Entry(name, f"sub/{name}.jpg", labels) for name, labels in tags.items()]
)


@given(entries)
def test_an_index_gives_back_its_entries(rows):
    index = TaggedIndex.of(rows)
    assert list(index) == rows
    assert list(index.ids) == [row.id for row in rows]
    assert index.ids[1:3] == [row.id for row in rows][1:3]
    assert index.unlabelled() == [row.id for row in rows if not row.labels]


@given(entries, st.integers(0, 2**12 - 1))
def test_without_leaves_out_what_is_named_and_nothing_else(rows, choice):
    left_out = {row.id for place, row in enumerate(rows) if choice >> place & 1}
    kept = TaggedIndex.of(rows).without(left_out | {"a name that nobody has"})
    assert list(kept) == [row for row in rows if row.id not in left_out]


def test_a_saved_index_is_mapped_from_disk_and_travels_as_its_path(tmp_path):
    rows = [Entry(f"image_{number}", f"{number}.jpg", [number % 3]) for number in range(5_000)]
    written = TaggedIndex.of(rows)
    written.save(tmp_path / "deep" / "train")
    index = TaggedIndex.load(tmp_path / "deep" / "train")
    assert isinstance(index.ids.array, np.memmap)
    assert isinstance(index.tags, np.memmap)
    parcel = pickle.dumps(index)
    assert len(parcel) < 1_000
    assert list(pickle.loads(parcel)) == rows
    assert index.fingerprint() == written.fingerprint()
    assert list(pickle.loads(pickle.dumps(index.without({"image_3"})))) == [
        r for r in rows if r.id != "image_3"
    ]
    assert not list(tmp_path.rglob("*.partial"))


def test_the_fingerprint_knows_ids_files_and_tags():
    base = [Entry("a", "a.jpg", [1]), Entry("b", "b.jpg", [2])]
    prints = {
        TaggedIndex.of(rows).fingerprint()
        for rows in (
            base,
            base[:1],
            [base[0], Entry("b", "b.jpg", [3])],
            [base[0], Entry("b", "c.jpg", [2])],
            [base[0], Entry("c", "b.jpg", [2])],
        )
    }
    assert len(prints) == 5


def test_an_id_that_comes_twice_is_refused():
    with pytest.raises(DataError, match=r"'a' comes twice, as x/a\.jpg and y/a\.png"):
        TaggedIndex.of([Entry("a", "x/a.jpg", []), Entry("a", "y/a.png", [])])


def test_a_damaged_index_is_named(tmp_path):
    TaggedIndex.of([Entry("a", "a.jpg", [])]).save(tmp_path / "train")
    (tmp_path / "train.tags.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"train\.tags\.npy cannot be read"):
        TaggedIndex.load(tmp_path / "train")
