"""Text prototypes against open_clip's own text tower and zero-shot classifier."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import tiny_clip
from vpl_lightning.clip import ClassSet, CLIPEncoder, class_set, text
from vpl_lightning.errors import ConfigurationError

CLASSES = ClassSet(
    "pets", ("cat", "dog"), ("cat,kitten", "dog"), ("grass", "sky", "a {brace}"), ("a {}.", "the big {}")
)


def test_encode_text_equals_open_clip(tiny_clip: nn.Module, tiny_encoder: CLIPEncoder) -> None:
    texts = ["a photo of a cat.", "person with clothes,people,human", "Ünïcode"]
    with torch.no_grad():
        expected = tiny_clip.encode_text(open_clip.tokenize(texts), normalize=True)
    torch.testing.assert_close(tiny_encoder.encode_text(texts), expected, rtol=1e-5, atol=1e-6)


def test_prototypes_equal_open_clips_zero_shot_classifier(
    tiny_clip: nn.Module, tiny_encoder: CLIPEncoder
) -> None:
    words = [*CLASSES.prompts, *CLASSES.background]
    templates = [lambda word: f"a {word}.", lambda word: f"the big {word}"]
    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=77)
    expected = open_clip.build_zero_shot_classifier(tiny_clip, tokenizer, words, templates).T
    found = tiny_encoder.encode_classes(CLASSES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))


def test_averaging_normalises_before_and_after() -> None:
    rows = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    expected = torch.stack(
        [F.normalize(rows[0] + rows[1] + rows[2], dim=0), F.normalize(rows[3:].sum(0), dim=0)]
    )
    torch.testing.assert_close(text.average_templates(rows, 3), expected)


def test_prototypes_come_from_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = CLIPEncoder(tiny_clip())
    calls: list[int] = []
    plain = encoder.model.encode_text

    def count(tokens: Tensor) -> Tensor:
        calls.append(len(tokens))
        return plain(tokens)

    monkeypatch.setattr(encoder.model, "encode_text", count)
    assert encoder.encode_classes(class_set("voc")).shape == (45, 32)
    assert calls == [8, 8, 8, 8, 8, 5]
    whole = encoder.encode_classes(CLASSES)
    monkeypatch.setattr(text, "TEXTS_AT_ONCE", 3)
    torch.testing.assert_close(encoder.encode_classes(CLASSES), whole, rtol=1e-5, atol=1e-6)
    assert calls[-4:] == [3, 3, 3, 1]


def test_prompts_that_do_not_fit_are_refused() -> None:
    encoder = CLIPEncoder(tiny_clip(context_length=8))
    assert encoder.encode_text(["one two three four five six"]).shape == (1, 32)
    with pytest.raises(
        ConfigurationError, match=r"'one two three four five six seven' needs 9 tokens, .* reads 8"
    ):
        encoder.encode_text(["one", "one two three four five six seven"])


def test_own_tokenizer() -> None:
    model = tiny_clip()
    encoder = CLIPEncoder(model, tokenizer=lambda texts: torch.full((len(texts), 77), 5))
    rows = encoder.encode_text(["a", "b"])
    torch.testing.assert_close(rows[0], rows[1])


def test_one_string_is_not_a_list_of_letters(tiny_encoder: CLIPEncoder) -> None:
    torch.testing.assert_close(tiny_encoder.encode_text("cat"), tiny_encoder.encode_text(["cat"]))


def test_a_dropped_tower_leaves_images_and_fingerprint_alone() -> None:
    encoder, whole = CLIPEncoder(tiny_clip()), CLIPEncoder(tiny_clip())
    encoder.drop_text()
    assert {name.split(".")[0] for name in encoder.model.state_dict()} == {"visual", "logit_scale"}
    assert encoder.fingerprint() == whole.fingerprint()
    images = torch.zeros(1, 3, 32, 32)
    torch.testing.assert_close(encoder.encode_image(images), whole.encode_image(images))
    assert encoder.logit_scale == whole.logit_scale
    with pytest.raises(ConfigurationError, match="'cat' cannot be encoded: the text tower was dropped"):
        encoder.encode_text("cat")
