"""Starts an experiment on TPU VMs, GKE, Slurm, SkyPilot or in several processes of this machine.

    python -m experiments.launch local configs/quickstart.py --small --processes 2
    python -m experiments.launch tpu configs/vit_base_lora.py --accelerator v5e-16 --folder gs://bucket/vit --dry-run

README.md beside this file tells a first run from a laptop to a pod. One description (`description.Launch`) is all that
a launcher sees; a launcher is one file with a `Launcher` and one row in `table.py`.
"""
