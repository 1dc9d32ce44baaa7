"""Which samples share a pack, and which rank computes it: NumPy on the host, before any tensor exists."""

from mmkernels.planning.balance import RankSchedule, balance_ranks
from mmkernels.planning.cost import AttentionCost, EncoderCost
from mmkernels.planning.plan import plan_packing
from mmkernels.planning.plan_result import PackingPlan
from mmkernels.planning.stream import StreamPlanner

__all__ = [
    "AttentionCost",
    "EncoderCost",
    "PackingPlan",
    "RankSchedule",
    "StreamPlanner",
    "balance_ranks",
    "plan_packing",
]
