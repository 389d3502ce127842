"""Which argument of a forward is counted in rows."""

import pytest
import torch
from torch import Tensor, nn

import ia3rt


class Denoiser(nn.Module):
    """With arguments as those of diffusers: a time step for all rows, places that no row has of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor, ids: Tensor | None = None) -> Tensor:
        return self.to_v(sample * torch.softmax(self.to_q(sample) * self.to_k(sample), -1)) + timestep[:, None, None]


@pytest.mark.parametrize("order", [("sample", "timestep"), ("timestep", "sample"), ("ids", "timestep", "sample")])
def test_arguments_are_named_in_any_order(order: tuple[str, ...]) -> None:
    model = Denoiser()
    runtime = ia3rt.patch(model)
    for name in "ab":
        runtime.add_adapter(name, {site.key: torch.rand(site.width) + 0.5 for site in runtime.sites})
    given = dict(sample=torch.randn(2, 3, 8), timestep=torch.tensor([3.0]), ids=torch.zeros(3, 2))
    compiled = torch.compile(model, backend="eager")
    with runtime.route(["a", "b"]):
        routed = model(**{name: given[name] for name in order})
        assert torch.equal(compiled(**{name: given[name] for name in order}), routed)
        assert torch.equal(compiled(given["sample"], timestep=given["timestep"]), routed)
    for row, name in enumerate("ab"):
        runtime.set_adapter(name)
        torch.testing.assert_close(routed[row], model(given["sample"], given["timestep"])[row])
    with runtime.route(["a", "b", "a"]), pytest.raises(ValueError, match="3 rows"):
        model(**{name: given[name] for name in order})
