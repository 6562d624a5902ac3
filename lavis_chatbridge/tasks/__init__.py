"""LAVIS tasks for alignment, instruction tuning, captioning and question answering, and their metrics."""

from lavis_chatbridge.tasks.alignment import AlignmentTask, InstructionTask
from lavis_chatbridge.tasks.generation import GenerationTask

__all__ = ["AlignmentTask", "GenerationTask", "InstructionTask"]
