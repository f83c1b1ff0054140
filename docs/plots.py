"""A hook of MkDocs: puts the plots of measured results beside the pages."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds benchmarks/results/**/*.png as results/**/*.png."""
    for path in sorted(RESULTS.rglob("*.png")):
        name = f"results/{path.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
