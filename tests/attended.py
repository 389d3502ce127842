"""Inputs of the attention op, and its comparison with the reference: shared by the kernel's tests here and on a GPU."""

import torch
from bar import assert_meets_bar
from torch import Tensor
from workloads import popularity, random_bank, random_mixes

from ia3rt import ops, reference

CAPACITY, SLOTS = 12, 9


class Layer:
    """Queries, keys and values as transformers passes them, transposed views; and a bank for the keys and values."""

    def __init__(
        self, device, dtype=torch.float32, *, B=2, Hq=4, Hkv=2, Sq=19, Skv=37, D=16, route="distinct", longest=2
    ) -> None:
        self.generator = torch.Generator().manual_seed(Sq + Skv + D)
        self.device, self.dtype, self.D, self.Sq, self.Skv = device, dtype, D, Sq, Skv
        self.q = self.randn(B, Sq, Hq, D).transpose(1, 2)
        self.k, self.v = self.randn(B, Skv, 2, Hkv, D).permute(2, 0, 3, 1, 4)
        self.l_k, self.l_v = (random_bank(CAPACITY, Hkv * D, self.generator, before=3).to(device) for _ in range(2))
        self.mixes = random_mixes(SLOTS, CAPACITY, longest, self.generator).to(device)
        self.route = popularity(route, B, SLOTS, self.generator).to(device)
        self.mask = self.ranges = self.table = None

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def ranged(self, *ranges: tuple[int, int]) -> "Layer":
        self.ranges = torch.tensor(ranges, dtype=torch.int32, device=self.device)
        return self

    def options(self, causal: bool, window: int | None, softcap: float | None) -> tuple:
        return self.D**-0.5, causal, window, softcap

    def run(self, op, dtype, *options, gradients=True) -> list[Tensor]:
        bank_dtype = torch.promote_types(dtype, torch.float32)
        inputs = [x.to(dtype).detach() for x in (self.q, self.k, self.v)]
        inputs += [bank.to(bank_dtype).detach() for bank in (self.l_k, self.l_v) if bank is not None]
        inputs = [x.requires_grad_() if gradients else x for x in inputs]
        q, k, v, *banks = inputs
        l_k = banks.pop(0) if self.l_k is not None else None
        l_v = banks.pop(0) if self.l_v is not None else None
        o, lse = op(q, k, v, self.mask, self.ranges, self.table, l_k, l_v, self.mixes, self.route, *options)
        if not gradients:
            return [o, lse]
        do = torch.linspace(-1, 2, o.numel(), device=o.device).to(self.dtype).to(dtype).view(o.shape)
        return [o.detach(), *torch.autograd.grad(o, inputs, do)]

    def check(self, causal=False, window=None, softcap=None, gradients=True) -> None:
        """Compare the op and its gradients with the reference and its autograd."""
        options = self.options(causal, window, softcap)
        ours = self.run(ops.attention, self.dtype, *options, gradients=gradients)
        theirs = self.run(reference.attention, self.dtype, *options, gradients=gradients)
        truths = self.run(reference.attention, torch.float64, *options, gradients=gradients)
        if not gradients:  # logsumexps, some infinite: in fp32 whatever the dtype
            lse, _, truth = ours.pop(), theirs.pop(), truths.pop()
            rough = 1e-5 if self.dtype == torch.float32 else 0.05
            torch.testing.assert_close(lse.double(), truth, rtol=rough, atol=rough)
        assert_meets_bar(ours.pop(0), theirs.pop(0), truths.pop(0))
        for y, in_torch, truth in zip(ours, theirs, truths, strict=True):
            assert_meets_bar(y, in_torch, truth)
