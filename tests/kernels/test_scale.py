import pytest
import torch
from bar import Guarded, assert_meets_bar
from torch import Tensor
from workloads import LINEAR, POPULARITY, PRODUCT, Mix, mix_table, popularity, random_bank, random_mixes

from ia3rt import reference
from ia3rt.kernels.scale import scale

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (1, 2, 7, 16, 33, 64, 129)
CAPACITY = 12


def check(x: Tensor, bank: Tensor, mixes: Tensor, route: Tensor) -> None:
    result = Guarded(*x.shape, x.dtype, x.device)
    assert scale(x, bank, mixes, route, out=result.out) is result.out
    result.assert_untouched()
    truth = reference.scale(x.double(), bank.double(), mixes, route)
    assert_meets_bar(result.out, reference.scale(x, bank, mixes, route), truth)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", ROWS)
def test_rows(M, dtype, device, generator) -> None:
    x = torch.randn(M, 77, generator=generator).to(device, dtype)
    bank = random_bank(CAPACITY, 77, generator, before=3).to(device)
    route = popularity("distinct", M, 9).to(device)
    check(x, bank, random_mixes(9, CAPACITY, 4, generator).to(device), route)


@pytest.mark.parametrize("name", POPULARITY)
@pytest.mark.parametrize("rows_per_mix", [1, 3])
def test_popularity(name, rows_per_mix, device, generator) -> None:
    x = torch.randn(10 * rows_per_mix, 33, generator=generator).to(device)
    bank = random_bank(CAPACITY, 33, generator).to(device)
    route = popularity(name, 10, 6, generator).to(device)
    check(x, bank, random_mixes(6, CAPACITY, 3, generator).to(device), route)


@pytest.mark.parametrize("mode", [PRODUCT, LINEAR])
@pytest.mark.parametrize("uniform", [True, False])
def test_mixes_of_up_to_eight_adapters(uniform, mode, device, generator) -> None:
    lengths = (8,) if uniform else range(9)
    weights = torch.randn(8, generator=generator).tolist()
    mixes = mix_table([Mix(mode, range(1, 1 + n), weights[:n]) for n in lengths], size=8).to(device)
    x = torch.randn(9, 40, generator=generator).to(device)
    check(
        x,
        random_bank(CAPACITY, 40, generator).to(device),
        mixes,
        torch.arange(len(lengths), dtype=torch.int32).to(device),
    )


@pytest.mark.parametrize("bank_dtype", DTYPES)
@pytest.mark.parametrize("uniform", [True, False])
def test_bank_dtypes(uniform, bank_dtype, device, generator) -> None:
    x = torch.randn(5, 600, generator=generator).to(device, torch.bfloat16)
    bank = random_bank(CAPACITY, 600, generator, bank_dtype, before=1).to(device)
    route = torch.tensor([3] if uniform else [0, 1, 2, 3, 4], dtype=torch.int32).to(device)
    check(x, bank, random_mixes(5, CAPACITY, 2, generator).to(device), route)


def test_strided_rows(device, generator) -> None:
    wide = torch.randn(6, 50, generator=generator).to(device)
    mixes = random_mixes(4, CAPACITY, 2, generator).to(device)
    route = popularity("uniform", 6, 4, generator).to(device)
    bank = random_bank(CAPACITY, 20, generator).to(device)
    check(wide[:, 7:27], bank, mixes, route)
    check(wide[:1, 7:27].expand(6, 20), bank, mixes, route)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_returns_x_to_the_bit(dtype, device, generator) -> None:
    x = torch.randn(3, 21, generator=generator).to(device, dtype)
    mixes = mix_table([Mix(PRODUCT, ()), Mix(PRODUCT, (0,)), Mix(LINEAR, (0,), (1.0,))]).to(device)
    bank = random_bank(CAPACITY, 21, generator).to(device)
    assert torch.equal(scale(x, bank, mixes, torch.arange(3, dtype=torch.int32).to(device)), x)


def test_a_row_is_the_same_alone_and_in_any_batch(device, generator) -> None:
    x = torch.randn(9, 30, generator=generator).to(device)
    mixes = random_mixes(9, CAPACITY, 5, generator).to(device)
    bank = random_bank(CAPACITY, 30, generator).to(device)
    route = torch.arange(9, dtype=torch.int32).to(device)
    together = scale(x, bank, mixes, route)
    for row in range(9):
        assert torch.equal(scale(x[row : row + 1], bank, mixes, route[row : row + 1]), together[row : row + 1])


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter computes in numpy
def test_zeros_infinities_and_overflow(device) -> None:
    x = torch.tensor([[1.0, -2.0, float("inf"), 65504.0]], dtype=torch.float16)
    bank = torch.tensor([[1.0, 1, 1, 1], [0.0, 0, 0, 2]])
    mixes, route = mix_table([Mix(PRODUCT, (1,))]), torch.zeros(1, dtype=torch.int32)
    y = scale(*(tensor.to(device) for tensor in (x, bank, mixes, route)))
    torch.testing.assert_close(y.cpu(), x * bank[1:].half(), rtol=0, atol=0, equal_nan=True)
