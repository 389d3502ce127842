"""Functions are taken for one another only where nothing that they compute with differs."""

import torch
from torch import nn

from ia3rt.modules.mlp_forms import form_of_class
from ia3rt.modules.same_code import same_code, same_function


def known(self, x, size=2, *, keep=True):
    first, rest = x.chunk(size, dim=-1)
    return self.down(torch.relu(first) * rest)


def renamed(module, states, parts=2, *, keep=True):
    """Other names."""
    a, b = states.chunk(parts, dim=-1)
    return module.down(torch.relu(a) * b)


def another_constant(self, x, size=2, *, keep=True):
    first, rest = x.chunk(size, dim=1)
    return self.down(torch.relu(first) * rest)


def another_order(self, x, size=2, *, keep=True):
    first, rest = x.chunk(size, dim=-1)
    return self.down(torch.relu(rest) * first)


def another_default(self, x, size=4, *, keep=True):
    first, rest = x.chunk(size, dim=-1)
    return self.down(torch.relu(first) * rest)


def another_name(self, x, size=2, *, keep=True):
    first, rest = x.chunk(size, dim=-1)
    return self.down(torch.tanh(first) * rest)


def more_arguments(self, x, size=2, *, keep=True, **kwargs):
    first, rest = x.chunk(size, dim=-1)
    return self.down(torch.relu(first) * rest)


def test_names_of_variables_are_no_part_of_what_is_computed():
    assert same_code(renamed, known)
    assert not same_function(renamed, known)  # it cannot be called with x=…
    assert same_function(known, known)


def test_all_else_is():
    others = [another_constant, another_order, another_default, another_name, more_arguments]
    assert not [other for other in others if same_code(other, known)]
    assert not same_code(nn.Linear(2, 2), known)
    assert not same_code(None, known)


def test_an_mlp_that_takes_its_halves_from_another_dimension_is_none_of_phi3s():
    class Phi3(nn.Module):
        def forward(self, hidden_states):
            up_states = self.gate_up_proj(hidden_states)
            gate, up_states = up_states.chunk(2, dim=-1)
            up_states = up_states * self.activation_fn(gate)
            return self.down_proj(up_states)

    class Other(Phi3):
        def forward(self, hidden_states):
            up_states = self.gate_up_proj(hidden_states)
            gate, up_states = up_states.chunk(2, dim=1)
            up_states = up_states * self.activation_fn(gate)
            return self.down_proj(up_states)

    assert form_of_class(Phi3) is not None
    assert form_of_class(Other) is None
