"""`python -m jax_flash_attn`: see `jax_flash_attn.cli`."""

import sys

from jax_flash_attn import cli

if __name__ == "__main__":
    sys.exit(cli.main())
