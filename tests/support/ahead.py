"""Slow results that many tests need, computed on the machine's other cores."""

import concurrent.futures
import os


class Ahead:
    """`function(argument)` for each argument, started at once, awaited when asked for.

    The function must release the interpreter lock for most of its time, as compilers
    and child processes do.
    """

    def __init__(self, function, arguments):
        self._function = function
        # More threads than cores would finish everything at the end, and nothing early.
        cores = len(os.sched_getaffinity(0))
        self._pool = concurrent.futures.ThreadPoolExecutor(cores)
        self._results = {
            argument: self._pool.submit(function, argument)
            for argument in dict.fromkeys(arguments)
        }

    def __getitem__(self, argument):
        if argument not in self._results:
            self._results[argument] = self._pool.submit(self._function, argument)
        return self._results[argument].result()

    def wait(self, argument):
        """Waits until the function has returned, if it was started for the argument."""
        if argument in self._results:
            self._results[argument].result()

    def close(self):
        """Gives up what nobody has waited for."""
        self._pool.shutdown(cancel_futures=True)


def parameters(session, name):
    """Returns the values of a parameter over the tests that the session will run.

    None in a worker of pytest-xdist, which is told of its tests as it goes.
    """
    if hasattr(session.config, "workerinput"):
        return []
    specs = [getattr(item, "callspec", None) for item in session.items]
    return [spec.params[name] for spec in specs if spec and name in spec.params]
