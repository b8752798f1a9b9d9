"""What each of the thin generators does beyond the contract."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vpl_baselines.external
import yaml
from torch.nn import functional as F
from vpl_baselines.dense_similarity import DenseSimilarity
from vpl_baselines.external import External
from vpl_baselines.grad_cam import GradCAM

from vpl_lightning import baselines
from vpl_lightning.cli.main import TRAINER_COMMANDS
from vpl_lightning.clip import ClassSet, CLIPEncoder
from vpl_lightning.errors import ConfigurationError, PluginError
from vpl_lightning.testing import sample_images

THINGS = ClassSet.from_dict({"foreground": ["cat", "dog", "boat", "tree"], "background": ["sky", "grass"]})
STAND_IN = str(Path(vpl_baselines.external.__file__).with_name("example.py"))
PLACES = ["{images}", "{labels}", "{prototypes}", "{output}"]


def lively_rows(encoder: CLIPEncoder) -> torch.Tensor:
    """Prototypes for which no Grad-CAM map of the samples is zero."""
    generator = torch.Generator().manual_seed(8)
    return F.normalize(torch.randn(6, encoder.joint_width, generator=generator), dim=-1)


def test_grad_cam_is_clip_es_without_affinity(tiny_encoder: CLIPEncoder) -> None:
    plain, full = (
        GradCAM(tiny_encoder, THINGS),
        baselines.create("clip_es", encoder=tiny_encoder, classes=THINGS),
    )
    plain.prototypes = full.prototypes = lively_rows(tiny_encoder)
    samples = sample_images(plain)
    for one, other in zip(plain.generate_batch(*samples), full.generate_batch(*samples), strict=True):
        torch.testing.assert_close(one.cams, other.cams)
        assert torch.equal(one.affinity, one.cams)
        assert not torch.allclose(other.affinity, other.cams)
    with pytest.raises(ConfigurationError, match="score='logit' must be one of log_probability, probability"):
        GradCAM(tiny_encoder, THINGS, score="logit")


@pytest.mark.parametrize("features", ["value", "final", "penultimate"])
def test_dense_similarity_against_a_loop(tiny_encoder: CLIPEncoder, features: str) -> None:
    generator = DenseSimilarity(tiny_encoder, THINGS, features=features)
    generator.scale = 7.0
    (image, *_), (labels, *_) = sample_images(generator)
    maps = generator.generate(image, labels)
    encoded = tiny_encoder.encode(tiny_encoder.resize(image)[None])
    dense = tiny_encoder.dense(encoded, features)[0].double().numpy()
    rivals = [*labels, 4, 5]
    scores = np.exp(7 * dense @ generator.prototypes.double().numpy()[rivals].T)
    share = (scores / scores.sum(1, keepdims=True))[:, : len(labels)].T.reshape(len(labels), *encoded.grid)
    low = share.min((1, 2), keepdims=True)
    expected = (share - low) / (share.max((1, 2), keepdims=True) - low)
    np.testing.assert_allclose(maps.cams.numpy(), expected, atol=1e-4)


def test_dense_similarity_refuses_unknown_features(tiny_encoder: CLIPEncoder) -> None:
    with pytest.raises(ConfigurationError, match="features='token' is none of value, final, penultimate"):
        DenseSimilarity(tiny_encoder, THINGS, features="token")


def external(encoder: CLIPEncoder, script: str | Path, **options: object) -> External:
    return External(encoder, THINGS, command=[sys.executable, str(script), *PLACES], **options)


def test_a_command_gets_images_tags_and_prototypes(tiny_encoder: CLIPEncoder) -> None:
    generator = external(tiny_encoder, STAND_IN)
    (image, *_), _ = sample_images(generator)
    maps = generator.generate(image, [2, 0])
    raw = image.astype(np.float32) / 255 @ generator.prototypes[[2, 0], :3].numpy().T
    low, high = raw.min((0, 1)), raw.max((0, 1))
    expected = ((raw - low) / (high - low)).transpose(2, 0, 1)
    np.testing.assert_allclose(maps.refined.numpy(), expected, atol=2e-3)
    patch = tiny_encoder.patch_size
    np.testing.assert_allclose(
        maps.cams[:, 1, 2].numpy(),
        maps.refined[:, patch : 2 * patch, 2 * patch : 3 * patch].mean((1, 2)),
        atol=0.1,
    )


SCRIPTS = {
    "fails": (
        "import sys; print('no such layer', file=sys.stderr); sys.exit(3)",
        "exit code 3:\nno such layer",
    ),
    "leaves nothing": ("", r"left no usable maps: .*000000\.npy: cannot be read"),
    "takes its time": ("import time; time.sleep(30)", r"took more than timeout=0\.5 s"),
    "forgets a class": ("save([2], 1)", r"000000\.npy has maps of classes \[2\], not of \[0\]"),
    "leaves the range": ("save([2, 0], 3)", r"leave \[0, 1\] or are not finite"),
    "divides by zero": ("save([2, 0], float('nan'))", r"leave \[0, 1\] or are not finite"),
}
SAVE = """
import sys
import numpy as np
def save(keys, value):
    maps = np.full((len(keys), 8, 8), value, np.float16)
    content = {"keys": np.array(keys), "attn_highres": maps}
    np.save(sys.argv[4] + "/000000.npy", np.array(content, dtype=object))
"""


@pytest.mark.parametrize("case", SCRIPTS)
def test_a_command_that_fails_says_how(tiny_encoder: CLIPEncoder, tmp_path: Path, case: str) -> None:
    code, reason = SCRIPTS[case]
    script = tmp_path / "host.py"
    script.write_text((SAVE if "save" in code else "") + code)
    generator = external(tiny_encoder, script, timeout=0.5 if "time" in case else 60.0)
    (image, *_), _ = sample_images(generator)
    with pytest.raises(PluginError, match=reason):
        generator.generate(image, [2, 0])


def test_a_command_runs_in_its_folder_and_knows_the_names(tiny_encoder: CLIPEncoder, tmp_path: Path) -> None:
    code = "import json, pathlib; print(json.load(open(sys.argv[2])), file=open('seen', 'w')); save([1], 1)"
    (tmp_path / "host.py").write_text(SAVE + code)
    generator = external(tiny_encoder, "host.py", folder=str(tmp_path))
    (image, *_), _ = sample_images(generator)
    generator.generate(image, [1])
    seen = json.loads((tmp_path / "seen").read_text().replace("'", '"'))
    assert seen == {
        "classes": ["cat", "dog", "boat", "tree"],
        "background": ["sky", "grass"],
        "labels": {"000000": [1]},
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"command": ["host", "{images}"]}, r"must be a list of words that holds \{images\}, \{output\}"),
        ({"command": "host {images} {output}"}, "must be a list of words"),
        ({"command": ["{images}", "{output}"], "timeout": 0.0}, "timeout=0.0 must be a positive number"),
    ],
)
def test_a_wrong_command_is_refused(tiny_encoder: CLIPEncoder, options: dict, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        External(tiny_encoder, THINGS, **options)


def test_a_program_that_is_not_there(tiny_encoder: CLIPEncoder) -> None:
    generator = External(tiny_encoder, THINGS, command=["no-such-program", "{images}", "{output}"])
    (image, *_), _ = sample_images(generator)
    with pytest.raises(PluginError, match="no-such-program cannot be run"):
        generator.generate(image, [1])


@pytest.mark.parametrize("name", ["clip_cpal", "clip_es", "dense_similarity", "external", "grad_cam"])
def test_every_generator_documents_itself(name: str, tiny_encoder: CLIPEncoder) -> None:
    folder = Path(vpl_baselines.__file__).with_name(name)
    readme, config = (folder / "README.md").read_text(), (folder / "config.yaml").read_text()
    for word in ("Paper", "Origin", "Licence", "differs", "not run"):
        assert word.lower() in readme.lower(), word
    first = config.splitlines()[0].split()
    assert first[:2] == ["#", "vpl"]
    assert first[2] in TRAINER_COMMANDS
    model = yaml.safe_load(config)["model"]["init_args"]
    spec = model.get("generator") or model["localiser"]["init_args"]["generator"]
    assert spec["name"] == name
    baselines.create(name, encoder=tiny_encoder, classes=THINGS, **spec.get("options", {}))
