"""What the compiler needs of the CPU code generator.

Import-light: Numba is loaded only to compile.
"""

from graphc.codegen.program import blocks, can_lower, lower_graph, plan_launches, rank_launches
from graphc.codegen.simd_host import host_lanes

__all__ = [
    "blocks",
    "can_lower",
    "host_lanes",
    "lower_graph",
    "plan_launches",
    "rank_launches",
]
