from typing import Any

def registrations() -> dict[str, dict[str, Any]]: ...
def configure(
    kernel_directory: str,
    cache_directory: str,
    nvrtc_path: str,
    nvrtc_directories: list[str],
    dump_directory: str,
    version: str,
) -> None: ...

seqlen_limits: tuple[int, ...]
part_head_dim: int

def tiles(
    operation: str,
    spec: dict[str, Any],
    dtype: str,
    head_dim: int,
    architecture: str,
    seqlen_q: int = ...,
    batch: int = 0,
    seqlen_k: int = 0,
    heads: int = 0,
    heads_k: int = 0,
    multiprocessors: int = 0,
) -> str: ...
def compile(
    operation: str,
    spec: dict[str, Any],
    dtype: str,
    head_dim: int,
    architecture: str,
    fresh: bool = False,
    tiles: str = "",
    seqlen_q: int = ...,
    batch: int = 0,
    seqlen_k: int = 0,
    heads: int = 0,
    heads_k: int = 0,
) -> list[dict[str, Any]]: ...
def devices() -> list[dict[str, Any]]: ...
def driver_version() -> int: ...
def nvrtc() -> dict[str, str]: ...
def cache() -> dict[str, Any]: ...
def check_sizes(
    batch: int, seqlen_q: int, seqlen_k: int, heads: int, head_dim: int
) -> None: ...
def override_tiles(operation: str, tiles: str) -> str: ...
def is_overridden(operation: str) -> bool: ...
