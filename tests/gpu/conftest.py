"""What the kernels give for a case, and what they ought to give."""

import functools

import pytest

from tests.support import ahead, calls, oracle


def pytest_collection_modifyitems(config, items):
    """Keeps tests of one case in one process, under pytest-xdist's loadgroup.

    What is expected of a case then takes the CPU's time once.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if case is not None:
            item.add_marker(pytest.mark.xdist_group(str(case)))


@pytest.fixture(scope="session")
def expected(request):
    """`oracle.expected` of each case, made on the CPU's cores while the GPU works."""
    results = ahead.Ahead(oracle.expected, ahead.parameters(request.session, "case"))
    yield results
    results.close()


@pytest.fixture(scope="session")
def kernel_results(request):
    """A function of a case: all five results of the kernels, computed once.

    Kernels are compiled on every core before the tests come to them.
    """
    compiled = ahead.Ahead(
        calls.compile_kernels, ahead.parameters(request.session, "case")
    )

    @functools.cache
    def run(case):
        compiled.wait(case)
        return calls.run(case, implementation="cuda")

    yield run
    compiled.close()
