"""Compare two checkouts of megagrow bit for bit: training, growth, resume, conversion.

    python tools/regression/compare_commits.py OLD NEW --work DIR [--reuse] [--cases GLOB ...]

Each case runs in both checkouts with this interpreter, on at most two CPU ranks. Losses, gradient
norms, counters and all tensors must be equal; text, times and memory are ignored. The run files
have the keys of OLD. In the cases `cross-resume-*` NEW resumes a run of OLD and must give the same
result. Prints one line per case; the exit code is 1 if anything differs.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from tools.regression.cases import CASES, WORLD, CheckoutRunner, RegressionCase  # noqa: E402
from tools.regression.equality import Comparison, compare_folders  # noqa: E402
from tools.regression.launching import CommandFailed, Workers  # noqa: E402


def main() -> int:
    """Run the selected cases in both checkouts; return the exit code."""
    arguments = _parse()
    work = arguments.work.resolve()
    selected = [case for case in CASES.values() if _is_selected(case, arguments.cases)]
    if arguments.list:
        print("\n".join(case.name for case in selected))
        return 0
    if not arguments.reuse:
        shutil.rmtree(work / "old", ignore_errors=True)
    shutil.rmtree(work / arguments.label, ignore_errors=True)
    begin = time.monotonic()
    with _runner("old", arguments.old, work) as old:
        failed = _produce(old, _references(selected))
    if failed:
        print("\n".join(f"{name}: OLD failed: {reason}" for name, reason in failed.items()))
        return 1
    print(f"OLD is complete after {time.monotonic() - begin:.0f} s", flush=True)
    with _runner(arguments.label, arguments.new, work) as new:
        different = sum(not _check(case, old, new) for case in selected)
    seconds = time.monotonic() - begin
    print(f"{len(selected)} cases, {different} different, {seconds:.0f} s")
    return 1 if different else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("old", type=Path, help="reference checkout")
    parser.add_argument("new", type=Path, help="checkout to check")
    parser.add_argument("--work", type=Path, required=True, help="folder of all outputs")
    parser.add_argument("--reuse", action="store_true", help="keep outputs of OLD in --work")
    parser.add_argument("--label", default="new", help="folder in --work of the outputs of NEW")
    parser.add_argument("--cases", nargs="+", default=["*"], help="names or patterns of cases")
    parser.add_argument("--list", action="store_true", help="list the cases and exit")
    arguments = parser.parse_args()
    if arguments.label in ("", ".", "..", "old") or "/" in arguments.label:
        parser.error(f"--label {arguments.label!r}: give the name of a folder other than `old`")
    return arguments


def _is_selected(case: RegressionCase, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(case.name, pattern) for pattern in patterns)


@contextmanager
def _runner(label: str, checkout: Path, work: Path) -> Iterator[CheckoutRunner]:
    (work / label).mkdir(parents=True, exist_ok=True)
    checkout, log = checkout.resolve(), work / label / "workers.log"
    with Workers(checkout, WORLD, log) as ranks, Workers(checkout, 1, log) as single:
        yield CheckoutRunner(label, checkout, work, ranks, single)


def _references(selected: Sequence[RegressionCase]) -> list[str]:
    """Return the cases of OLD that the selected cases need, sources first."""
    references: dict[str, None] = {}

    def add(name: str) -> None:
        for source in CASES[name].sources:
            add(source)
        references.setdefault(name)

    for case in selected:
        for source in case.sources:
            add(source)
        add(case.reference or case.name)
    return list(references)


def _produce(runner: CheckoutRunner, names: Sequence[str]) -> dict[str, str]:
    """Produce cases of OLD; return the reason for each that failed."""
    failed = {}
    for name in names:
        try:
            runner.need(name)
        except CommandFailed as error:
            failed[name] = str(error)
    return failed


def _check(case: RegressionCase, old: CheckoutRunner, new: CheckoutRunner) -> bool:
    """Run a case in NEW, compare and print it; return True if it is equal."""
    try:
        comparison = compare_folders(old.folder(case.reference or case.name), new.need(case.name))
    except CommandFailed as error:
        comparison = Comparison(0, f"NEW failed: {error}")
    print(
        f"{case.name}: {comparison.values} values, {comparison.difference or 'equal'}", flush=True
    )
    return comparison.difference is None


if __name__ == "__main__":
    sys.exit(main())
