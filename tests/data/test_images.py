"""Decoding."""

import numpy as np
import pytest
from PIL import Image

from tests.archives import ORIENTATION, picture, save_palette, save_photo, truncate
from vpl_lightning.archives.verify import ImageCheck, Rules, check_image
from vpl_lightning.data.images import ImageFolder, MaskFolder, TaggedImages, read_image
from vpl_lightning.data.index import Entry, TaggedIndex
from vpl_lightning.errors import DataError


@pytest.mark.parametrize("kind", ["rgb", "grey", "cmyk"])
def test_every_jpeg_becomes_rgb(tmp_path, kind):
    pixels = picture(1)
    save_photo(tmp_path / "a.jpg", pixels, kind)
    image = read_image(tmp_path / "a.jpg")
    assert image.dtype == np.uint8
    wanted = (
        np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, -1)
        if kind == "grey"
        else pixels
    )
    assert np.abs(image.astype(int) - wanted).mean() < 12


def test_exif_turns_own_photographs_only(tmp_path):
    save_photo(tmp_path / "a.jpg", picture(1), "turned")
    stored = read_image(tmp_path / "a.jpg")
    assert stored.shape == (40, 60, 3)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", upright=True), np.rot90(stored, k=-1))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (4000, 3)])
def test_extreme_sizes(tmp_path, size):
    save_photo(tmp_path / "a.jpg", picture(1, size))
    assert read_image(tmp_path / "a.jpg").shape == (*size, 3)


def test_png_of_other_kinds(tmp_path):
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png")[..., 1], np.arange(256).reshape(16, 16))
    palette = Image.fromarray(picture(2)).convert("P")
    palette.save(tmp_path / "clear.png", transparency=bytes([0] * 256))
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png"), np.asarray(palette.convert("RGB")))


def test_damage_is_named(tmp_path):
    save_photo(tmp_path / "cut.jpg", picture(1))
    truncate(tmp_path / "cut.jpg")
    (tmp_path / "empty.jpg").touch()
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif cannot be decoded \(32 bits a pixel"):
        read_image(tmp_path / "float.tif")
    (fault,) = check_image(
        ImageCheck("float", tmp_path / "float.tif"), rules=Rules(frozenset(), 2, deep=True)
    )
    assert fault.kind == "image of wrong format"
    (tmp_path / "text.jpg").write_text("no image")
    for name, reason in {"cut": "truncated", "empty": "cannot identify", "text": "cannot identify"}.items():
        with pytest.raises(DataError, match=rf"{name}\.jpg cannot be decoded .*{reason}"):
            read_image(tmp_path / f"{name}.jpg")
    with pytest.raises(DataError, match=r"gone\.jpg is missing"):
        read_image(tmp_path / "gone.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp"])
def test_changed_bytes_give_an_image_or_a_data_error(tmp_path, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / f"a.{suffix}"
    options = {} if suffix == "bmp" else {"exif": exif}
    Image.fromarray(picture(1)).save(path, **options)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = []
    for _ in range(150):
        changed = bytearray(content)
        for place in rng.integers(0, 200, 3):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            assert read_image(path, upright=True).dtype == np.uint8
        except DataError as error:
            refused.append(str(error))
    assert refused
    assert all(path.name in message for message in refused)


def test_masks_are_read_as_indices_and_checked(tmp_path):
    save_photo(tmp_path / "a.jpg", picture(1))
    mask = np.zeros((40, 60), np.uint8)
    mask[3:9] = 20
    mask[20:] = 255
    save_palette(tmp_path / "masks" / "a.png", mask)
    index = TaggedIndex.of([Entry("a", "a.jpg", [19])])

    def sample(num_classes=21, folder="masks"):
        masks = MaskFolder(tmp_path / folder, num_classes, fix="draw it")
        return TaggedImages(index, ImageFolder(tmp_path), masks)[0]

    np.testing.assert_array_equal(sample()["mask"], mask)
    with pytest.raises(DataError, match="20"):
        sample(num_classes=20)
    with pytest.raises(DataError, match=r"a\.png is missing: no mask for image 'a'; draw it"):
        sample(folder="elsewhere")
    save_palette(tmp_path / "masks" / "a.png", mask[:, :-1])
    with pytest.raises(DataError, match=r"'a' has 40 x 60 pixels \(H x W\), its mask 40 x 59"):
        sample()
    rgb = np.repeat(mask[..., None], 3, -1)
    Image.fromarray(rgb).save(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match="indices"):
        sample()
