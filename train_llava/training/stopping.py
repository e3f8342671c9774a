"""Ends a run early: at a SIGTERM, or when a score stops improving. Any other early end, as of a rank, is an error."""

import atexit
import math
import multiprocessing.util  # whose own function at exit runs after those that are registered later
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Seconds after which the system asks whether the other side of a silent connection is there, and asks again; seconds
# without an answer, and milliseconds for what was sent, after which the connection ends with an error
ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 8, "TCP_USER_TIMEOUT": 40_000}


def outlive_sigterm(worker: int, begin: Callable[[int], None] | None) -> None:
    """Begins a data-loading worker. A SIGTERM to all processes of a job does not end it before the run."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if begin is not None:
        begin(worker)


@atexit.register
def end_workers() -> None:
    """Ends the data-loading workers of a failed run. Python would send them a SIGTERM, and wait for ever."""
    workers = multiprocessing.active_children()
    if workers and hasattr(signal, "SIGCHLD"):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise at it
    for worker in workers:
        worker.kill()


def watch_connections() -> None:
    """Lets this process's connections end within a minute if the other machine is gone, which does not close them.

    A rank would wait for `--ddp_timeout`, half an hour. Linux only; InfiniBand has timeouts of its own.
    """
    for link in Path("/proc/self/fd").glob("*") if hasattr(socket, "TCP_USER_TIMEOUT") else ():
        with suppress(OSError):  # closed by now, or no TCP
            if os.readlink(link).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(link.name))) as connection:
                    for option, value in ALIVE.items():
                        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def stopped_early(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether `early_stopping_patience` evaluations have followed the best one.

    They are counted in the log, which is part of each checkpoint: a resumed run stops at the same step.
    """
    if not args.early_stopping_patience:
        return False
    # One score a step, the higher the better; not a number is the worst
    key, sign = f"eval_{args.metric_for_best_model.removeprefix('eval_')}", 1 if args.greater_is_better else -1
    scores = {entry["step"]: sign * entry[key] for entry in state.log_history if key in entry}
    scores = [-math.inf if math.isnan(score) else score for score in scores.values()]
    return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= args.early_stopping_patience


class StopOnSignal(TrainerCallback):
    """Ends a run, with a checkpoint, after a step in which any rank got a SIGTERM, or by `stopped_early`."""

    received = False

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "received", True))
        watch_connections()

    def on_log(self, *_: Any, **__: Any) -> None:
        watch_connections()  # some are made by the first steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        received = self.received
        if args.world_size > 1:  # the signal may reach ranks in different steps; all end in the same
            torch.distributed.all_reduce(count := torch.tensor(float(received), device=args.device))
            received = count.item()
        if received:
            if state.is_world_process_zero:
                print(f"SIGTERM: ending at step {state.global_step} with a checkpoint", flush=True)
            self.received = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= stopped_early(args, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if state.global_step < state.max_steps and not self.received and not stopped_early(args, state):
            raise ValueError(f"the data ended after {state.global_step} of {state.max_steps} steps")
