"""A route that is entered inside of a forward: what is called in it is a forward of its own."""

from contextlib import nullcontext

import pytest
import torch
from peft import IA3Config, get_peft_model
from tiny import TARGETS, logits, patched, tiny_model
from torch import Tensor, nn
from where import TRITON, home
from worn_truth import IDS, NAMES, close, input_gradients, truth

import ia3rt


@pytest.fixture
def runtime() -> ia3rt.Runtime:
    return patched(tiny_model())


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


@pytest.mark.parametrize("backend", ["torch", TRITON])
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
    runtime = patched(model, backend=backend)
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
