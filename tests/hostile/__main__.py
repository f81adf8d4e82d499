"""`python -m tests.hostile [READER ...] [--minutes 30] [--first N] [--inputs N]`: what `make soak` runs.

Prints for each reader how many inputs it was given and how many answers were wrong, crashed, hung or above memory; exit code 1
if there was any.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.hostile.harness import READERS, run


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.hostile", description=__doc__)
    parser.add_argument("readers", nargs="*", default=[*READERS], metavar="READER", help=f"of {', '.join(READERS)}")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all of it")
    parser.add_argument("--first", type=int, help="number of the attempt to begin at: alone, that one is made again")
    parser.add_argument("--inputs", type=int, help="of each reader, instead of the soak's")
    options = parser.parse_args()
    if unknown := [name for name in options.readers if name not in READERS]:
        parser.error(f"expected readers of {', '.join(READERS)}, got {', '.join(unknown)}")
    end, wrong = time.monotonic() + 60 * options.minutes, 0
    for place, name in enumerate(options.readers):
        per, inputs, _ = READERS[name]
        inputs = options.inputs or (per if options.first is not None else inputs)
        share = (end - time.monotonic()) / (len(options.readers) - place)
        found = run(name, options.first or 0, inputs, time.monotonic() + (share if name != "strings" else 3 * share))
        wrong += len(found.faults)
        print(found, flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
