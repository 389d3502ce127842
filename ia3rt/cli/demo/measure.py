"""What the demo measures: the outputs of a mixed batch, accuracy, logits, and what switching costs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ia3rt.cli.demo.inputs import Row, Task
from ia3rt.cli.packages import quiet
from ia3rt.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 16

Switch = Callable[[str], None]
"""Makes the model wear the adapter of this name."""


def generate_mixed(
    rt: Runtime, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], tokens: int
) -> list[str]:
    """What each row's model continues its prompt with: greedy, all rows in one batch, each wearing its own mix."""
    inputs = encode(model, tokenizer, [row.prompt for row in rows])
    with torch.inference_mode(), rt.route([row.mix for row in rows]), quiet():
        generated = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    new = generated[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    batch_done: Callable[[], None] = lambda: None,
) -> float:
    """The share of a task's examples whose label is the likelier of the two, in [0, 1].

    What is compared is the logit of each label's first token after the prompt. The model wears what it was set to.
    """
    first = [tokenizer.encode(label, add_special_tokens=False)[0] for label in task.labels]
    right = 0
    for batch in batches(task):
        inputs = encode(model, tokenizer, [task.examples[position].prompt for position in batch])
        with torch.inference_mode():
            logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, first]  # [batch, 2]
        guesses = logits.argmax(dim=1).tolist()
        right += sum(task.labels[guess] == task.examples[i].label for guess, i in zip(guesses, batch, strict=True))
        batch_done()
    return right / len(task.examples)


def batches(task: Task) -> list[list[int]]:
    """The positions of a task's examples, in batches of prompts of about one length: little padding is computed."""
    order = sorted(range(len(task.examples)), key=lambda position: len(task.examples[position].prompt))
    return [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]


def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, [prompts, longest prompt] each, on the model's device."""
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    return {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}


def all_logits(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits at every position: [rows, tokens, vocabulary]."""
    with torch.inference_mode():
        return model(**inputs).logits  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PeftSwitches:
    """The two ways of switching that PEFT has."""

    set_adapter: Switch
    merge_and_unmerge: Switch


def peft_is_installed() -> bool:
    """Whether there is something to compare with; PEFT is not imported."""
    return importlib.util.find_spec("peft") is not None


def peft_switches(model: PreTrainedModel, adapters: Mapping[str, str | Path]) -> PeftSwitches:
    """PEFT's ways of switching among `adapters` on `model`, which PEFT wraps, and whose weights its merges change."""
    with quiet():
        from peft import PeftModel

        # PEFT's own names: a user's may hold a dot, which PEFT refuses.
        names = {name: f"adapter_{position}" for position, name in enumerate(adapters)}
        wrapped: Any = None
        for name, path in adapters.items():
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, str(path), adapter_name=names[name])
            else:
                wrapped.load_adapter(str(path), adapter_name=names[name])

    def merge_and_unmerge(name: str) -> None:
        wrapped.merge_adapter(adapter_names=[names[name]])
        wrapped.unmerge_adapter()

    return PeftSwitches(lambda name: wrapped.set_adapter(names[name]), merge_and_unmerge)


def device_wait(model: nn.Module) -> Callable[[], None]:
    """What waits until the model's device has done its work: nothing on the CPU."""
    return torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
