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
    monkeypatch.setattr(jobs, "KEPT_BYTES", 100)
    gate, queue = threading.Event(), Jobs()

    def work(job: Job) -> None:
        gate.wait(10)
        job.files["a"] = "text/plain", bytes(101)

    first = queue.add(Job(work))
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


def test_a_job_that_nobody_waits_for_ends(monkeypatch):
    """Visitors who had left kept the others waiting."""
    queue, reached = Jobs(), []

    def work(job: Job) -> None:
        job.tell("step")
        reached.append(1)
        job.cancelled = True  # as the server does when its watcher has gone
        job.tell("step")
        reached.append(2)

    job = queue.add(Job(work))
    assert list(job.watch())[-1] == {"event": "step"} and reached == [1]
    waiting = [queue.add(Job(lambda job: job.tell("step"))) for _ in range(2)]
    queue.close()
    assert not queue._worker.is_alive() and all(job.cancelled for job in waiting)


@pytest.mark.parametrize("error", [ValueError("seed"), KeyError("x")])
def test_an_error_after_the_visitor_has_left_does_not_end_the_worker(error):
    queue = Jobs()

    def work(job: Job) -> None:
        job.cancelled = True
        raise error

    assert list(queue.add(Job(work)).watch())
    events = list(queue.add(Job(lambda job: job.tell("step"))).watch())
    assert events[-1] == {"event": "step"} and queue._worker.is_alive()


def test_a_full_queue_is_closed_too():
    gate, queue = threading.Event(), Jobs()
    queue.add(Job(lambda job: gate.wait(10)))
    while queue._queue.qsize():  # until the worker has taken it
        pass
    for _ in range(jobs.WAITING):
        queue.add(Job(lambda job: None))
    threading.Timer(0.2, gate.set).start()
    queue.close()
    assert not queue._worker.is_alive()
