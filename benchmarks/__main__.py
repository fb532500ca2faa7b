"""The command: `python -m benchmarks install|run|report|micro`."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import HOME, RESULTS, ROOT
from benchmarks.install import install

QUICK_PEERS: Final = ("sharedcluster", "gunicorn gevent", "granian", "bjoern", "node cluster")
LATEST: Final = RESULTS / "latest.json"
PREVIOUS: Final = RESULTS / "previous.json"
QUICK: Final = HOME / "quick.json"
SHOWN_IN: Final = (ROOT / "docs" / "performance.md", ROOT / "README.md")
"""Pages into which a report writes its tables, between `<!-- results: NAME -->` and `<!-- end of results -->`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="make .bench/ with the peers")
    run = commands.add_parser("run", help="measure, and write results and report")
    run.add_argument("--quick", action="store_true", help="rows with a bar only, short turns; under 3 minutes")
    run.add_argument("--row", action="append", default=[], metavar="TEXT", help="only rows whose name has this in it")
    run.add_argument("--work", action="store_true", help="only CPU per request: not reloads, memory, scaling ...")
    run.add_argument("--peer", action="append", default=[], help="only this server beside ours; repeatable")
    run.add_argument("--seconds", type=float, default=2.0, help="of one turn [2]")
    run.add_argument("--rounds", type=int, default=5, help="turns of each server [5]")
    commands.add_parser("report", help="write the page and the plots from the kept results again")
    micro = commands.add_parser("micro", help="instruction counts of the hot paths, against those kept")
    micro.add_argument("--keep", action="store_true", help="keep these counts as the release's")
    chosen = parser.parse_args(arguments)
    if chosen.command == "install":
        install()
    elif chosen.command == "run":
        _run(chosen)
    elif chosen.command == "report":
        report(LATEST, PREVIOUS)
    else:
        from benchmarks.micro import counting

        sys.exit(counting.run(keep=chosen.keep))


def _run(chosen: argparse.Namespace) -> None:
    from benchmarks import code_state, environment, limits, rows
    from benchmarks.install import left_out
    from benchmarks.results import Results
    from benchmarks.rounds import Scale
    from benchmarks.servers import Redis

    limits.raise_open_files()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that no server is left behind
    path = QUICK if chosen.quick else LATEST
    scale = Scale(1.0, 2) if chosen.quick else Scale(chosen.seconds, chosen.rounds)
    is_whole = not (chosen.quick or chosen.row or chosen.peer)
    if is_whole and path.exists():
        shutil.copy(path, PREVIOUS)  # the table before this one is kept, to see how far two runs differ
    results = Results() if chosen.quick else Results.load(path)
    results.environment, results.left_out = environment.describe(), left_out()
    only = ("sharedcluster", *chosen.peer) if chosen.peer else QUICK_PEERS if chosen.quick else ()
    begun = time.monotonic()
    redis = Redis().start()
    try:
        for name in rows.wanted(quick=chosen.quick, work=chosen.work, texts=chosen.row):
            sys.stderr.write(f"{time.monotonic() - begun:5.0f} s  {name} ")
            code = code_state.current()
            results.add(rows.measure(name, scale, redis, only, quick=chosen.quick), scale, code)
            results.save(path)
    finally:
        redis.stop()
    report(path, PREVIOUS)


def report(path: Path, previous: Path) -> None:
    """Write the Markdown page and the plots that belong to a file of results; print the bars."""
    from benchmarks import capacity, code_state, plots, table
    from benchmarks.results import Results

    results, now = Results.load(path), code_state.current()
    before = Results.load(previous) if path == LATEST else None
    page = path.with_suffix(".md")
    page.write_text(table.document(results, now, before))
    if path == LATEST:
        for entry in results.entries.values():
            if entry.kind == "work" and entry.servers:
                (RESULTS / f"{slug(entry.name)}.svg").write_text(plots.cpu_per_request(entry))
        blocks = {"bars": table.bars(results, now), "capacity": capacity.section(results)}
        for shown in SHOWN_IN:
            if shown.exists():
                shown.write_text(table.insert(shown.read_text(), blocks))
        (RESULTS / "scaling.svg").write_text(plots.scaling(list(results.entries.values())))
    print("\n".join(table.bars(results, now)))
    print(f"\nthe whole table: {page.relative_to(ROOT)}")


def slug(name: str) -> str:
    """A file's name from a row's: letters, digits and hyphens."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words)


if __name__ == "__main__":
    main()
