"""Anyone's photographs."""

import json

import pytest

from tests.archives import make_folder, save_photo
from vpl_lightning.clip import ClassSet
from vpl_lightning.data import TaggedFolderDataModule
from vpl_lightning.data.tags import TagResolver, read_tag_rows
from vpl_lightning.errors import ConfigurationError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("folder"))


def module(folder, *, tags="tags.csv", **options):
    root, classes = str(folder / "photos"), str(folder / "classes.yaml")
    return TaggedFolderDataModule(root, str(folder / tags), classes, **{"crop_size": 32, **options})


def rewrite(folder, tmp_path, text, name="tags.csv"):
    (tmp_path / name).write_text(text)
    return module(folder, tags=str(tmp_path / name))


def test_tags_become_classes_whatever_their_spelling(photos):
    train = module(photos).localisation_dataset()
    assert list(train.ids) == [f"photo {number}" for number in range(6)]
    # CSV: cat | Kitten; boat | dog | dog; boat | boat | cat; dog
    assert [train.labels(row) for row in range(6)] == [[0], [0, 2], [1], [1, 2], [2], [0, 1]]


def test_photographs_stand_upright(photos):
    train = module(photos).localisation_dataset()
    # Every fourth photograph was taken with the camera on its side.
    assert [train[row]["image"].shape[:2] for row in range(4)] == [(40, 60)] * 3 + [(60, 40)]


def test_photographs_with_masks_are_scored(photos):
    data = module(photos, masks=str(photos / "masks"))
    assert [batch["id"] for batch in data.val_dataloader()] == [["photo 0"], ["photo 1"]]
    assert module(photos).val_dataloader() == []
    with pytest.raises(ConfigurationError, match=r"set data.masks"):
        module(photos).test_dataloader()


def test_a_split_column_divides(photos, tmp_path):
    text = "file,tags,split\nphoto 0.jpg,cat,train\ntrip/photo 1.jpg,dog,val\nphoto 2.jpg,boat,\n"
    data = rewrite(photos, tmp_path, text)
    assert list(data.localisation_dataset("train").ids) == ["photo 0", "photo 2"]
    assert list(data.localisation_dataset("val").ids) == ["photo 1"]
    assert len(data.predict_dataloader()) == 3


def test_json_of_both_shapes(photos, tmp_path):
    mapping = {"photo 0.jpg": ["cat"], "photo 1": ["Kitten"]}
    records = [{"image": name, "image_labels": tags} for name, tags in mapping.items()]
    for value in (mapping, records):
        data = rewrite(photos, tmp_path, json.dumps(value), "tags.json")
        assert [(e.file, e.labels) for e in data.localisation_dataset().index] == [
            ("photo 0.jpg", [0]),
            ("trip/photo 1.jpg", [0]),
        ]


def test_unknown_tags_are_all_named_or_ignored_aloud(photos, tmp_path, capsys):
    rows = ["file,tags", "photo 0.jpg,cat;kat", "photo 2.jpg,holiday", "photo 4.jpg,boat"]
    (tmp_path / "tags.csv").write_text("\n".join(rows))
    found = r"(?s)2 unknown tags.*'holiday' is no class.*'kat'.*did you mean 'cat'\?"
    with pytest.raises(ConfigurationError, match=found):
        module(photos, tags=str(tmp_path / "tags.csv")).localisation_dataset()
    data = module(photos, tags=str(tmp_path / "tags.csv"), unknown_tags="ignore", on_bad_image="skip")
    assert list(data.localisation_dataset().ids) == ["photo 0", "photo 4"]
    printed = capsys.readouterr().out
    assert "ignoring 2 unknown tags: holiday, kat" in printed
    assert "1 of 3 images have no tag: photo 2; leaving them out" in printed


def test_wrong_files_of_tags_are_named(photos, tmp_path):
    for text, reason in {
        "file,tags\ngone.jpg,cat\n": "names 1 files that are not in .*gone.jpg",
        "file,tags\nphoto 0.jpg,cat,dog\n": "line 2: 1 cells too many",
        "file,tags,split\nphoto 0.jpg,cat,dev\n": r"1 rows have a wrong split: photo 0\.jpg: split 'dev'; a",
        "file,tags\nphoto 0.jpg,\n": "1 of 1 images have no tag: photo 0",
        "file,tags\n,cat\n": "line 2: needs the name of an image",
        "file,tags\nphoto 0.jpg,cat\nphoto 0,dog\n": r"1 rows repeat a name: photo 0\.jpg \(after photo 0\.jpg\)",
    }.items():
        with pytest.raises(ConfigurationError, match=reason):
            rewrite(photos, tmp_path, text).localisation_dataset()
    with pytest.raises(ConfigurationError, match=r"needs a column 'file' and a column 'tags'.*name, word"):
        rewrite(photos, tmp_path, "name,word\na,b\n").localisation_dataset()
    for text, reason in {"{": "is not JSON", '{"a": ["cat"], "a": ["dog"]}': "'a' comes twice"}.items():
        with pytest.raises(ConfigurationError, match=reason):
            rewrite(photos, tmp_path, text, "tags.json").localisation_dataset()
    with pytest.raises(ConfigurationError, match="mapping of files to lists"):
        rewrite(photos, tmp_path, "[3]", "tags.json").localisation_dataset()
    with pytest.raises(ConfigurationError, match=r"suffix must be \.csv"):
        rewrite(photos, tmp_path, "a", "tags.txt").localisation_dataset()
    with pytest.raises(ConfigurationError, match="unknown split 'dev'"):
        module(photos).localisation_dataset("dev")


def test_names_that_fit_several_photographs_are_refused(photos, tmp_path):
    for place in ("a", "b"):
        save_photo(tmp_path / "photos" / place / "x.jpg", module(photos).localisation_dataset()[0]["image"])
    (tmp_path / "classes.yaml").write_text("foreground: [cat]\n")
    (tmp_path / "tags.csv").write_text("file,tags\nx.jpg,cat\n")
    with pytest.raises(ConfigurationError, match=r"'x\.jpg' fits several images: a/x\.jpg, b/x\.jpg"):
        module(tmp_path).localisation_dataset()


def test_missing_paths_are_named(photos, tmp_path):
    with pytest.raises(ConfigurationError, match=r"data\.root='.*photos' is no folder"):
        TaggedFolderDataModule(str(tmp_path / "photos"), str(photos / "tags.csv"), "voc")
    with pytest.raises(ConfigurationError, match=r"data\.tags='.*gone\.csv' does not exist"):
        module(photos, tags="gone.csv")
    with pytest.raises(ConfigurationError, match=r"data\.masks='gone' is no folder"):
        module(photos, masks="gone")
    with pytest.raises(ConfigurationError, match="does not exist"):
        read_tag_rows(tmp_path / "gone.csv")


def test_names_win_over_synonyms_of_others():
    words = {"cat": ["cat", "kitten", "Tom_Cat"]}
    classes = ClassSet.from_dict({"foreground": ["cat", "kitten"], "synonyms": words})
    resolver = TagResolver(classes)
    found = [resolver.find(tag) for tag in ("cat", "KITTEN", "tom cat", "tom-cat", "dog")]
    assert found == [0, 1, 0, 0, None]
    assert resolver.resolve(["tom cat", "cat", "x", "kitten"]) == ([0, 1], ["x"])
