"""`mmace label`: plan, run, collect and check DFT labels."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ase import Atoms
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..data import PARTS, Splits, check_groups, label_from_atoms, read_splits
from ..errors import LabelError
from ..files import refuse_inputs
from . import check
from .collecting import collect, earlier_labels, earlier_rejections
from .files import CHECKSUMS, check_checksums, read_checked, write_checksums, write_labels, write_text
from .gate import FAILED, find_duplicates, one_of_each_job
from .plan import check_name, read_plan, write_plan, write_splits
from .run import GPAW_VARIABLE, find_programs, job_key, run_plan
from .sampling import read_sampling

WORK = "labels-work"
SPREADS = ("energy", "forces", "magnetic_forces")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register `mmace label` and its actions."""
    parser = subparsers.add_parser("label", help="make DFT labels: plan, run, collect, check")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    plan = actions.add_parser("plan", help="expand a sampling file into a plan")
    plan.add_argument("sampling", help="sampling file (JSON): lattices, distortions, moments, recipe")
    plan.add_argument("-o", "--output", required=True, help="plan file to write")
    plan.set_defaults(run=_plan)

    splits = actions.add_parser("splits", help="write the splits by parent of several plans to one file")
    splits.add_argument("plans", nargs="+", help="plan files")
    splits.add_argument("--given", help="JSON file with the splits of parents that come with no plan")
    splits.add_argument("-o", "--output", required=True, help="JSON file to write")
    splits.set_defaults(run=_splits)

    propose = actions.add_parser("propose", help="plan what to label next: where the members of a committee disagree")
    propose.add_argument("labels", nargs="+", help="label files to start from (those of training parents are used)")
    propose.add_argument("--splits", required=True, help="JSON file with the parents of train, valid and test")
    propose.add_argument("--recipe", required=True, help="plan file whose recipe the new plan gets")
    propose.add_argument("--model", default="default", help="committee: shipped name or .json (default %(default)s)")
    propose.add_argument("--count", type=int, default=40, help="labels to propose (default %(default)s)")
    propose.add_argument("--candidates", type=int, default=400, help="structures to choose from (default %(default)s)")
    propose.add_argument("--per-parent", type=int, default=3, help="most proposals from one parent (%(default)s)")
    propose.add_argument("--max-atoms", type=int, default=8, help="largest structure (default %(default)s)")
    propose.add_argument(
        "--window", type=float, default=1.0, metavar="EV", help="largest energy above the lowest, eV/atom (%(default)s)"
    )
    propose.add_argument("--seed", type=int, default=0, help="of the random candidates (default %(default)s)")
    propose.add_argument("--threads", type=int, default=1, help="CPU threads; more seldom help (default %(default)s)")
    propose.add_argument("--report", help="JSON file for what was chosen and why")
    propose.add_argument("-o", "--output", required=True, help="plan file to write; its name names the plan")
    propose.set_defaults(run=_propose)

    run = actions.add_parser("run", help="run the jobs of a plan that have no result yet; stop and start at any time")
    _add_run_options(run)
    run.add_argument("--only", nargs="+", metavar="JOB", help="names of the jobs to run")
    run.add_argument(
        "--labels", nargs="+", default=[], metavar="FILE", help="label files: jobs that have their label there are kept"
    )
    run.add_argument("--report", help="report of an earlier `collect`: jobs rejected there are kept too")
    run.add_argument("--retry", action="store_true", help="run failed jobs again")
    run.set_defaults(run=_run)

    gather = actions.add_parser("collect", help="write the finished jobs that pass the quality gate as labels")
    gather.add_argument("plan", help="plan file")
    gather.add_argument("--work", default=WORK, help="folder of the runs (default %(default)s)")
    gather.add_argument(
        "-o",
        "--output",
        required=True,
        help="extended XYZ file, whose labels stay; SHA256SUMS beside it is renewed",
    )
    gather.add_argument("--report", help="JSON file for the counts of what was rejected and why")
    gather.set_defaults(run=_collect)

    verify = actions.add_parser("check", help="check and count label files: contract, checksums, duplicates")
    verify.add_argument("folder", help="folder with *.extxyz and SHA256SUMS, and the reports beside them")
    verify.add_argument(
        "--splits", help="JSON file with the parents of each part: count the parts, and keep them apart"
    )
    verify.set_defaults(run=_check)

    again = actions.add_parser("reproduce", help="label frames of a file again and compare")
    again.add_argument("labels", help="extended XYZ file with reference labels")
    again.add_argument("--names", nargs="+", required=True, help="names of the frames")
    _add_run_options(again)
    again.set_defaults(run=_reproduce)

    refine = actions.add_parser("refine", help="plan that runs jobs of a plan again on a finer mesh")
    refine.add_argument("plan", help="plan file")
    refine.add_argument("--jobs", nargs="+", required=True, metavar="JOB", help="names of the jobs")
    refine.add_argument("--k-spacing", type=float, required=True, help="largest spacing of the mesh, 1/Å")
    refine.add_argument("-o", "--output", required=True, help="plan file to write")
    refine.set_defaults(run=_refine)

    compare = actions.add_parser("compare", help="RMS differences between labels of the same names in two files")
    compare.add_argument("first", help="extended XYZ file")
    compare.add_argument("second", help="extended XYZ file")
    compare.set_defaults(run=_compare)

    slope = actions.add_parser(
        "differences", help="compare forces, stress and magnetic forces of one job with central differences of energies"
    )
    _add_run_options(slope)
    slope.add_argument("--job", required=True, help="name of a job of the plan")
    slope.set_defaults(run=_differences)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", help="plan file (its recipe is used)")
    parser.add_argument("--work", default=WORK, help="folder for the runs (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="jobs at once, one core each (default %(default)s)")
    parser.add_argument("--abinit", default="abinit", help="ABINIT program (default %(default)s)")
    parser.add_argument("--paw", help="folder with PAW data sets (default: $MMACE_PAW, then the gpaw_data package)")
    parser.add_argument("--gpaw-python", help=f"Python that has GPAW (default: ${GPAW_VARIABLE}, then this one)")
    parser.add_argument(
        "--limit", type=float, default=3600.0, help="seconds after which a job is given up (default %(default)g)"
    )
    parser.add_argument("--nice", type=int, default=10, help="lower the priority by this much (default %(default)s)")


def _plan(args: argparse.Namespace) -> int:
    refuse_inputs(args.output, [args.sampling])
    plan = read_sampling(args.sampling)
    write_plan(args.output, plan)
    splits = Counter(job.split for job in plan.jobs)
    print(f"{args.output}: {len(plan.jobs)} jobs ({', '.join(f'{n} {split}' for split, n in sorted(splits.items()))})")
    return 0


def _splits(args: argparse.Namespace) -> int:
    refuse_inputs(args.output, args.plans)
    given = read_splits(args.given) if args.given else None
    splits = write_splits(args.output, [read_plan(path) for path in args.plans], given)
    print(f"{args.output}: " + ", ".join(f"{len(getattr(splits, part))} {part}" for part in PARTS) + " parents")
    return 0


def _propose(args: argparse.Namespace) -> int:
    import torch  # takes seconds, which the other actions spare

    from .proposals import as_json, propose, read_models

    for name in ("count", "candidates", "per_parent", "max_atoms", "threads"):
        if getattr(args, name) < 1:
            raise LabelError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 1 or more")
    if args.window <= 0:
        raise LabelError(f"--window is {args.window:g}; it must be positive")
    check_name(f"{Path(args.output).stem}-0", f"the plan {args.output!r} names its jobs after itself")
    for output in (args.output, args.report):
        if output:
            refuse_inputs(output, [*args.labels, args.splits, args.recipe, args.model])
    torch.set_num_threads(args.threads)
    splits = read_splits(args.splits)
    frames = [atoms for path in args.labels for atoms in read_checked(path)]
    models = read_models(args.model)
    with Progress(TextColumn("candidates"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        bar = progress.add_task("", total=args.candidates)
        plan, chosen = propose(
            frames,
            splits.train,
            models,
            read_plan(args.recipe).recipe,
            Path(args.output).stem,
            args.count,
            args.candidates,
            args.per_parent,
            args.max_atoms,
            args.window,
            args.seed,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
    write_plan(args.output, plan)
    if args.report:
        write_text(args.report, as_json(chosen, plan))
    rows = [
        (job.name, c.parent, c.origin, *(f"{1e3 * (c.spread or {})[key]:.1f}" for key in SPREADS))
        for job, c in zip(plan.jobs, chosen, strict=True)
    ]
    _print_table(["job", "parent", "origin", "σ_E meV/atom", "σ_F meV/Å", "σ_m meV/µB"], rows)
    print(f"{args.output}: {len(plan.jobs)} jobs; run them with `mmace label run {args.output}`")
    return 0


def _run(args: argparse.Namespace) -> int:
    plan = read_plan(args.plan)
    names = {job.name for job in plan.jobs}
    for name in args.only or ():
        if name not in names:
            raise LabelError(f"the plan {args.plan!r} has no job {name!r}")
    programs = find_programs(plan, Path(args.work), args.abinit, args.paw, args.gpaw_python)
    _stand_back(args)
    finished = set(earlier_labels(plan, [atoms for path in args.labels for atoms in read_checked(path)]))
    if args.report:
        rejected = earlier_rejections(plan, _report(args.report))
        finished |= {name for name, reason in rejected.items() if not (args.retry and reason == FAILED)}
    counts = run_plan(plan, args.work, programs, _workers(args), args.retry, args.limit, args.only, finished)
    print(", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    return 0


def _collect(args: argparse.Namespace) -> int:
    plan, output = read_plan(args.plan), Path(args.output)
    if (output.parent / CHECKSUMS).is_file():
        check_checksums(output.parent, output.name)
    earlier = read_checked(output) if output.is_file() else []
    known = _report(args.report) if args.report and Path(args.report).is_file() else {"rejected": {}}
    frames, report = collect(plan, args.work, earlier, earlier_rejections(plan, known), _labels_beside(output))
    rejected = dict(sorted(report.rejected.items()))
    if args.report:
        own = {job_key(plan, job) for job in plan.jobs}
        others = {key: reason for key, reason in known.get("rejected_keys", {}).items() if key not in own}
        summary = {
            "plan": plan.name,
            "planned": len(plan.jobs),
            "accepted": report.accepted,
            "unfinished": report.unfinished,
            "rejected": rejected,
            "rejected_keys": others | report.rejected_keys,
        }
        write_text(args.report, json.dumps(summary, indent=1) + "\n")
    if not frames and rejected:
        reasons = "; ".join(f"{len(names)} {reason}" for reason, names in rejected.items())
        raise LabelError(f"no label of {plan.name!r} passed ({reasons}); there is nothing to write")
    if not frames:
        raise LabelError(f"no finished label of {plan.name!r} under {args.work!r}; run the plan first")
    write_labels(output, frames)
    write_checksums(output.parent)
    kept = f", and {report.kept} that it held before" if report.kept else ""
    print(f"{args.output}: {report.accepted} labels of the plan{kept}; {report.unfinished} jobs not finished")
    if report.stayed:
        print(f"run again without an answer, earlier label stays: {len(report.stayed)} ({', '.join(report.stayed)})")
    for reason, names in rejected.items():
        print(f"rejected, {reason}: {len(names)} ({', '.join(names)})")
    return 0


def _labels_beside(output: Path) -> list[Atoms]:
    """Labels of the other files in the folder of an output; what holds no labels is left out."""
    found: list[Atoms] = []
    for path in sorted(output.parent.glob("*.extxyz")):
        if path.name == output.name:
            continue
        try:
            found += read_checked(path)
        except LabelError as error:
            print(f"{path.name} is left out of the search for duplicates: {error}")
    return found


def _report(path: str) -> dict[str, Any]:
    try:
        report = json.loads(Path(path).read_text())
        if not isinstance(report["rejected"], dict) or not isinstance(report.get("rejected_keys", {}), dict):
            raise TypeError
        return dict(report)
    except OSError as error:
        raise LabelError(f"cannot read the report {path!r}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise LabelError(f"{path!r} is no report of `mmace label collect --report`") from None


def _check(args: argparse.Namespace) -> int:
    splits = read_splits(args.splits) if args.splits else None
    folder, places, frames = Path(args.folder), [], []
    for name in check_checksums(folder):
        found = read_checked(folder / name)
        print(f"{name}: {_counts(folder / name, found, splits)}")
        places += [name] * len(found)
        frames += found
    check_groups(label_from_atoms(atoms, str(atoms.info["name"])) for atoms in frames)
    leaks = []
    for one, other in find_duplicates(frames):
        what = " and ".join(f"{frames[k].info['name']} of {places[k]}" for k in (one, other))
        print(f"equal: {what}")
        if splits and {_part(frames[k], splits) for k in (one, other)} == {"train", "test"}:
            leaks.append(what)
    if leaks:
        raise LabelError(f"a label for testing is also trained on: {leaks[0]}; move the parent of one, or drop it")
    return 0


def _counts(path: Path, frames: Sequence[Atoms], splits: Splits | None) -> str:
    """Labels, parents and jobs of a file in words, by part where the splits are known."""
    jobs = len(one_of_each_job(frames))
    words = [f"{len(frames)} labels of {jobs} jobs, {len({atoms.info['parent'] for atoms in frames})} parents"]
    if splits:
        parts = Counter(_part(atoms, splits) for atoms in frames)
        words.append(f"{' / '.join(str(parts[part]) for part in PARTS)} in {' / '.join(PARTS)}")
    path = path.with_name(f"{path.stem}.report.json")
    if path.is_file():
        report = _report(str(path))
        rejected = {reason: len(names) for reason, names in report["rejected"].items()}
        planned = report.get("planned", jobs + report["unfinished"] + sum(rejected.values()))
        words.append(f"planned {planned}, finished {planned - report['unfinished']}")
        words += [f"rejected {', '.join(f'{n} {reason}' for reason, n in rejected.items())}"] if rejected else []
    return "; ".join(words)


def _part(atoms: Atoms, splits: Splits) -> str:
    return splits.part_of(label_from_atoms(atoms, str(atoms.info["name"])))


def _reproduce(args: argparse.Namespace) -> int:
    plan = check.reproduction_plan(read_plan(args.plan), read_checked(args.labels), args.names)
    programs = find_programs(plan, Path(args.work), args.abinit, args.paw, args.gpaw_python)
    _stand_back(args)
    run_plan(plan, args.work, programs, _workers(args), limit_s=args.limit)
    rows = check.compare_reproduction(plan, args.work, read_checked(args.labels))
    _print_table(["frame", "ΔE meV/atom", "max ΔF meV/Å", "max Δσ GPa", "max ΔF_m meV/µB"], rows)
    return 0


def _refine(args: argparse.Namespace) -> int:
    if args.k_spacing <= 0:
        raise LabelError(f"--k-spacing is {args.k_spacing}; it must be above 0")
    refuse_inputs(args.output, [args.plan])
    plan = check.refined_plan(read_plan(args.plan), args.jobs, args.k_spacing)
    write_plan(args.output, plan)
    print(f"{args.output}: {len(plan.jobs)} jobs")
    return 0


def _compare(args: argparse.Namespace) -> int:
    rows = check.compare_labels(read_checked(args.first), read_checked(args.second))
    _print_table(["quantity", "values", "RMS", "largest", "unit"], rows)
    return 0


def _differences(args: argparse.Namespace) -> int:
    base = read_plan(args.plan)
    plan = check.difference_plan(base, args.job)
    programs = find_programs(plan, Path(args.work), args.abinit, args.paw, args.gpaw_python)
    _stand_back(args)
    run_plan(plan, args.work, programs, _workers(args), limit_s=args.limit)
    _print_table(["derivative", "label", "difference", "unit"], check.compare_differences(plan, args.work))
    return 0


def _stand_back(args: argparse.Namespace) -> None:
    """Lower the priority, and end with all programs that were started when the command is ended."""
    if not 0 < args.limit < math.inf:
        raise LabelError(f"--limit is {args.limit:g}; it must be a number of seconds above 0")
    os.nice(args.nice)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


def _workers(args: argparse.Namespace) -> int:
    if args.workers < 1:
        raise LabelError(f"--workers is {args.workers}; it must be 1 or more")
    return int(args.workers)


def _print_table(columns: list[str], rows: list[tuple[str, ...]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
