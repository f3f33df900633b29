"""Evaluates a run: python evaluate.py WORKDIR --metrics fid is kid prdc nll rate-distortion nearest

Killed at any moment, the same command continues. Results, figures and report.html go into the workdir.
"""

from ddpm_jax.commands.cli import run

if __name__ == "__main__":
    run("evaluate")
