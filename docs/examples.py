"""Run the examples on the pages and put what they print there.

`python docs/examples.py [--jobs N] [--all] [WORD ...]` runs the commands of fenced blocks that begin with
`$ mmace-props`, from the top of the repository, and replaces what follows the command by what it prints. Blocks that
the shipped model printed are left alone without `--all`, so a run that was stopped goes on; WORDs choose commands
that contain one of them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from rich.progress import Progress

from mmace.calculator import MMACECalculator
from mmace.files import whole_file

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "properties"
WORK = ROOT / ".examples"
BLOCK = re.compile(r"```\n\$ (mmace-props (?:[^\n]*\\\n)*[^\n]*)\n(.*?)```\n", re.DOTALL)
PASSING = ("wrote ", "restart ")


@dataclass(frozen=True)
class Example:
    """A command on a page, as it stands there, and what the page says it prints."""

    page: Path
    command: str
    output: str

    @property
    def arguments(self) -> list[str]:
        """Arguments of `mmace-props`."""
        return shlex.split(self.command.replace("\\\n", " "))[1:]

    @property
    def model(self) -> str:
        """What `--model` names."""
        words = self.arguments
        return words[words.index("--model") + 1] if "--model" in words else "default"


def examples() -> list[Example]:
    """Examples of all pages in their order."""
    return [
        Example(page, *match.groups())
        for page in sorted(PAGES.glob("*.md"))
        for match in BLOCK.finditer(page.read_text())
    ]


def is_current(example: Example) -> bool:
    """Whether the model as it is now printed the block."""
    return model_hash(example.model)[:16] in example.output


@cache
def model_hash(model: str) -> str:
    """Hash of a model's weights, of a shipped name or a path below the top of the repository."""
    path = ROOT / model
    return str(MMACECalculator(path if path.exists() else model, soc=False).provenance()["hash"])


def run(example: Example) -> str:
    """Run a command and return what a page shows of it; its dataset goes to `.examples`, where a stopped run goes on.

    Raises
    ------
    RuntimeError
        The command failed; holds what it said.
    """
    WORK.mkdir(exist_ok=True)
    dataset = WORK / f"{sha256(example.command.encode()).hexdigest()[:12]}.nc"
    code = "import sys; from mmace_props.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *example.arguments, "-o", str(dataset)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{example.command}\n{done.stderr.strip()}")
    lines = [line.rstrip() for line in done.stdout.splitlines() if not line.startswith(PASSING)]
    return "\n".join(lines) + "\n"


def put(example: Example, output: str) -> None:
    """Replace what an example prints on its page."""
    with whole_file(example.page) as temporary:
        text = example.page.read_text()
        old = f"```\n$ {example.command}\n{example.output}```\n"
        Path(temporary).write_text(text.replace(old, f"```\n$ {example.command}\n{output}```\n", 1))


def main() -> int:
    """Bring the examples up to date; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="run commands alone that contain one of these")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="commands at a time (default %(default)s)")
    parser.add_argument("--all", action="store_true", help="run those too that the shipped model printed")
    args = parser.parse_args()
    due = [e for e in examples() if not args.words or any(word in e.command for word in args.words)]
    due = [e for e in due if args.all or not is_current(e)]
    failed = 0
    with Progress() as progress, ThreadPoolExecutor(args.jobs) as pool:
        task = progress.add_task("examples", total=len(due))
        running = {pool.submit(run, example): example for example in due}
        for future in as_completed(running):
            try:
                put(running[future], future.result())
            except RuntimeError as error:
                failed += 1
                progress.console.print(str(error), markup=False)
            progress.advance(task)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
