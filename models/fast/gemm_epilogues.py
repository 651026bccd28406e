"""What a product does to its sums before it writes them, for quack-kernels to compile.

Imported by models/fast/fused_gemm.py alone, where that library is installed: see there for the
formulas.
Each function is called for one number: `acc` is the product's sum, `c` the other tensor's value at
the same place, `gate` and `bias` belong to the column.
"""

from quack.activation import dgelu_tanh_approx, gelu_tanh_approx
from quack.epilogue import gemm_epilogue
from quack.epilogue.ops import RowVecLoad
from quack.gemm_config import GemmConfig

# Two groups of warps take turns: one multiplies while the other finishes its 128 x 192 numbers, so
# that finishing costs no time. 128 x 256 by both groups together: 6 % slower.
CONFIG = GemmConfig(
    tile_m=128,
    tile_n=192,
    pingpong=True,
    cluster_m=2,
    cluster_n=1,
    device_capacity=9,
    is_dynamic_persistent=False,
)
CHOSEN = dict(config=CONFIG, tuned=False)
# named, because a square result does not show whether a vector belongs to columns or rows
BIAS, GATE = RowVecLoad("bias"), RowVecLoad("gate")


@gemm_epilogue(outputs=("after",), ops={"bias": BIAS})
def with_gelu(acc, bias):
    before = acc + bias
    return {"D": before, "after": gelu_tanh_approx(before)}


@gemm_epilogue()
def times_slope(acc, c):
    through_gelu, _ = dgelu_tanh_approx(c, acc)
    return {"D": through_gelu}


@gemm_epilogue(ops={"bias": BIAS, "gate": GATE})
def gated(acc, c, gate, bias):
    return {"D": c + gate * (acc + bias)}
