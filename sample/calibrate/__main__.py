"""`python -m imgtok.sample.calibrate` and `torchrun -m imgtok.sample.calibrate` run the job."""

from imgtok.cli import run_job
from imgtok.sample.calibrate import job

if __name__ == "__main__":
    run_job(job)
