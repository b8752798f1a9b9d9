"""CLIP-ES's pickled maps: what it reads and writes itself, and pickles that would run code."""

from __future__ import annotations

import io
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vpl_lightning.artifacts import read_clip_es, write_clip_es
from vpl_lightning.artifacts.clip_es import _ArraysOnly
from vpl_lightning.errors import DataError

AS_CLIP_ES_LOADS = {"allow_pickle": True}
RECONSTRUCT = np.zeros(1).__reduce__()[0]
KEYS, MAPS = np.array([14, 2]), np.random.default_rng(0).random((2, 5, 7)).astype(np.float16)


def save(path, content, *, protocol=4, rename=()):
    """Write an object array by hand, as numpy of any age would have."""
    array = np.empty((), object)
    array[()] = content
    body = pickle.dumps(array, protocol=protocol)
    for old, new in rename:
        assert old in body
        body = body.replace(old, new)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(body)


def test_the_released_code_reads_ours(tmp_path):
    path = tmp_path / "2007_000032.npy"
    write_clip_es(path, KEYS, MAPS.astype(np.float32), highres=MAPS)
    content = np.load(path, **AS_CLIP_ES_LOADS).item()
    assert sorted(content) == ["attn_highres", "highres", "keys"]
    assert (content["keys"].dtype, content["attn_highres"].dtype) == (np.int64, np.float16)
    np.testing.assert_array_equal(content["attn_highres"], MAPS)


def test_we_read_what_the_released_code_writes(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, {"keys": KEYS, "attn_highres": MAPS, "highres": MAPS / 2})
    read = read_clip_es(path)
    assert (read.keys.dtype, read.attn_highres.dtype) == (np.int64, np.float16)
    np.testing.assert_array_equal(read.keys, KEYS)
    np.testing.assert_array_equal(read.attn_highres, MAPS)
    np.testing.assert_array_equal(read_clip_es(path, field="highres").attn_highres, MAPS / 2)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_age_of_numpy(tmp_path, protocol):
    content = {"keys": KEYS.astype(np.int32), "attn_highres": MAPS.astype(np.float32)}
    path = tmp_path / "a.npy"
    home = RECONSTRUCT.__module__.encode()
    save(path, content, protocol=protocol, rename=[(home, b"numpy.core.multiarray")] if protocol < 4 else [])
    read = read_clip_es(path)
    np.testing.assert_array_equal(read.keys, KEYS)
    np.testing.assert_array_equal(read.attn_highres, MAPS)


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.float16, hnp.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=5)),
    st.booleans(),
    st.sampled_from("<>"),
)
def test_any_layout(tmp_path_factory, maps, fortran, order):
    path = tmp_path_factory.mktemp("maps") / "a.npy"
    stored = (np.asfortranarray(maps) if fortran else maps).astype(f"{order}f2")
    np.save(path, {"keys": np.arange(len(maps)), "attn_highres": stored})
    np.testing.assert_array_equal(read_clip_es(path).attn_highres, maps)


class Evil:
    """Would make a folder when unpickled the usual way."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_file_is_run(tmp_path):
    canary = tmp_path / "made"
    for number, content in enumerate(
        (
            {"keys": Evil(canary), "attn_highres": MAPS},
            Evil(canary),
            {"keys": KEYS, "attn_highres": [Evil(canary)]},
        )
    ):
        path = tmp_path / f"{number}.npy"
        np.save(path, np.array(content, dtype=object))
        with pytest.raises(DataError, match=rf"{number}\.npy: asks for posix\.mkdir; .* nothing is executed"):
            read_clip_es(path)
    assert not canary.exists()
    np.load(tmp_path / "0.npy", **AS_CLIP_ES_LOADS)
    assert canary.exists()  # the danger is real


class Forged:
    """A pickled array whose parts contradict one another, which numpy's own classes would have to survive."""

    def __init__(self, *, code="f2", shape=(1, 1, 1), data=b"\0\0"):
        self.state = (1, shape, np.dtype(code), False, data)

    def __reduce__(self):
        return RECONSTRUCT, (np.ndarray, (0,), b"b"), self.state


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"data": b"\0"}, "array of shape"),
        ({"shape": (-1, 2, 2)}, "array of shape"),
        ({"shape": 3}, "without shape"),
        ({"code": "O", "data": b"\1" * 8}, "array of objects"),
        ({"data": [1.0]}, "array of objects"),
        ({"code": "M8[s]", "data": b"\0" * 8}, "not a plain number"),
        ({"code": "S2"}, "not a plain number"),
    ],
)
def test_forged_arrays_are_refused(tmp_path, changes, word):
    path = tmp_path / "forged.npy"
    save(path, {"keys": np.array([1]), "attn_highres": Forged(**changes)})
    with pytest.raises(DataError, match=word):
        read_clip_es(path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"keys": KEYS}, r"no 'attn_highres', only \['keys'\]"),
        ({"keys": KEYS[:1], "attn_highres": MAPS}, "do not fit"),
        ({"keys": KEYS.astype(float), "attn_highres": MAPS}, "do not fit"),
        ({"keys": KEYS, "attn_highres": MAPS[0][:2]}, "different, non-negative keys"),
        ({"keys": KEYS * 0, "attn_highres": MAPS}, "different, non-negative keys"),
        ({"keys": -KEYS, "attn_highres": MAPS}, "different, non-negative keys"),
        ({"keys": [14, 2], "attn_highres": MAPS}, r"\['keys'\] in the dictionary are no arrays"),
        ([KEYS, MAPS], "no dictionary"),
    ],
)
def test_other_contents_are_named(tmp_path, content, word):
    path = tmp_path / "a.npy"
    save(path, content)
    with pytest.raises(DataError, match=rf"a\.npy: .*{word}"):
        read_clip_es(path)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(DataError, match="No such file"):
        read_clip_es(path)
    np.save(path, MAPS)
    with pytest.raises(DataError, match="not CLIP-ES's pickled dictionary"):
        read_clip_es(path)
    write_clip_es(path, KEYS, MAPS)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], whole[:-20]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            read_clip_es(path)


def test_bytes_spelt_as_text_in_other_encodings_are_refused():
    body = b"c_codecs\nencode\n(Vabc\nVutf-16\ntR."
    with pytest.raises(DataError, match="utf-16"):
        _ArraysOnly(io.BytesIO(body)).load()
    body = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntVb\ntR."
    with pytest.raises(DataError, match="unknown kind"):
        _ArraysOnly(io.BytesIO(body)).load()
