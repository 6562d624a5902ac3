"""LAVIS tasks: alignment, instruction tuning, captions and answers, multiple choice; and their scores."""

from lavis_chatbridge.tasks.alignment import AlignmentTask, InstructionTask
from lavis_chatbridge.tasks.choice import ChoiceTask
from lavis_chatbridge.tasks.generation import GenerationTask

__all__ = ["AlignmentTask", "ChoiceTask", "GenerationTask", "InstructionTask"]
