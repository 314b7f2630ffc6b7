"""All launchers. A new one is a file with a `LAUNCHER` and a row here."""

from experiments.launch import gke, local, skypilot, slurm, tpu
from experiments.launch.launcher import Launcher

LAUNCHERS: dict[str, Launcher] = {
    launcher.name: launcher
    for launcher in (
        local.LAUNCHER,
        tpu.LAUNCHER,
        gke.LAUNCHER,
        slurm.LAUNCHER,
        skypilot.LAUNCHER,
    )
}
