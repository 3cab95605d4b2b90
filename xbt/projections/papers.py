"""What a model card says of the method that made a projection, with its paper."""

from __future__ import annotations

_METHODS = {
    "identity": "The new vectors as they are, cut or filled up with zeros; nothing was fitted.",
    "mean_shift": (
        "The new vectors moved by the difference of both models' means: query drift compensation (Goswami et "
        "al., 2025, [arXiv 2506.00037](https://arxiv.org/abs/2506.00037))."
    ),
    "procrustes": (
        'The rotation that brings the new vectors nearest to the old ones, in closed form (Schönemann, "A '
        'generalized solution of the orthogonal Procrustes problem", Psychometrika, 1966).'
    ),
    "ridge": (
        'Regularised least squares, in closed form (Hoerl & Kennard, "Ridge Regression: Biased Estimation '
        'for Nonorthogonal Problems", 1970).'
    ),
    "low_rank": (
        "Reduced-rank regression, in closed form (Izenman, 1975), of the form of Drift-Adapter's low-rank "
        "map (Vejendla, 2025, [arXiv 2509.23471](https://arxiv.org/abs/2509.23471))."
    ),
    "whitened_procrustes": (
        'A rotation between whitened vectors, in closed form (Artetxe, Labaka & Agirre, "Generalizing and '
        'Improving Bilingual Word Embedding Mappings with a Multi-Step Framework of Linear Transformations", '
        "2018)."
    ),
    "lambda_orthogonal": (
        "An affine map trained from the Procrustes rotation on under a λ-orthogonality constraint (Ricci, "
        "Biondi, Pernici et al., NeurIPS 2025, [arXiv 2509.16664](https://arxiv.org/abs/2509.16664))."
    ),
    "mlp": (
        "A residual MLP trained from the Procrustes rotation on: Drift-Adapter (Vejendla, EMNLP 2025, "
        "[arXiv 2509.23471](https://arxiv.org/abs/2509.23471))."
    ),
    "xbt": (
        "XBT's projection, pretrained on text (Jang & Lim, \"Towards Cross-modal Backward-compatible "
        'Representation Learning for Vision-Language Models", ICCV 2025, '
        "[arXiv 2405.14715](https://arxiv.org/abs/2405.14715)); its architecture here is xbt's own."
    ),
}
_KINDS = {
    "linear": "One matrix, with an offset if there is one; how it was fitted was not recorded.",
    "residual": f"{_METHODS['xbt']} A rotation plus a gated residual MLP.",
    "head": (
        "The head of a model that is born compatible: BT² (Zhou et al., ICCV 2023, "
        "[arXiv 2211.03989](https://arxiv.org/abs/2211.03989)), OCA (Ricci et al., 2024, "
        "[arXiv 2408.08793](https://arxiv.org/abs/2408.08793)) or BCT (Shen et al., CVPR 2020, "
        "[arXiv 2003.11942](https://arxiv.org/abs/2003.11942)); its config says which."
    ),
    "forward": (
        'A forward map, from old vectors to the new space (Ramanujan et al., "Forward Compatible Training '
        'for Large-Scale Embedding Retrieval Systems", CVPR 2022).'
    ),
}


def told_method(method: str | None, kind: str) -> str:
    """How a projection was made, in a sentence with its paper; as far as it is known."""
    return _METHODS.get(method or "", _KINDS.get(kind, "How it was made was not recorded."))
