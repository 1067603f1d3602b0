"""The program of OpenSSL's manual page ASYNC_start_job(3), line for line in Python.

A hand-written select loop drives a job that hands out a pipe to be woken by.

Expected output::

    Starting...
    Executing within a job
    Passed in message is: Hello world!
    Job was paused
    Waiting for the job to be woken up
    Resumed the job after a pause
    Job finished with return value 1
    Finishing
"""

from __future__ import annotations

import os
import select

from aiojob import JobError, JobStatus, WaitCtx, get_current_job, get_wait_ctx, pause_job, start_job

UNIQUE = object()


def cleanup(ctx: WaitCtx, key: object, read_fd: int, write_fd: int) -> None:
    os.close(read_fd)
    os.close(write_fd)


def jobfunc(message: str) -> int:
    job = get_current_job()
    if job is None:
        print("Not executing within a job - should not happen")
        return 0
    print("Executing within a job")
    print(f"Passed in message is: {message}")
    read_fd, write_fd = os.pipe()
    get_wait_ctx(job).set_wait_fd(UNIQUE, read_fd, write_fd, cleanup)
    # Usually something else makes the fd readable, and later; here the job itself does.
    os.write(write_fd, b"X")
    pause_job()  # returns control to main()
    os.read(read_fd, 1)  # clears the signal
    print("Resumed the job after a pause")
    return 1


def main() -> None:
    job = None
    print("Starting...")
    with WaitCtx() as ctx:
        while True:
            try:
                status, job, ret = start_job(job, ctx, jobfunc, "Hello world!")
            except JobError:  # ASYNC_ERR
                print("An error occurred")
                break
            match status:
                case JobStatus.NO_JOBS:
                    print("An error occurred")
                    break
                case JobStatus.PAUSE:
                    print("Job was paused")
                case JobStatus.FINISH:
                    print(f"Job finished with return value {ret}")
                    break
            print("Waiting for the job to be woken up")
            [wait_fd] = ctx.get_all_fds()
            select.select([wait_fd], [], [])
    print("Finishing")


if __name__ == "__main__":
    main()
