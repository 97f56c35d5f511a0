"""`python -m imgtok.sample.benchmark` and `torchrun -m imgtok.sample.benchmark` run the job."""

from imgtok.cli import run_job
from imgtok.sample.benchmark import job

if __name__ == "__main__":
    run_job(job)
