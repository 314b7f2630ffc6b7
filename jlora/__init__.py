"""LoRA and the methods around it, as pure functions on JAX pytrees."""

from jlora import methods as methods
from jlora.adapt import Adapted as Adapted
from jlora.adapt import Count as Count
from jlora.adapt import Extra as Extra
from jlora.adapt import apply as apply
from jlora.adapt import combine as combine
from jlora.adapt import count as count
from jlora.adapt import mask as mask
from jlora.adapt import merge as merge
from jlora.adapt import partition as partition
from jlora.adapt import summary as summary
from jlora.adapt import unmerge as unmerge
from jlora.adapt import with_key as with_key
from jlora.explain import Explanation as Explanation
from jlora.explain import explain as explain
from jlora.lift import MaterialisedError as MaterialisedError
from jlora.lift import lift as lift
from jlora.methods import Method as Method
from jlora.methods import dora as dora
from jlora.methods import lora as lora
from jlora.methods import rslora as rslora
from jlora.sites import Site as Site
from jlora.sites import sites as sites
