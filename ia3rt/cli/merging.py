"""`ia3rt merge`: a plain model, with adapters multiplied into its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ia3rt.adapters.new_folder import check_new, new_folder
from ia3rt.cli.files import read_all
from ia3rt.cli.input_files import copy_input_files, model_folder
from ia3rt.cli.loading import load_whole
from ia3rt.cli.packages import quiet, require
from ia3rt.cli.progress import busy
from ia3rt.cli.stopping import ended_by_sigterm
from ia3rt.cli.stored_dtypes import stored_dtypes


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        architecture: the model's class.
        dtype: of its weights, which is what its config names.
        cast_from: the dtypes that its files have, where those are others than what was written.
        copied: the files of the model's tokenizer, and of what else prepares its inputs, as they were.
        not_copied: files of code beside it, which the copied ones may name.
        left_out: weights in its files that its class has no place for, and transformers does not load.
    """

    architecture: str
    dtype: str
    cast_from: tuple[str, ...]
    copied: tuple[str, ...]
    not_copied: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def in_words(self) -> str:
        """What it is: `LlamaForCausalLM in float32 (its files have float16), with its tokenizer.json`."""
        cast = f" (its files have {', '.join(self.cast_from)})" if self.cast_from else ""
        copied = f"with its {', '.join(self.copied)}" if self.copied else "it has no tokenizer's files"
        return f"{self.architecture} in {self.dtype}{cast}, {copied}"


def merge(console: Console, model: str, adapters: Sequence[str], output: Path) -> Merged:
    """Loads a model, multiplies the adapters' product into its weights, and writes it with its tokenizer's files.

    Args:
        console: where to show that it is at work.
        model: a folder or a Hub id, of a class of transformers'. It is loaded in the dtype that its config names.
        adapters: folders or Hub ids; what they are to be otherwise than multiplied, `combine` makes one of them first.
        output: a folder that is not there yet, or is empty.

    Raises:
        UsageError: as `load_whole`, or an adapter is given twice.
        FileNotFoundError: there is no such adapter.
        FileExistsError: the output is there already.
        ValueError: an adapter is damaged or does not fit the model, or the weights cannot be merged into. Nothing is
            written then.
        OSError: the output cannot be written.
        MissingPackageError: transformers is not installed.
    """
    require("transformers", "pip install 'transformers>=5'")
    check_new(output)
    checkpoints = read_all(console, adapters)  # before the model, which takes longer
    with busy(console, f"Loading {model}"):
        loaded = load_whole(model, checkpoints.values())
    import ia3rt

    runtime = ia3rt.patch(loaded.model)
    with busy(console, "Merging the adapters", len(adapters) + 1) as advance:
        for adapter in adapters:
            runtime.load_adapter(adapter, adapter)
            advance()
        runtime.merge_and_unload(list(adapters))
        advance()
    with busy(console, f"Writing {output}"), quiet(), ended_by_sigterm(), new_folder(output) as folder:
        loaded.model.save_pretrained(folder)
        source = model_folder(model)
        copied, not_copied = copy_input_files(source, folder)
        stored, written = stored_dtypes(source), stored_dtypes(folder)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return Merged(
        type(loaded.model).__name__, dtype, stored if stored != written else (), copied, not_copied, loaded.left_out
    )
