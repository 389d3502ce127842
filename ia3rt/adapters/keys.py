"""What the keys of a PEFT file mean: vectors, an adapter's own modules, or weights that belong to no part of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ia3rt.adapters.given import check_floating
from ia3rt.adapters.site import Side, SiteKey
from ia3rt.adapters.site_names import paths_of

PREFIX = "base_model.model."
SUFFIX = ".ia3_l"

MOST_NAMED = 1_000
"""Modules that a config may name as an adapter's own: every key is compared with each."""

# What wrappers put into names: torch.compile, FSDP, activation checkpointing. DistributedDataParallel's `module.`
# stands in front only.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_DDP = "module."
# PEFT takes the adapter's name out of the keys that it saves; state_dict() has it.
_VECTOR = re.compile(r"(?P<path>.+)\.ia3_l(\.(?P<adapter>[^.]+))?")
_OWN = re.compile(r"(?P<path>.+?)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<name>.+)")
_ORIGINAL = re.compile(r".+?\.original_module\..+")
_TOKENS = re.compile(r".*\b(token_adapter|trainable_tokens\w*)\b.*")
_OTHER_METHODS = re.compile(
    r".*\.(?P<parameter>lora_\w+|vera_lambda\w*|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|ln_tuning_layers|prompt_encoder|"
    r"prompt_embeddings|adaption_\w+|fourierft_\w+|vblora_\w+|loras|adapters)(\..*)?"
)
_WEIGHT = re.compile(r"(?P<path>.+?)(\.base_layer)?\.(?P<name>weight|bias)")

# What PEFT trains and saves with the vectors for a task, without having been asked.
_TASK_MODULES = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass
class Contents:
    """What a file holds.

    Attributes:
        vectors: by module path and side, as stored.
        modules: by module path, the tensors of an adapter's own module, by their names in it.
        unnamed: which of `modules` the config's modules_to_save does not name, as it does not name saved embeddings.
    """

    vectors: dict[SiteKey, Tensor] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unnamed: set[str] = field(default_factory=set)


def sort_keys(tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: str) -> Contents:
    """Tells from its keys what each tensor of a PEFT file is.

    Args:
        tensors: the file's.
        config: the adapter_config.json.
        file: the file's name, for errors.

    Raises:
        ValueError: a key is of another method's or unknown, two mean the same, or a vector's shape or dtype is wrong.
    """
    contents = Contents()
    seen: dict[tuple[str, str], str] = {}
    adapters: dict[str, str] = {}
    try:
        to_save = modules_to_save(config)
    except ValueError as error:
        raise ValueError(f"the config beside {file}: {error}") from None
    for key, plain in zip(tensors, _plain(tensors), strict=True):
        tensor = tensors[key]
        what = _meaning(plain, to_save, key, file)
        if what is None:
            continue
        path, name, adapter, is_named = what
        if (path, name) in seen:
            raise ValueError(f"{file} holds {seen[path, name]!r} and {key!r}, which mean the same: leave one of them")
        seen[path, name] = key
        if adapter is not None:
            adapters.setdefault(adapter, key)
        if name == SUFFIX:
            contents.vectors[path, _side(path, tensor, config, file)] = tensor
            continue
        contents.modules.setdefault(path, {})[name] = tensor
        if not is_named:
            contents.unnamed.add(path)
    if len(adapters) > 1:
        raise ValueError(f"{file} holds several adapters, {sorted(adapters)}, by its keys: save each in its own folder")
    if not contents.vectors:
        raise ValueError(f"{file} holds no vectors: none of its {len(tensors)} keys ends with {SUFFIX}")
    return contents


def path_of_key(key: str) -> str:
    """The module that a vector's key is of, in the names that the model has without PEFT; what is no key, as it is."""
    (plain,) = _plain([key])
    match = _VECTOR.fullmatch(plain)
    return match["path"] if match else plain


def modules_to_save(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the modules of which an adapter has its own: the config's, and those of its task.

    Raises:
        ValueError: the config's are no list of names.
    """
    named = config.get("modules_to_save") or ()
    if not isinstance(named, list | tuple | set) or not all(isinstance(name, str) and name for name in named):
        raise ValueError(f"modules_to_save is {str(named)[:80]!r}: expected a list of modules' names")
    if len(named) > MOST_NAMED:
        raise ValueError(f"modules_to_save names {len(named):,} modules: {MOST_NAMED:,} are the most")
    return tuple(dict.fromkeys((*named, *task_modules(config))))


def task_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that PEFT adds to modules_to_save for the config's task; each where the model has such a module."""
    task = config.get("task_type")
    return _TASK_MODULES.get(str(getattr(task, "value", task)), ())


def saved_paths(names: Collection[str], paths: Iterable[str]) -> list[str]:
    """Which modules modules_to_save means: as in PEFT those whose path ends with a name; the outermost of them."""
    found: list[str] = []
    for path in sorted((path for path in paths if path and path.endswith(tuple(names))), key=len):
        if not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found


def _plain(keys: Iterable[str]) -> list[str]:
    """The keys as they are below PEFT's wrapper, without what other wrappers put into them."""
    plain = [".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in keys]
    while plain and all(key.startswith(_DDP) for key in plain):  # below PEFT's prefix it is a module of the model's own
        plain = [key.removeprefix(_DDP) for key in plain]
    return [key.removeprefix(PREFIX) for key in plain]


def _meaning(key: str, to_save: Collection[str], raw: str, file: str) -> tuple[str, str, str | None, bool] | None:
    """A key's module path, name in that module, adapter, and whether modules_to_save names it; None to leave it."""
    if match := _OWN.fullmatch(key):
        return match["path"], match["name"], match["adapter"], True
    if _ORIGINAL.fullmatch(key):
        return None  # the model's own, beside which state_dict() has the adapter's
    for path in _prefixes(key):
        if path.endswith(tuple(to_save)) and not key.startswith((f"{path}.ia3_l", f"{path}.base_layer.")):
            return path, key[len(path) + 1 :], None, True
    if match := _VECTOR.fullmatch(key):
        return match["path"], SUFFIX, match["adapter"], False
    if _TOKENS.fullmatch(key):
        raise ValueError(f"{file} holds {raw!r}, trained tokens (trainable_token_indices), which ia3rt cannot wear")
    if match := _OTHER_METHODS.fullmatch(key):
        raise ValueError(
            f"{file} holds {raw!r}: a {match['parameter']!r} is no IA³ vector, but the config beside it is of type "
            "IA3. The two are of different adapters"
        )
    if match := _WEIGHT.fullmatch(key):
        return match["path"], match["name"], None, False
    raise ValueError(
        f"{file} holds {raw!r}, which is no IA³ vector (such keys end with {SUFFIX}), and of no module that "
        "modules_to_save names: ia3rt does not know what it is"
    )


def _prefixes(key: str) -> Iterable[str]:
    """The paths of the modules that may hold what a key names, outermost first."""
    parts = key.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _side(path: str, tensor: Tensor, config: Mapping[str, Any], file: str) -> Side:
    # The shape says what was trained. The config can be wrong: in PEFT the first adapter on a module fixes its side
    # for all later ones.
    check_floating(tensor, f"{file}: the vector at {path!r}")
    if tensor.dim() == 2 and tensor.shape[0] == 1 and tensor.shape[1] > 1:
        return "in"
    if tensor.dim() == 2 and tensor.shape[1] == 1 and tensor.shape[0] > 1:
        return "out"
    if tensor.dim() == 3 and tensor.shape[0] > 1 and (tensor.shape[1] == 1) != (tensor.shape[2] == 1):
        return "in" if tensor.shape[1] == 1 else "out"  # one such vector an expert
    of_convolution = tensor.dim() in (3, 4, 5) and tensor.shape[0] == 1 and tensor.numel() == tensor.shape[1]
    if of_convolution or (tensor.dim() == 2 and tensor.numel() == 1):
        return "in" if _is_input(path, config, file) else "out"  # of the same shape at both sides: PEFT asks its config
    raise ValueError(
        f"{file}: the vector at {path!r} has shape {tuple(tensor.shape)}: PEFT's linear layers have [1, in_features] "
        "or [out_features, 1], and convolutions [1, channels, 1, 1] or one dimension more"
    )


def _is_input(path: str, config: Mapping[str, Any], file: str) -> bool:
    """Whether feedforward_modules mean a module, for a vector whose shape does not say its side."""
    named = config.get("feedforward_modules") or ()
    if isinstance(named, str) and (paths := paths_of(named)) is not None:
        return path in paths
    if not isinstance(named, list | tuple | set):  # a pattern out of a file is not run: it may take for ever
        raise ValueError(
            f"the config beside {file}: feedforward_modules is {str(named)[:80]!r}, and the shape of the vector at "
            f"{path!r} does not say on which side it acts: expected a list of modules' names, which does"
        )
    return path.endswith(tuple(map(str, named)))  # as PEFT compares
