"""What hostile files, faults and a second process do to ``granq``. Counts, and 0 where 0 is promised.

    python -m benchmarks.robustness [--mutations 100] [--faults 3] [--seed 0] [--only files|faults|determinism]

- files: every file that the command reads, mutated (:mod:`benchmarks.mutations`), is given to the command that reads it; the
  outcome must be one line of error or a correct read; memory is the growth of the process's peak beyond its use before.
- faults: signals and the like at random moments (:mod:`benchmarks.faults`); then every file must be whole, and the same command,
  with ``--resume`` where there is one, must leave what an uninterrupted one leaves, bit for bit.
- determinism: the same command in two processes, on one thread and on two.

Writes ``benchmarks/results/robustness_{files,faults,determinism}.csv``, row by row, and at the end the table in docs/results.md;
exit code 1 if anything is found. What was found is told on stderr, and its file kept with --keep DIR.
"""

import os
import platform
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from benchmarks import faults as injected
from benchmarks.hostile import Prey, formats, judge, place, tries
from benchmarks.readme import replace_table
from benchmarks.rows import read, write

RESULTS = Path(__file__).parent / "results"
MARKER = "robustness: written by python -m benchmarks.robustness"
FILES = ("file", "read_by", "tried", "errors", "reads", "other", "memory_mb", "seed")
FAULTS = ("fault", "command", "tried", "stopped", "lost", "identical", "other", "how", "seed")
DETERMINISM = ("command", "threads", "processes", "equal", "equal_to_one_thread")
PARTS = ("files", "faults", "determinism")


def try_files(folder: Path, count: int, seed: int, keep: Path | None) -> None:
    """A row per format."""
    rows, prey = [], Prey(folder)
    for of in formats(folder):
        outcomes, memory, tried = Counter(), 0, max(1, round(count * of.share))
        place(of, folder, of.data)
        valid = judge(prey.run(of.command), of) if of.is_read else "read"
        if valid != "read":
            raise RuntimeError(f"{of.name}: the valid file is not read: {valid}")
        start = time.perf_counter()
        for i, (mutation, data) in enumerate(tries(of, tried, seed)):
            place(of, folder, data)
            outcome = prey.run(of.command)
            found = judge(outcome, of)
            outcomes[found] += 1
            memory = max(memory, outcome.memory)
            if found not in ("error", "read"):
                click.echo(f"{of.name}, {mutation} {i}: {found}\n{outcome.error[-2000:]}", err=True)
                if keep:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{re.sub(r'[^a-z]+', '_', of.name)}_{mutation}_{i}").write_bytes(data)
        place(of, folder, of.data)
        escaped = [p.name for p in (*folder.parent.iterdir(), *Path("/").iterdir()) if "escaped" in p.name]
        if escaped:
            raise RuntimeError(f"{of.name}: {escaped[0]} was written outside of the folder")
        total = sum(outcomes.values())
        rows.append(dict(
            file=of.name, read_by=" ".join(of.command[:1 + (of.command[0] == "zoo")]), tried=total, errors=outcomes["error"],
            reads=outcomes["read"], other=total - outcomes["error"] - outcomes["read"], memory_mb=round(memory / 1e6), seed=seed))
        write(RESULTS / "robustness_files.csv", FILES, rows)
        click.echo(f"{of.name}: {dict(outcomes)}, {memory / 1e6:.0f} MB, {time.perf_counter() - start:.0f} s", err=True)
    prey.close()


def references(folder: Path) -> dict[str, tuple[dict, float]]:
    """What each command leaves when nothing happens, and how long it takes."""
    found = {}
    for name, command in injected.COMMANDS.items():
        out, start = folder / "whole" / name, time.perf_counter()
        out.mkdir(parents=True)
        code, said = injected.run(command.arguments(out), out.with_suffix(".log"))
        if code:
            raise RuntimeError(f"granq {name} ends with {code}: {said}")
        found[name] = injected.digests(out), time.perf_counter() - start
    return found


def try_faults(folder: Path, count: int, seed: int, kinds: tuple[str, ...]) -> None:
    """A row per kind of fault and command; rows of other kinds stay."""
    rows, whole = [r for r in read(RESULTS / "robustness_faults.csv") if r["fault"] not in kinds], references(folder)
    mounts = injected.can_mount(folder / "probe")
    for kind in kinds:
        for name, command in injected.COMMANDS.items():
            if (kind == "a rank dies" and name != "qat") or (kind == "two runs in one folder" and not command.resumes):
                continue
            if kind == "read-only folder" and not mounts:
                continue
            expected, seconds = whole[name]
            if kind == "a rank dies":
                out = folder / "whole" / "ranks"
                out.mkdir(parents=True)
                if any(injected.run_ranks(command, out)):
                    said = [injected.last_line(out.with_suffix(f".rank{r}")) for r in range(2)]
                    raise RuntimeError(f"granq qat does not run on two ranks: {said}")
                expected = injected.digests(out)
            rng, counts = random.Random(f"{seed} {kind} {name}"), Counter()
            for i in range(count if command.resumes else -(-count // 2)):
                tried = injected.try_fault(kind, command, folder / f"{kind}_{name}_{i}".replace(" ", "_"), expected, seconds, rng)
                counts["tried"] += 1
                counts["stopped"] += tried.code != 0
                counts["lost"] += tried.lost
                counts["identical"] += tried.identical
                counts["other"] += bool(tried.problems)
                for problem in tried.problems:
                    click.echo(f"{kind}, {name}, {i}: {problem}", err=True)
            how = {"full disk": "tmpfs of 4 to 160 kB" if mounts else "RLIMIT_FSIZE", "read-only folder": "tmpfs, remounted",
                   "two runs in one folder": "lock"}.get(kind, "")
            rows.append(dict(fault=kind, command=name, how=how, seed=seed, **{k: counts[k] for k in FAULTS[2:7]}))
            write(RESULTS / "robustness_faults.csv", FAULTS, rows)
            click.echo(f"{kind}, {name}: {dict(counts)}", err=True)


def try_determinism(folder: Path) -> None:
    """The same command in fresh processes."""
    rows = []
    for name in ("qat", "train-teacher", "evaluate", "export"):
        command, first = injected.COMMANDS[name], None
        for threads in (1, 2):
            found = []
            for i in range(2):
                out = folder / f"same_{name}_{threads}_{i}"
                out.mkdir()
                arguments = [f"--threads={threads}" if a.startswith("--threads") else a for a in command.arguments(out)]
                code, said = injected.run(arguments, out.with_suffix(".log"))
                if code:
                    raise RuntimeError(f"granq {name} ends with {code}: {said}")
                found.append(injected.digests(out))
            first = first or found[0]
            rows.append(dict(command=name, threads=threads, processes=2, equal=int(found[0] == found[1]),
                             equal_to_one_thread=int(found[0] == first)))
            write(RESULTS / "robustness_determinism.csv", DETERMINISM, rows)
            click.echo(rows[-1], err=True)
            if "--threads=1" not in command.args:  # it takes no number of threads
                break


def table() -> str:
    """Markdown, of the committed results."""
    files, faults, same = (read(RESULTS / f"robustness_{part}.csv") for part in PARTS)
    lines = ["| file | read by `granq` | tried | clear error | correct read | other | peak memory, MB |",
             "|---|---|---|---|---|---|---|"]
    lines += [f"| {r['file']} | {r['read_by']} | {r['tried']} | {r['errors']} | {r['reads']} | {r['other']} | {r['memory_mb']} |"
              for r in files]
    lines.append("| **all** | | **{}** | **{}** | **{}** | **{}** | **{}** |".format(
        *(sum(int(r[k]) for r in files) for k in ("tried", "errors", "reads", "other")),
        max((int(r["memory_mb"]) for r in files), default=0)))
    lines += ["", "| fault | command | injected | command stopped | results lost | then bit-identical | other |",
              "|---|---|---|---|---|---|---|"]
    lines += ["| {}{} | {} | {} | {} | {} | {} | {} |".format(r["fault"], f" ({r['how']})" if r["how"] else "", *(
        r[k] for k in FAULTS[1:7])) for r in faults]
    lines.append("| **all** | | **{}** | **{}** | **{}** | **{}** | **{}** |".format(
        *(sum(int(r[k]) for r in faults) for k in FAULTS[2:7])))
    lines += ["", "| command, same seed | threads | two processes | as on one thread |", "|---|---|---|---|"]
    words = {"1": "same bits", "0": "other bits"}
    lines += [f"| {r['command']} | {r['threads']} | {words[r['equal']]} | {words[r['equal_to_one_thread']]} |" for r in same]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--mutations", type=click.IntRange(min=1), default=100, show_default=True, help="Of each file.")
@click.option("--faults", type=click.IntRange(min=1), default=6, show_default=True,
              help="Of each kind and command; half as many of commands that do not resume.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="One part; the other tables stay.")
@click.option("--fault", "kinds", type=click.Choice(list(injected.FAULTS)), multiple=True,
              help="One kind of fault; the rows of the others stay.")
@click.option("--table-only", is_flag=True, help="Run nothing; write the table of the rows there are.")
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep files whose outcome is neither error nor read.")
def main(
        mutations: int, faults: int, seed: int, only: tuple[str, ...], kinds: tuple[str, ...], table_only: bool,
        keep: Path | None) -> None:
    if table_only:
        replace_table(MARKER, table())
        return
    if platform.system() != "Linux":
        raise click.ClickException("memory is measured, and faults are injected, by means of Linux")
    import torch
    torch.set_num_threads(1)
    os.environ.pop("GRANQ_DATA", None)  # commands see the files that are made here, and no others
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        try:
            parts = only or PARTS
            if "files" in parts:
                try_files(folder / "files", mutations, seed, keep and here / keep)
            if parts != ("files", ):
                formats(folder / "valid")  # changes into it
            if "faults" in parts:
                try_faults(folder, faults, seed, kinds or tuple(injected.FAULTS))
            if "determinism" in parts:
                try_determinism(folder)
        finally:
            os.chdir(here)
    replace_table(MARKER, table())
    click.echo(table())
    if any(int(r["other"]) for part in PARTS[:2] for r in read(RESULTS / f"robustness_{part}.csv")):
        sys.exit(1)


if __name__ == "__main__":
    main()
