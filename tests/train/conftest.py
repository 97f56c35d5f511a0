"""Makes `toy_job` importable by the tests beside it, whose folder pytest does not put on the path."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("toy_job", Path(__file__).with_name("toy_job.py"))
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules["toy_job"] = module
spec.loader.exec_module(module)
