"""Reading an untrusted LoRA: config and header are checked against the encoder before a weight is read.

The names of the weights show the adapted modules, and their shapes show the ranks. So no regular expression
of an adapter's config is ever run, neither here nor in peft.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from xbt.encoders.base import DualEncoder
from xbt.errors import EncoderError
from xbt.hub import SavedPartError, Stored, read_header, read_json, require_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Embedding, nn.MultiheadAttention)
"""Module types that LoRA supports."""

_PREFIX = "base_model.model."
_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
_INNER = ".base_layer.out_proj"  # peft's name for the adapter of an attention's output projection
_FLOATS = ("F16", "BF16", "F32", "F64")
_USED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules")
_WHERE = ("exclude_modules", "layers_to_transform", "layers_pattern")
_IRRELEVANT = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config", "fan_in_fan_out"),
)
_OFF: tuple[Any, ...] = (None, False, "none", [], {})
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of ``init_lora_weights`` that do not change the base model."""
_MAX_ALPHA = 1e6
_MAX_PATTERNS = 200_000
"""Maximum number of characters of all patterns of a setting together."""
_MAX_EXPRESSION = 1_000


class Settings(NamedTuple):
    """Settings of an adapter's config that change vectors."""

    rank: int
    """Rank of modules that no pattern in ``ranks`` matches."""
    alpha: float
    """Alpha of modules that no pattern in ``alphas`` matches."""
    dropout: float
    rslora: bool
    """Whether the update is scaled by ``alpha / sqrt(rank)``."""
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: str | list[str]
    """``target_modules``, a list of name endings or a regular expression."""
    everywhere: bool
    """Whether ``targets`` is complete: no other setting excludes modules."""


def read_lora(encoder: DualEncoder, folder: Path) -> Any:
    """Read a saved LoRA's config and the header of its weights, and compare both with the encoder.

    Returns:
        The ``peft.LoraConfig`` of exactly the adapter that the weights belong to.
    """
    from peft import LoraConfig

    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise EncoderError(f"{folder} has no {file}, so it is not a saved LoRA")
    try:
        config = read_json(require_file(folder / CONFIG_FILE, folder))
        header = read_header(require_file(folder / WEIGHTS_FILE, folder))
        settings = _settings(config)
        names = _targets(encoder, settings.targets) if settings.everywhere else None
    except SavedPartError as error:
        raise EncoderError(f"the adapter in {folder} cannot be read: {error}") from error
    except ValueError as error:
        raise EncoderError(f"the adapter in {folder} {error}") from error
    ranks = _ranks(header, adaptable(encoder))
    needed = expected_weights(encoder, dict.fromkeys(names or (), settings.rank) | ranks)
    fault = misfit(needed, header) or _wrong_rank(settings, ranks)
    if fault:
        raise EncoderError(f"the adapter in {folder} does not fit {encoder.name}: {fault}")
    try:
        alphas = _resolve(settings.alphas, settings.alpha, ranks)
    except ValueError as error:
        raise EncoderError(f"the adapter in {folder} has alpha_pattern {error}") from error
    default = default_pattern(encoder)
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        rank_pattern=_patterns(ranks, settings.rank),
        alpha_pattern=_patterns(alphas, settings.alpha),
        target_modules=default if settings.targets == default else exact_pattern(ranks),
    )


def default_pattern(encoder: DualEncoder) -> str:
    """The regular expression for the modules that LoRA adapts by default."""
    return "|".join(encoder.lora_targets.values())


def exact_pattern(names: Iterable[str]) -> str:
    """A regular expression for exactly these full module names.

    A list would not work: peft treats its entries as endings of names, and saves them in random order.
    """
    return "|".join(re.escape(name) for name in sorted(names))


def adaptable(encoder: DualEncoder) -> dict[str, nn.Module]:
    """Name → module for all modules that LoRA supports.

    The output projection of ``nn.MultiheadAttention`` is excluded, because its weight is read without calling
    it. Grouped convolutions are excluded, because peft cannot merge into them.
    """
    modules = dict(encoder.module.named_modules())
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, ADAPTABLE)
        and not isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
        and getattr(module, "in_proj_weight", module) is not None
        and getattr(module, "groups", 1) == 1
    }


def expected_weights(encoder: DualEncoder, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name → shape for the weights of a LoRA with a rank for each full name of an adaptable module."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rank in ranks.items():
        module: Any = encoder.module.get_submodule(name)
        key = _PREFIX + name
        if isinstance(module, nn.MultiheadAttention):
            shapes |= _pair(key, rank, module.in_proj_weight.shape)
            shapes |= _pair(key + _INNER, rank, module.out_proj.weight.shape)
        elif isinstance(module, nn.Embedding):
            count, dim = module.weight.shape
            shapes |= {f"{key}.lora_embedding_A": (rank, count), f"{key}.lora_embedding_B": (dim, rank)}
        elif isinstance(module, nn.Conv2d):
            out, *rest = module.weight.shape
            shapes |= {f"{key}.lora_A.weight": (rank, *rest), f"{key}.lora_B.weight": (out, rank, 1, 1)}
        else:
            shapes |= _pair(key, rank, module.weight.shape)
    return shapes


def misfit(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored]) -> str:
    """Describe the difference between two sets of weights; empty if there is none."""
    missing = sorted(set(expected) - set(stored))
    extra = sorted(set(stored) - set(expected))
    common = sorted(set(stored) & set(expected))
    wrong = [key for key in common if stored[key].shape != expected[key]]
    odd = [key for key in common if stored[key].dtype not in _FLOATS]
    faults = []
    if missing:
        faults.append(f"{len(missing)} weights are missing, first {missing[0]}")
    if extra:
        faults.append(f"{len(extra)} are unknown to it, first {extra[0]:.200}")
    if wrong:
        key = wrong[0]
        shapes = f"{stored[key].shape} instead of {expected[key]}"
        faults.append(f"{len(wrong)} have another shape, first {key} with {shapes}")
    if odd:
        faults.append(f"{len(odd)} are not floats, first {odd[0]} with {stored[odd[0]].dtype}")
    return "; ".join(faults)


def _pair(key: str, rank: int, shape: Iterable[int]) -> dict[str, tuple[int, ...]]:
    out, into = shape
    return {f"{key}.lora_A.weight": (rank, into), f"{key}.lora_B.weight": (out, rank)}


def _settings(saved: Mapping[str, Any]) -> Settings:
    """Check every setting of a config; a ``ValueError`` holds the end of a sentence about the adapter."""
    if saved.get("peft_type") != "LORA":
        raise ValueError(f"is of type {saved.get('peft_type')!r:.80}, not a LoRA")
    start = saved.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in _PLAIN_STARTS:
        raise ValueError(
            f"has init_lora_weights={start!r:.80}, which changes the base model; convert it to a plain LoRA "
            "with peft (save_pretrained with path_initial_model_for_weight_conversion) first"
        )
    for name in sorted(saved):
        if name not in (*_USED, *_WHERE, *_IRRELEVANT) and saved[name] not in _OFF:
            raise ValueError(
                f"has {name}={saved[name]!r:.80}, so it is not a plain LoRA; merge it into its base model "
                "with peft (merge_and_unload), save that model and load it instead"
            )
    rank, alpha, dropout = saved.get("r"), saved.get("lora_alpha"), saved.get("lora_dropout", 0.0)
    rslora, targets = saved.get("use_rslora", False), saved.get("target_modules")
    endings = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    checks: dict[str, tuple[object, bool]] = {
        "r": (rank, _is_rank(rank)),
        "lora_alpha": (alpha, _is_alpha(alpha)),
        "lora_dropout": (dropout, _is_alpha(dropout) and 0 <= dropout <= 1),
        "use_rslora": (rslora, isinstance(rslora, bool)),
        "target_modules": (targets, isinstance(targets, str) or endings),
    }
    for name, (value, right) in checks.items():
        if not right:
            raise ValueError(f"cannot be read: {CONFIG_FILE} has {name} {value!r:.80}")
    return Settings(
        saved["r"],
        saved["lora_alpha"],
        dropout,
        rslora,
        _mapping(saved, "rank_pattern", _is_rank),
        _mapping(saved, "alpha_pattern", _is_alpha),
        saved["target_modules"],
        all(saved.get(name) in (None, "", []) for name in _WHERE),  # not 0, which is a layer
    )


def _mapping(saved: Mapping[str, Any], name: str, is_right: Any) -> dict[str, Any]:
    """A setting that maps patterns to numbers."""
    mapping = saved.get(name) or {}
    if not isinstance(mapping, dict) or not all(map(is_right, mapping.values())):
        raise ValueError(f"cannot be read: {CONFIG_FILE} has {name} {mapping!r:.80}")
    if sum(map(len, mapping)) > _MAX_PATTERNS:
        raise ValueError(
            f"cannot be read: the patterns of {name} have {sum(map(len, mapping)):,} characters, but at most "
            f"{_MAX_PATTERNS:,} are read"
        )
    return mapping


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: object) -> bool:
    """True for a finite number of a plausible size for a LoRA."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_ALPHA


def _targets(encoder: DualEncoder, targets: str | list[str]) -> list[str] | None:
    """The modules that ``target_modules`` names; ``None`` if it is an unknown regular expression."""
    if targets == default_pattern(encoder):
        # This is the encoder's own pattern, so it is safe to run.
        return [name for name in adaptable(encoder) if re.fullmatch(targets, name)]
    if isinstance(targets, list):
        endings = set(targets)
        return [name for name in adaptable(encoder) if not endings.isdisjoint(_endings(name))]
    globs = _globs(targets) if len(targets) <= _MAX_PATTERNS else None
    if globs is None or any(set(glob) & set("*?[") for _, glob in globs):
        return None
    exact = {glob for _, glob in globs}
    return [name for name in adaptable(encoder) if name in exact]


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _ranks(header: Mapping[str, Stored], modules: Collection[str]) -> dict[str, int]:
    """The rank of every adapted module; :func:`misfit` reports weights of no module."""
    ranks: dict[str, int] = {}
    for key, stored in header.items():
        ending = next(filter(key.endswith, _ENDINGS), None)
        if ending is None or not key.startswith(_PREFIX):
            continue
        name = key.removeprefix(_PREFIX).removesuffix(ending)
        if name not in modules:
            name = name.removesuffix(_INNER)
        axis = 0 if "A" in ending else 1
        if name in modules and len(stored.shape) > axis and (axis == 0 or name not in ranks):
            ranks[name] = stored.shape[axis]
    return ranks


def _wrong_rank(settings: Settings, ranks: Mapping[str, int]) -> str:
    """Describe a difference between the ranks of the config and of the weights; empty if there is none."""
    if not ranks:
        return "it adapts none of the model's modules"
    try:
        expected = {name: {rank} for name, rank in _resolve(settings.ranks, settings.rank, ranks).items()}
    except ValueError:
        # A regular expression is not run, so any of its ranks is accepted.
        for pattern in settings.ranks:
            if not _is_expression(pattern):
                return f"its rank_pattern {pattern!r:.80} is not a regular expression"
        expected = {name: {settings.rank, *settings.ranks.values()} for name in ranks}
    for name, rank in ranks.items():
        if rank not in expected[name]:
            ranks_in_config = ", ".join(map(str, sorted(expected[name])))
            return f"its config says rank {ranks_in_config:.80} for {name}, but its weights have rank {rank}"
    return ""


def _is_expression(pattern: str) -> bool:
    if len(pattern) > _MAX_EXPRESSION:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _resolve(patterns: Mapping[str, Any], default: Any, names: Iterable[str]) -> dict[str, Any]:
    """Name → value of the first pattern that matches it, as peft chooses it.

    A regular expression with more than names and wildcards is refused and never run.
    """
    matchers: list[tuple[re.Pattern[str], Any]] = []
    for pattern, value in patterns.items():
        globs = _globs(pattern)
        if globs is None:
            raise ValueError(
                f"{pattern!r:.80}, a regular expression, and expressions from files are not run; write the "
                "names of the modules instead"
            )
        for anchored, glob in globs:
            # The expressions of fnmatch take linear time.
            matchers.append((re.compile(fnmatch.translate(glob)), value))
            if not anchored:
                matchers.append((re.compile(fnmatch.translate(f"*.{glob}")), value))
    return {
        name: next((value for matcher, value in matchers if matcher.match(name)), default) for name in names
    }


def _globs(pattern: str) -> list[tuple[bool, str]] | None:
    r"""Translate a regular expression of names, ``\.``, ``.``, ``.*`` and ``|`` into globs.

    Returns:
        For each alternative True if it begins with ``^``, and the glob; ``None`` for any other syntax.
    """
    globs: list[tuple[bool, str]] = []
    anchored, ended, glob = False, False, ""
    # The tokens do not overlap, so this takes linear time.
    for token in re.findall(r"\\.?|\.[*+]?|[^\\.]", pattern, re.DOTALL):
        if token == "|":
            globs.append((anchored, glob))
            anchored, ended, glob = False, False, ""
        elif ended:
            return None
        elif token == "$":
            ended = True
        elif token == "^" and not glob and not anchored:
            anchored = True
        elif token[0] == ".":
            glob += {".": "?", ".*": "*", ".+": "?*"}[token]
        elif token[0] == "\\":
            if len(token) == 1 or token[1].isalnum():
                return None
            glob += f"[{token[1]}]" if token[1] in "*?[" else token[1]
        elif token in "*+?{}[]()^":
            return None
        else:
            glob += token
    return [*globs, (anchored, glob)]


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Values in peft's form: for each value other than the default, one pattern of full names → the value."""
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        if value != default:
            groups.setdefault(value, []).append(name)
    return {
        "|".join(f"^{re.escape(name)}" for name in sorted(names)): value for value, names in groups.items()
    }
