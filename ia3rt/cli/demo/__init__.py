"""The flow of `ia3rt demo`: a batch of mixed adapters, their accuracy, what switching costs, and back again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console

import ia3rt
from ia3rt.adapters.mix import BASE, Mix
from ia3rt.bench.interleaved import time_interleaved
from ia3rt.cli.demo.inputs import DemoInputs
from ia3rt.cli.demo.measure import (
    PeftSwitches,
    Switch,
    accuracy,
    all_logits,
    batches,
    device_wait,
    encode,
    generate_mixed,
    peft_is_installed,
    peft_switches,
)
from ia3rt.cli.demo.report import print_accuracy, print_batch, print_check, print_note, print_switching
from ia3rt.cli.packages import quiet
from ia3rt.cli.progress import busy
from ia3rt.runtime import Runtime

NEW_TOKENS = 4
ROUNDS = 15
OURS = "ia3rt set_adapter"


def run_demo(console: Console, inputs: DemoInputs) -> bool:
    """Runs the demo and prints what it finds.

    Args:
        console: where to print.
        inputs: the model, which is patched meanwhile, and all else.

    Returns:
        Whether the model's logits at the end are, bit for bit, those from before it was patched.

    Raises:
        ValueError: an adapter does not fit the model.
    """
    model = inputs.model
    prompts = encode(model, inputs.tokenizer, list(dict.fromkeys(row.prompt for row in inputs.rows)))
    with busy(console, "Loading the adapters"):
        before = all_logits(model, prompts)
        spare = copy.deepcopy(model) if peft_is_installed() else None  # PEFT's merges change the weights
        rt = _patched(inputs)
        peft = peft_switches(spare, inputs.adapters) if spare is not None else None
    _print_headline(console, inputs, rt)
    _show_batch(console, inputs, rt)
    if inputs.tasks:
        _show_accuracy(console, inputs, rt)
    _show_switching(console, rt, inputs.adapters, peft)
    rt.unpatch()
    exact = torch.equal(all_logits(model, prompts), before)
    print_check(console, exact)
    return exact


def _patched(inputs: DemoInputs) -> Runtime:
    rt = ia3rt.patch(inputs.model)
    for name, path in inputs.adapters.items():
        rt.load_adapter(path, name)
    return rt


def _print_headline(console: Console, inputs: DemoInputs, rt: Runtime) -> None:
    model = inputs.model
    kept = sum(site.width for site in rt.sites)
    print_note(
        console,
        f"{inputs.title}: {model.num_parameters():,} parameters, {str(model.dtype).removeprefix('torch.')} on "
        f"{model.device}. An adapter is {kept:,} numbers at {len(rt.sites)} sites; the {rt.backend} backend runs them.",
    )


def _show_batch(console: Console, inputs: DemoInputs, rt: Runtime) -> None:
    with busy(console, f"Generating {len(inputs.rows)} rows in one batch"):
        outputs = generate_mixed(rt, inputs.model, inputs.tokenizer, inputs.rows, NEW_TOKENS)
    print_batch(console, inputs.rows, outputs)
    console.print()


def _show_accuracy(console: Console, inputs: DemoInputs, rt: Runtime) -> None:
    names = list(inputs.adapters)
    mixes = [BASE, *(Mix((name,)) for name in names), Mix(tuple(names))]
    total = len(mixes) * sum(len(batches(task)) for task in inputs.tasks)
    shares = []
    with busy(console, "Scoring the held-out examples", total) as batch_done:
        for mix in mixes:
            rt.set_adapter(mix)
            shares.append([accuracy(inputs.model, inputs.tokenizer, task, batch_done) for task in inputs.tasks])
    print_accuracy(console, mixes, inputs.tasks, shares)


def _show_switching(
    console: Console, rt: Runtime, adapters: Mapping[str, str | Path], peft: PeftSwitches | None
) -> None:
    theirs = {
        "PEFT set_adapter": peft.set_adapter if peft else None,
        "PEFT merge_adapter + unmerge_adapter": peft.merge_and_unmerge if peft else None,
    }
    switches = {OURS: rt.set_adapter, **{name: switch for name, switch in theirs.items() if switch}}
    with quiet(), busy(console, "Timing switches", ROUNDS + 1) as round_done:
        timings = time_interleaved(
            {name: _in_turn(switch, list(adapters)) for name, switch in switches.items()},
            ROUNDS,
            round_done=round_done,
            wait=device_wait(rt.model),
        )
    medians = {name: timings[name].p50 if name in timings else None for name in (OURS, *theirs)}
    print_switching(console, medians, OURS, ROUNDS)


def _in_turn(switch: Switch, adapters: list[str]) -> Callable[[int], None]:
    """Switches to the next adapter at each round."""
    return lambda turn: switch(adapters[turn % len(adapters)])
