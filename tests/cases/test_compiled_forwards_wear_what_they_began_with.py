"""Compiled forwards and switches in any order."""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import logits, patched, tiny_model
from torch import Tensor, nn
from worn_truth import IDS, NAMES, close, input_gradients, truth

import ia3rt


@pytest.fixture
def runtime() -> ia3rt.Runtime:
    return patched(tiny_model())


@pytest.mark.parametrize("compile_in_place", [False, True], ids=["torch.compile", "model.compile"])
def test_a_compiled_forward_that_ctrl_c_ended_is_over(runtime, compile_in_place) -> None:
    """Also for compiled functions that call the model, whose code finds by itself what is worn."""
    is_interrupted = False

    def backend(graph, _):
        def run(*inputs):
            if is_interrupted:
                raise KeyboardInterrupt
            return graph.forward(*inputs)

        return run

    torch._dynamo.reset()
    model = runtime.model
    function = torch.compile(lambda: model(input_ids=IDS).logits, backend=backend)
    if compile_in_place:
        model.compile(backend=backend)
    compiled = model if compile_in_place else torch.compile(model, backend=backend)
    runtime.set_adapter("a")
    with torch.no_grad():
        for run in (function, lambda: compiled(input_ids=IDS).logits):
            close(run(), logits(truth(runtime, "a"), IDS))
        is_interrupted = True
        with pytest.raises(KeyboardInterrupt):
            compiled(input_ids=IDS)
        is_interrupted = False
        runtime.set_adapter("b")
        expected = logits(truth(runtime, "b"), IDS)
        mlp, x = model.model.layers[0].mlp, torch.ones(1, 64)
        close(mlp(x), truth(runtime, "b").model.layers[0].mlp(x.double()))
        close(function(), expected)
        close(compiled(input_ids=IDS).logits, expected)
    torch._dynamo.reset()


def test_rows_are_the_first_that_a_model_compiled_in_place_is_called_with(runtime) -> None:
    """To see where it has its rows, a forward runs that is not compiled."""
    torch._dynamo.reset()
    model, names = runtime.model, ["b", None, "a"]
    model.compile(backend="eager")
    runtime.route(names)
    by_row = logits(model, IDS)
    for row, name in enumerate(names):
        alone = tiny_model().double() if name is None else truth(runtime, name)
        close(by_row[row], logits(alone, IDS)[row])
    torch._dynamo.reset()


@pytest.mark.parametrize("breaks", [False, True])
def test_a_compiled_forward_wears_what_was_set_when_it_began(runtime, breaks) -> None:
    """Another thread switches in the middle of it; behind a graph break too."""
    torch._dynamo.reset()
    model, switches = runtime.model, []

    def switch() -> None:
        for name in (*NAMES, "b", "a", "b"):
            runtime.set_adapter(name)

    def backend(graph, _):
        def run(*inputs):
            if switches:
                thread = threading.Thread(target=switches.pop())
                thread.start()
                thread.join()
            return graph.forward(*inputs)

        return run

    if breaks:
        model.model.layers[1].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for name in NAMES:
            runtime.set_adapter(name)
            expected = truth(runtime, name)(IDS).logits
            close(compiled(IDS).logits, expected)
            switches.append(switch)
            close(compiled(IDS).logits, expected)
            assert not switches
    torch._dynamo.reset()


def test_a_compiled_backward_pass_after_other_switches(runtime) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(runtime.model, backend="aot_eager")
    runtime.set_adapter("a")
    found = input_gradients(compiled, IDS, lambda: [runtime.set_adapter(name) for name in "bab"])
    close(found, input_gradients(truth(runtime, "a"), IDS))
    torch._dynamo.reset()


def test_compiled_rows_after_one_row(runtime) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(runtime.model, backend="eager")
    with torch.no_grad():
        for names in ("a", "ab", "b", "bba"):
            with runtime.route(list(names)):
                found = compiled(IDS[: len(names)]).logits
            for row, name in enumerate(names):
                close(found[row], truth(runtime, name)(IDS[row : row + 1]).logits[0])
    torch._dynamo.reset()


def compiled_alike(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """The model compiled, and a compiled function that calls it, without a hook of ours that runs uncompiled."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    function = torch.compile(lambda: model(input_ids=IDS).logits, backend="eager", fullgraph=True)
    return {"model": lambda: logits(compiled, IDS), "function": torch.no_grad()(function)}


@pytest.mark.parametrize("kind", ["model", "function"])
def test_compiled_code_wears_what_its_task_entered(runtime, kind) -> None:
    """The tasks share one thread."""
    run = compiled_alike(runtime.model)[kind]

    async def answer(name: str) -> Tensor:
        with runtime.route([name] * 3):
            for _ in range(2):
                await asyncio.sleep(0)
                result = run()
        return result

    async def answers() -> list[Tensor]:
        return await asyncio.gather(*map(answer, "aba"))

    for name, result in zip("aba", asyncio.run(answers()), strict=True):
        close(result, logits(truth(runtime, name), IDS))
    close(run(), logits(tiny_model().double(), IDS))


@pytest.mark.parametrize("kind", ["model", "function"])
def test_compiled_code_wears_what_the_context_does_that_its_thread_runs(runtime, kind) -> None:
    """As asyncio.to_thread has threads of a pool run copies of contexts; nothing of them stays in the thread."""
    run, names = compiled_alike(runtime.model)[kind], ["b", None, "a"]
    right = {name: logits(truth(runtime, name), IDS) for name in NAMES} | {None: logits(tiny_model().double(), IDS)}
    close(run(), right[None])
    with ThreadPoolExecutor(1) as pool:

        def copied(function: Callable[[], Tensor]) -> Tensor:
            return pool.submit(contextvars.copy_context().run, function).result()

        with runtime.route(names):
            rows = [copied(run), copied(lambda: logits(runtime.model, IDS)), copied(run)]
        for each in rows:
            close(each, torch.stack([right[name][row] for row, name in enumerate(names)]))
        close(pool.submit(run).result(), right[None])
        runtime.set_adapter("a")
        close(pool.submit(run).result(), right["a"])
        copied(lambda: runtime.route(names))  # which that copy wears on, and nobody else
        close(pool.submit(run).result(), right["a"])
    torch._dynamo.reset()
