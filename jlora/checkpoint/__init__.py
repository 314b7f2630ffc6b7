"""Files on disk: adapters (`save`, `load`) and the state of a training run (`Checkpoints`)."""

from jlora.checkpoint import export as export
from jlora.checkpoint.adapter import load as load
from jlora.checkpoint.adapter import save as save
from jlora.checkpoint.fingerprint import fingerprint as fingerprint
from jlora.checkpoint.resume import DamagedCheckpoint as DamagedCheckpoint
from jlora.checkpoint.run import Checkpoints as Checkpoints
