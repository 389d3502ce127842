"""Where a vector acts in a model: the sites that are found, and the drop-ins that modules become in place.

An MLP or an attention whose forward is known applies its vector where it costs no pass; any other layer at its input or
output. What changes weights (merge.py) or tells of drop-ins (explanation.py) is here too. It may import `routing`,
`ops`, `reference` and `adapters`, and of `kernels` what names a launch, when asked for an explanation.
"""
