"""Lets the test files of this folder import its helpers: recipe, cases, models."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
