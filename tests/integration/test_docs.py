"""Every code block of the documentation is run, in the order of its page, as a reader would run it.

The blocks of one page share one empty folder, a home of its own and no REDIS_URL. What a block is follows from the
words behind its fence, and words that are not listed here fail:

    python               a fresh interpreter runs it
    python file=app.py   it is written to that file, and has to compile; any other tag takes `file=` too
    sh                   a shell runs it, and stops at the first error
    console              lines after "$ " are run ("> " goes on with one); what stands below has to come out
    json, toml, yaml     has to be well-formed
    text, ini, ...       is only shown (see SHOWN)
    sh no-run: reason    is not run (also python and console); the reason is required

In console blocks "..." stands for anything, a line of it for any lines. `$ sharedcluster run ...` is started in the
background; at the end of its block it gets TERM and has to exit with 0. Ports 8000 to 8009 become free ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.redis_process import free_port

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "demo_app" / "README.md"})

RUN = {"python", "sh", "console"}
WELL_FORMED: dict[str, Callable[[str], object]] = {"json": json.loads, "toml": tomllib.loads, "yaml": yaml.safe_load}
SHOWN = {"text", "ini", "nginx", "dockerfile", "html", "js", "lua", "mermaid"}

FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
INFO = re.compile(r"(?P<tag>\w+)(?: file=(?P<file>[\w./-]+))?(?: no-run: *(?P<reason>\S.*))?")
DONE = "--done--"


@dataclass(frozen=True, slots=True)
class Block:
    """One code block; `place` is page and line, for the failure."""

    place: str
    tag: str
    file: str
    reason: str
    text: str


def read_blocks(page: str, name: str) -> Iterator[Block]:
    """The blocks of a page in order; what does not follow the conventions raises."""
    for match in FENCE.finditer(page):
        place = f"{name}:{page.count(chr(10), 0, match.start()) + 1}"
        info = INFO.fullmatch(match["info"].strip())
        if info is None:
            raise AssertionError(f"{place}: a tag is missing, or a reason for no-run: ```{match['info']}")
        tag, file, reason = info["tag"], info["file"] or "", info["reason"] or ""
        if tag not in RUN | SHOWN | WELL_FORMED.keys():
            raise AssertionError(f"{place}: unknown tag {tag}")
        yield Block(place, tag, file, reason, textwrap.dedent(match["text"]))


@dataclass(frozen=True, slots=True)
class Command:
    """A line after "$ " and what has to come out (None: whatever does)."""

    line: str
    expected: str | None
    is_server: bool


def read_console(text: str) -> list[Command]:
    """Take a console block apart."""
    commands: list[Command] = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        end = 1
        while end < len(lines) and (lines[end].startswith("> ") or lines[end - 1].endswith("\\")):
            end += 1
        line = "\n".join(text.removeprefix("> ") for text in lines[:end])
        expected = "\n".join(lines[end:]).strip() or None
        commands.append(Command(line, expected, line.startswith("sharedcluster run")))
    assert commands, 'a console block needs a line that starts with "$ "'
    return commands


def matches(expected: str, output: str) -> bool:
    """Compare, with "..." as a wildcard: within a line, or a line of its own for any number of lines."""
    pattern = ""
    for line in expected.splitlines():
        any_text = ".*".join(map(re.escape, line.rstrip().split("...")))
        pattern += r"(?:.*\n)*?" if line.strip() == "..." else any_text + r"\s*\n"
    return re.fullmatch(pattern, output.strip() + "\n") is not None


class Reader:
    """Somebody with an empty folder and a new shell who types what the page says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {str(port): str(free_port()) for port in range(8000, 8010)}
        (folder / "run").mkdir(mode=0o700)
        self.environ = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "PORT": self.ports["8000"],
            "LC_ALL": "C.UTF-8",
            "NO_COLOR": "1",
        }

    def read(self, page: str, name: str) -> None:
        """Follow a page from its first to its last block."""
        for block in read_blocks(page, name):
            self.do(block)

    def do(self, block: Block) -> None:
        """Run, write or check one block."""
        if block.file:
            path = self.folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        if block.tag in WELL_FORMED:
            WELL_FORMED[block.tag](block.text)
        elif block.tag == "python" and block.file:
            compile(block.text, block.place, "exec")
        elif block.tag in RUN and not block.reason:
            getattr(self, f"run_{block.tag}")(block)

    def run_python(self, block: Block) -> None:
        """In a fresh interpreter."""
        self._run([sys.executable, "-c", block.text], block)

    def run_sh(self, block: Block) -> None:
        """As a script."""
        self._run(["bash", "-e", "-o", "pipefail", "-c", self._with_free_ports(block.text)], block)

    def run_console(self, block: Block) -> None:
        """In one shell; each command has to succeed and to say what the page says it does."""
        commands = read_console(block.text)
        script = "\n".join([*map(self._as_shell, commands), *["stop_server"] * any(c.is_server for c in commands)])
        said = self._run(["bash", "-o", "pipefail", "-c", SERVERS + self._with_free_ports(script)], block)
        for command, output in zip(commands, said.split(DONE + "\n"), strict=False):
            if command.expected is not None:
                shown = self._with_usual_ports(output)
                assert matches(command.expected, shown), f"{block.place}: $ {command.line}\n{shown}"

    def _as_shell(self, command: Command) -> str:
        if command.is_server:
            port = next(iter(re.findall(r"\b800\d\b", command.line)), "8000")
            return f"start_server {port} {command.line}\necho {DONE}"
        return f"{{ {command.line}\n}} || exit\necho {DONE}"

    def _with_free_ports(self, text: str) -> str:
        return re.sub(r"\b800\d\b", lambda match: self.ports[match[0]], text)

    def _with_usual_ports(self, text: str) -> str:
        for usual, free in self.ports.items():
            text = re.sub(rf"\b{free}\b", usual, text)
        return text

    def _run(self, command: list[str], block: Block) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 0, f"{block.place} ended with {done.returncode}:\n{block.text}\n{done.stdout}"
        return done.stdout


SERVERS = """
servers=()
start_server() {  # port, command: in the background, until its port takes connections
    local port=$1; shift
    "$@" > server.log 2>&1 & servers+=($!)
    until (exec 3<> /dev/tcp/127.0.0.1/$port) 2> /dev/null; do
        kill -0 ${servers[-1]} 2> /dev/null || { cat server.log; exit 1; }
        sleep 0.1
    done
}
stop_server() {  # all of them, and each has to end well
    for pid in ${servers[@]}; do kill -TERM $pid 2> /dev/null; done
    for pid in ${servers[@]}; do wait $pid || { echo "the server ended with $?"; cat server.log; exit 1; }; done
    servers=()
}
trap 'for pid in ${servers[@]}; do kill -TERM $pid 2> /dev/null; wait $pid; done' EXIT
"""


@pytest.fixture
def reader() -> Iterator[Reader]:
    """A reader in a folder with a short path, because sockets are made in it."""
    folder = Path(tempfile.mkdtemp(prefix="sc-docs-"))
    yield Reader(folder)
    shutil.rmtree(folder)


@pytest.mark.timeout(150)  # a page starts several clusters, one after the other
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path, reader: Reader) -> None:
    """What a reader types from this page works, and says what the page says."""
    reader.read(page.read_text(), page.name)


# --- the harness itself: it has to fail where it should ---


@pytest.mark.parametrize("info", ["", "pyhton", "sh no-run", "sh no-run:", "python file=", "sh skip"])
def test_unknown_words_fail(info: str) -> None:
    """No tag, an unknown tag, an unknown word, and no-run without a reason are errors of the page."""
    with pytest.raises(AssertionError, match=r"page\.md:2"):
        list(read_blocks(f"text\n```{info}\ncontent\n```\n", "page.md"))


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("```python\nassert 1 == 2\n```", "ended with 1"),
        ("```sh\nfalse\ntrue\n```", "ended with 1"),
        ("```console\n$ false\n```", "ended with 1"),
        ("```console\n$ echo one\ntwo\n```", "echo one"),
        ("```console\n$ echo one\n$ echo two\nthree\n```", "echo two"),
        ("```console\njust output\n```", "needs a line"),
    ],
)
def test_what_does_not_work_fails(reader: Reader, block: str, complaint: str) -> None:
    """An exit code that is not 0, and output that is not what the page shows."""
    with pytest.raises(AssertionError, match=complaint):
        reader.read(block + "\n", "page.md")


@pytest.mark.parametrize("block", ["```json\n{,}\n```", "```toml\na=\n```", "```python file=a.py\nif\n```"])
def test_malformed_files_fail(reader: Reader, block: str) -> None:
    """Data that cannot be parsed and code that cannot be compiled."""
    with pytest.raises((ValueError, SyntaxError)):
        reader.read(block + "\n", "page.md")


def test_a_server_that_does_not_stop_well_fails(reader: Reader) -> None:
    """A server started by a page is reached on its free port, gets TERM at the end, and has to exit with 0."""
    program = reader.folder / "sharedcluster"
    program.write_text("#!/bin/sh\nexec python3 -m http.server --bind 127.0.0.1 $PORT\n")
    program.chmod(0o755)
    reader.environ["PATH"] = f"{reader.folder}:{reader.environ['PATH']}"
    page = "```console\n$ sharedcluster run app\n$ curl -sI http://127.0.0.1:8000/\nHTTP/1.0 200 OK\n...\n```\n"
    with pytest.raises(AssertionError, match="the server ended with 143"):
        reader.read(page, "page.md")


def test_blocks_of_a_page_build_on_each_other(reader: Reader) -> None:
    """A file one block writes is there for the next; variables live through a console block; "..." is anything."""
    page = """
    ```python file=greeting.py
    TEXT = "hello"
    ```
    ```python
    from greeting import TEXT
    assert TEXT == "hello"
    ```
    ```console
    $ name=world
    $ python -c "from greeting import TEXT
    > print(TEXT, '$name')"; seq 5
    hel... world
    1
    ...
    5
    ```
    ```sh no-run: there is nothing to see
    exit 1
    ```
    """
    reader.read(page, "page.md")
