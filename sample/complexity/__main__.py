"""`python -m imgtok.sample.complexity` and `torchrun -m imgtok.sample.complexity` run the job."""

from imgtok.cli import run_job
from imgtok.sample.complexity import job

if __name__ == "__main__":
    run_job(job)
