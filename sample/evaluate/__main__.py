"""`python -m imgtok.sample.evaluate` and `torchrun -m imgtok.sample.evaluate` run the job."""

from imgtok.cli import run_job
from imgtok.sample.evaluate import job

if __name__ == "__main__":
    run_job(job)
