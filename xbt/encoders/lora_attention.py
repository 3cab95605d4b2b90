"""LoRA on ``nn.MultiheadAttention`` (open_clip's attention) that never changes the base weights.

That module has no linear layers to wrap, so peft adds the adapter to the base weights before every forward
pass and subtracts it afterwards. This has two errors up to peft 0.21. First, ``(w + d) - d`` is not ``w`` in
floating point, so the base drifts from pass to pass, and the saved adapter does not quite fit the original
model. Second, the output projection's adapter is added twice, with half of its gradient. The layer below
keeps peft's parameters, names and file format, and replaces these two steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn


class ExactAttention(MultiheadAttention):  # type: ignore[misc]  # peft is untyped
    """peft's LoRA layer for ``nn.MultiheadAttention``, which merges ``W + scaling · B A`` reversibly.

    The original parameters are kept while the adapter is merged, and the same objects are restored.
    """

    _originals: tuple[nn.Parameter, nn.Parameter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace both weights by their sum with the adapter's, differentiably in the adapter.

        Args:
            safe_merge: Whether to refuse NaN and infinite sums with a ``ValueError``.
            adapter_names: Adapters to merge; the active ones by default.
        """
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        attention = self.get_base_layer()
        output = attention.out_proj  # peft's own LoRA layer around the linear one
        linear = output.get_base_layer()
        if not self.merged:
            self._originals = (attention.in_proj_weight, linear.weight)
        inward, outward = attention.in_proj_weight.detach(), linear.weight.detach()
        for name in names:
            inward = inward + self.get_delta_weight(name).to(inward.dtype)
            outward = outward + output.get_delta_weight(name).to(outward.dtype)
        if safe_merge and not (torch.isfinite(inward).all() and torch.isfinite(outward).all()):
            raise ValueError(f"merging {', '.join(names)} gives NaN or infinite weights")
        # Plain tensors instead of parameters, so that the gradient reaches the adapter.
        del attention.in_proj_weight, linear.weight
        attention.in_proj_weight, linear.weight = inward, outward
        self.merged_adapters.extend(names)
        output.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the original parameters, bit for bit."""
        if not self.merged:
            return
        attention = self.get_base_layer()
        linear = attention.out_proj.get_base_layer()
        del attention.in_proj_weight, linear.weight
        inward, outward = self._originals
        attention.register_parameter("in_proj_weight", inward)
        linear.register_parameter("weight", outward)
        self.merged_adapters.clear()
        attention.out_proj.merged_adapters.clear()


@contextmanager
def unmerged(module: nn.Module) -> Iterator[None]:
    """Unmerge the adapters of attention layers within the block.

    Needed to move a model: ``nn.Module.to`` moves neither merged weights, which are plain tensors, nor the
    stored originals.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ExactAttention) and layer.merged]
    for layer in layers:
        layer.unmerge()
    try:
        yield
    finally:
        with torch.no_grad():
            for layer in layers:
                layer.merge()
