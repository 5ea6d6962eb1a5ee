"""Runs on a SLURM cluster: submit, scale, cancel, resume, and what runs inside the jobs."""
