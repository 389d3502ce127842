"""Copies the files of a model's tokenizer, and of what else prepares its inputs, without reading them.

A tokenizer that is loaded and written again may be another one: transformers makes an empty one where there is none,
and has to run code for one of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

PATTERNS = (
    # Of all tokenizers and processors: the names in transformers.utils and transformers.tokenization_utils_base.
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    # Vocabularies: the vocab_files_names of transformers' tokenizers.
    "*vocab*.json",
    "*vocab*.txt",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.codes",
    "*.tiktoken",
    "tekken.json",
    "byte_maps.json",
    "emoji.json",
    "dict.txt",
    "prophetnet.tokenizer",
    "normalizer.json",
)


def copy_input_files(model: str, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copies them byte for byte; no code, and nothing that is there already.

    Args:
        model: a folder or a Hub id.
        folder: where to.

    Returns:
        The names of the files copied, and those of the files of code beside them, which are not.

    Raises:
        OSError: one cannot be read or written.
    """
    source = _source(model)
    copied = []
    for file in sorted({file for pattern in PATTERNS for file in source.glob(pattern) if file.is_file()}):
        name = file.relative_to(source)
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
            copied.append(name.as_posix())
    return tuple(copied), tuple(sorted(file.name for file in source.glob("*.py")))


def _source(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=[*PATTERNS, "*.py"]))
