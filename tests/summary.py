"""Counts the test cases in a folder of JUnit files and prints the closing line of tests/run.sh.

A C++ test program counts with the GoogleTest cases it ran, so the figures are of cases everywhere.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree


def count_case(case: ElementTree.Element) -> tuple[int, int]:
    """Passed and failed cases behind one <testcase>."""
    failed = case.find("failure") is not None or case.find("error") is not None
    output = case.findtext("system-out") or ""
    passed_cases = sum(map(int, re.findall(r"^\[  PASSED  \] (\d+) tests?", output, re.MULTILINE)))
    failed_cases = len(set(re.findall(r"^\[  FAILED  \] (\w+[./]\S+?)[ ,(]", output, re.MULTILINE)))
    if failed:
        return passed_cases, max(failed_cases, 1)
    if case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
        return 0, 0
    return max(passed_cases, 1), 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("--failed", action="store_true", help="a runner ended with an error")
    arguments = parser.parse_args()
    passed = failed = 0
    names = []
    for file in sorted(arguments.results.glob("*.xml")):
        for case in ElementTree.parse(file).getroot().iter("testcase"):
            good, bad = count_case(case)
            passed += good
            failed += bad
            if bad:
                names.append(f"{file.stem}: {case.get('classname')}.{case.get('name')}")
    if arguments.failed and not failed:
        failed = 1
        names.append("a test runner itself ended with an error")
    for name in names:
        print(f"FAILED {name}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
