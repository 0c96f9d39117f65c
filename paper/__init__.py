"""What reproduces the paper: run from the root as `python -m paper.reproduce`; needs paper/requirements.txt."""
