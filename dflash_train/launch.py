"""`accelerate launch` that ends with the exit code of the training.

    python -m dflash_train.launch --config_file recipes/launch/ddp.yaml train.py recipe=NAME

It takes the arguments of accelerate's own command and starts the same processes. That command ends
with 1 and a traceback of its own whatever its processes ended with, so a scheduler cannot tell a
saved run (130) from a recipe that has to be mended (2); and with a single process it dies of
SIGTERM at once and leaves that process behind. Both are settled here, and nothing else.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Start processes as `accelerate launch` does, wait for them and give their exit code.

    Args:
        arguments: Those of `accelerate launch`; None takes the command line's.

    Returns:
        The code of the process that failed first, 128 + N if signal N ended it; 130 if torch's
        launcher, which stands between for several processes, was told to stop them.
    """
    parsed = launch_command_parser().parse_args(arguments)
    parsed.quiet = False  # quiet, accelerate would end this process itself, with 1
    with _signals_for_processes():
        try:
            launch_command(parsed)
        except subprocess.CalledProcessError as error:
            return _shell_code(error.returncode)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return _shell_code(failure.exitcode)
        except SignalException:
            return INTERRUPTED
    return 0


@contextmanager
def _signals_for_processes() -> Iterator[None]:
    """Hand SIGTERM on and wait on; the terminal itself sends SIGINT to every process.

    Torch's launcher puts handlers of its own in their place.
    """

    def hand_on(number: int, _frame: FrameType | None) -> None:
        for process in psutil.Process().children():
            process.send_signal(number)

    def wait_on(_number: int, _frame: FrameType | None) -> None:
        pass

    before = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGTERM, hand_on), (signal.SIGINT, wait_on))
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _shell_code(code: int) -> int:
    """Give the exit code as a shell would: a negative one names the signal that ended a process."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
