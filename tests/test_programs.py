"""Random programs over the whole API, compared after each step with a few lines of float64."""

import contextlib
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from where import home

import ia3rt
from ia3rt import Mix

NAMES = ["p", "q", "r", "s"]
WIDTHS = {("fc1", "out"): 6, ("fc1", "in"): 4, ("fc2", "in"): 6, ("fc2", "out"): 3}
ROWS = 3

names = st.sampled_from(NAMES)
numbers = st.floats(-2, 2, width=32)
mixes = st.one_of(
    st.none(),
    st.lists(names, min_size=1, max_size=4).map(lambda chosen: ("product", chosen, None)),
    st.tuples(st.sampled_from(["linear", "delta"]), st.lists(st.tuples(names, numbers), min_size=1, max_size=4)).map(
        lambda drawn: (drawn[0], [name for name, _ in drawn[1]], [weight for _, weight in drawn[1]])
    ),
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


def as_mix(drawn):
    return None if drawn is None else Mix(drawn[1], drawn[2], drawn[0])


class Programs(RuleBasedStateMachine):
    """`truth` holds the adapters' vectors and `worn` the mix of each row, as plain data."""

    @initialize(capacity=st.integers(1, 3), backend=st.sampled_from(["torch", "triton"]))
    def patch(self, capacity, backend):
        self.device = home(backend)
        self.model = Net().to(self.device)
        self.runtime = ia3rt.patch(self.model, capacity=capacity, backend=backend)
        self.weights = {name: parameter.detach().double() for name, parameter in Net().named_parameters()}
        self.truth, self.worn, self.merged = {}, None, False
        self.x = torch.randn(ROWS, 2, 4)

    def usable(self, drawn):
        return drawn is None or all(name in self.truth for name in drawn[1])

    @precondition(lambda self: not self.merged)
    @rule(name=names, keys=st.sets(st.sampled_from(sorted(WIDTHS)), min_size=1), seed=st.integers(0, 1000))
    def add(self, name, keys, seed):
        generator = torch.Generator().manual_seed(seed)
        vectors = {key: torch.randint(-4, 9, (WIDTHS[key],), generator=generator) / 4.0 for key in sorted(keys)}
        with contextlib.nullcontext() if name not in self.truth else _refused("already loaded"):
            self.runtime.add_adapter(name, vectors)
            self.truth[name] = {key: vector.double() for key, vector in vectors.items()}

    @precondition(lambda self: not self.merged)
    @rule(name=names)
    def delete(self, name):
        with contextlib.nullcontext() if name in self.truth else _refused("unknown adapter"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.runtime.delete_adapter(name)
            del self.truth[name]
            without = [None if drawn and name in drawn[1] else drawn for drawn in self.rows()]
            self.worn = without[0] if not isinstance(self.worn, list) else without

    @precondition(lambda self: not self.merged)
    @rule(drawn=mixes)
    def set(self, drawn):
        with contextlib.nullcontext() if self.usable(drawn) else _refused("unknown adapter"):
            self.runtime.set_adapter(as_mix(drawn))
            self.worn = drawn

    @precondition(lambda self: not self.merged)
    @rule(drawn=st.lists(mixes, min_size=ROWS, max_size=ROWS))
    def route(self, drawn):
        with contextlib.nullcontext() if all(map(self.usable, drawn)) else _refused("unknown adapter"):
            self.runtime.route([as_mix(one) for one in drawn])
            self.worn = drawn

    @precondition(lambda self: not self.merged)
    @rule(drawn=mixes.filter(bool), name=names)
    def combine(self, drawn, name):
        kind, chosen, weights = drawn
        refused = "already loaded" if name in self.truth else "" if self.usable(drawn) else "unknown adapter"
        with _refused(refused) if refused else contextlib.nullcontext():
            self.runtime.add_weighted_adapter(chosen, weights, name, kind)
            keys = set().union(*(self.truth[part] for part in chosen))
            self.truth[name] = {key: self.scale(drawn, key) for key in keys}

    @precondition(lambda self: not self.merged and not isinstance(self.worn, list))
    @rule()
    def merge(self):
        with _refused("wear the base model") if self.worn is None else contextlib.nullcontext():
            self.runtime.merge_adapter()
            self.merged = True

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        self.runtime.unmerge_adapter()
        self.merged = False

    @precondition(lambda self: not self.merged)
    @rule()
    def disable(self):
        with self.runtime.disable_adapter():
            self.compare([None] * ROWS)

    def rows(self):
        return self.worn if isinstance(self.worn, list) else [self.worn] * ROWS

    def scale(self, drawn, key):
        ones = torch.ones(WIDTHS[key], dtype=torch.float64)
        if drawn is None or not any(key in self.truth[name] for name in drawn[1]):
            return ones
        kind, chosen, weights = drawn
        vectors = [self.truth[name].get(key, ones) for name in chosen]
        if kind == "product":
            return torch.stack(vectors).prod(0)
        if kind == "linear":
            return sum(w * v for w, v in zip(weights, vectors, strict=True))
        return 1 + sum(w * (v - 1) for w, v in zip(weights, vectors, strict=True))

    def expected(self, rows):
        outputs = []
        for row, drawn in enumerate(rows):
            s = {key: self.scale(drawn, key) for key in WIDTHS}
            h = self.x[row].double() * s["fc1", "in"]
            h = torch.tanh((h @ self.weights["fc1.weight"].T + self.weights["fc1.bias"]) * s["fc1", "out"])
            h = h * s["fc2", "in"]
            outputs.append((h @ self.weights["fc2.weight"].T + self.weights["fc2.bias"]) * s["fc2", "out"])
        return torch.stack(outputs)

    def compare(self, rows):
        with torch.no_grad():
            actual = self.model(self.x.to(self.device)).cpu()
        truth = self.expected(rows)
        torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max().clamp(min=1)))

    @invariant()
    def outputs_are_the_truth(self):
        if hasattr(self, "worn"):
            self.compare(self.rows())
            assert self.runtime.adapters == list(self.truth)

    def teardown(self):
        if hasattr(self, "runtime"):
            self.runtime.unpatch()
            for name, parameter in self.model.named_parameters():
                assert torch.equal(parameter.cpu().double(), self.weights[name])


@contextlib.contextmanager
def _refused(message):
    try:
        yield
    except ValueError as error:
        assert message in str(error)
    else:
        raise AssertionError(f"expected a ValueError: {message}")


TestPrograms = Programs.TestCase
TestPrograms.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)


@pytest.mark.slow
class TestMorePrograms(TestPrograms):
    settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
