"""Coverage-guided fuzzing of our readers with atheris: nothing but a UserError, no hang over 5 s, no memory over 1 GB.

make fuzz                                                # all kinds, a minute each; installs atheris
python tests/faults/fuzz.py --kind VOC --seconds 600     # one kind; stops at the first finding
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
MEGABYTES = 1024 + 512  # imports included


def main() -> None:
    """Fuzz one kind in this process, or all of them, each in one of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", help="as fuzz_kinds.KINDS calls it")
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.kind is not None:
        fuzz(arguments.kind, arguments.seconds)
        return
    from fuzz_kinds import KINDS

    failed = []
    for kind in KINDS:
        line = [sys.executable, __file__, "--kind", kind, "--seconds", str(arguments.seconds)]
        done = subprocess.run(line, check=False, capture_output=True, text=True)
        print(f"{kind}: {'held' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            failed.append(kind)
            print(done.stdout[-3000:], done.stderr[-3000:])
    sys.exit(bool(failed))


def fuzz(kind: str, seconds: int) -> None:
    """Feed what atheris makes of a sound file to its reader; atheris ends the process."""
    with atheris.instrument_imports(include=["tailseg"]):
        from fuzz_kinds import KINDS
        from test_fuzz import check

    folder = Path(tempfile.mkdtemp())
    make, use = KINDS[kind]
    (folder / "set").mkdir()
    path = make(folder / "set")
    seeds = folder / "seeds"
    seeds.mkdir()
    (seeds / "sound").write_bytes(path.read_bytes())

    def try_one(data: bytes) -> None:
        check(path, data, use, [])

    limits = [f"-max_total_time={seconds}", "-timeout=5", f"-rss_limit_mb={MEGABYTES}", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *limits, str(seeds)], try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
