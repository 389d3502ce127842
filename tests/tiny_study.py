"""The study in little: tasks of made-up words, and a decoder and an encoder with random weights."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from transformers import BertConfig, BertForSequenceClassification

from ia3rt.bench.study import precision, run, tasks
from ia3rt.bench.study.models import Decoder, Encoder
from ia3rt.bench.study.settings import Budget, Scale
from ia3rt.examples.tasks import Task

SCALE = Scale(
    name="tiny",
    main=("movie", "author", "news"),
    domain=("amazon",),
    seeds=(0, 1),
    budget=Budget(steps=3, rows=2, rows_of_joint=2, texts=60, check_every=2),
    length=6,
    validation=6,
    validation_of_triples=6,
    test=12,
    test_of_triples=6,
    seen=6,
    curve_steps=2,
    grid=5,
)


class Words:
    """A tokenizer: a word is a number that its letters say."""

    pad_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [1 + zlib.crc32(word.encode()) % 127 for word in text.split()]

    def __call__(self, texts: Sequence[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text)[:max_length] for text in texts]}


class TinyDecoder(Decoder):
    name = "tiny-decoder"

    @classmethod
    def load(cls, dtype: torch.dtype) -> TinyDecoder:
        return cls(tiny_model().to(dtype), Words())


class TinyEncoder(Encoder):
    name = "tiny-encoder"

    @classmethod
    def load(cls, dtype: torch.dtype) -> TinyEncoder:
        torch.manual_seed(0)
        sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
        return cls(BertForSequenceClassification(BertConfig(**sizes, num_labels=8)).to(dtype), Words())


def read(seed: int, labels: int) -> Iterator[tuple[str, int]]:
    """Texts whose label says which words they are of."""
    rng = random.Random(seed)
    for number in range(300):
        label = number % labels
        yield " ".join(rng.choice(f"{label}abcdefgh") * rng.randint(1, 6) for _ in range(8)) + " x" * label, label


def make_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, (name, real) in enumerate(list(tasks.TASKS.items())):
        count = len(real.labels)
        made = Task(real.package, lambda _, s=seed, n=count: read(s, n), real.template, real.labels)
        monkeypatch.setitem(tasks.TASKS, name, made)
    monkeypatch.setattr(run, "fetch", lambda package: Path())
    # Which dtype answers depends on which is faster: here none is.
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
