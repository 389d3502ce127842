"""What torch.export and torch.jit.trace make of a model wears what was worn then, row by row, whatever is set later."""

import pytest
import torch
from tiny import patched, tiny_model
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from where import home
from worn_truth import IDS, close, truth

import ia3rt

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's, of what else a trace or an export may leave out

NAMES = ["a", None, "b"]
RECORDERS = {
    "trace": lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
}


class Logits(nn.Module):
    """A model that gives a tensor, as a trace needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def setting(backend: str) -> tuple[ia3rt.Runtime, Tensor]:
    model = tiny_model().to(home(backend))
    return patched(model, backend=backend), IDS.to(model.device)


def right(runtime: ia3rt.Runtime, names: list[str | None]) -> list[Tensor]:
    """The logits of each row."""
    alone = [tiny_model().double() if name is None else truth(runtime, name) for name in names]
    with torch.no_grad():
        return [model.to(IDS.device)(IDS[row : row + 1]).logits[0] for row, model in enumerate(alone)]


def switch_often(runtime: ia3rt.Runtime) -> None:
    """Has memory and the bank's rows written that are free."""
    runtime.set_adapter(None)
    for names in (["b", "b", "a"], [None, "b", "b"]) * 2:
        with runtime.route(names):
            pass
    for name in ["b", "a", "b", "a", "b"]:
        runtime.set_adapter(name)
    runtime.delete_adapter("a")
    runtime.add_adapter("z", {site.key: torch.zeros(site.width) for site in runtime.sites})


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows(backend, recorder) -> None:
    runtime, ids = setting(backend)
    expected = right(runtime, NAMES)
    with torch.no_grad():
        with runtime.route(NAMES):
            runtime.model(ids)
            program = RECORDERS[recorder](Logits(runtime.model), ids)
        switch_often(runtime)
        close(program(ids).cpu(), torch.stack(expected))


@pytest.mark.parametrize(
    ("backend", "recorder"), [("torch", "trace"), ("torch", "export"), ("torch", "strict export"), ("triton", "trace")]
)
def test_one_adapter_and_no_forward_before(backend, recorder) -> None:
    runtime, ids = setting(backend)
    expected = right(runtime, ["a"] * 3)
    runtime.set_adapter("a")
    with torch.set_grad_enabled(backend == "triton"):
        program = RECORDERS[recorder](Logits(runtime.model), ids)
        switch_often(runtime)
        close(program(ids).cpu(), torch.stack(expected))


@pytest.mark.parametrize("recorder", [*RECORDERS, "make_fx"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_part_of_the_model(backend, recorder) -> None:
    """Its forward has no hooks of ours."""
    runtime, ids = setting(backend)
    x = torch.randn(3, 7, 64).to(ids.device)
    record = RECORDERS.get(recorder, lambda part, x: make_fx(part)(x))
    with torch.no_grad():
        expected = truth(runtime, "a").cpu().model.layers[0].mlp(x.cpu().double())
        runtime.set_adapter("a")
        program = record(runtime.model.model.layers[0].mlp, x)
        switch_often(runtime)
        close(program(x).cpu(), expected)


def test_rows_are_not_known_where_nothing_has_numbers() -> None:
    """An export, unless it is strict, has the model's weights without their numbers."""
    runtime, ids = setting("torch")
    expected = right(runtime, NAMES)
    with runtime.route(NAMES), torch.no_grad():
        for _ in range(2):
            with pytest.raises(ValueError, match="a model that is exported.*call the model once in this route"):
                torch.export.export(Logits(runtime.model), (ids,))
        close(torch.export.export(Logits(runtime.model), (ids,), strict=True).module()(ids), torch.stack(expected))
        close(torch.export.export(Logits(runtime.model), (ids,)).module()(ids), torch.stack(expected))


def test_rows_of_what_make_fx_records() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(2, 8)
    with torch.no_grad():
        plain = model(x)
    runtime = ia3rt.patch(model, target_modules="2", feedforward_modules="(?!)")
    runtime.add_adapter("a", {site.key: torch.full((8,), 0.5) for site in runtime.sites})
    runtime.route([None, "a"])
    with torch.no_grad():
        for options in ({}, {"tracing_mode": "fake", "_allow_non_fake_inputs": True}, {"pre_dispatch": True}):
            with pytest.raises(ValueError, match="Call the model once in this route first"):
                make_fx(model, **options)(x)
        model(x)
        for options in ({}, {"tracing_mode": "fake", "_allow_non_fake_inputs": True}, {"pre_dispatch": True}):
            close(make_fx(model, **options)(x)(x), plain * torch.tensor([[1.0], [0.5]]))


def test_a_route_that_is_entered_in_what_is_traced() -> None:
    """What is written then is not written again by the program."""
    runtime, ids = setting("torch")
    expected = right(runtime, NAMES)
    model = Logits(runtime.model)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            with runtime.route(NAMES):
                return self.model(ids)

    with torch.no_grad():
        program = torch.jit.trace(Routed(), (ids,), check_trace=False)
        switch_often(runtime)
        close(program(ids), torch.stack(expected))
    assert "copy_" not in str(program.inlined_graph)
