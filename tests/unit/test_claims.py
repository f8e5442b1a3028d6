"""Leases: one run at a time has a call, and what is lost is started again or ends, as it must."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from time import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame_broker.messages import CallFrame, CallSpec, Result, Status, Suspicion, Target
from flame_broker.outcomes import describe
from flame_broker.topology import suspects_beside
from flame_orchestrator import custody
from flame_orchestrator.custody import Run
from flame_orchestrator.letters import Letter
from flame_orchestrator.session import News
from flame_orchestrator.silence import Silence
from lab.desk import (
    AT_ONCE,
    CALLS,
    CUSTODY,
    Desk,
    again,
    cancel,
    claim,
    deposit,
    failed,
    good,
    lost,
    outcome,
    release,
)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def granted(news: News) -> list[tuple[int, ...]]:
    return [answer.granted for answer in news.answers]


def start(desk: Desk) -> CallFrame:
    """The frame of the one call that is due, as a worker gets it."""
    (due,) = desk.start_due()
    return replace(due.frame, reply=CUSTODY, attempt=due.attempt)


def lose(desk: Desk, counter: int = 1, run: str = "w/1") -> News:
    return desk.take(lost(counter, run=run, epoch=desk.epoch))


def test_one_run_has_a_call_and_all_others_are_refused(desk: Desk) -> None:
    assert granted(desk.take(claim(1, 2))) == [(1, 2)]
    news = desk.take(claim(2, 3, run="v/1"), claim(1, 2, look=True, run="v/2"), claim(1, 2))
    assert granted(news) == [(3,), (), (1, 2)]
    assert [answer.refused for answer in news.answers] == [(2,), (1, 2), ()]
    assert (desk.state(1), desk.history.story("c", 1)) == (None, None)  # its frame is on its way
    assert sorted(desk.custody.runs()) == sorted([
        Run("w/1", "c", frozenset({1, 2})), Run("v/1", "c", frozenset({3}))
    ])  # fmt: skip


def test_who_only_looks_gets_no_lease(desk: Desk) -> None:
    assert granted(desk.take(claim(1, look=True), claim(1, run="v/1"))) == [(1,), (1,)]
    assert [run.run for run in desk.custody.runs()] == ["v/1"]


def test_a_kept_call_runs_as_its_worker_says_so(desk: Desk) -> None:
    desk.take(deposit(1))
    frame = start(desk)
    desk.take(claim(frame=frame))
    story = desk.history.story("c", 1)
    assert story is not None
    assert (story["state"], story["worker"]) == ("running", "w")
    desk.take(outcome(good(1)))
    assert desk.state(1) == "succeeded"
    assert desk.custody.runs() == []
    assert granted(desk.take(claim(frame=frame, run="v/1"))) == [()]


def test_the_end_of_a_claimed_call_is_told_to_its_client(desk: Desk) -> None:
    desk.take(claim(1))
    news = desk.take(outcome(good(1)))
    assert [frame.queue for frame in news.results] == ["reply.c"]
    assert desk.told["c-1"] == [good(1)]


def test_a_claim_of_what_is_over_is_refused_though_nothing_is_kept_of_it(desk: Desk) -> None:
    desk.take(claim(1), outcome(good(1)))
    desk.custody.forget(before=1e12)
    assert granted(desk.take(claim(1, run="v/1"))) == [()]


def test_a_lost_run_is_started_again_as_a_suspect(desk: Desk) -> None:
    desk.take(claim(1))
    assert not lose(desk).results
    frame = start(desk)
    assert (frame.queue, frame.suspicion) == (suspects_beside(CALLS), Suspicion.SHARED)
    assert granted(desk.take(claim(frame=frame, run="v/1"))) == [(1,)]
    desk.take(outcome(failed(1), worker="w"))  # of the run that was lost
    assert not desk.told
    desk.take(outcome(good(1), worker="v"))
    assert desk.told["c-1"] == [good(1)]


def test_a_run_that_comes_back_goes_on_unless_another_one_has_begun(desk: Desk) -> None:
    desk.take(claim(1))
    lose(desk)
    frame = start(desk)
    assert granted(desk.take(claim(1))) == [(1,)]
    assert granted(desk.take(claim(frame=frame, run="v/1", look=True))) == [()]
    lose(desk)
    assert granted(desk.take(claim(frame=start(desk), run="v/1"))) == [(1,)]
    assert granted(desk.take(claim(1))) == [()]


def test_what_was_lost_three_times_while_it_ran_alone_is_quarantined(desk: Desk) -> None:
    desk.take(claim(1))
    lose(desk)
    for run in ("v/1", "v/2", "v/3", "v/4"):
        frame = start(desk)
        if frame.suspicion is Suspicion.APART:  # as a worker announces it
            frame = replace(frame, suspicion=Suspicion.ALONE)
        desk.take(claim(frame=frame, run=run))
        news = desk.take(lost(1, run=run, epoch=desk.epoch))
    assert describe(desk.told["c-1"][0])[0] == "Quarantined"
    (dead, reason), *_ = news.dead
    assert (dead.calls[0].counter, dead.reply) == (1, "reply.c")
    assert "nothing was heard" in reason
    assert desk.state(1) == "quarantined"


def test_at_most_once_means_one_start(desk: Desk) -> None:
    desk.take(deposit(1, at_most_once=True))
    frame = start(desk)
    assert granted(desk.take(claim(frame=frame, run="w/1"))) == [(1,)]
    assert granted(desk.take(claim(frame=frame, run="v/1"))) == [()]
    ending = lost(1, epoch=desk.epoch)
    desk.take(ending)
    desk.take(ending)
    assert {describe(result)[0] for result in desk.told["c-1"]} == {"WorkerLost"}
    assert len({*desk.told["c-1"]}) == 1
    assert desk.start_due() == []
    assert granted(desk.take(claim(frame=frame, run="v/2"))) == [()]


def test_at_most_once_is_refused_to_whom_knows_more_than_the_database(desk: Desk) -> None:
    spec = CallSpec(Target("m:f"), at_most_once=True)
    frame = CallFrame(CALLS, CUSTODY, "c", spec, claim(1).frame.frame.calls)  # type: ignore[union-attr]
    assert granted(desk.take(claim(frame=frame))) == [()]


def test_what_a_worker_gives_back_starts_elsewhere_and_is_no_copy(desk: Desk) -> None:
    desk.take(deposit(1, at_most_once=True))
    first = start(desk)
    desk.take(claim(frame=first), release(1, run="another"))
    assert desk.start_due() == []
    desk.take(release(1))
    second = start(desk)
    assert second != first
    assert second.queue == CALLS
    assert granted(desk.take(claim(frame=second, run="v/1"))) == [(1,)]


def test_what_is_given_back_before_it_stands_as_queued_starts_all_the_same(desk: Desk) -> None:
    desk.take(deposit(1, at_most_once=True))
    published = desk.custody.due(time(), 100)
    frame = replace(published[0].frame, reply=CUSTODY, attempt=1)
    desk.take(claim(frame=frame))
    desk.take(release(1))
    desk.custody.queued(desk.epoch, published)
    assert granted(desk.take(claim(frame=start(desk), run="v/1"))) == [(1,)]


def test_news_of_a_lost_run_counts_while_its_writer_leads(desk: Desk) -> None:
    desk.take(claim(1))
    old = lost(1, epoch=desk.epoch)
    desk.epoch = desk.custody.lead("another")
    desk.take(old)
    assert [run.run for run in desk.custody.runs()] == ["w/1"]


def test_an_attempt_that_failed_leaves_no_lease_and_its_run_gets_none_again(desk: Desk) -> None:
    desk.take(deposit(1, retry=AT_ONCE))
    first = start(desk)
    desk.take(claim(frame=first), outcome(again(1)))
    assert granted(desk.take(claim(frame=first))) == [()]
    assert granted(desk.take(claim(frame=start(desk), run="v/1"))) == [(1,)]


def test_a_cancel_ends_a_call_that_has_a_lease_and_spares_it_if_told_to(desk: Desk) -> None:
    desk.take(claim(1), cancel(1, spare_running=True))
    assert not desk.told
    desk.take(cancel(1))
    assert describe(desk.told["c-1"][0])[0] == "CallCancelled"
    assert desk.custody.runs() == []


def test_whoever_begins_a_new_database_is_no_older_leader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    latest = max(Desk(tmp_path / "old").custody.lead("us") for _ in range(10))
    monkeypatch.setattr(custody, "time", lambda: time() + 60)
    assert Desk(tmp_path / "new").epoch > latest


# ── silence ──────────────────────────────────────────────────────────────────


class Ear:
    """A ``Silence`` of thirty seconds, and a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.silence = Silence(30.0, lambda: self.now)
        self.silence.start_anew([Run("w/1", "c", frozenset({1}))])

    def pass_s(self, seconds: int, *, echo: bool = True, beats: tuple[str, ...] = ()) -> list[str]:
        """Time passes; the runs that were lost meanwhile."""
        found: list[str] = []
        for _ in range(seconds):
            self.now += 1
            if echo:
                self.silence.echo()
            self.silence.beat(beats)
            found += [run.run for run in self.silence.take_lost()]
        return found


def test_a_run_is_lost_after_a_whole_lease_of_silence_and_not_while_it_beats() -> None:
    ear = Ear()
    assert ear.pass_s(100, beats=("w/1",)) == []
    assert ear.pass_s(30) == []
    assert ear.pass_s(1) == ["w/1"]
    assert ear.pass_s(100) == []
    assert ear.silence.beat(["w/1"]) == ["w/1"]


@pytest.mark.parametrize("away_s", [4, 19, 300])
def test_silence_while_we_hear_not_even_ourselves_means_nothing(away_s: int) -> None:
    ear = Ear()
    assert ear.pass_s(20) == []
    assert ear.pass_s(away_s, echo=False) == []
    assert ear.pass_s(30) == []
    assert ear.pass_s(2) == ["w/1"]


def test_a_pause_of_the_orchestrator_takes_no_lease() -> None:
    ear = Ear()
    ear.pass_s(10)
    ear.now += 300  # it was stopped
    assert ear.silence.take_lost() == []
    assert ear.pass_s(30) == []


def test_a_new_leader_gives_each_run_its_whole_time() -> None:
    ear = Ear()
    ear.pass_s(29)
    ear.silence.start_anew([Run("w/1", "c", frozenset({1})), Run("v/1", "c", frozenset({2}))])
    assert ear.pass_s(30) == []
    assert sorted(ear.pass_s(1)) == ["v/1", "w/1"]


# ── everything together ──────────────────────────────────────────────────────


class World:
    """Workers that start, claim, come back, fall silent; a desk; and chance."""

    def __init__(self, desk: Desk, chance: random.Random) -> None:
        self.desk, self.chance = desk, chance
        self.letters: list[Letter] = [
            deposit(n, retry=AT_ONCE) if n % 2 else deposit(n, at_most_once=True) for n in range(4)
        ]
        self.letters += [claim(n, run=f"first/{n}") for n in (10, 11)]  # were the broker's
        self.frames: list[CallFrame] = []
        self.holders: dict[str, CallFrame] = {}
        self.starts: dict[int, int] = defaultdict(int)
        self.take(*self.letters)

    def take(self, *letters: Letter) -> None:
        """Letters arrive; at no time have two runs the same call."""
        news = self.desk.take(*letters)
        for answer in news.answers:
            for counter in answer.granted:
                known = self.holders.get(answer.claim.run)
                if known is None and not answer.claim.look:
                    self.starts[counter] += 1
                    self.holders[answer.claim.run] = answer.claim.frame
        runs = self.desk.custody.runs()
        calls = [(run.client, counter) for run in runs for counter in run.counters]
        assert len(calls) == len({*calls})

    def step(self) -> None:
        chance, number = self.chance, len(self.letters)
        self.queue_what_is_due()
        fresh: list[Letter] = []
        runs = self.desk.custody.runs()
        match chance.randrange(7):
            case 0 | 1 if self.frames:
                fresh = [claim(frame=chance.choice(self.frames), run=f"w{number}/1")]
            case 2 if runs:
                run = chance.choice(runs)
                fresh = [lost(*run.counters, run=run.run, epoch=self.desk.epoch)]
            case 3 if self.holders:  # it ends, although it may have been given up
                run_id, frame = chance.choice(sorted(self.holders.items(), key=lambda h: h[0]))
                result = chance.choice([good, again, failed])(frame.calls[0].counter)
                worker = run_id.partition("/")[0]
                fresh = [outcome(result, attempt=frame.attempt, worker=worker)]
            case 4 if self.holders:  # it comes back
                run_id, frame = chance.choice(sorted(self.holders.items(), key=lambda h: h[0]))
                fresh = [claim(frame=frame, run=run_id)]
            case 5:
                self.desk.epoch = self.desk.custody.lead("another")
            case 6:
                self.take(*chance.sample(self.letters, 2))
        self.letters += fresh
        self.take(*fresh)

    def queue_what_is_due(self) -> None:
        """The frames that workers may get, at any time, and more than once."""
        for due in self.desk.start_due():
            self.frames.append(replace(due.frame, reply=CUSTODY, attempt=due.attempt))

    def come_to_rest(self) -> None:
        """All that was ever said is said once more, and every run ends well."""
        for waiting in self.letters:
            self.take(waiting)
        for turn in range(4):
            self.queue_what_is_due()
            for number, frame in enumerate(self.frames):
                self.take(claim(frame=frame, run=f"last{turn}-{number}/1"))
            for run in self.desk.custody.runs():
                worker = run.run.partition("/")[0]
                self.take(outcome(*map(good, sorted(run.counters)), attempt=9, worker=worker))

    def ends(self, counter: int) -> set[Result]:
        return set(self.desk.told[f"c-{counter}"])


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 1_000_000))
def test_whatever_is_lost_late_or_said_twice_a_call_ends_once_and_one_run_has_it(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    world = World(Desk(tmp_path_factory.mktemp("desk")), random.Random(seed))
    for _ in range(60):
        world.step()
    world.come_to_rest()
    for counter in (0, 1, 2, 3, 10, 11):
        (final,) = world.ends(counter)
        assert final.status is not Status.AGAIN
        found = world.desk.history.outcome("c", counter)
        assert found is not None
        assert found.final == final
    assert all(world.starts[counter] == 1 for counter in (0, 2))  # at most once
