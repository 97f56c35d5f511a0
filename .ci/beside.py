"""Installs what an extra of pyproject.toml adds to this environment into a folder beside it:

    python .ci/beside.py EXTRA FOLDER

A program that needs the extra has the folder first on its path; for all others the environment stays as it is. pip
itself says what is lacking. What the environment has in a version that suits the extra is not installed again.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

extra, folder = sys.argv[1:]
wanted = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"][extra]
install = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
dry_run = [*install, "--dry-run", "--report", "-", *wanted]
try:
    report = json.loads(subprocess.run(dry_run, check=True, stdout=subprocess.PIPE).stdout)
    found = [package["metadata"] for package in report["install"]]
    lacking = [f"{package['name']}=={package['version']}" for package in found]
    print(f"{folder}:", *lacking)
    if lacking:
        subprocess.run([*install, "--no-deps", "--target", folder, *lacking], check=True)
except subprocess.CalledProcessError:
    sys.exit(f"the packages of the extra '{extra}' ({', '.join(wanted)}) could not be installed: see above")
