"""Takes the working folder off the import path of ``python -m hf_gradnas…``.

Python puts it there first, so that a file ``json.py`` in a folder of downloads would be run. This
is imported before everything else, and imports nothing itself that is not built in.
"""

import sys


def leave_working_folder(package: str, file: str) -> None:
    """Take the working folder off ``sys.path`` where Python put it for this package.

    Nothing is done in a process that was started otherwise. A checkout that is used from its own
    folder stays on the path, as the last entry, for processes that the libraries start.

    Args:
        package: Name of the package.
        file: Of its ``__init__``.
    """
    # While a package of the module that -m names is imported, argv begins with "-m".
    named = {argument.removeprefix("-m").partition(".")[0] for argument in sys.orig_argv}
    is_safe = bool(sys.flags.isolated) or (sys.version_info >= (3, 11) and sys.flags.safe_path)
    if sys.argv[:1] != ["-m"] or package not in named or is_safe:
        return
    folder = sys.path.pop(0)
    inside = file[len(folder) :].replace("\\", "/") if file.startswith(folder) else ""
    if inside == f"/{package}/__init__.py":
        sys.path.append(folder)
