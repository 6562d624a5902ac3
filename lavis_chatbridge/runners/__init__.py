"""Training on LAVIS's runner: configuration, processes, optimiser steps, checkpoints, logs."""

from lavis_chatbridge.runners.chatbridge_runner import ChatBridgeRunner

__all__ = ["ChatBridgeRunner"]
