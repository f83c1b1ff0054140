"""Flash attention inside the attention layers of flax, Haiku and Equinox.

One module for each framework: `linen`, `nnx`, `haiku` and `equinox`. Each is imported
by name and needs its framework; nothing else here imports one. A layer says what the
kernel should do when it is made, since under `jit` nobody can read a mask array:
`causal=True` runs the kernel, a causal mask array takes the plain JAX path.
"""
