"""What holds for heads of every kind: shapes, the two ways to embed, folding, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from xbt.errors import ConfigError, SpaceMismatchError
from xbt.heads import BCTHead, BT2Head, CompatibleHead, OCAHead, PlainHead, make_head

COMPATIBLE = [
    BCTHead(8, 8, n_classes=3),
    BCTHead(10, 6, 2, n_classes=3),
    BCTHead(4, 7, 3, n_classes=3),
    BT2Head(8, 8, 2, n_classes=3),
    BT2Head(8, 8, 0, n_classes=3),
    BT2Head(8, 8, 8, n_classes=3),
    BT2Head(10, 6, 3, n_classes=3),
    BT2Head(10, 6, 0, n_classes=3),
    BT2Head(6, 9, 3, n_classes=3),
    BT2Head(6, 9, 5, scale=0.7, n_classes=3),
    BT2Head(1, 1, 1, n_classes=3),
    OCAHead(8, 2, n_classes=3),
    OCAHead(8, 0, n_classes=3),
    OCAHead(6, 3, orthogonal=False, n_classes=3),
]


def name_of(head):
    return f"{head.kind}-" + "-".join(str(value) for value in head.options().values())


@pytest.mark.parametrize("head", COMPATIBLE, ids=name_of)
def test_compatible_is_the_leading_part_of_the_whole_bit_by_bit(head):
    features = torch.randn(7, head.in_dim)
    output = head(features)
    assert output.full.shape == (7, head.out_dim)
    assert output.compatible.shape == (7, head.old_dim)
    assert torch.equal(output.compatible, output.full[:, : head.old_dim])
    assert output.logits.shape == (7, 3)
    assert torch.equal(output.logits, head.classifier(output.features))
    assert torch.equal(head.embed(features, "old"), normalize(output.compatible, dim=1))
    assert torch.equal(head.embed(features), normalize(output.full, dim=1))
    torch.testing.assert_close(output.features.norm(dim=1), torch.ones(7))


def test_out_dims_are_those_of_the_papers():
    assert BT2Head(128, 128, 32).out_dim == 160
    assert BT2Head(128, 128, 32).in_dim == 256
    assert OCAHead(128, 32).out_dim == OCAHead(128, 32).in_dim == 160
    assert BCTHead(128, 128).out_dim == BCTHead(128, 128).in_dim == 128
    assert PlainHead(128).out_dim == PlainHead(128).in_dim == 128


def test_plain_head_is_compatible_with_nothing():
    head = PlainHead(6, 4)
    features = torch.randn(5, 6)
    output = head(features)
    assert head.old_dim == 0
    assert output.compatible is None
    assert torch.equal(output.full, output.features)
    torch.testing.assert_close(output.full, features / features.norm(dim=1, keepdim=True))
    for each in (head, head.fold()):
        with pytest.raises(ConfigError, match=r"no space 'old' to embed into; choose new$"):
            each.embed(features, "old")


def test_without_classes_there_are_no_logits(kind, options):
    head = make_head(kind, {**options[kind], "n_classes": None})
    assert head(torch.randn(2, head.in_dim)).logits is None
    assert head.n_classes is None
    assert not any("classifier" in name for name, _ in head.named_parameters())


def test_options_rebuild_the_head(head):
    written = json.loads(json.dumps(head.options()))
    twin = make_head(head.kind, written)
    assert twin.options() == head.options()
    assert [(name, each.shape) for name, each in twin.state_dict().items()] == [
        (name, each.shape) for name, each in head.state_dict().items()
    ]


def test_folded_embeds_the_same_after_training(head, train):
    train(head)
    folded = head.fold()
    assert not list(folded.parameters())
    assert (folded.in_dim, folded.old_dim, folded.out_dim) == (head.in_dim, head.old_dim, head.out_dim)
    features = torch.randn(50, head.in_dim)
    for space in ("new", "old") if head.old_dim else ("new",):
        assert (folded.embed(features, space) - head.embed(features, space)).abs().max() <= 1e-5
    assert torch.equal(folded(features), folded.embed(features))
    with pytest.raises(SpaceMismatchError, match=rf"shape \(n, {head.in_dim}\), got \(2, 3\)"):
        folded.embed(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="space 'both'"):
        folded.embed(features, "both")


@pytest.mark.parametrize("head", COMPATIBLE, ids=name_of)
def test_folded_embeds_the_same_whatever_the_dimensions(head):
    features = torch.randn(20, head.in_dim)
    for space in ("new", "old"):
        assert (head.fold().embed(features, space) - head.embed(features, space)).abs().max() <= 1e-5


def test_folding_is_a_copy(head):
    folded = head.fold()
    features = torch.randn(5, head.in_dim)
    before = folded.embed(features)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(1.0)
    assert torch.equal(folded.embed(features), before)


def test_one_row_and_batches_of_any_size_agree(head):
    features = torch.randn(5, head.in_dim)
    whole = head.embed(features)
    rows = torch.cat([head.embed(features[row : row + 1]) for row in range(5)])
    torch.testing.assert_close(rows, whole)
    assert head.embed(features[:0]).shape == (0, head.out_dim)


def test_half_precision_and_autocast_are_computed_in_float32(head):
    features = torch.randn(6, head.in_dim)
    rounded = features.bfloat16()
    assert torch.equal(head(rounded).full, head(rounded.float()).full)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(features)
    assert mixed.full.dtype == torch.float32
    assert torch.equal(mixed.full, head(features).full)


def test_features_of_another_shape_are_refused(head):
    with pytest.raises(
        SpaceMismatchError, match=rf"the {head.kind} head .* \(n, {head.in_dim}\), got \(2, 5\)"
    ):
        head(torch.zeros(2, 5))
    with pytest.raises(SpaceMismatchError, match="head takes features"):
        head(torch.zeros(2, head.in_dim, 1))
    with pytest.raises(ConfigError, match="no space 'both' to embed into"):
        head.embed(torch.zeros(2, head.in_dim), "both")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PlainHead(0), "dim must be a whole number of at least 1, got 0"),
        (lambda: PlainHead(4, 0), "n_classes must be a whole number of at least 1, got 0"),
        (lambda: PlainHead(4.0), "dim must be a whole number of at least 1, got 4.0"),
        (lambda: PlainHead(True), "dim must be a whole number of at least 1, got True"),
        (lambda: BCTHead(4, 0), "old_dim must be a whole number of at least 1, got 0"),
        (lambda: BCTHead(4, 6), "but the old vectors have 6; raise extra_dims to at least 2"),
        (lambda: BCTHead(4, 4, -1), "extra_dims must be a whole number of at least 0, got -1"),
        (lambda: BT2Head(8, 4, 5), "extra_dims 5 is more than the 4 dimensions of the old vectors"),
        (lambda: BT2Head(8, 4, -1), "extra_dims must be a whole number of at least 0, got -1"),
        (lambda: BT2Head(4, 8, 3), "7 dimensions, but the old vectors have 8; raise extra_dims to at least"),
        (lambda: BT2Head(4, 4, 1, scale=0.0), "scale must be a number above 0, got 0.0"),
        (lambda: BT2Head(4, 4, 1, scale=float("nan")), "scale must be a number above 0, got nan"),
        (lambda: BT2Head(4, 4, 1, orthogonal_map="qr"), "orthogonal_map 'qr' is not known; there is mat"),
        (lambda: OCAHead(0, 4), "old_dim must be a whole number of at least 1, got 0"),
        (lambda: OCAHead(4, -1), "extra_dims must be a whole number of at least 0, got -1"),
        (lambda: OCAHead(4, 1, orthogonal=False, orthogonal_map="qr"), "orthogonal_map 'qr' is not known"),
        (lambda: make_head("racl", {}), "head 'racl' is not known; there is bct, bt2, independent, oca"),
        (lambda: make_head("bct", {"depth": 3}), "options of the bct head cannot be used: .*depth"),
        (lambda: make_head("bct", None), "options of the bct head must be a mapping, got None"),
    ],
)  # fmt: skip
def test_impossible_heads_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_head_is_part_of_a_module():
    model = nn.Sequential(nn.Linear(3, 16), BT2Head(8, 8, 2))
    assert isinstance(model[1], CompatibleHead)
    assert model(torch.randn(2, 3)).full.shape == (2, 10)
    decayed = [name for name, _ in model.named_parameters() if not any(p in name for p in BT2Head.no_decay)]
    assert decayed == ["0.weight", "0.bias", "1.code.weight", "1.code.bias"]
