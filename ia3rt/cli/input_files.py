"""Copies the files of a model's tokenizer, and of what else prepares its inputs, without reading them.

A tokenizer that is loaded and written again may be another one: transformers makes an empty one where there is none,
and has to run code for one of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path

_PATTERNS = (
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
    "word_shape.json",
    "word_pronunciation.json",
    # What else processors save: voices, a language model over sounds, a font for what is written into pictures.
    "speaker_embeddings_path.json",
    "speaker_embeddings/**/*.npy",
    "alphabet.json",
    "language_model/attrs.json",
    "language_model/unigrams.txt",
    "language_model/*.arpa",
    "language_model/*.bin",
    "*.ttf",
)
_MARKS = ("config.json", "adapter_config.json")
"""What another model's or an adapter's folder has, as trainers leave them inside: its tokenizer is not this model's."""


def copy_input_files(source: Path, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Copies them byte for byte; no code, and nothing that is there already.

    Args:
        source: the model's folder.
        folder: where to.

    Returns:
        The names of the files copied, and those of the files of code beside them, which are not.

    Raises:
        OSError: one cannot be read or written.
    """
    copied = []
    places = (source, *_other_tokenizers(source))
    for file in sorted({file for place in places for pattern in _PATTERNS for file in place.glob(pattern)}):
        name = file.relative_to(source)
        if file.is_file() and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
            copied.append(name.as_posix())
    return tuple(copied), tuple(sorted(file.name for file in source.glob("*.py")))


def _other_tokenizers(source: Path) -> list[Path]:
    """The folders inside in which a processor saves what tokenizers it has besides its first."""
    folders = [file.parent for file in source.glob("*/tokenizer_config.json")]
    return [folder for folder in folders if not any((folder / mark).exists() for mark in _MARKS)]


def model_folder(model: str) -> Path:
    """Where a model's files are on this machine, with those that `copy_input_files` copies, downloaded if need be.

    Args:
        model: a folder, or a Hub id of a model that was loaded.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    inside = [f"*/{name}" for name in (*_PATTERNS, *_MARKS)]
    return Path(snapshot_download(model, allow_patterns=[*_PATTERNS, *inside, "*.py"]))
