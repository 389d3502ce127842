"""Ways of making one adapter out of several, each a function of vectors, with its formula and source.

An adapter's vector at a site is l, and what it changes there its task vector τ = l - 1 (Ilharco et al. 2023). What all
of them have in common:

- Vectors are [width] each, of any floating point dtype; what comes back is float32, computed in float64 on the CPU and
  rounded once, so that every machine gives the same numbers.
- A site that an adapter lacks is ones there, so its task vector is zeros. A number that none of them changes is 1.
- Weights are as in PEFT's `add_weighted_adapter` for LoRA: they scale what is left of a task vector after pruning and
  after signs are elected.
"""
