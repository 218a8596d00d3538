"""Many jobs, so many side by side, none before those that it needs."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter

from t2i_rl.core.errors import UserError
from t2i_rl.study.jobs import Job, run_job


def run_jobs(jobs: Sequence[Job], workers: int, finished: Callable[[Job], None] = lambda job: None) -> None:
    """Run every job that is not done. One that fails stops those that need it and no other.

    Args:
        workers: jobs side by side, each on one thread.
        finished: called for each job that is done, as it ends.

    Raises:
        UserError: before any begins, one is stale or lacks what it takes; after all, some have failed.
    """
    for job in jobs:
        job.check()
        check_needs(job, jobs)
    by_folder = {job.folder: job for job in jobs}
    queue = TopologicalSorter(
        {job.folder: [other.folder for other in job.needs if other.folder in by_folder] for job in jobs}
    )
    queue.prepare()
    ready: list[Job] = []
    running: dict[Future, Job] = {}
    failures: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        while queue.is_active():
            ready += [by_folder[folder] for folder in queue.get_ready()]
            while ready and len(running) < workers:  # no more than that, so that Ctrl-C leaves nothing queued
                job = ready.pop(0)
                running[pool.submit(run_job, job)] = job
            if not running:  # what is left needs a job that has failed
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    future.result()
                except UserError as error:
                    failures.append(str(error))
                    print(error, flush=True)
                else:
                    finished(job)
                    queue.done(job.folder)
    if failures:
        left = sum(not job.done for job in jobs) - len(failures)
        raise UserError("; ".join([*failures, *([f"{left} that need them were not begun"] if left else [])]))


def check_needs(job: Job, jobs: Sequence[Job]) -> None:
    """Whether a job that is not done can begin, once those of `jobs` that it needs are done.

    Raises:
        UserError: it needs a job that is neither done nor among `jobs`, or takes a file that nothing is going to make.
    """
    if job.done:
        return
    coming = {other.folder for other in jobs if not other.done}
    for other in job.needs:
        if not other.done and other.folder not in coming:
            raise UserError(f"{job.name} needs {other.name}, which is not done: run that too")
    for file in job.takes:
        if not file.exists() and not any(other.folder in coming for other in job.needs):
            raise UserError(f"{job.name} takes {job.shortened(str(file))}, which is not there: make it first")
