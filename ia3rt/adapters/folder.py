"""The folder that holds an adapter's files: found here or on the Hub; where it holds none, what it holds instead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ia3rt.adapters.plain_file import check_plain

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
HUB_SAFETENSORS_NAME = "adapter.safetensors"
HUB_PICKLE_NAME = "pytorch_adapter.bin"
HUB_HEAD_SAFETENSORS_NAME = "model_head.safetensors"
HUB_HEAD_PICKLE_NAME = "pytorch_model_head.bin"
PEFT_NAMES = (SAFETENSORS_NAME, PICKLE_NAME)
ADAPTERHUB_NAMES = (HUB_SAFETENSORS_NAME, HUB_PICKLE_NAME)
ADAPTERHUB_HEAD_NAMES = (HUB_HEAD_SAFETENSORS_NAME, HUB_HEAD_PICKLE_NAME)
FILE_NAMES = (CONFIG_NAME, *PEFT_NAMES, *ADAPTERHUB_NAMES, *ADAPTERHUB_HEAD_NAMES)
"""All files of an adapter that are read, PEFT's and AdapterHub's."""

_MODEL_NAME = "config.json"
_MOST_SHOWN = 80  # characters of what is not even a path
_MOST_NAMED = 5  # subfolders in one message


def local_folder(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """The folder that holds an adapter's files, downloaded where it is no folder here.

    Args:
        path_or_hub_id: a folder, or the id of a repository on the Hugging Face Hub.
        revision: the repository's branch, tag or commit.
        subfolder: the folder inside `path_or_hub_id` that holds the adapter.
        token: the Hub token, as in huggingface_hub.

    Raises:
        FileNotFoundError: it is neither a folder nor a repository that the Hub gave, or there is no adapter in it; the
            message names the folders inside that hold one.
        ValueError: its adapter_config.json is no regular file.
    """
    if not is_folder(path_or_hub_id, "the adapter"):
        return _download(str(path_or_hub_id), revision, subfolder, token)
    given = Path(path_or_hub_id)
    folder = given / (subfolder or "")
    if not _is_there(folder / CONFIG_NAME):
        raise FileNotFoundError(_without_adapter(str(path_or_hub_id), subfolder, list(_here(given, subfolder))))
    return folder


def is_folder(path_or_hub_id: str | Path, holds: str) -> bool:
    """Whether it is a folder here; else it may be the id of a repository on the Hub.

    Args:
        path_or_hub_id: what a user gave.
        holds: what it should hold, for errors.

    Raises:
        FileNotFoundError: it is a file, or a path at which there is no folder, or none that can be read.
    """
    given = Path(path_or_hub_id)
    try:
        os.stat(given)
    except (FileNotFoundError, NotADirectoryError):
        pass  # a repository on the Hub, perhaps
    except (OSError, ValueError) as error:  # too long, a NUL in it, a folder that may not be read
        raise FileNotFoundError(f"{str(given)[:_MOST_SHOWN]!r} is no folder that can be read: {error}") from error
    if given.is_file():
        raise FileNotFoundError(f"{given} is a file: give the folder that holds it, {str(given.parent)!r}")
    if given.is_dir():
        return True
    if given.is_absolute() or str(path_or_hub_id).startswith("."):  # which no repository's id is
        raise FileNotFoundError(f"{str(given)[:_MOST_SHOWN]!r} is not there: give the folder that holds {holds}")
    return False


def adapter_folders(root: Path) -> tuple[list[Path], list[str]]:
    """The folders in a folder that hold an adapter, and the paths of adapters that lie one folder deeper, by name.

    PEFT saves an adapter that was trained by a name of its own into a folder of that name in the one that it is given.
    """
    folders = [root / name for name in sorted(each.name for each in os.scandir(root) if each.is_dir())]
    found = [folder for folder in folders if (folder / CONFIG_NAME).is_file()]
    known = set(found)
    deeper = [file.parent for folder in folders if folder not in known for file in folder.glob(f"*/{CONFIG_NAME}")]
    return found, [folder.relative_to(root).as_posix() for folder in sorted(deeper)]


def find_file(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of `names` that is in `folder`.

    Raises:
        FileNotFoundError: none is.
        ValueError: one is, and is no regular file.
    """
    for name in names:
        if _is_there(folder / name):
            return folder / name
    raise FileNotFoundError(
        f"{folder} holds neither {' nor '.join(names)} beside its {CONFIG_NAME}: the adapter's numbers are missing"
    )


def _is_there(file: Path) -> bool:
    try:
        check_plain(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _download(repo: str, revision: str | None, subfolder: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    inside = f"{subfolder}/" if subfolder else ""
    patterns = [inside + name for name in FILE_NAMES]
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, token=token)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{repo!r} is neither a folder here nor an adapter that the Hugging Face Hub gave: {error}"
        ) from error
    found = Path(folder) / (subfolder or "")
    if not (found / CONFIG_NAME).is_file():
        files: list[str] = []
        with suppress(HfHubHTTPError, OSError):  # offline: what is there is not known then
            files = list_repo_files(repo, revision=revision, token=token)
        raise FileNotFoundError(_without_adapter(repo, subfolder, files))
    return found


def _here(folder: Path, subfolder: str | None) -> Iterator[str]:
    """The files that matter in a folder, and adapters down to two levels inside, as the Hub lists a repository's."""
    for place in dict.fromkeys((folder, folder / (subfolder or ""))):
        for name in (*FILE_NAMES, _MODEL_NAME):
            if (place / name).is_file():
                yield (place / name).relative_to(folder).as_posix()
    for pattern in (f"*/{CONFIG_NAME}", f"*/*/{CONFIG_NAME}"):
        yield from (file.relative_to(folder).as_posix() for file in sorted(folder.glob(pattern)))


def _how(given: str, inside: str) -> str:
    """How one that is inside is given, to a function as to a command."""
    if os.path.isdir(given):
        return f"Give {os.path.join(given, inside)!r}"
    return f"Give it as the subfolder {inside!r}"


def _without_adapter(given: str, subfolder: str | None, files: list[str]) -> str:
    """What to say of a folder or repository without an adapter_config.json where it should be."""
    where = f"{given}/{subfolder}" if subfolder else given
    says = f"{where} holds no {CONFIG_NAME}: it is not an adapter"
    inside = [file.removesuffix(f"/{CONFIG_NAME}") for file in files if file.endswith(f"/{CONFIG_NAME}")]
    prefix = f"{subfolder}/" if subfolder else ""
    if CONFIG_NAME in files:
        return f"{says}, but {given} itself is one: leave subfolder out"
    if inside:
        named = ", ".join(repr(name) for name in inside[:_MOST_NAMED]) + (", …" if len(inside) > _MOST_NAMED else "")
        which = "this folder inside does" if len(inside) == 1 else "these folders inside do"
        return f"{says}, but {which} hold one: {named}. {_how(given, inside[0])}"
    beside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    weights = [name for name in FILE_NAMES if name in beside]
    if weights:
        return f"{says}, though it holds {weights[0]}: the two belong together, copy the {CONFIG_NAME} beside it"
    if _MODEL_NAME in beside:
        return f"{says}, but a model: it holds a {_MODEL_NAME}"
    return says
