"""A training step's memory, FLOPs, traffic and least time on devices that need not be there: `plan`, `layouts`."""

from jlora.planning.collectives import Collective as Collective
from jlora.planning.devices import DEVICES as DEVICES
from jlora.planning.devices import Device as Device
from jlora.planning.devices import Speed as Speed
from jlora.planning.flops import flops as flops
from jlora.planning.planned import plan as plan
from jlora.planning.report import Plan as Plan
from jlora.planning.roofline import Roofline as Roofline
from jlora.planning.trials import Layouts as Layouts
from jlora.planning.trials import Trial as Trial
from jlora.planning.trials import layouts as layouts
