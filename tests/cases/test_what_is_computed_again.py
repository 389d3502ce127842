"""What a backward pass is of, and computes again, wears what the forward began with."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import logits, patched, tiny_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from worn_truth import IDS, NAMES, close, input_gradients, truth

import ia3rt


@pytest.fixture
def runtime() -> ia3rt.Runtime:
    return patched(tiny_model())


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


def test_a_whole_forward_is_computed_again_as_it_was_though_its_thread_has_ended(runtime) -> None:
    """Which a later thread takes the id of, and where autograd counts from 0 again."""
    model, losses = runtime.model, []
    expected = {name: input_gradients(truth(runtime, name), IDS) for name in NAMES}
    embeddings = {name: model.get_input_embeddings()(IDS).detach().requires_grad_() for name in NAMES}

    def forward(name: str) -> None:
        run = lambda e: model(inputs_embeds=e, labels=IDS, use_cache=False).loss  # noqa: E731
        with runtime.route([name] * 3):
            losses.append(checkpoint(run, embeddings[name], use_reentrant=True))

    for name in NAMES:
        thread = threading.Thread(target=forward, args=(name,))
        thread.start()
        thread.join()
    sum(losses).backward()
    for name in NAMES:
        close(embeddings[name].grad, expected[name])


def in_thread(runtime: ia3rt.Runtime, name: str) -> tuple[Tensor, Tensor, int]:
    """Inputs, a loss whose blocks are computed again, and the id of a thread that has ended."""
    model = runtime.model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward() -> tuple[Tensor, Tensor, int]:
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        with runtime.route([name] * 3):
            loss = model(inputs_embeds=embeddings, labels=IDS, use_cache=False).loss
        return embeddings, loss, threading.get_ident()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(forward).result()


def test_a_thread_that_has_the_id_of_one_that_ended_is_another(runtime) -> None:
    """Whose of the two a number of autograd's is cannot be told: that is an error, and no wrong gradient."""
    first, second = in_thread(runtime, "a"), in_thread(runtime, "b")
    for _ in range(20):  # the system gives ids anew when it likes
        if first[2] != second[2]:
            second = in_thread(runtime, "b")
    for embeddings, loss, _ in (first, second):
        with pytest.raises(RuntimeError, match="forwards of several threads"):
            loss.backward()
        assert embeddings.grad is None


def test_a_thread_that_ended_leaves_nothing_but_its_results(runtime) -> None:
    expected = {name: input_gradients(truth(runtime, name), IDS) for name in NAMES}
    for name in "abab":
        embeddings, loss, _ = in_thread(runtime, name)
        loss.backward()
        close(embeddings.grad, expected[name])
    assert len(runtime._routing.past._threads) < 4


def test_checkpointing_within_checkpointing(runtime) -> None:
    model = runtime.model
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    run = lambda e: model(inputs_embeds=e, labels=IDS, use_cache=False).loss  # noqa: E731
    runtime.set_adapter("a")
    loss = checkpoint(lambda e: checkpoint(run, e, use_reentrant=True), embeddings, use_reentrant=True)
    runtime.set_adapter("b")
    loss.backward()
    close(embeddings.grad, input_gradients(truth(runtime, "a"), IDS))


@pytest.mark.parametrize("file", ["loss.py", "train_from_checkpoint.py"])
def test_a_forward_inside_a_backward_hook_is_one_of_its_own(runtime, file) -> None:
    """As losses do that cache gradients of representations and run the model again for each piece of a batch."""
    model = runtime.model
    input_gradients(model, IDS)  # of another adapter's, before
    runtime.set_adapter("b")
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    leaf = torch.ones(1, requires_grad=True)

    def again(_: Tensor) -> None:
        with torch.enable_grad():
            model(inputs_embeds=embeddings, labels=IDS, use_cache=False).loss.backward()

    again.__code__ = again.__code__.replace(co_filename=file)
    loss = (leaf * 2).sum()
    loss.register_hook(again)
    runtime.set_adapter("a")
    loss.backward()
    close(embeddings.grad, input_gradients(truth(runtime, "a"), IDS))
