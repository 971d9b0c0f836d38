"""Forecasts of a training run from its recipe and the model's config alone: memory by part, operations, time and cost."""

from manyicl.training_plan.jobs import Decoder, Layout, TrainingJob, read_decoder
from manyicl.training_plan.memory import MemoryParts, check_training_memory, forecast_memory, peak_bytes
from manyicl.training_plan.plans import PlanRequest, TrainingPlan, plan_recipe, plan_training, show_plan

__all__ = [
    "Decoder",
    "Layout",
    "MemoryParts",
    "PlanRequest",
    "TrainingJob",
    "TrainingPlan",
    "check_training_memory",
    "forecast_memory",
    "peak_bytes",
    "plan_recipe",
    "plan_training",
    "read_decoder",
    "show_plan",
]
