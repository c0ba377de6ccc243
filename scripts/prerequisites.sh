#!/bin/sh
# Checks what must be on the machine before anything can be installed: one line for each thing missing, exit 1 if any.
# Usage: prerequisites.sh [PYTHON]
set -u
python=${1:-python3}
missing=0

lack() {
    echo "missing: $1" >&2
    missing=1
}

command -v make >/dev/null 2>&1 || lack "make (Debian: apt install make)"

compiler=
for candidate in "${CXX:-}" c++ g++ clang++; do
    if [ -n "$candidate" ] && command -v "${candidate%% *}" >/dev/null 2>&1; then
        compiler=$candidate
        break
    fi
done
[ -n "$compiler" ] || lack "a C++ compiler, needed to build hnswlib (Debian: apt install g++)"

if ! command -v "$python" >/dev/null 2>&1 || ! "$python" -c '' >/dev/null 2>&1; then
    lack "$python: Python 3.11 or later (name another with PYTHON=...)"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    lack "Python 3.11 or later: $python is $("$python" -c 'import platform; print(platform.python_version())') (name another with PYTHON=...)"
else
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        lack "the venv module of $python (Debian: apt install python3-venv)"
    "$python" -c 'import sqlite3; sqlite3.connect(":memory:").execute("CREATE VIRTUAL TABLE t USING fts5(x)")' >/dev/null 2>&1 ||
        lack "an SQLite with FTS5 in $python"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        lack "Python.h of $python, needed to build hnswlib (Debian: apt install python3-dev)"
fi
exit $missing
