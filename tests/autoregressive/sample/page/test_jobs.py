"""The queue of the demo page: one job after another, events for all who watch."""

import threading

import pytest

from autoregressive.sample.page import jobs
from autoregressive.sample.page.jobs import Job, Jobs


def test_jobs_run_one_after_another_and_tell_what_they_do():
    queue, order, running = Jobs(), [], []

    def work(job: Job) -> None:
        running.append(job)
        assert len(running) == 1
        job.tell("step", number=len(order))
        order.append(job)
        running.remove(job)

    made = [queue.add(Job(work)) for _ in range(5)]
    for i, job in enumerate(made):
        events = [e for e in job.watch() if e["event"] != "queued"]
        assert events == [{"event": "step", "number": i}]
        assert list(job.watch())[-1] == events[0]  # also for who comes late
    assert order == made and len({job.name for job in made}) == 5
    assert queue.find(made[0].name) is made[0] and queue.find("x") is None


def test_what_goes_wrong_is_told(capsys):
    def mistake(job: Job) -> None:
        raise ValueError("seed: expected a whole number")

    def fault(job: Job) -> None:
        raise KeyError("x")

    queue = Jobs()
    told = [list(queue.add(Job(work)).watch())[-1] for work in (mistake, fault)]
    assert told[0] == {"event": "error", "message": "seed: expected a whole number"}
    assert told[1] == {"event": "error", "message": "KeyError: 'x'"}
    assert "KeyError" in capsys.readouterr().err


def test_a_full_queue_says_so_and_old_jobs_are_forgotten(monkeypatch):
    monkeypatch.setattr(jobs, "KEPT", 2)
    gate, queue = threading.Event(), Jobs()
    first = queue.add(Job(lambda job: gate.wait(10)))
    while queue._queue.qsize():  # until the worker has taken it
        pass
    waiting = [queue.add(Job(lambda job: None)) for _ in range(jobs.WAITING)]
    with pytest.raises(ValueError, match="16 jobs are waiting already"):
        queue.add(Job(lambda job: None))
    gate.set()
    list(waiting[-1].watch())
    last = queue.add(Job(lambda job: None))
    list(last.watch())
    assert queue.find(first.name) is None and queue.find(last.name) is last
