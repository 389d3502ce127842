"""The torch backend's multiplication, whole and by pieces."""

import pytest
import torch

from ia3rt.modules import eager


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "rows"),
    [((700, 1000), 1), ((2, 700, 1000), 1), ((5, 300, 1000), 5), ((4, 1, 300, 1000), 4), ((1, 9, 3), 1)],
)
def test_large_tensors_go_by_pieces_to_the_same_result(dtype, shape, rows):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    scale = torch.rand(shape[-1]) if rows == 1 else torch.rand(rows, *[1] * (len(shape) - 2), shape[-1])
    expected = (x.double() * scale.double()).to(torch.float32).to(dtype)
    kept = x.clone()
    assert torch.equal(eager.scaled(x, scale), expected)
    assert torch.equal(x, kept)
    assert eager.scaled_own(x, scale) is x
    assert torch.equal(x, expected)


def test_a_default_device_is_nobody_who_looks_on():
    x = torch.ones(2, 3)
    with torch.device("cpu"):
        assert eager.scaled_own(x, torch.rand(3)) is x
