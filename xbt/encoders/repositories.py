"""Which repository of the Hugging Face Hub a specification of an encoder means."""

from __future__ import annotations

from xbt.hub import LOCAL, public_name


def hub_repository(spec: str) -> str | None:
    """The repository ``org/name`` that an encoder's weights come from.

    Args:
        spec: A specification as :func:`~xbt.encoders.load_encoder` takes it, or whatever a space is called.

    Returns:
        The repository, or ``None`` for a directory, a file, or weights that the Hub does not have.
    """
    if public_name(spec) != spec or LOCAL in spec:
        return None
    backend, _, rest = spec.partition(":")
    if backend == "open_clip" and not rest.startswith("hf-hub:"):
        from open_clip.pretrained import get_pretrained_cfg  # takes seconds

        architecture, _, tag = rest.partition("/")
        rest = str(get_pretrained_cfg(architecture, tag).get("hf_hub", "")).rstrip("/")
    elif backend not in ("open_clip", "transformers"):
        return None
    repository = rest.removeprefix("hf-hub:").partition("@")[0]
    return repository if repository.count("/") == 1 else None
