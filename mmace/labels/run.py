"""Runs the jobs of a plan: resumable at any time, several at once, one folder for each job."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import LabelError, MissingProgramError
from ..locks import sole_use
from . import abinit, gpaw_soc
from .files import write_text
from .plan import Job, Plan

RESULT = "result.json"
GPAW_VARIABLE = "MMACE_GPAW_PYTHON"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ENDED = (*(-number for number in SIGNALS), *(128 + number for number in SIGNALS))  # of a program, of a shell around it


@dataclass(frozen=True)
class Programs:
    """Programs and data sets of an engine, found before the first job starts.

    Attributes
    ----------
    command : tuple of str
        ABINIT's program, or the Python that has GPAW.
    datasets : Path
        Folder with the PAW data sets.
    """

    command: tuple[str, ...]
    datasets: Path


def find_programs(
    plan: Plan, work: Path, abinit_command: str = "abinit", paw: str | None = None, gpaw_python: str | None = None
) -> Programs:
    """Find what a plan needs.

    Raises
    ------
    MissingProgramError
        Says which program or data set is missing and how to get it.
    """
    if plan.recipe.engine == "abinit":
        elements = [symbol for job in plan.jobs for symbol in job.symbols]
        program = abinit.find_program(abinit_command)
        return Programs((program,), abinit.find_datasets(elements, paw, work.resolve() / "paw"))
    python = gpaw_python or os.environ.get(GPAW_VARIABLE) or sys.executable
    try:
        probe = subprocess.run([python, "-c", "import gpaw.spinorbit"], capture_output=True, check=False)
        missing = probe.returncode != 0
    except OSError:
        missing = True
    if missing:
        raise MissingProgramError(
            f"the Python {python!r} has no GPAW: `pip install gpaw gpaw-data` (it compiles against libxc, BLAS and "
            f"MPI), and name the Python that has it with --gpaw-python or the variable {GPAW_VARIABLE}"
        )
    python = os.path.abspath(shutil.which(python) or python)
    return Programs((python, str(Path(gpaw_soc.__file__).resolve())), Path())


def run_plan(
    plan: Plan,
    work: str | Path,
    programs: Programs,
    workers: int = 1,
    retry: bool = False,
    limit_s: float = 3600.0,
    only: Sequence[str] | None = None,
    finished: Collection[str] = (),
    console: Console | None = None,
) -> dict[str, int]:
    """Run the jobs of a plan that have no result yet, in the order of the plan.

    A result appears under its final name when it is whole, so a run that was killed loses the jobs in flight and
    nothing else. Several runs may share a folder: each job is locked while it runs.

    Parameters
    ----------
    plan : Plan
    work : path
        Holds one folder for each job.
    programs : Programs
    workers : int
        Jobs at once, each on one core.
    retry : bool
        Run jobs again whose result says that they failed.
    limit_s : float
        Wall time after which a job is given up, seconds.
    only : sequence of str, optional
        Names of the jobs to run.
    finished : collection of str
        Names of jobs that need no run: their labels were collected before.
    console : rich Console, optional

    Returns
    -------
    dict
        Number of jobs by outcome: `done`, `failed`, `kept` (had a result or label before), `busy` (elsewhere).
    """
    work = Path(work)
    jobs = [job for job in plan.jobs if only is None or job.name in only]
    counts = dict.fromkeys(("done", "failed", "kept", "busy"), 0)
    counts["kept"] = sum(job.name in finished for job in jobs)
    jobs = [job for job in jobs if job.name not in finished]
    guard, stop = threading.Lock(), threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(plan.name, total=len(jobs))

        def one(job: Job) -> None:
            if stop.is_set():
                return
            outcome = _run_job(plan, job, work, programs, retry, limit_s, stop)
            with guard:
                counts[outcome] += 1
                progress.update(bar, advance=1, description=f"{plan.name}: {job.name} {outcome}")

        with ThreadPoolExecutor(workers) as pool:
            try:
                for future in [pool.submit(one, job) for job in jobs]:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return counts


def job_key(plan: Plan, job: Job) -> str:
    """Hash of everything that decides a job's result, so that a changed plan never reuses an old one."""
    structure = (job.symbols, job.cell, job.scaled_positions, job.moments)
    content = [*structure, plan.recipe.engine, plan.recipe.carriers, plan.settings(job)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_result(plan: Plan, job: Job, work: str | Path) -> dict[str, Any] | None:
    """Result of a job, or None where it has none yet (or one of an older plan)."""
    try:
        result = json.loads((Path(work) / plan.name / job.name / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("key") == job_key(plan, job) else None


def _run_job(
    plan: Plan, job: Job, work: Path, programs: Programs, retry: bool, limit_s: float, stop: threading.Event
) -> str:
    folder = work / plan.name / job.name
    folder.mkdir(parents=True, exist_ok=True)
    with sole_use(folder / "lock") as mine:
        if not mine:
            return "busy"
        known = read_result(plan, job, work)
        if known is not None and not (retry and "failed" in known):
            return "kept"
        scratch = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
        start = time.monotonic()
        try:
            compute = _run_abinit if plan.recipe.engine == "abinit" else _run_gpaw
            result = compute(plan, job, scratch, folder, programs, lambda args: _call(args, scratch, limit_s, stop))
        except (LabelError, subprocess.TimeoutExpired) as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            result = {"failed": f"no result within {limit_s:.0f} s" if late else str(error)}
            if (scratch / "log").is_file():
                shutil.copy(scratch / "log", folder / "log")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        result |= {"key": job_key(plan, job), "seconds": round(time.monotonic() - start, 1)}
        write_text(folder / RESULT, json.dumps(result))
    return "failed" if "failed" in result else "done"


def _call(args: Sequence[str], folder: Path, limit_s: float, stop: threading.Event) -> None:
    """Run a program in a folder on one core; end it when the time is up or the run is stopped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        try:
            process = subprocess.Popen(
                args, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        except OSError as error:
            raise MissingProgramError(
                f"{args[0]} cannot be started ({error.strerror}); a script needs its first line, such as #!/bin/sh"
            ) from None
        deadline = time.monotonic() + limit_s
        try:
            while process.poll() is None:
                if stop.is_set():
                    raise KeyboardInterrupt
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired(list(args), limit_s)
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            # the program may be a script that started others
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # a program that somebody ended says nothing about its job
    if process.returncode in ENDED:
        raise KeyboardInterrupt


def _run_abinit(
    plan: Plan, job: Job, scratch: Path, folder: Path, programs: Programs, call: Callable[[list[str]], None]
) -> dict[str, Any]:
    text = abinit.write_input(job, plan.settings(job), plan.recipe.carriers, programs.datasets)
    (scratch / "job.abi").write_text(text)
    call([*programs.command, "job.abi"])
    output = scratch / abinit.OUTPUT
    if not output.is_file():
        raise LabelError("ABINIT wrote no output: " + _last_words(scratch / "log"))
    shutil.copy(output, folder / abinit.OUTPUT)
    return abinit.parse_output(output.read_text(), len(job.symbols))


def _run_gpaw(
    plan: Plan, job: Job, scratch: Path, folder: Path, programs: Programs, call: Callable[[list[str]], None]
) -> dict[str, Any]:
    settings = plan.settings(job)
    task = {
        "symbols": job.symbols,
        "cell": job.cell,
        "scaled_positions": job.scaled_positions,
        "moments": [moment[2] for moment in job.moments],
        **settings,
    }
    (scratch / "job.json").write_text(json.dumps(task))
    call([*programs.command, "job.json", RESULT])
    if not (scratch / RESULT).is_file():
        raise LabelError("GPAW wrote no result: " + _last_words(scratch / "log"))
    result: dict[str, Any] = json.loads((scratch / RESULT).read_text())
    if not np.isfinite(result["soc_energies"]).all():
        raise LabelError("GPAW gave energies that are not finite")
    return result


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "its log is empty"
