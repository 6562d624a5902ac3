"""All targets, by name."""

from __future__ import annotations

from tests.fuzzing import annotations, media, texts
from tests.fuzzing.target import Target

TARGETS: dict[str, Target] = {
    target.name: target for target in (*media.TARGETS, *annotations.TARGETS, *texts.TARGETS)
}
