"""A training step's memory, FLOPs and traffic on a device that need not be there: `plan`."""

from jlora.planning.collectives import Collective as Collective
from jlora.planning.devices import DEVICES as DEVICES
from jlora.planning.devices import Device as Device
from jlora.planning.flops import flops as flops
from jlora.planning.planned import plan as plan
from jlora.planning.report import Plan as Plan
