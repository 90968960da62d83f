"""The process of one lane: a combination as a line of JSON in, its resources as one out. Started by lanes.py."""

import json
import os
import sys
from dataclasses import asdict

from moe_fast.compile.combinations import Combination
from moe_fast.compile.resources import compile_one


def main() -> None:
    # Compiler and tools may print; answers keep the standard output to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        document = json.loads(line)
        pairs = {name: tuple(map(tuple, value)) for name, value in document.items() if isinstance(value, list)}
        answers.write(json.dumps(asdict(compile_one(Combination(**document | pairs)))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
