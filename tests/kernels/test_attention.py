import pytest
import torch
from attended import Layer
from bar import GUARD
from grid import DTYPES, ROWS
from where import DEVICE
from workloads import POPULARITY

from ia3rt import ops, reference
from ia3rt.kernels.attention import attention

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_dtypes(causal, dtype, device) -> None:
    Layer(device, dtype).check(causal)


@pytest.mark.parametrize("Sq", ROWS)
def test_rows(Sq, device) -> None:
    B = 1 if Sq > 2 else 4  # of few numbers, the largest error of torch's is small by chance
    Layer(device, Sq=Sq, Skv=130, B=B).check(causal=True, gradients=Sq in (7, 129))


@pytest.mark.parametrize("D", [3, 8, 16, 64, 80, 96, 128, 256])
def test_head_sizes(D, device) -> None:
    """Those of less than 16 the interpreter takes as they are, too: bench/compiled builds such."""
    Layer(device, torch.bfloat16, D=D, Hq=2, Hkv=1, Sq=9, Skv=20).check(causal=True)


@pytest.mark.parametrize(
    ("Hq", "Hkv"), [(6, 2), *(pytest.param(*heads, marks=pytest.mark.slow) for heads in ((3, 3), (5, 1)))]
)
def test_heads(Hq, Hkv, device) -> None:
    for Sq in (1, 40):
        Layer(device, Hq=Hq, Hkv=Hkv, Sq=Sq).check(causal=Sq < 37, gradients=Sq == 40)


@pytest.mark.parametrize("Sq", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_shared_keys_of_a_decoded_token(causal, Sq, device) -> None:
    """Long enough that several programs share them; some of these then see none."""
    Layer(device, torch.float16, B=1, Hkv=1, Sq=Sq, Skv=1030).ranged((500, 900)).check(causal, gradients=False)


@pytest.mark.parametrize("softcap", [None, 2.0, pytest.param(50.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("causal", "window"), [(True, 5), (True, 70), (False, 9)])
def test_windows_and_caps(causal, window, softcap, device) -> None:
    Layer(device, Sq=90, Skv=100, B=1, Hq=2, Hkv=1).check(causal, window, softcap)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="counts in the interpreter")
@pytest.mark.parametrize("causal", [True, False])
def test_what_a_window_leaves_out_is_not_multiplied(causal, device, monkeypatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    products, multiply = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *a: products.append(0) or multiply(*a))
    layer = Layer(device, torch.float16, B=1, Hq=1, Hkv=1, Sq=512, Skv=512)
    layer.l_k = layer.l_v = None
    counts = []
    for window in (None, 16):
        products.clear()
        layer.run(ops.attention, torch.float16, *layer.options(causal, window, None))
        counts.append(len(products))
    assert counts[1] < counts[0] / 2, counts


@pytest.mark.parametrize("Sq", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_padding_on_either_side(Sq, device) -> None:
    layer = Layer(device, B=3, Sq=Sq, Skv=80).ranged((0, 80), (33, 80), (0, 51))
    layer.check(causal=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("Sq", [1, 20])
def test_what_padding_holds_is_not_seen(Sq, backend, bad, device, monkeypatch) -> None:
    """Nor by the gradients, which of padding are 0."""
    if backend == "torch":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        device = "cpu"
    layer = Layer(device, Sq=Sq, Skv=40).ranged((3, 40), (0, 33))
    options = layer.options(Sq > 1, None, None)
    for x in (layer.k, layer.v):
        x[0, :, :3] = x[1, :, 33:] = 0
    truths = layer.run(reference.attention, torch.float64, *options)
    for x in (layer.k, layer.v):
        x[0, :, :3] = x[1, :, 33:] = bad
    for ours, truth in zip(layer.run(ops.attention, torch.float32, *options), truths, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_more_sequences_than_cuda_has_programs_along_an_axis(device, monkeypatch) -> None:
    grids = []
    for name in ("attention", "attention_gradient"):
        monkeypatch.setattr(f"ia3rt.kernels.{name}.run", lambda kernel, grid, *_, **__: grids.append(grid))
    layer = Layer(device, torch.float16, B=2**16, Hq=1, Hkv=1, Sq=1, Skv=2)
    layer.l_k = layer.l_v = None
    layer.run(ops.attention, torch.float16, *layer.options(False, None, None))
    assert len(grids) >= 4 and all(max(grid[1:], default=1) < 2**16 for grid in grids)


@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_heads_more_than_32_bits_apart(name, device) -> None:
    """As in the mask of each head of a long sequence. On a CPU, memory that nobody touches is not there."""
    layer = Layer(device, torch.float16, B=1, Hq=3, Hkv=3, Sq=4, Skv=4)
    layer.l_k = None  # q times its scale is another tensor
    layer.mask = (torch.rand(1, 3, 4, 4, generator=layer.generator) < 0.6).to(device)
    tensor, apart = getattr(layer, name), 2**30
    S, width = tensor.shape[2:]
    far = torch.empty(2 * apart + S * width, dtype=tensor.dtype, device=device)
    setattr(layer, name, far.as_strided(tensor.shape, (0, apart, width, 1)).copy_(tensor))
    layer.check()


@pytest.mark.parametrize("kind", ["bool", "additive", "by head"])
def test_masks(kind, device) -> None:
    layer = Layer(device, torch.bfloat16)
    shape = (2, 4 if kind == "by head" else 1, 19, 37)
    mask = torch.rand(shape, generator=layer.generator) < 0.6
    mask[1, :, 3] = False
    mask = mask.to(device)
    layer.mask = mask if kind != "additive" else layer.randn(*shape).masked_fill(~mask, float("-inf"))
    layer.check()
    assert not layer.run(ops.attention, torch.bfloat16, *layer.options(False, None, None))[0][1, 3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", [ops.attention, reference.attention])
@pytest.mark.parametrize("least", [-1e9, None])
def test_rows_masked_by_numbers_are_the_mean_of_all_keys(least, op, dtype, device) -> None:
    """As torch's attention has them: padding's, in transformers' masks. Other rows do not see what is so masked."""
    layer = Layer(device, B=1, Sq=4, Skv=37)
    layer.mask = torch.zeros(1, 1, 4, 37, dtype=dtype, device=device)
    least = torch.finfo(dtype).min if least is None else least
    layer.mask[:, :, 1], layer.mask[:, :, 2, 5:] = least, least
    layer.l_k = layer.l_v = None
    o, lse = layer.run(op, torch.float32, *layer.options(False, None, None), gradients=False)
    inputs = layer.q, layer.k, layer.v, layer.mask.float()
    truth = torch.nn.functional.scaled_dot_product_attention(*inputs, enable_gqa=True)
    torch.testing.assert_close(o, truth.transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert lse.isfinite().all()


def test_the_gradient_of_large_scores_is_the_softmaxs(torch_backend) -> None:
    """Which their logsumexp, rounded, does not say: torch's softmax is the truth here."""
    layer = Layer("cpu", Sq=4, Skv=5, D=8)
    layer.l_k = layer.l_v = None
    layer.mask = torch.zeros(2, 1, 4, 5)
    layer.mask[:, :, 1], layer.mask[:, :, 2] = -1e9, torch.finfo(torch.float32).min

    def plain(q, k, v, mask, *rest):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        s = q @ k.transpose(2, 3) * rest[6] + mask
        return (s.softmax(-1) @ v).transpose(1, 2), None

    options = layer.options(False, None, None)
    for ours, truth in zip(*(layer.run(op, torch.float32, *options) for op in (ops.attention, plain)), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


def test_rows_that_see_no_key_are_zero(device) -> None:
    layer = Layer(device, Sq=40, Skv=30).ranged((0, 0), (5, 9))
    layer.check(causal=True)
    o, lse = layer.run(ops.attention, torch.float32, *layer.options(True, None, None), gradients=False)
    assert not o[0].any() and (lse[0] == float("inf")).all()


@pytest.mark.parametrize("Sq", [1, 5, 70])
def test_pages(Sq, device) -> None:
    """A table with pages in any order, of which some are of no sequence, is the same as the keys in their order."""
    layer = Layer(device, Sq=Sq, Skv=48).ranged((0, 48), (0, 21))
    expected = layer.run(reference.attention, torch.float64, *layer.options(False, None, None), gradients=False)
    pages = torch.randperm(11, generator=layer.generator)[:6].view(2, 3)
    for name in "kv":
        cache = torch.full((11, 16, 2, 16), float("nan"), device=device)
        cache[pages] = getattr(layer, name).transpose(1, 2).unflatten(1, (3, 16))
        setattr(layer, name, cache)
    layer.table = pages.to(device, torch.int32)
    paged = layer.run(ops.attention, torch.float32, *layer.options(False, None, None), gradients=False)
    torch.testing.assert_close(paged[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    layer.ranges[0, 1] = 40
    causal = layer.options(True, None, None)
    ours = layer.run(ops.attention, torch.float32, *causal, gradients=False)
    theirs = layer.run(lambda *a: reference.attention(*a[:1], *(x.transpose(1, 2) for x in a[1:3]), *a[3:]),
                       torch.float64, *causal, gradients=False)  # fmt: skip
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", POPULARITY)
def test_popularity(name, device) -> None:
    for Sq, longest in ((1, 8), (20, 2)):
        layer = Layer(device, B=5, Hq=2, Hkv=1, Sq=Sq, Skv=20, route=name, longest=longest)
        layer.check(gradients=Sq == 20)


@pytest.mark.parametrize("absent", [("l_k",), ("l_v",), ("l_k", "l_v")])
def test_no_vectors(absent, device) -> None:
    layer = Layer(device, torch.float16)
    for name in absent:
        setattr(layer, name, None)
    layer.check()


def test_nothing_is_written_beside_the_output(device) -> None:
    layer = Layer(device, D=24)
    layer.l_k = layer.l_v = None
    o, lse = (torch.full((n + 2 * GUARD,), float("nan"), device=device) for n in (2 * 19 * 4 * 24, 2 * 4 * 19))
    outs = o[GUARD:-GUARD].view(2, 19, 4, 24), lse[GUARD:-GUARD].view(2, 4, 19)
    options = layer.options(True, None, None)
    attention(layer.q, layer.k, layer.v, *(None,) * 5, layer.mixes, layer.route, *options, out=outs)
    for buffer, out in zip((o, lse), outs, strict=True):
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all() and not out.isnan().any()


def test_the_reference_is_torchs_attention(device) -> None:
    layer = Layer(device)
    o, _ = reference.attention(
        layer.q, layer.k, layer.v, *(None,) * 5, layer.mixes, layer.route, *layer.options(False, None, None)
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(layer.q, layer.k, layer.v, enable_gqa=True)
    torch.testing.assert_close(o, theirs.transpose(1, 2))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_gradient_formulas(softcap, torch_backend) -> None:
    """In fp64, of the op whose backward is written by hand, by finite differences."""
    layer = Layer("cpu", torch.float64, Sq=4, Skv=5, D=3)
    layer.ranged((0, 5), (2, 5))
    inputs = [x.detach().double().requires_grad_() for x in (layer.q, layer.k, layer.v, layer.l_k, layer.l_v)]

    def run(q, k, v, l_k, l_v):
        options = layer.options(True, 3, softcap)
        return ops.attention(q, k, v, None, layer.ranges, None, l_k, l_v, layer.mixes, layer.route, *options)[0]

    assert torch.autograd.gradcheck(run, inputs)


def test_opcheck(device) -> None:
    layer = Layer(device, Sq=5, Skv=6)
    inputs = [x.detach().requires_grad_() for x in (layer.q, layer.k, layer.v, layer.l_k, layer.l_v)]
    arguments = (*inputs[:3], None, None, None, *inputs[3:], layer.mixes, layer.route)
    torch.library.opcheck(torch.ops.ia3rt.attention, (*arguments, *layer.options(True, 3, 2.0)))


def test_results_repeat(device) -> None:
    layer = Layer(device, torch.bfloat16, Sq=1, Skv=600, B=1)
    first, second = (layer.run(ops.attention, torch.bfloat16, *layer.options(False, None, None)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def gradient_of(layer: Layer, lay_out=lambda x: x) -> list[torch.Tensor]:
    layer.l_k = layer.l_v = None
    options = layer.options(True, None, None)
    o, lse = layer.run(ops.attention, torch.float32, *options, gradients=False)
    do = torch.linspace(-1, 2, o.numel(), device=o.device).view(o.shape)
    return ops.attention_gradient(do, layer.q, layer.k, layer.v, lay_out(o), lay_out(lse), None, None, *options)


def test_the_gradient_takes_results_in_any_layout(device) -> None:
    def transposed(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    assert all(map(torch.equal, gradient_of(Layer(device)), gradient_of(Layer(device), transposed)))


def test_the_gradients_errors() -> None:
    for lay_out, message in ((lambda x: x[:, :1], "o must be"), (lambda x: x[..., :16].clone(), "lse must be")):
        with pytest.raises(ValueError, match=message):
            gradient_of(Layer("cpu"), lay_out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k=torch.ones(2, 3, 37, 16), v=torch.ones(2, 3, 37, 16)), "heads"),
        (dict(v=torch.ones(2, 2, 36, 16)), r"\[batch, heads, length, D\]"),
        (dict(mask=torch.ones(2, 1, 19, 36)), "mask"),
        (dict(ranges=torch.ones(2, 2)), "ranges"),
        (dict(table=torch.ones(2, 3, dtype=torch.int32)), "table|heads"),
        (dict(l_v=torch.ones(3, 31)), "l_v"),
    ],
)
def test_errors(changes, message) -> None:
    layer = Layer("cpu")
    for name, value in changes.items():
        setattr(layer, name, value)
    with pytest.raises(ValueError, match=message):
        layer.run(ops.attention, torch.float32, *layer.options(False, 5, None))
