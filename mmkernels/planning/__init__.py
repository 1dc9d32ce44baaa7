"""Which samples share a pack, which rank computes it, and what a step takes on many ranks: on the host, before any
tensor exists."""

from mmkernels.planning.balance import RankSchedule, balance_ranks
from mmkernels.planning.cost import AttentionCost, EncoderCost
from mmkernels.planning.plan import plan_packing
from mmkernels.planning.plan_result import PackingPlan
from mmkernels.planning.scale import StepPlan, TrainingStep, plan_scale
from mmkernels.planning.stream import StreamPlanner

__all__ = [
    "AttentionCost",
    "EncoderCost",
    "PackingPlan",
    "RankSchedule",
    "StepPlan",
    "StreamPlanner",
    "TrainingStep",
    "balance_ranks",
    "plan_packing",
    "plan_scale",
]
