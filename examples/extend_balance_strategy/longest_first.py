"""A balance strategy of one's own, used by the planner, the verifier and the trainer.

    meshloom check-strategy examples/extend_balance_strategy/longest_first.py:LongestFirst
    meshloom plan --lengths l.txt --hdp 8 --capacity 8192 \\
        --strategy examples/extend_balance_strategy/longest_first.py:LongestFirst
    meshloom train config.yaml --ranks 4 \\
        --strategy examples/extend_balance_strategy/longest_first.py:LongestFirst
"""

import meshloom as ml


class LongestFirst(ml.BalanceStrategy):
    """Longest sample first, each on the fewest ranks that hold it, and on those that are free first.

    Samples that fit one rank fill bins of at most the capacity (first fit).
    """

    def assign(self, problem: ml.PlanProblem) -> list[ml.Unit]:
        capacity, hdp = problem.capacity_tokens, problem.layout.hdp
        units: list[tuple[int, list[ml.SampleInfo]]] = []  # degree, samples
        room: dict[int, int] = {}  # unit of one rank -> tokens that still fit
        for sample in sorted(problem.samples, key=lambda s: (-s.tokens, s.id)):
            degree = -(-sample.tokens // capacity)
            bin_ = next((i for i, left in room.items() if left >= sample.tokens), None)
            if degree == 1 and bin_ is not None:
                units[bin_][1].append(sample)
                room[bin_] -= sample.tokens
                continue
            if degree == 1:
                room[len(units)] = capacity - sample.tokens
            units.append((degree, [sample]))

        busy_until = [0.0] * hdp
        result = []
        for degree, samples in units:
            ranks = sorted(sorted(range(hdp), key=lambda r: (busy_until[r], r))[:degree])
            work = sum(problem.cost.work(s.tokens) for s in samples)
            end = max(busy_until[r] for r in ranks) + problem.cost.unit_time(
                work, sum(s.tokens for s in samples), degree
            )
            for rank in ranks:
                busy_until[rank] = end
            result.append(ml.Unit(ranks=ranks, samples=[s.id for s in samples],
                                  exchange="ring" if degree > 1 else "local"))
        return result
