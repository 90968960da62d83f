"""A subject that could ask the oracle would prove nothing: its process may neither import nor read the answers."""

import os
import sys

import moe_ref

ORACLE_SIDE = ("moe_ref.oracle", "moe_ref.verify.measure", "moe_ref.verify.bounds", "moe_ref.verify.judge")


def refuse_oracle() -> None:
    """For good: an audit hook cannot be removed, whatever becomes of sys.meta_path and importlib.

    It sees this process and its forks; what native code or another interpreter opens it does not see.
    """
    # Names of its own: those of a module are a subject's to replace.
    real_path, decode, separator, modules = os.path.realpath, os.fsdecode, os.sep, ORACLE_SIDE
    root = os.path.dirname(moe_ref.__file__)
    starts = {real_path(os.path.join(root, *name.split(".")[1:])) + end: name
              for name in modules for end in (separator, ".")}

    def refuse(event: str, arguments: tuple) -> None:
        if event == "import":
            name = arguments[0]
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = real_path(decode(arguments[0])).replace(f"{separator}__pycache__", "")
            name = next((name for start, name in starts.items() if path.startswith(start)), "")
        else:
            return
        for module in modules:
            if name == module or name.startswith(module + "."):
                raise ImportError(f"{module} may not be imported or read by an implementation under test")

    sys.addaudithook(refuse)
