from functools import partial

import pytest
import torch
from bar import Guarded, assert_meets_bar
from grid import DTYPES
from torch import Tensor
from workloads import LINEAR, POPULARITY, PRODUCT, Mix, mix_table, popularity, random_bank, random_mixes

from ia3rt import ops, reference
from ia3rt.kernels.rope import rope, rope_gradient, rope_into_cache

CAPACITY = 12
SLOTS = 9


class Attention:
    """The parts of an attention's projection, its site in a bank, and angles for its rows."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        heads: int = 3,
        heads_kv: int = 1,
        D: int = 16,
        rotary: int | None = None,
        by_head: bool = False,
    ) -> None:
        self.device, self.dtype, self.D, self.rotary = device, dtype, D, D if rotary is None else rotary
        self.heads, self.by_head = (heads, heads_kv, heads_kv), by_head
        self.generator = torch.Generator().manual_seed(D)
        bank = random_bank(CAPACITY, sum(self.heads) * D, self.generator, before=3).to(device)
        self.vectors = self.split(bank)

    def split(self, fused: Tensor) -> tuple[Tensor, ...]:
        """Return [..., width] as its parts [..., heads, D]."""
        if self.by_head:
            return fused.unflatten(-1, (self.heads[0], 3, self.D)).unbind(-2)
        return fused.unflatten(-1, (-1, self.D)).split(self.heads, -2)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def parts(self, M: int) -> tuple[Tensor, ...]:
        return self.split(self.randn(M, sum(self.heads) * self.D))

    def tables(self, C: int) -> tuple[Tensor, Tensor]:
        """Return a cos and a sin whose two entries for a pair are not the same, though those of a rotation are."""
        return self.randn(C, self.rotary), self.randn(C, self.rotary)

    def routing(self, rows: int, name: str = "distinct", longest: int = 3) -> tuple[Tensor, Tensor]:
        route = popularity(name, rows, SLOTS, self.generator)
        return random_mixes(SLOTS, CAPACITY, longest, self.generator).to(self.device), route.to(self.device)


def exact(*arguments: object) -> list:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def guarded(like: Tensor) -> Guarded:
    return Guarded(like.shape[0], like[0].numel(), like.dtype, like.device)


def check(parts, vectors, tables, routing, interleaved: bool = False) -> None:
    """Compare the kernel, as rope and as its gradient, with the reference."""
    arguments = (*parts, *vectors, *tables, *routing, interleaved)
    for kernel, in_torch in ((rope, reference.rope), (rope_gradient, reference.rope_gradient)):
        results = [guarded(x) for x in parts]
        kernel(*arguments, out=[result.out.view(x.shape) for result, x in zip(results, parts, strict=True)])
        for result, theirs, truth in zip(results, in_torch(*arguments), in_torch(*exact(*arguments)), strict=True):
            result.assert_untouched()
            assert_meets_bar(result.out.view(theirs.shape), theirs, truth)


def check_attention(attention: Attention, M: int, R: int, interleaved: bool = False, C: int | None = None) -> None:
    tables = attention.tables(M if C is None else C)
    check(attention.parts(M), attention.vectors, tables, attention.routing(R), interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "interleaved"), [(1, True), (2, False), (7, True), (16, False), (33, True), (64, False), (129, True)]
)
def test_rows(M, dtype, interleaved, device) -> None:
    check_attention(Attention(device, dtype), M, M, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("D", "rotary"),
    [
        (6, 4),
        (80, 32),
        (96, 96),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in ((2, 2), (10, 10), (16, 2), (64, 16), (96, 24), (128, 128))
        ),
    ],
)
def test_head_sizes(D, rotary, interleaved, device) -> None:
    check_attention(Attention(device, torch.bfloat16, 2, 2, D, rotary), 3, 3, interleaved)
    check_attention(Attention(device, torch.bfloat16, 2, 2, D, rotary, by_head=True), 5, 1, interleaved)


@pytest.mark.parametrize(("heads", "heads_kv"), [(1, 1), (9, 3), (7, 1), (8, 2), (4, 4)])
def test_counts_of_heads(heads, heads_kv, device) -> None:
    check_attention(Attention(device, torch.float16, heads, heads_kv, D=4), 6, 2)


@pytest.mark.slow
def test_a_program_of_a_prefill_takes_several_heads(device) -> None:
    check_attention(Attention(device, torch.bfloat16, 6, 3, D=2), 2048, 1)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("by_head", [True, False])
def test_a_projection_is_read_in_place(by_head, uniform, device) -> None:
    attention = Attention(device, torch.bfloat16, 3, 3, by_head=by_head)
    parts, vectors = attention.parts(6), attention.vectors
    assert all(x.data_ptr() != parts[0].data_ptr() and not x.is_contiguous() for x in parts[1:])
    fixed = (*attention.tables(6), *attention.routing(1 if uniform else 6), False)
    together = rope(*parts, *vectors, *fixed)
    apart = rope(*(x.contiguous() for x in parts), *(l.contiguous() for l in vectors), *fixed)  # noqa: E741
    assert all(map(torch.equal, together, apart))


@pytest.mark.parametrize("C", [1, 3, 6])
@pytest.mark.parametrize("R", [1, 2, 4, 12])
def test_angles_and_mixes_of_a_sequence(R, C, device) -> None:
    check_attention(Attention(device), 12, R, C=C)


@pytest.mark.parametrize("name", POPULARITY)
def test_popularity(name, device) -> None:
    attention = Attention(device, D=4)
    check(attention.parts(20), attention.vectors, attention.tables(2), attention.routing(10, name))


@pytest.mark.parametrize("mode", [PRODUCT, LINEAR])
@pytest.mark.parametrize("uniform", [True, False])
def test_mixes_of_up_to_eight_adapters(uniform, mode, device) -> None:
    attention = Attention(device, D=6)
    lengths = (8,) if uniform else range(9)
    weights = attention.randn(8).tolist()
    mixes = mix_table([Mix(mode, range(1, 1 + n), weights[:n]) for n in lengths], size=8).to(device)
    route = torch.arange(len(lengths), dtype=torch.int32, device=device)
    check(attention.parts(9), attention.vectors, attention.tables(9), (mixes, route), interleaved=True)


@pytest.mark.parametrize("scaled", ["", "q", "k v", "v"])
def test_parts_without_a_vector(scaled, device) -> None:
    attention = Attention(device, torch.float16, D=10, rotary=4)
    vectors = [l if name in scaled else None for name, l in zip("qkv", attention.vectors, strict=True)]  # noqa: E741
    check(attention.parts(5), vectors, attention.tables(5), attention.routing(5))


@pytest.mark.parametrize("bank_dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_dtypes_of_the_bank_and_of_the_angles(table_dtype, bank_dtype, device) -> None:
    attention = Attention(device, torch.bfloat16)
    vectors = [l.to(bank_dtype) for l in attention.vectors]  # noqa: E741
    tables = [table.to(table_dtype) for table in attention.tables(5)]
    check(attention.parts(5), vectors, tables, attention.routing(5))


def test_rows_and_heads_far_apart(device) -> None:
    attention = Attention(device, D=6)
    q, k, v = (attention.randn(heads + 1, 8, 9)[1:, ::2, 2:8].transpose(0, 1) for heads in attention.heads)
    check((q, k, v), attention.vectors, attention.tables(2), attention.routing(4))


def test_a_row_is_the_same_alone_and_in_any_batch(device) -> None:
    attention = Attention(device, torch.bfloat16, D=12, rotary=8)
    parts, tables, (mixes, route) = attention.parts(9), attention.tables(9), attention.routing(9)
    together = rope(*parts, *attention.vectors, *tables, mixes, route, True)
    for row in range(9):
        here = slice(row, row + 1)
        alone = (x[here] for x in parts), (table[here] for table in tables)
        ys = rope(*alone[0], *attention.vectors, *alone[1], mixes, route[here], True)
        assert all(torch.equal(y, whole[here]) for y, whole in zip(ys, together, strict=True))


def test_a_zero_factor_is_zero_and_the_identity_is_exact(device) -> None:
    attention = Attention(device, torch.bfloat16)
    for l in attention.vectors:  # noqa: E741
        l[1] = 0
    mixes = mix_table([Mix(PRODUCT, ()), Mix(PRODUCT, (0, 0)), Mix(PRODUCT, (2, 1)), Mix(LINEAR, ())]).to(device)
    route = torch.arange(4, dtype=torch.int32, device=device)
    arguments = (*attention.tables(4), mixes, route, False)
    parts = attention.parts(4)
    plain = rope(*parts, None, None, None, *arguments)
    for y, base in zip(rope(*parts, *attention.vectors, *arguments), plain, strict=True):
        assert torch.equal(y[:2], base[:2]) and (y[2:] == 0).all()


def test_the_vector_comes_before_the_rotation(device) -> None:
    """By hand, a quarter turn of one pair: (2 · 3, 5 · 7) becomes (−35, 6)."""
    x = torch.tensor([[[3.0, 7.0]]], device=device)
    l = torch.tensor([[[1.0, 1.0]], [[2.0, 5.0]]], device=device)  # noqa: E741
    cos, sin = torch.zeros(1, 2, device=device), torch.ones(1, 2, device=device)
    mixes = mix_table([Mix(PRODUCT, (1,))]).to(device)
    route = torch.zeros(1, dtype=torch.int32, device=device)
    for interleaved in (False, True):
        q, k, v = rope(x, x, x, l, None, l, cos, sin, mixes, route, interleaved)
        assert [y.flatten().tolist() for y in (q, k, v)] == [[-35, 6], [-7, 3], [6, 35]]


def caches(attention: Attention, layout: str, blocks: int = 4, size: int = 3) -> tuple[Tensor, Tensor]:
    """Return two caches [blocks, size, heads, D] full of NaN: vLLM's, or transposed static ones."""
    heads = attention.heads[1]
    shape = (2, blocks, size, heads, attention.D) if layout == "paged" else (2, blocks, heads, size, attention.D)
    both = torch.full(shape, float("nan"), dtype=attention.dtype, device=attention.device)
    k_cache, v_cache = both if layout == "paged" else both.transpose(2, 3)
    return k_cache, v_cache


@pytest.mark.parametrize(("layout", "slot_dtype"), [("paged", torch.int64), ("static", torch.int32)])
@pytest.mark.parametrize(("dtype", "heads_kv", "rotary"), [(torch.bfloat16, 2, 8), (torch.float32, 3, 6)])
def test_into_a_cache(dtype, heads_kv, rotary, layout, slot_dtype, device) -> None:
    attention = Attention(device, dtype, 6, heads_kv, D=8, rotary=rotary)
    slots = torch.tensor([11, -1, 0, 7, -5, 3, 4], dtype=slot_dtype, device=device)
    arguments = (*attention.parts(7), *attention.vectors, *attention.tables(7), *attention.routing(7), False)
    result = guarded(arguments[0])
    y = result.out.view(arguments[0].shape)
    for into_cache, plain in (
        (partial(rope_into_cache, out=y), rope),
        (reference.rope_into_cache, reference.rope),
    ):
        kept = caches(attention, layout)
        q, *expected = plain(*arguments)
        assert torch.equal(into_cache(*arguments, *kept, slots), q)
        for cache, x in zip(kept, expected, strict=True):
            for place in range(12):
                row = (slots == place).nonzero()
                written = cache[place // 3, place % 3]
                assert torch.equal(written, x[row.item()]) if row.numel() else written.isnan().all()
    result.assert_untouched()


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_reference_is_what_transformers_computes(interleaved) -> None:
    """In bf16, rotating a part of each head: the same bits."""
    pytest.importorskip("transformers")
    if interleaved:
        from transformers.models.glm.modeling_glm import apply_rotary_pos_emb
    else:
        from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb
    attention = Attention(torch.device("cpu"), torch.bfloat16, 4, 2, D=16, rotary=8)
    q, k, v = attention.parts(5)
    angles = torch.arange(5)[:, None] * torch.rand(4)
    half = angles.cos().bfloat16(), angles.sin().bfloat16()
    cos, sin = (torch.cat((table, table), -1) for table in half)
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    if interleaved:
        cos, sin = (table.repeat_interleave(2, -1) for table in half)
    ours = reference.rope(q, k, v, None, None, None, cos, sin, *attention.routing(5), interleaved)
    for y, expected in zip(ours, theirs, strict=False):
        assert torch.equal(y, expected[0].transpose(0, 1))


def op_inputs(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    R: int = 2,
    interleaved: bool = False,
    by_head: bool = False,
) -> tuple[list[Tensor], list]:
    """Return the parts of a projection [2, 3, width] and the vectors, as leaves, and the other arguments."""
    attention = Attention(device, dtype, 3, 3 if by_head else 1, D=6, rotary=4, by_head=by_head)
    parts = attention.split(attention.randn(2, 3, sum(attention.heads) * 6))
    vectors = [l[:6].to(torch.promote_types(dtype, torch.float32)) for l in attention.vectors]  # noqa: E741
    vectors[1][1, 0, 0] = vectors[1][2, 0, 0] = vectors[2][3, 0, 1] = 0  # two factors of zero in one mix, and one
    mixes = [Mix(PRODUCT, ()), Mix(PRODUCT, (1, 2, 3)), Mix(LINEAR, (4, 1), (0.5, -2.0)), Mix(PRODUCT, (5,))]
    route = torch.tensor([1, 2, 3, 0, 2, 1][:R], dtype=torch.int32, device=device)
    tensors = [tensor.detach().requires_grad_() for tensor in (*parts, *vectors)]
    return tensors, [*attention.tables(3), mix_table(mixes).to(device), route, interleaved]


@pytest.mark.parametrize(
    ("R", "by_head"), [(1, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, True), (6, False)))]
)
def test_opcheck(R, by_head, device) -> None:
    tensors, fixed = op_inputs(device, R=R, by_head=by_head)
    if R == 1:
        tensors[3] = tensors[5] = None
    torch.library.opcheck(ops.rope.op, (*tensors, *fixed))
    plain = [tensor if tensor is None else tensor.detach() for tensor in tensors]
    torch.library.opcheck(ops.rope_gradient.op, (*plain, *fixed))
    slots = torch.tensor([3, -1, 2, 0, 1, 5], device=device)
    cache = torch.zeros(2, 3, 2, *plain[1].shape[2:], device=device)
    torch.library.opcheck(ops.rope_into_cache.op, (*plain, *fixed, *cache, slots))


@pytest.mark.usefixtures("torch_backend")
def test_opcheck_in_torch() -> None:
    tensors, fixed = op_inputs(torch.device("cpu"), torch.bfloat16)
    torch.library.opcheck(ops.rope.op, (*tensors, *fixed))


@pytest.mark.slow
@pytest.mark.parametrize(("R", "interleaved"), [(1, False), (6, True)])
def test_gradcheck(R, interleaved) -> None:
    tensors, fixed = op_inputs(torch.device("cpu"), torch.float64, R, interleaved)
    assert torch.autograd.gradcheck(lambda *t: tuple(ops.rope(*t, *fixed)), tensors)
    assert torch.autograd.gradcheck(
        lambda *t: tuple(ops.rope(*t[:3], None, t[3], None, *fixed)), tensors[:3] + tensors[4:5]
    )


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_kernels(dtype, by_head, device) -> None:
    """Each gradient errs at most twice as much as torch's own autograd does."""

    def flat_reference(q, k, v, *rest):
        flat = (x.reshape(6, *x.shape[2:]) for x in (q, k, v))
        return [y.view(x.shape) for y, x in zip(reference.rope(*flat, *rest), (q, k, v), strict=True)]

    def gradients(run, dtype: torch.dtype) -> list[Tensor]:
        tensors, fixed = op_inputs(device, by_head=by_head, R=6)  # the same values for each dtype, rounded
        parts = [x.detach().to(torch.bfloat16).to(dtype).requires_grad_() for x in tensors[:3]]
        vectors = [l.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for l in tensors[3:]]  # noqa: E741
        fixed[:2] = [table.to(torch.bfloat16).to(dtype) for table in fixed[:2]]
        ys = run(*parts, *vectors, *fixed)
        dys = [torch.linspace(-1, 2, y.numel(), device=device).to(torch.bfloat16).to(dtype).view(y.shape) for y in ys]
        return list(torch.autograd.grad(ys, (*parts, *vectors), dys))

    truths = gradients(flat_reference, torch.float64)
    for ours, theirs, truth in zip(gradients(ops.rope, dtype), gradients(flat_reference, dtype), truths, strict=True):
        assert_meets_bar(ours, theirs, truth)


@pytest.mark.parametrize("needed", range(6))
def test_only_needed_gradients_are_returned(needed, device) -> None:
    tensors, fixed = op_inputs(device)
    tensors = [tensor.detach() for tensor in tensors]
    tensors[needed].requires_grad_()
    sum(y.sum() for y in ops.rope(*tensors, *fixed)).backward()
    assert [tensor.grad is not None for tensor in tensors] == [place == needed for place in range(6)]


def test_gradients_are_the_same_bits_each_time(device) -> None:
    tensors, fixed = op_inputs(device, R=6)
    total = sum(y.square().sum() for y in ops.rope(*tensors, *fixed))
    first, again = (torch.autograd.grad(total, tensors, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_shapes_strides_and_repeated_angles(device) -> None:
    tensors, (cos, sin, *fixed) = op_inputs(device)
    q, k, v, *vectors = (tensor.detach() for tensor in tensors)
    ys = ops.rope(q, k, v, *vectors, cos, sin, *fixed)
    assert all(y.is_contiguous() and y.shape == x.shape for y, x in zip(ys, (q, k, v), strict=True))
    repeated = (table.expand(2, -1, -1) for table in (cos, sin))
    assert all(map(torch.equal, ys, ops.rope(q, k, v, *vectors, *repeated, *fixed)))
    laid_out = (table[None].repeat(2, 1, 1) for table in (cos, sin))
    assert all(map(torch.equal, ys, ops.rope(q, k, v, *vectors, *laid_out, *fixed)))
    apart = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert all(map(torch.equal, ys, ops.rope(*apart, *vectors, cos, sin, *fixed)))
    empty = ops.rope(q[:0], k[:0], v[:0], *vectors, cos, sin, *fixed)
    assert [y.shape for y in empty] == [(0, *x.shape[1:]) for x in (q, k, v)]


@pytest.mark.parametrize("expanded", [0, 1])
def test_one_of_cos_and_sin_repeats_and_the_other_does_not(expanded, device) -> None:
    tensors, (*tables, mixes, route, interleaved) = op_inputs(device)
    laid_out = [torch.stack((table, -table)) for table in tables]
    laid_out[expanded] = torch.stack([tables[expanded]] * 2)
    given = list(laid_out)
    given[expanded] = tables[expanded].expand(2, -1, -1)
    with torch.no_grad():
        ours, theirs = (ops.rope(*tensors, *each, mixes, route, interleaved) for each in (given, laid_out))
    assert all(map(torch.equal, ours, theirs))


def test_cos_and_sin_have_no_gradient(device) -> None:
    tensors, (cos, *fixed) = op_inputs(device)
    ys = ops.rope(*tensors, cos.requires_grad_(), *fixed)
    with pytest.raises(ValueError, match="no gradient for cos and sin"):
        ys[0].sum().backward()


def test_torch_compile_leaves_the_op_and_its_gradient_whole(device) -> None:
    tensors, fixed = op_inputs(device)

    def run(*tensors):
        return torch.stack([y.square().sum() for y in ops.rope(*tensors, *fixed)])

    y, eager = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors)
    torch.testing.assert_close(y, eager, rtol=0, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(each.sum(), tensors) for each in (y, eager)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_torch_compile_writes_the_cache(device) -> None:
    tensors, fixed = op_inputs(device)
    tensors = [tensor.detach() for tensor in tensors]
    slots = torch.arange(6, device=device)
    cache, theirs = (torch.zeros(2, 2, 3, 1, 6, device=device) for _ in range(2))

    def run(cache):
        return ops.rope_into_cache(*tensors, *fixed, cache[0], cache[1], slots) + 1

    y = torch.compile(run, fullgraph=True, backend="aot_eager")(cache)
    torch.testing.assert_close(y, run(theirs), rtol=0, atol=0)
    assert cache.any() and torch.equal(cache, theirs)


def test_autograd_is_told_that_a_cache_was_written(device) -> None:
    """What was multiplied by it before has no gradient any more, and not a wrong one."""
    tensors, fixed = op_inputs(device)
    cache, slots = torch.zeros(2, 2, 3, 1, 6, device=device), torch.arange(6, device=device)
    y = cache * torch.ones_like(cache, requires_grad=True)
    with torch.no_grad():
        ops.rope_into_cache(*tensors, *fixed, cache[0], cache[1], slots)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


NAMES = (
    "q",
    "k",
    "v",
    "l_q",
    "l_k",
    "l_v",
    "cos",
    "sin",
    "mixes",
    "route",
    "interleaved",
    "k_cache",
    "v_cache",
    "slots",
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.ones(2, 3, 2, 6)}, r"with the same heads in k and v, not \[2, 3, 3, 6\], \[2, 3, 1, 6\] and"),
        ({"q": torch.ones(2, 3, 3, 5)}, r"q, k and v must be \[..., heads, D\]"),
        ({"q": torch.ones(18, 6)}, r"q, k and v must be \[..., heads, D\]"),
        ({"k": torch.ones(2, 3, 1, 6).half()}, "q, k and v must have one dtype"),
        ({"l_k": torch.ones(12, 2, 6)}, r"l_k must be a bank slice of shape \[capacity, 1, 6\], not \[12, 2, 6\]"),
        ({"l_q": torch.ones(12, 6, 3).transpose(1, 2)}, "l_q must have contiguous numbers in a head"),
        ({"cos": torch.ones(3, 2)}, r"cos and sin must be .* not \[3, 2\] and \[3, 4\]"),
        ({"cos": torch.ones(3, 3), "sin": torch.ones(3, 3)}, "with an even rotary_dim of at most 6"),
        ({"cos": torch.ones(3, 8), "sin": torch.ones(3, 8)}, "with an even rotary_dim of at most 6"),
        ({"cos": torch.ones(3, 4).half()}, "cos and sin must have one dtype"),
        ({"cos": torch.ones(4, 4), "sin": torch.ones(4, 4)}, "the 6 rows of q are no multiple of the 4 rows of cos"),
        ({"mixes": torch.zeros(1, 2)}, "mixes must be a contiguous int32 tensor"),
        ({"route": torch.zeros(4, dtype=torch.int32)}, "the 6 rows of x cannot be divided"),
        ({"k_cache": torch.ones(2, 3, 2, 6)}, r"k_cache and v_cache must be \[blocks, block size, 1, 6\]"),
        ({"v_cache": torch.ones(2, 3, 1, 6).half()}, "the caches must be torch.float32, as k is"),
        ({"v_cache": torch.ones(3, 2, 1, 6).transpose(0, 1)}, "must have the same strides"),
        ({"slots": torch.zeros(6)}, "slots must be a contiguous int32 or int64 tensor"),
        ({"slots": torch.zeros(5, dtype=torch.int32)}, "slots must have one entry for each of the 6 rows, not 5"),
    ],
)
def test_wrong_arguments(change, message, device) -> None:
    tensors, fixed = op_inputs(device)
    cache = torch.zeros(2, 2, 3, 1, 6, device=device)
    arguments = (*(tensor.detach() for tensor in tensors), *fixed, *cache, torch.arange(6, device=device))
    changed = dict(zip(NAMES, arguments, strict=True)) | change
    moved = [
        value if value is None or isinstance(value, bool) or "l_q" in change else value.to(device)
        for value in changed.values()
    ]
    with pytest.raises(ValueError, match=message):
        ops.rope_into_cache(*moved)
    if not set(change) & set(NAMES[-3:]):
        for op in (ops.rope, ops.rope_gradient):
            with pytest.raises(ValueError, match=message):
                op(*moved[:11])
