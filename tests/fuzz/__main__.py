"""`python -m tests.fuzz TARGET`: coverage-guided fuzzing with atheris (`.[fuzz]`), from `seeds` on.

Rules: the only place that knows atheris; no test needs it. What it finds becomes a case of `test_targets`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

FOLDER = Path("build/fuzz")


def main() -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: pip install -e '.[test,fuzz]'")
    with atheris.instrument_imports(include=["gdbstub", "probes"]):
        from tests.fuzz.seeds import commands, conversations, streams, words
        from tests.fuzz.targets import TARGETS
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz",
        description=f"Fuzz until something is found, whose input is then in {FOLDER}/TARGET-*.",
        epilog="What follows -- is for libFuzzer (-help=1 lists it); an input's file there is run alone.",
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600, help="how long, at the most (default: 600; 0: no end)")
    parser.add_argument("libfuzzer", nargs="*", metavar="-- OPTION")
    given = parser.parse_args()
    corpus = FOLDER / given.target
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = {"codec": streams, "monitor": commands}.get(given.target, conversations)
    for index, seed in enumerate(seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)
    dictionary = FOLDER / "words"
    dictionary.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in words()))
    options = [
        f"-max_total_time={given.seconds}",
        f"-dict={dictionary}",
        f"-artifact_prefix={corpus}-",
        "-max_len=2048",
        "-timeout=20",
    ]
    inputs = given.libfuzzer or [str(corpus)]
    atheris.Setup([sys.argv[0], *options, *inputs], TARGETS[given.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
