"""The attention layer against an ordinary one with the update written into its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from xbt.encoders.lora_attention import ExactAttention, unmerged

# peft visits the output projection of an attention layer a second time and says so.
pytestmark = pytest.mark.filterwarnings(r"ignore:A.*lready .*merged.*:UserWarning")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, inputs):
        return self.attn(inputs, inputs, inputs, need_weights=False)[0]


@pytest.fixture
def plain():
    return Block().double().requires_grad_(False)


@pytest.fixture
def adapted(plain):
    config = LoraConfig(r=2, lora_alpha=6, target_modules="attn")
    config._register_custom_module({nn.MultiheadAttention: ExactAttention})
    model = get_peft_model(copy.deepcopy(plain), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def inputs():
    return torch.randn(3, 5, 8, dtype=torch.float64)


def layer(model):
    return model.base_model.model.attn


def written_out(plain, adapted):
    """The oracle: W + alpha / rank · B A computed by hand."""
    expected = copy.deepcopy(plain)
    lora = layer(adapted)
    pairs = ((lora, expected.attn.in_proj_weight), (lora.base_layer.out_proj, expected.attn.out_proj.weight))
    with torch.no_grad():
        for source, weight in pairs:
            weight += 3 * source.lora_B["default"].weight @ source.lora_A["default"].weight
    return expected


def test_the_update_is_added_once(plain, adapted, inputs):
    expected = written_out(plain, adapted)(inputs)
    torch.testing.assert_close(adapted(inputs), expected)
    adapted.merge_adapter()
    assert layer(adapted).merged
    torch.testing.assert_close(adapted(inputs), expected)


def test_gradients_are_those_of_the_function(adapted, inputs):
    weights = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(weights) == 4
    target = torch.randn(3, 5, 8, dtype=torch.float64)
    (adapted(inputs) * target).sum().backward()
    for weight in weights:
        index, step = (1, 0), 1e-6
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                weight[index] += sign * step
                values.append((adapted(inputs) * target).sum().item())
                weight[index] -= sign * step
        assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_the_base_stays_bit_for_bit_the_same(plain, adapted, inputs):
    adapted, plain = adapted.float(), plain.float()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(50):
        adapted(inputs.float()).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            adapted(inputs.float())
    attention = layer(adapted).get_base_layer()
    assert torch.equal(attention.in_proj_weight, plain.attn.in_proj_weight)
    assert torch.equal(attention.out_proj.get_base_layer().weight, plain.attn.out_proj.weight)


def test_merging_and_unmerging_restores_registered_parameters(plain, adapted):
    adapted.merge_adapter()
    attention = layer(adapted).get_base_layer()
    assert not torch.equal(attention.in_proj_weight, plain.attn.in_proj_weight)
    adapted.unmerge_adapter()
    assert torch.equal(attention.in_proj_weight, plain.attn.in_proj_weight)
    assert isinstance(attention.in_proj_weight, nn.Parameter)
    assert isinstance(attention.out_proj.get_base_layer().weight, nn.Parameter)


def test_a_broken_adapter_is_refused_by_a_safe_merge(adapted):
    nn.init.constant_(layer(adapted).lora_B["default"].weight, float("nan"))
    with pytest.raises(ValueError, match="default gives NaN"):
        adapted.merge_adapter(safe_merge=True)
    assert not layer(adapted).merged


def test_unmerged_is_for_the_time_of_the_block_only(adapted, inputs):
    with torch.no_grad():
        adapted.merge_adapter()
        merged = adapted(inputs)
        with unmerged(adapted):
            assert not layer(adapted).merged
        assert layer(adapted).merged
        assert torch.equal(adapted(inputs), merged)
