"""Runs scripts one after the other, each in a process forked from one without hf_gradnas.

``python -I forked.py SCRIPT ARGUMENTS... -- SCRIPT ARGUMENTS...``. Torch and Transformers are
imported once, by the parent, which computes nothing. A script after ``alone`` gets a new process,
not isolated, in which nothing is imported. The first that fails ends the rest.
"""

import gc
import os
import runpy
import subprocess
import sys
import traceback


def forked(script: str, *arguments: str) -> int:
    """Run a script in a fork; its exit code."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        sys.argv[:] = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Run all scripts."""
    import transformers.generation
    import transformers.modeling_utils  # noqa: F401 - what every model imports

    gc.freeze()  # as in conftest
    assert not any(name.startswith("hf_gradnas") for name in sys.modules)
    steps = [[]]
    for word in sys.argv[1:]:
        steps.append([]) if word == "--" else steps[-1].append(word)
    for step in steps:
        if step[0] == "alone":
            code = subprocess.run([sys.executable, *step[1:]], check=False).returncode
        else:
            code = forked(*step)
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
