"""The command: `python -m benchmarks install|run|report|micro`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks import HOME, RESULTS, ROOT
from benchmarks.install import install

LATEST: Final = RESULTS / "latest.json"
PREVIOUS: Final = RESULTS / "previous.json"
UNDER_WAY: Final = HOME / "under-way.json"
"""A whole run, until it is done: one that is interrupted takes nothing from the results that are kept."""
QUICK: Final = HOME / "quick.json"
SHOWN_IN: Final = (ROOT / "docs" / "performance.md", ROOT / "README.md")
"""Pages into which a report writes its tables, between `<!-- results: NAME -->` and `<!-- end of results -->`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="make .bench/ with the peers")
    run = commands.add_parser("run", help="measure, and write results and report")
    run.add_argument("--quick", action="store_true", help="only what has a bar, in few rounds; under 3 minutes")
    run.add_argument("--row", action="append", default=[], metavar="TEXT", help="only rows whose name has this in it")
    run.add_argument("--work", action="store_true", help="only CPU per request: not reloads, memory, scaling ...")
    run.add_argument("--peer", action="append", default=[], help="only this server beside ours; repeatable")
    run.add_argument("--seconds", type=float, default=1.0, help="of one turn [1]")
    run.add_argument("--rounds", type=int, default=9, help="turns of each server that a bar is set against [9]")
    run.add_argument("--others", type=int, default=2, help="turns of each other server [2]")
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
    is_whole = not (chosen.quick or chosen.row or chosen.peer or chosen.work)
    path = QUICK if chosen.quick else UNDER_WAY if is_whole else LATEST
    scale = Scale(1.0, 3, 0) if chosen.quick else Scale(chosen.seconds, chosen.rounds, chosen.others)
    results = Results() if chosen.quick or is_whole else Results.load(path)
    results.environment, results.left_out = environment.describe(), left_out()
    only = ("sharedcluster", *chosen.peer) if chosen.peer else ()
    begun = time.monotonic()
    redis = Redis().start()
    try:
        for name in rows.wanted(quick=chosen.quick, work=chosen.work, texts=chosen.row):
            sys.stderr.write(f"{time.monotonic() - begun:5.0f} s  {name} ")
            code = code_state.current()
            results.add(rows.measure(name, scale, redis, only, quick=chosen.quick), scale, code)
            results.environment |= environment.seen_since(results.environment, time.monotonic() - begun)
            results.save(path)
    finally:
        redis.stop()
    if is_whole:
        if LATEST.exists():
            LATEST.replace(PREVIOUS)  # the table before this one is kept, to see how far two runs differ
        path = path.replace(LATEST)
    report(path, PREVIOUS)


def report(path: Path, previous: Path) -> None:
    """Write the Markdown page and the plots that belong to a file of results; print the bars."""
    from benchmarks import code_state, markdown, plots, table, twice
    from benchmarks.results import Results

    results, now = Results.load(path), code_state.current()
    page = path.with_suffix(".md")
    if path == LATEST:
        before = Results.load(previous)
        page.write_text(table.document(results, now, before))
        plots.write_all(results, RESULTS)
        blocks = table.blocks(results, now, before)
        for shown in SHOWN_IN:
            if shown.exists():
                shown.write_text(markdown.insert(shown.read_text(), blocks))
        print("\n".join([*twice.bars(results, before), ""]))
    else:
        page.write_text(table.document(results, now))
    print("\n".join(table.bars(results, now)))
    print(f"\nthe whole table: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
