"""Switches, threads and backward passes in any order: a forward wears what it began with, wherever it is computed."""

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from peft import IA3Config, get_peft_model
from tiny import TARGETS, logits, scaled, tiny_model, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from where import home

import ia3rt

IDS = token_ids()
NAMES = "ab"


@pytest.fixture
def runtime() -> ia3rt.Runtime:
    runtime = ia3rt.patch(tiny_model())
    generator = torch.Generator().manual_seed(3)
    for name in NAMES:
        runtime.add_adapter(name, {s.key: torch.rand(s.width, generator=generator) + 0.5 for s in runtime.sites})
    return runtime


def truth(runtime: ia3rt.Runtime, name: str) -> nn.Module:
    """A copy of the model with an adapter in its weights, in float64."""
    vectors = runtime._bank.vectors(runtime._bank.adapters[name]).items()
    return scaled(tiny_model(), {site.key: vector.double() for site, vector in vectors})


def input_gradients(model: nn.Module, ids: Tensor, backward_after=lambda: None) -> Tensor:
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
    backward_after()
    loss.backward()
    return embeddings.grad


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "not reentrant", "reentrant"])
def test_gradients_are_of_what_was_worn_whatever_is_set_before_the_backward(runtime, checkpointing) -> None:
    model = runtime.model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})

    def disturb() -> None:
        runtime.set_adapter("b")
        logits(model, IDS)
        runtime.set_adapter(["a", "b"])
        runtime.add_adapter("c", {site.key: torch.full((site.width,), 9.0) for site in runtime.sites})
        runtime.set_adapter("c")

    runtime.set_adapter("a")
    close(input_gradients(model, IDS, disturb), input_gradients(truth(runtime, "a"), IDS))


@pytest.mark.parametrize("reentrant", [False, True])
def test_rows_are_computed_again_as_they_were(runtime, reentrant) -> None:
    model = runtime.model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with runtime.route(["a", None, "b"]):
        rows = input_gradients(model, IDS, lambda: runtime.set_adapter("a"))
    for row, expected in enumerate((truth(runtime, "a"), tiny_model().double(), truth(runtime, "b"))):
        close(rows[row], input_gradients(expected, IDS[row : row + 1])[0] / 3)


def test_a_gradient_outlives_the_adapter_that_it_is_of(runtime) -> None:
    expected = input_gradients(truth(runtime, "a"), IDS)
    runtime.set_adapter("a")

    def replace() -> None:
        runtime.set_adapter(None)
        for _ in range(12):
            runtime.delete_adapter(runtime.adapters[0])
            runtime.add_adapter(f"{torch.rand(())}", {site.key: torch.zeros(site.width) for site in runtime.sites})

    runtime.model.train().gradient_checkpointing_enable()
    close(input_gradients(runtime.model, IDS, replace), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_and_one_backward_train_each_its_adapter(runtime, reentrant) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = copy.deepcopy(runtime)
        parameters = model.train_adapter(["a", "b"])
        if checkpointing:
            model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.model.enable_input_require_grads()
        losses = []
        for wear in (lambda: model.set_adapter("a"), lambda: model.route(["b", "a", None])):
            wear()
            losses.append(model.model.train()(IDS, labels=IDS, use_cache=False).loss)
        model.set_adapter(None)
        sum(losses).backward()
        return [parameter.grad for parameter in parameters]

    for again, plain in zip(gradients(True), gradients(False), strict=True):
        close(again, plain)


def test_a_whole_forward_may_be_what_is_computed_again(runtime) -> None:
    embeddings = runtime.model.get_input_embeddings()(IDS).detach().requires_grad_()
    runtime.set_adapter("a")
    result = checkpoint(
        lambda e: runtime.model(inputs_embeds=e, labels=IDS, use_cache=False).loss, embeddings, use_reentrant=False
    )
    runtime.set_adapter("b")
    result.backward()
    close(embeddings.grad, input_gradients(truth(runtime, "a"), IDS))


def test_a_result_that_is_gone_is_an_error_and_no_guess(runtime) -> None:
    model = runtime.model.train()
    model.gradient_checkpointing_enable()
    kept = []
    model.model.layers[1].register_forward_hook(lambda _, __, output: kept.append(output))
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    runtime.set_adapter("a")
    model(inputs_embeds=embeddings, use_cache=False)
    for step in range(40):  # as many others as are remembered, and more
        runtime.set_adapter("ab"[step % 2])
        model(inputs_embeds=embeddings, use_cache=False)
    with pytest.raises(RuntimeError, match="it is not known in which forward"):
        kept[0].sum().backward()


def test_a_switch_inside_a_forward_is_for_the_next(runtime) -> None:
    model = runtime.model
    hook = model.model.layers[0].register_forward_hook(lambda *_: runtime.set_adapter("b"))
    runtime.set_adapter("a")
    close(logits(model, IDS), logits(truth(runtime, "a"), IDS))
    hook.remove()
    close(logits(model, IDS), logits(truth(runtime, "b"), IDS))


def test_a_forward_that_fails_leaves_nothing_behind(runtime) -> None:
    model = runtime.model
    runtime.set_adapter("a")
    hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    for wear in (lambda: None, lambda: runtime.route(["a", "b", None])):
        wear()
        with pytest.raises(ZeroDivisionError):
            logits(model, IDS)
    hook.remove()
    runtime.set_adapter("b")
    close(logits(model, IDS), logits(truth(runtime, "b"), IDS))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_threads_wear_their_own(backend) -> None:
    """Threads that route, threads that wear what all do, and one that loads and deletes meanwhile."""
    from where import home

    model = tiny_model().to(home(backend))
    runtime = ia3rt.patch(model, backend=backend, capacity=2)
    for name in NAMES:
        runtime.add_adapter(name, {site.key: torch.rand(site.width) + 0.5 for site in runtime.sites})
    expected = {None: tiny_model().double()} | {name: truth(runtime, name) for name in NAMES}
    right = {name: logits(each, IDS) for name, each in expected.items()}
    runtime.set_adapter("b")
    stop = threading.Event()

    def load() -> None:
        number = 0
        while not stop.is_set():
            runtime.add_adapter(f"x{number}", {site.key: torch.zeros(site.width) for site in runtime.sites})
            if number:
                runtime.delete_adapter(f"x{number - 1}")
            number += 1

    def forward(turn: int) -> None:
        names = [("a", None, "b")[(turn + row) % 3] for row in range(3)]
        if turn % 4 == 0:
            close(logits(model, IDS), right["b"])
        elif turn % 4 == 1:
            with runtime.disable_adapter():
                close(logits(model, IDS), right[None])
        else:
            with runtime.route(names):
                result = logits(model, IDS)
            for row, name in enumerate(names):
                close(result[row], right[name][row])

    loading = threading.Thread(target=load)
    loading.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(forward, turn) for turn in range(24 if backend == "torch" else 8)]:
                done.result()
    finally:
        stop.set()
        loading.join()
    assert runtime.active_adapters == ["b"]


def test_what_is_set_while_another_thread_computes_is_for_its_next_forward(runtime) -> None:
    model, inside, go_on = runtime.model, threading.Event(), threading.Event()
    runtime.set_adapter("a")

    def wait(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    hook = model.model.layers[0].register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(logits, model, IDS)
        assert inside.wait(60)
        hook.remove()
        runtime.set_adapter("b")
        after = logits(model, IDS)
        go_on.set()
        close(running.result(), logits(truth(runtime, "a"), IDS))
    close(after, logits(truth(runtime, "b"), IDS))


def test_tasks_of_an_event_loop_wear_their_own(runtime) -> None:
    async def answer(name: str) -> Tensor:
        with runtime.route([name] * 3):
            await asyncio.sleep(0)
            first = logits(runtime.model, IDS)
            await asyncio.sleep(0)
            assert torch.equal(logits(runtime.model, IDS), first)
        return first

    async def answers() -> list[Tensor]:
        return await asyncio.gather(*map(answer, "abab"))

    for name, result in zip("abab", asyncio.run(answers()), strict=True):
        close(result, logits(truth(runtime, name), IDS))


def test_a_route_in_another_thread_cannot_be_worn_over_merged_weights(runtime) -> None:
    ready, merged = threading.Event(), threading.Event()

    def forward() -> Tensor:
        with runtime.route(["a", None, "b"]):
            ready.set()
            assert merged.wait(60)
            return logits(runtime.model, IDS)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(forward)
        assert ready.wait(60)
        runtime.merge_adapter("b")
        merged.set()
        with pytest.raises(RuntimeError, match="merged into the weights"):
            running.result()
    close(logits(runtime.model, IDS), logits(truth(runtime, "b"), IDS))


@pytest.mark.parametrize("routed", [False, True])
def test_a_forward_that_ctrl_c_ended_is_over(runtime, routed) -> None:
    """torch calls no hook after an exception that is no Exception."""
    model = runtime.model

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_hook(interrupt)
    runtime.set_adapter("a")
    if routed:
        runtime.route(["a", None, "b"])  # the first of its kind, which is looked at
    with pytest.raises(KeyboardInterrupt):
        logits(model, IDS)
    hook.remove()
    for name in ("b", "a"):
        runtime.set_adapter(name)
        close(logits(model, IDS), logits(truth(runtime, name), IDS))
        close(input_gradients(model, IDS), input_gradients(truth(runtime, name), IDS))
    with runtime.route(["a", "b"]), pytest.raises(ValueError, match="the route has 2 rows, but the batch has 3"):
        logits(model, IDS)
    assert not torch._C._len_torch_dispatch_stack()


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


def test_a_function_of_autograds_may_run_a_whole_forward_again(runtime) -> None:
    """As the reentrant way of checkpointing does, which records the forward before it calls it."""
    model = runtime.model
    expected = {name: input_gradients(truth(runtime, name), IDS) for name in NAMES}
    embeddings = {name: model.get_input_embeddings()(IDS).detach().requires_grad_() for name in NAMES}
    losses = []
    for name in NAMES:
        runtime.set_adapter(name)
        run = lambda e: model(inputs_embeds=e, labels=IDS, use_cache=False).loss  # noqa: E731
        losses.append(checkpoint(run, embeddings[name], use_reentrant=True))
    runtime.set_adapter(None)
    logits(model, IDS)
    sum(losses).backward()
    for name in NAMES:
        close(embeddings[name].grad, expected[name])


def test_a_forward_inside_a_backward_hook_is_one_of_its_own(runtime) -> None:
    """As losses do that cache gradients of representations and run the model again for each piece of a batch."""
    model = runtime.model
    input_gradients(model, IDS)  # of another adapter's, before
    runtime.set_adapter("b")
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    leaf = torch.ones(1, requires_grad=True)

    def again(_: Tensor) -> None:
        with torch.enable_grad():
            model(inputs_embeds=embeddings, labels=IDS, use_cache=False).loss.backward()

    loss = (leaf * 2).sum()
    loss.register_hook(again)
    runtime.set_adapter("a")
    loss.backward()
    close(embeddings.grad, input_gradients(truth(runtime, "a"), IDS))


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


def test_compiled_code_refuses_what_a_task_entered(runtime) -> None:
    """It finds what is worn by its thread, which the tasks share."""
    compiled = torch.compile(runtime.model, backend="eager")
    logits(compiled, IDS)

    async def answer() -> None:
        with runtime.route(["a"] * 3):
            await asyncio.sleep(0)
            logits(compiled, IDS)

    with pytest.raises(RuntimeError, match="entered by a task of an event loop"):
        asyncio.run(answer())


def test_nothing_of_a_model_stays_in_its_thread() -> None:
    import gc
    import weakref

    model = tiny_model()
    runtime = ia3rt.patch(model)
    runtime.add_adapter("a", {site.key: torch.rand(site.width) for site in runtime.sites})
    runtime.route(["a", None, "a"])
    logits(model, IDS)
    with runtime.route(["a"] * 3):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)
    worn = weakref.ref(runtime._routing.now())
    runtime.unpatch()
    del runtime, model
    gc.collect()
    assert worn() is None


def test_a_forward_wears_its_own_head_while_the_bank_grows(monkeypatch) -> None:
    """For a row more no module is touched, which a forward of another thread may be about to call."""
    runtime = ia3rt.patch(tiny_model(), capacity=1)
    head = {"lm_head": {"weight": torch.randn(128, 64)}}
    runtime.add_adapter("h", {site.key: torch.full((site.width,), 0.5) for site in runtime.sites}, modules=head)
    runtime.set_adapter("h")
    right, seen, place = logits(runtime.model, IDS), [], runtime._placement._drop_ins.place

    def meanwhile(sites) -> None:
        thread = threading.Thread(target=lambda: seen.append(logits(runtime.model, IDS)))
        thread.start()
        thread.join()
        place(sites)

    monkeypatch.setattr(runtime._placement._drop_ins, "place", meanwhile)
    for name in "xyz":
        runtime.add_adapter(name)
    assert len(runtime._bank.table) > 4
    for each in (*seen, logits(runtime.model, IDS)):
        assert torch.equal(each, right)
    runtime.set_adapter("z")
    assert not torch.equal(logits(runtime.model, IDS), right)


@pytest.mark.parametrize("within", ["disabled", "routed", "failed"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "not reentrant", "reentrant"])
def test_what_a_forward_calls_in_a_with_wears_what_that_says(runtime, within, checkpointing) -> None:
    """A hook compares the model with a reference; the layers after it wear what the forward began with."""
    model = runtime.model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    found: list[Tensor] = []

    def compare(*_: object) -> None:
        if (
            found or torch._C._current_graph_task_id() != -1
        ):  # not again in the forward that it calls, nor in a backward
            return
        found.append(IDS)
        with runtime.disable_adapter() if within == "disabled" else runtime.route(["b", None, "a"]):
            found.append(model(inputs_embeds=model.get_input_embeddings()(IDS), use_cache=False).logits)
            if within == "failed":
                with pytest.raises(ValueError, match="the route has 3 rows, but the batch has 2"):
                    model(IDS[:2])
                raise OSError("the comparison failed")

    def compare_or_go_on(*_: object) -> None:
        with pytest.raises(OSError) if within == "failed" and not found else nullcontext():
            compare()

    handle = model.model.rotary_emb.register_forward_hook(compare_or_go_on)  # of no block that is checkpointed
    runtime.set_adapter("a")
    close(input_gradients(model, IDS), input_gradients(truth(runtime, "a"), IDS))
    base, a, b = (logits(each, IDS) for each in (tiny_model().double(), truth(runtime, "a"), truth(runtime, "b")))
    expected = base if within == "disabled" else torch.stack([b[0], base[1], a[2]])
    close(found[1].detach(), expected)
    with torch.no_grad():
        found.clear()
        close(model(IDS).logits, a)
        close(found[1], expected)
    handle.remove()
    close(logits(model, IDS), a)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_model_that_compares_itself_with_its_base(backend) -> None:
    class WithReference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llm = tiny_model()

        def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
            policy = self.llm(input_ids).logits
            with runtime.disable_adapter():
                reference = self.llm(input_ids).logits
            with runtime.route(["b", None, "a"]):
                rows = self.llm(input_ids).logits
            return policy, reference, rows, self.llm(input_ids).logits

    model = WithReference().to(home(backend))
    runtime = ia3rt.patch(model, backend=backend)
    generator = torch.Generator().manual_seed(3)
    for name in NAMES:
        runtime.add_adapter(name, {s.key: torch.rand(s.width, generator=generator) + 0.5 for s in runtime.sites})
    alone = {}
    for name in (*NAMES, None):
        runtime.set_adapter(name)
        with torch.no_grad():
            alone[name] = model.llm(IDS.to(home(backend))).logits
    runtime.set_adapter("a")
    with torch.no_grad():
        for _ in range(2):
            policy, reference, rows, again = model(IDS.to(home(backend)))
            close(policy, alone["a"])
            close(reference, alone[None])
            close(rows, torch.stack([alone["b"][0], alone[None][1], alone["a"][2]]))
            close(again, alone["a"])


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "not reentrant", "reentrant"])
@pytest.mark.parametrize("called", ["a part", "the model"])
def test_a_with_inside_of_what_is_computed_again(called, reentrant) -> None:
    """A checkpointed block that compares itself with its base: as PEFT's, of whose layers all read what is set now."""

    def blocks(model: nn.Module, switched_off) -> nn.Module:
        block = model.model.layers[1].mlp

        def forward(h: Tensor) -> Tensor:
            with switched_off(), nullcontext() if called == "a part" else torch.no_grad():
                reference = plain(h) if called == "a part" else h * model(input_ids=IDS, use_cache=False).logits.mean()
            return plain(h) - 0.5 * reference + plain(h)

        class Compared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = block

            def forward(self, h: Tensor) -> Tensor:
                nonlocal depth
                if depth:
                    return block(h)
                depth += 1
                try:
                    return forward(h)
                finally:
                    depth -= 1

        depth, plain = 0, block
        model.model.layers[1].mlp = Compared()
        return model

    def gradient(model: nn.Module, layers: nn.Module) -> Tensor:
        torch.manual_seed(0)
        layers.train()
        if reentrant is not None:
            layers.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return input_gradients(model, IDS)

    runtime = ia3rt.patch(tiny_model())
    generator = torch.Generator().manual_seed(3)
    vectors = {s.key: torch.rand(s.width, generator=generator) + 0.5 for s in runtime.sites}
    runtime.add_adapter("a", vectors)
    runtime.set_adapter("a")
    wrapped = get_peft_model(tiny_model(), IA3Config(**TARGETS["llama"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "ia3_l" in name:
                path = name.removeprefix("base_model.model.").rpartition(".ia3_l")[0]
                parameter.copy_(vectors[path, "in" if "down" in name else "out"].view_as(parameter))
    inner = wrapped.base_model.model
    blocks(inner, wrapped.disable_adapter)
    expected = gradient(inner, inner)
    model = runtime.model
    mlp = model.model.layers[1].mlp
    blocks(model, runtime.disable_adapter)
    assert model.model.layers[1].mlp is not mlp
    close(gradient(model, model), expected)


def test_a_with_that_outlasts_its_forward_leaves_nothing_in_it(runtime) -> None:
    """As a generator holds one that is not read to its end."""
    model, held = runtime.model, []

    def reads():
        with runtime.disable_adapter():
            yield

    def begin(*_: object) -> None:
        if not held:
            held.append(reads())
            next(held[0])

    handle = model.model.layers[0].register_forward_hook(begin)
    with runtime.route(["a", "b", None]), torch.no_grad():  # the first forward is followed
        model(IDS)
    handle.remove()
    assert torch._C._len_torch_dispatch_stack() == 0
    held[0].close()
    runtime.set_adapter("a")
    close(logits(model, IDS), logits(truth(runtime, "a"), IDS))
    with runtime.route(["b", None, "a"]):
        rows = logits(model, IDS)
    close(rows[0], logits(truth(runtime, "b"), IDS)[0])
    close(rows[1], logits(tiny_model().double(), IDS)[1])
    runtime.unpatch()
    close(logits(model, IDS), logits(tiny_model().double(), IDS))
