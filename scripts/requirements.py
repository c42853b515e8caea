"""Which packages of a requirements file an interpreter lacks; for environment.sh and the doctor.

Standard library only, and syntax that old interpreters read: environment.sh runs it to say that one
is too old.
"""

import importlib.metadata
import importlib.util
import re
import shlex
import sys

NEWEST_PYTHON = (3, 13)  # that was tried


def wanted(path):
    """Yield the requirements in a file and in those that it names, such as ``torch>=2.7``."""
    with open(path) as file:
        lines = [line.partition("#")[0].strip() for line in file]
    for line in lines:
        if line.startswith("-r "):
            yield from wanted(line[3:].strip())
        elif line:
            yield line


def version_of(package):
    """Return the version of an installed package, ``unknown`` if it has no metadata, or
    ``missing``.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown" if importlib.util.find_spec(package) else "missing"


def numbers(version):
    """Return a version as integers, without what follows a plus sign."""
    return [int(n) for n in re.findall(r"\d+", version.partition("+")[0])]


def missing(path):
    """Return (requirement, installed version) of all that is missing or too old."""
    lacking = []
    for requirement in wanted(path):
        name, _, least = requirement.partition(">=")
        version = version_of(name)
        if version == "missing" or (version != "unknown" and numbers(version) < numbers(least)):
            lacking.append((requirement, version))
    return lacking


def untried(path):
    """Return (name, version here, newest version tried) of all that is newer here than in a file
    of exact versions, and of Python.
    """
    newer = []
    for name, _, tried in (line.partition("==") for line in wanted(path)):
        version = version_of(name)
        if version not in ("missing", "unknown") and numbers(version) > numbers(tried):
            newer.append((name, version, tried))
    if sys.version_info[:2] > NEWEST_PYTHON:
        newer.insert(0, ("Python", *("%d.%d" % v for v in (sys.version_info[:2], NEWEST_PYTHON))))  # noqa: UP031
    return newer


def check(python, path):
    """Exit with one line that says what to install if the interpreter ``python``, this one,
    lacks something.
    """
    if sys.version_info < (3, 10):  # noqa: UP036
        found = (python, *sys.version_info[:2])
        sys.exit("error: %s is Python %d.%d, 3.10 or newer is needed" % found)  # noqa: UP031
    names = [requirement for requirement, _ in missing(path)]
    if names:
        command = " ".join(map(shlex.quote, [python, "-m", "pip", "install", *names]))
        sys.exit("error: %s lacks %s; to install: %s" % (python, ", ".join(names), command))  # noqa: UP031
