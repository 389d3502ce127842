"""Which module applies a site's vector, and the drop-in that it becomes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ia3rt.adapters.site import Site
from ia3rt.modules import mlp_forms, qkv_forms
from ia3rt.modules.layer import IA3Layer
from ia3rt.modules.mlp import IA3MLP
from ia3rt.modules.qkv import IA3QKV
from ia3rt.modules.wearer import Wearer
from ia3rt.routing.route import Backend


def wearer_of(modules: Mapping[str, nn.Module], site: Site, backend: Backend) -> tuple[nn.Module, type[Wearer]]:
    """The module that applies a site's vector, and its drop-in.

    It is the MLP around a second matrix, on the Triton backend the attention around a projection of q, k and v, and
    else the layer itself. A forward set on the instance is not hidden, unless it is accelerate's, which calls on.
    """
    layer = modules[site.path]
    parent, _, name = site.path.rpartition(".")
    around = modules[parent]
    if "forward" in vars(around) and "_old_forward" not in vars(around):
        return layer, IA3Layer
    if site.side == "in":
        form = mlp_forms.form_of(around)
        return (around, IA3MLP) if form is not None and form.down == name else (layer, IA3Layer)
    attention = qkv_forms.form_of(around) if backend == "triton" else None
    return (around, IA3QKV) if attention is not None and attention.projection == name else (layer, IA3Layer)
