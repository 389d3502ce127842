"""In which part of a model sites are looked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

from torch import nn


def searched_paths(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The paths of modules in which sites are looked for: all, but for what sees and hears where a text is written.

    There the vision and audio towers stay as they are. An encoder has no such part, and models with two towers beside
    each other (CLIP) or with an encoder before the decoder are searched as a whole.
    """
    decoder = None if _is_encoder_decoder(model) else asked(model, "get_decoder")
    paths = {module: path for path, module in modules.items()}
    if not isinstance(decoder, nn.Module) or decoder not in paths or not _writes(decoder):
        yield from modules
        return
    root = paths[decoder]
    towers = [asked(model, "get_encoder", modality=sense) for sense in ("image", "audio")]
    towers += [module for module in modules.values() if getattr(module, "main_input_name", "input_ids") != "input_ids"]
    inside = [paths[tower] for tower in towers if isinstance(tower, nn.Module) and tower in paths]
    left_out = [path for path in inside if path != root and _is_in(path, root)]
    for path in modules:
        if _is_in(path, root) and not any(_is_in(path, tower) for tower in left_out):
            yield path


def _is_in(path: str, root: str) -> bool:
    return root in ("", path) or path.startswith(f"{root}.")


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _writes(decoder: nn.Module) -> bool:
    """Whether it goes on with a text: it keeps a cache for that, and its config does not say that it is an encoder."""
    takes = inspect.signature(decoder.forward).parameters
    return "use_cache" in takes and getattr(getattr(decoder, "config", None), "is_decoder", True) is not False


def asked(model: nn.Module, method: str, **about: str) -> object:
    """What a transformers model answers, None for any other."""
    ask = getattr(model, method, None)
    return ask(**about) if callable(ask) else None
