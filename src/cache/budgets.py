"""What each principal may cost: a leaky bucket for each, in Redis, and in the process while Redis is away.

A bucket holds what its principal owes. Each charge adds its cost where that fits, and what is owed runs
out at a steady rate. Debts are in millionths of a cost and times in microseconds: both engines reckon
with whole numbers below 2^53, and come to the same.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

from modelharbor.errors import RateLimited
from modelharbor.settings import Settings

log = logging.getLogger(__name__)
MILLION: Final = 1_000_000
LARGEST: Final = 2**31 - 1  # a cost, a rate, a limit: what GraphQL's Int can tell
MOST_BUCKETS: Final = 10_000  # of one process: some 3 MB

SCRIPT: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local answers, at = {}, 1
for _, key in ipairs(KEYS) do
  local rate, limit = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  local settled, last = tonumber(ARGV[at + 2]), at + 3 + ARGV[at + 3]
  local debt = 0
  local kept = redis.pcall('GET', key)
  local owed, since = string.match(type(kept) == 'string' and kept or '', '^(%d+) (%d+)$')
  if owed and #owed < 17 then
    debt = math.max(0, tonumber(owed) - math.max(0, now - tonumber(since)) * rate)
  end
  debt = math.max(0, debt + settled)
  answers[#answers + 1] = debt
  for index = at + 4, last do
    local cost = tonumber(ARGV[index])
    if debt == 0 or debt + cost <= limit then
      debt = debt + cost
      answers[#answers + 1] = debt
    else
      answers[#answers + 1] = -1 - debt
    end
  end
  at = last + 1
  if debt > 0 then
    local ms = math.ceil(debt / rate / 1000) + 1
    redis.call('SET', key, string.format('%.0f %.0f', debt, now), 'PX', string.format('%.0f', ms))
  elseif kept then
    redis.call('DEL', key)
  end
end
return answers
"""
"""KEYS: buckets. ARGV, for each: rate, limit, what is owed more (or less) in any case, how many charges
follow, and these. Answers for each what is owed before its charges, then for each charge what is owed
after it, or that (as -1 - debt) where it was refused."""


class Kind(Enum):
    """Who may cost how much."""

    ANONYMOUS = "anonymous"  # one address
    TOKEN = "token"
    OPERATOR = "operator"  # an operator's token


class BudgetSpent(RateLimited):
    """With the charge that was refused, for headers."""

    def __init__(self, charge: "Charge") -> None:
        seconds = -(-charge.retry_after * 1000 // 1) / 1000  # up to the next millisecond
        left, limit = charge.remaining, charge.limit
        super().__init__(
            f"The budget is used up: this costs {charge.cost}, and {left} of {limit} are left;"
            f" try again in {seconds:g} s.",
            retryAfter=seconds,
            requested=charge.cost,
            remaining=left,
        )
        self.charge = charge


class Budget:
    """What each principal of one kind may cost. Compared by identity: a process has one for each kind."""

    __slots__ = ("kind", "limit", "rate")

    def __init__(self, kind: Kind, rate: int, seconds: float) -> None:
        self.kind = kind
        self.rate = min(rate, LARGEST)
        """Cost that is restored in a second."""
        self.limit = min(max(int(rate * seconds), 1), LARGEST)
        """Cost that can be saved up."""


class Charge:
    """What one operation is charged. It is decided by the round that it was registered for, else here."""

    __slots__ = (
        "_debt",
        "_is_refused",
        "_refunded",
        "budget",
        "budgets",
        "cost",
        "is_dry",
        "is_local",
        "principal",
    )

    def __init__(
        self, budgets: "Budgets", principal: str, budget: Budget | None, cost: int, is_dry: bool
    ) -> None:
        self.budgets, self.principal, self.budget = budgets, principal, budget
        self.cost, self.is_dry = cost, is_dry
        self.is_local = False
        self._debt: int | None = 0 if budget is None else None
        self._is_refused = False
        self._refunded = 0

    @property
    def waits(self) -> bool:
        """For a round."""
        return self._debt is None

    @property
    def allowed(self) -> bool:
        self._decide()
        return not self._is_refused

    @property
    def limit(self) -> int:
        """Cost that can be saved up; of who has no limit the largest number."""
        return LARGEST if self.budget is None else self.budget.limit

    @property
    def restore_rate(self) -> int:
        """Cost that is restored in a second."""
        return LARGEST if self.budget is None else self.budget.rate

    @property
    def remaining(self) -> int:
        """What may still be spent at once."""
        if self.budget is None:
            return LARGEST
        return max(0, self.budget.limit * MILLION - self._decide()) // MILLION

    @property
    def reset_after(self) -> float:
        """Seconds until nothing is owed."""
        return 0.0 if self.budget is None else self._decide() / self.budget.rate / MILLION

    @property
    def retry_after(self) -> float:
        """Seconds until this charge would be allowed."""
        debt = self._decide()
        if self.budget is None or not self._is_refused:
            return 0.0
        over = debt - max(0, self.budget.limit - self.cost) * MILLION
        return over / self.budget.rate / MILLION

    def check(self) -> None:
        """Raises BudgetSpent."""
        if not self.allowed:
            raise BudgetSpent(self)

    def _decide(self) -> int:
        """What is owed now that this has been charged."""
        if self._debt is None:
            self.budgets.decide(self)
            assert self._debt is not None
        return self._debt if not self._refunded else max(0, self._debt - self._refunded)

    def answered(self, answer: int) -> None:
        """By one number of the script."""
        debt = -1 - answer if answer < 0 else answer
        self._debt = debt
        if self.is_dry:  # nothing was taken: whether it could have been
            assert self.budget is not None
            self._is_refused = not fits(debt, self.cost * MILLION, self.budget.limit * MILLION)
        else:
            self._is_refused = answer < 0

    def refunded(self, cost: int) -> None:
        self._refunded += cost * MILLION


class Budgets:
    """The buckets of all principals: a part of each round to Redis.

    The process keeps the buckets that it used last as they were when it last heard of them. They
    decide when Redis does not, and tell who has nothing left before anything is asked.
    """

    def __init__(self, settings: Settings) -> None:
        rates = {
            Kind.ANONYMOUS: settings.budget_anonymous,
            Kind.TOKEN: settings.budget_token,
            Kind.OPERATOR: settings.budget_operator,
        }
        self.budgets: dict[Kind, Budget | None] = {
            kind: Budget(kind, rate, settings.budget_seconds) if rate else None
            for kind, rate in rates.items()
        }
        self.prefix = f"{settings.redis_prefix}:budget:"
        self.seconds = settings.budget_seconds
        self.refused = 0  # charges so far
        self.decided_here = 0  # likewise
        self._local: OrderedDict[str, tuple[int, int]] = OrderedDict()  # debt, and when
        self._waiting: dict[Charge, None] = {}
        self._sent: list[tuple[str, Budget, list[Charge]]] = []
        self._settled: dict[tuple[str, Budget], int] = {}
        self._settled_since = 0
        self._is_alone = False

    def charge(self, principal: str, kind: Kind, cost: int, *, dry_run: bool = False) -> Charge:
        """Goes with the next round. `dry_run`: it is told whether the cost fits, and taken nothing.

        What costs more than can be saved up is allowed to who owes nothing, and owes it then.
        """
        if cost < 0:
            raise ValueError(f"a cost of {cost}")
        made = Charge(self, principal, self.budgets[kind], min(cost, LARGEST), dry_run)
        if made.budget is not None:
            self._waiting[made] = None
        return made

    def settle(self, charge: Charge, actual: int) -> None:
        """Gives back what a charge took more than the operation cost in the end; with the next round."""
        more = charge.cost - max(0, actual)
        budget = charge.budget
        if budget is None or charge.is_dry or more <= 0 or not charge.allowed:
            return
        charge.refunded(more)
        self._settle(charge.principal, budget, -more * MILLION, is_shared=not charge.is_local)

    def refund(self, principal: str, kind: Kind, cost: int) -> None:
        """Gives back, with the next round; nobody gets more than the limit."""
        budget = self.budgets[kind]
        if budget is not None and cost > 0:
            self._settle(principal, budget, -min(cost, LARGEST) * MILLION)

    def owe(self, principal: str, kind: Kind, cost: int) -> None:
        """Charges what has been done already, also to who has nothing left; with the next round."""
        budget = self.budgets[kind]
        if budget is not None and cost > 0:
            self._settle(principal, budget, min(cost, LARGEST) * MILLION)

    def exhausted(self, principal: str, kind: Kind) -> Charge | None:
        """A refused charge of 1, where the process knows that nothing is left; nobody is asked."""
        budget = self.budgets[kind]
        found = self._local.get(principal)
        if budget is None or found is None:
            return None
        debt = owed(found, clock(), budget.rate)
        if fits(debt, MILLION, budget.limit * MILLION):
            return None
        made = Charge(self, principal, budget, 1, False)
        made.answered(-1 - debt)
        self.refused += 1
        return made

    def decide(self, charge: Charge) -> None:
        """By the bucket of this process: no round has answered."""
        self._waiting.pop(charge, None)
        if len(self._waiting) > MOST_BUCKETS:
            self._waiting.clear()  # of requests that ended before they asked
        self._alone()
        budget = charge.budget
        assert budget is not None
        now = clock()
        found = self._local.get(charge.principal)
        debt = 0 if found is None else owed(found, now, budget.rate)
        cost = 0 if charge.is_dry else charge.cost * MILLION
        _, answer = take(debt, budget.limit * MILLION, 0, [cost])
        charge.is_local = True
        charge.answered(answer)
        self.decided_here += 1
        self.refused += not charge.allowed
        self._keep(charge.principal, -1 - answer if answer < 0 else answer, now)

    # ---- a part of rounds

    def commands(self, pipeline: Any) -> int:
        """One call of the script for all that waits."""
        if self._settled and clock() - self._settled_since > self.seconds * MILLION:
            self._settled.clear()  # it has run out, or been restored, by itself
        if not self._waiting and not self._settled:
            return 0
        groups: dict[tuple[str, Budget], list[Charge]] = {key: [] for key in self._settled}
        for charge in self._waiting:
            assert charge.budget is not None
            groups.setdefault((charge.principal, charge.budget), []).append(charge)
        keys, arguments = [], []
        for (principal, budget), charges in groups.items():
            keys.append(self.prefix + principal)
            settled = self._settled.get((principal, budget), 0)
            arguments += [budget.rate, budget.limit * MILLION, settled, len(charges)]
            arguments += [0 if each.is_dry else each.cost * MILLION for each in charges]
        self._waiting.clear()
        self._settled.clear()
        self._sent = [(principal, budget, each) for (principal, budget), each in groups.items()]
        pipeline.execute_command("EVAL", SCRIPT, len(keys), *keys, *arguments)
        return 1

    def answered(self, replies: list[Any]) -> None:
        if not self._sent:
            return
        sent, answers = self._sent, replies[0]
        if not isinstance(answers, list) or len(answers) != sum(len(e) + 1 for *_, e in sent):
            log.warning("budgets.unanswered reply=%.200r", answers)
            self.failed()
            return
        self._sent = []
        if self._is_alone:
            self._is_alone = False
            log.info("budgets.shared")
        now, at = clock(), 0
        for principal, budget, charges in sent:
            answer = answers[at]
            for charge in charges:
                at += 1
                answer = answers[at]
                if charge.waits:
                    charge.answered(answer)
                    self.refused += not charge.allowed
            at += 1
            debt = -1 - answer if answer < 0 else answer
            settled = self._settled.get((principal, budget), 0)  # since the round began
            self._keep(principal, max(0, debt + settled), now)

    def failed(self) -> None:
        """What was sent is decided here; whether Redis has heard of it nobody knows."""
        self._alone()
        sent, self._sent = self._sent, []
        for *_, charges in sent:
            for charge in charges:
                if charge.waits:
                    self.decide(charge)

    # ---- buckets of this process

    def _settle(self, principal: str, budget: Budget, more: int, is_shared: bool = True) -> None:
        now = clock()
        found = self._local.get(principal)
        debt = 0 if found is None else owed(found, now, budget.rate)
        self._keep(principal, max(0, debt + more), now)
        if not is_shared or self._is_alone:
            return
        if not self._settled:
            self._settled_since = now
        key = (principal, budget)
        self._settled[key] = self._settled.get(key, 0) + more
        if len(self._settled) > MOST_BUCKETS:
            self._settled.clear()  # no round has come for a long time

    def _keep(self, principal: str, debt: int, now: int) -> None:
        local = self._local
        if debt == 0:
            local.pop(principal, None)
            return
        local[principal] = (debt, now)
        local.move_to_end(principal)
        if len(local) > MOST_BUCKETS:
            local.popitem(last=False)

    def _alone(self) -> None:
        if not self._is_alone:
            self._is_alone = True
            log.warning("budgets.local")
        self._settled.clear()  # settled here; in Redis it runs out by itself


def clock() -> int:
    """Microseconds, of this process."""
    return time.monotonic_ns() // 1000


def owed(bucket: tuple[int, int], now: int, rate: int) -> int:
    debt, since = bucket
    return max(0, debt - max(0, now - since) * rate)


def fits(debt: int, cost: int, limit: int) -> bool:
    return debt == 0 or debt + cost <= limit


def take(debt: int, limit: int, settled: int, costs: Sequence[int]) -> list[int]:
    """What the script answers for a bucket that owes so much now."""
    debt = max(0, debt + settled)
    answers = [debt]
    for cost in costs:
        if fits(debt, cost, limit):
            debt += cost
            answers.append(debt)
        else:
            answers.append(-1 - debt)
    return answers
