"""Makes `launch/`: what `python -m experiments.launch ... --dry-run` prints, one file for each command.

    python -m tests.golden.make_launch

tests/test_launch.py compares them byte for byte, so that a change of a launcher is seen as the change of its commands and
files. Read the difference before it is committed: nothing else looks at these commands until somebody pays for machines.
Commands of this machine have its interpreter and its folders; in the files they are PYTHON and HERE.
"""

import contextlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

from experiments.launch.__main__ import main

FOLDER = Path(__file__).with_name("launch")
COMMIT = ("--commit", "0123456789abcdef0123456789abcdef01234567")
CLONED = (*COMMIT, "--repository", "https://example.com/a user's/jlora.git")
E2E = ("configs/gpt2_medium_e2e_lora.py", "runs.lora.method=lora(8, alpha=16)")
TPU = ("tpu", *E2E, "--folder", "gs://bucket/runs/e2e", "--project", "project", "--zone", "us-west4-a", *CLONED)
GKE = ("gke", *E2E, "--image", "example.com/jax:1", *CLONED)
BUCKET = ("--folder", "gs://bucket/runs/e2e")
DISK = ("--folder", "/mnt/runs/e 2 e")
SLURM = ("slurm", *E2E, "--partition", "gpu", "--venv", "/shared/venv", "--files", "/shared/e2e", *DISK, *COMMIT)
SKY = ("skypilot", *E2E, *BUCKET, *CLONED)

CASES: dict[str, tuple[str, ...]] = {
    "tpu": (*TPU, "--accelerator", "v5e-16", "--spot", "--env", "JAX_COMPILATION_CACHE_DIR=/mnt/gs/bucket/compiled"),
    "tpu_slices": (*TPU, "--accelerator", "v6e-256", "--slices", "2", "--reserved", "--restarts", "3"),
    "tpu_plain": (*TPU, "--accelerator", "v5p-8", "--plain", "--service-account", "runs@project.example.com"),
    **{f"tpu_{action}": (*TPU, "--accelerator", "v4-32", "--do", action) for action in ("create", "setup", "run", "logs", "status", "delete")},
    "gke": (*GKE, *BUCKET, "--accelerator", "v5litepod-16", "--spot", "--service-account", "runs"),
    "gke_slices": (*GKE, *BUCKET, "--accelerator", "v5p-128", "--slices", "4"),
    "gke_gpu": (*GKE, *DISK, "--claim", "filestore", "--accelerator", "h100:8", "--nodes", "2"),
    "gke_xpk": (*GKE, *DISK, "--accelerator", "v5e-256", "--xpk", "--cluster", "c", "--project", "p", "--zone", "z"),
    **{f"gke_{action}": (*GKE, *BUCKET, "--accelerator", "v5e-16", "--do", action) for action in ("logs", "status", "delete")},
    "slurm": (*SLURM, "--accelerator", "h100:8", "--nodes", "2", "--time", "12:00:00", "--account", "lab"),
    "slurm_node": (*SLURM, "--accelerator", "a100:4", "--small"),
    **{f"slurm_{action}": (*SLURM, "--accelerator", "h100:8", "--do", action) for action in ("logs", "status", "delete")},
    "skypilot": (*SKY, "--accelerator", "h100:8", "--nodes", "2", "--spot", "--infra", "gcp/us-central1"),
    "skypilot_tpu": (*SKY, "--accelerator", "v6e-16"),
    **{f"skypilot_{action}": (*SKY, "--accelerator", "h100:8", "--do", action) for action in ("logs", "status", "delete")},
    "local": ("local", "configs/quickstart.py", "train.steps=20", "--small", "--processes", "2", "--devices-per-process", "4", *COMMIT),
}  # fmt: skip


def printed(*arguments: str) -> str:
    """What a dry run prints, without what is this machine's."""
    out = io.StringIO()
    with mock.patch.dict(os.environ, {"XLA_FLAGS": ""}), contextlib.redirect_stdout(out):
        code = main([*arguments, "--dry-run"])
    assert code == 0, arguments
    return out.getvalue().replace(sys.executable, "PYTHON").replace(str(Path.cwd()), "HERE")


if __name__ == "__main__":
    for old in FOLDER.glob("*.txt"):
        old.unlink()
    for name, arguments in CASES.items():
        (FOLDER / f"{name}.txt").write_text(printed(*arguments))
