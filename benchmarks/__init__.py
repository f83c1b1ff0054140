"""Speed and memory of attention in JAX, ours beside the other libraries'.

`python -m benchmarks.run` measures, `python -m benchmarks.report` prints and plots,
`python -m benchmarks.memory` measures peak memory; all run from a checkout's root.
"""
