"""Where arrays lie on a mesh: a `Layout` says it of the weights and the batch, and the factors follow the weights.

    layout = jlora.sharding.MODELS                               # of all of jlora.models, by the names of their weights
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"))
    params = jlora.models.load(folder, sharding=layout.on(mesh)).params   # each process reads its parts alone
    batch = jlora.sharding.put_rows(rows, layout.rows(mesh))              # each process gives its own rows

`jlora.train_step` keeps what lies on the mesh where it lies, and puts the factors there: see `beside`.
"""

from jlora.sharding.arrays import check_fits as check_fits
from jlora.sharding.arrays import of_axes as of_axes
from jlora.sharding.arrays import parts_here as parts_here
from jlora.sharding.arrays import put as put
from jlora.sharding.arrays import put_rows as put_rows
from jlora.sharding.arrays import put_whole as put_whole
from jlora.sharding.arrays import row_numbers as row_numbers
from jlora.sharding.factors import axes_of_rows as axes_of_rows
from jlora.sharding.factors import beside as beside
from jlora.sharding.layout import MODELS as MODELS
from jlora.sharding.layout import Layout as Layout
from jlora.sharding.layout import indivisible as indivisible
