"""Which modules apply a site's vector, and the drop-ins that they become."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ia3rt.adapters.site import Site
from ia3rt.modules import mlp_forms, qkv_forms
from ia3rt.modules.channels import CONVOLUTIONS
from ia3rt.modules.convolution import IA3Convolution
from ia3rt.modules.embedding import IA3Embedding
from ia3rt.modules.experts import drop_in_of
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.mlp import IA3MLP
from ia3rt.modules.qkv import IA3QKV
from ia3rt.modules.set_forward import keeps_class_forward
from ia3rt.modules.sharding import is_tensor_parallel
from ia3rt.modules.split_layer import IA3SplitLayer
from ia3rt.modules.wearer import Wearer
from ia3rt.modules.weights import quantised_weight
from ia3rt.routing.route import Backend


def wearers_of(
    modules: Mapping[str, nn.Module], site: Site, backend: Backend
) -> tuple[tuple[nn.Module, type[Wearer]], ...]:
    """The modules that apply a site's vector, with their drop-ins: the site's layer first, which wears it.

    And one that spares it a pass, where there is one: the MLP around a second matrix, and on the Triton backend the
    attention around a projection of q, k or v; unless other code set a forward on that, which runs in its place.
    """
    if site.experts:
        return ((modules[site.module], drop_in_of(modules[site.module])),)
    if is_tensor_parallel(modules, site.path):
        if backend == "triton":
            raise ValueError(
                f"module {site.path!r} is tensor-parallel, and the Triton backend computes with whole weights: "
                "patch(model, backend='torch')"
            )
        return ((modules[site.path], IA3SplitLayer),)
    layer = modules[site.path], _drop_in(modules[site.path])
    parent, _, name = site.path.rpartition(".")
    around = modules[parent]
    if layer[1] is not IA3Layer or not keeps_class_forward(around):
        return (layer,)
    if site.side == "in":
        form = mlp_forms.form_of(around)
        return (layer, (around, IA3MLP)) if form is not None and form.down == name else (layer,)
    attention = qkv_forms.form_of(around) if backend == "triton" else None
    if attention is None or name not in attention.projections:
        return (layer,)
    if len(attention.projections) > 1 and quantised_weight(modules[site.path]) is not None:
        return (layer,)  # its vector costs nothing in the kernel that dequantises its weight either
    return layer, (around, IA3QKV)


def _drop_in(module: nn.Module) -> type[IA3Layer]:
    if isinstance(module, CONVOLUTIONS):
        return IA3Convolution
    return IA3Embedding if isinstance(module, nn.Embedding) else IA3Layer
